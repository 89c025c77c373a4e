// @ts-check
/** Two checksums of 32 bits, eight bytes at once (slicing by 8, Kounavis and Berry 2005). */

const AT_ONCE = 8;

/** Tables of a polynomial: what a byte does to the checksum, with 0 to 7 bytes after it. @param {number} polynomial its bits in reverse */
function tables(polynomial) {
  const made = new Uint32Array(AT_ONCE * 256);
  for (let byte = 0; byte < 256; byte++) {
    let crc = byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? polynomial : 0);
    made[byte] = crc;
  }
  for (let i = 256; i < made.length; i++) made[i] = (made[i - 256] >>> 8) ^ made[made[i - 256] & 255];
  return made;
}

/** @param {Uint32Array} t @param {Uint8Array} bytes */
function checksum(t, bytes) {
  const { length } = bytes;
  let [crc, i] = [-1, 0];
  for (; i + AT_ONCE <= length; i += AT_ONCE) {
    const first = crc ^ (bytes[i] | (bytes[i + 1] << 8) | (bytes[i + 2] << 16) | (bytes[i + 3] << 24));
    crc = t[1792 + (first & 255)] ^ t[1536 + ((first >>> 8) & 255)] ^ t[1280 + ((first >>> 16) & 255)] ^ t[1024 + (first >>> 24)]
      ^ t[768 + bytes[i + 4]] ^ t[512 + bytes[i + 5]] ^ t[256 + bytes[i + 6]] ^ t[bytes[i + 7]];
  }
  for (; i < length; i++) crc = t[(crc ^ bytes[i]) & 255] ^ (crc >>> 8);
  return ~crc >>> 0;
}

const [ETHERNET, CASTAGNOLI] = [tables(0xedb88320), tables(0x82f63b78)];

/** The checksum of PNG and zip. @param {Uint8Array} bytes */
export const crc32 = (bytes) => checksum(ETHERNET, bytes);
/** The checksum of zarr's chunks. @param {Uint8Array} bytes */
export const crc32c = (bytes) => checksum(CASTAGNOLI, bytes);
