// @ts-check
/**
 * Zip files: written as what is in them, and read out of somebody else's file in bounded memory.
 *
 * Only what recordings are packed as is read: files as they are, or deflated. The sizes that a zip
 * claims are checked before anything is unpacked, and again meanwhile.
 *
 * @typedef {{size: number, packed: boolean, read: (from?: number, to?: number) => Promise<Uint8Array<ArrayBuffer>>}} Entry
 *          a file: its bytes, or some of them; of one that is packed, all is unpacked for some
 */

import { crc32 } from "../checksums.js";

const [MOST_ENTRIES, MOST_LISTED, DEPTH] = [50_000, 16 * 2 ** 20, 16]; // files; bytes of their list; folders in each other
const [MOST_RATIO, SMALL] = [100, 64 * 2 ** 20]; // bytes for one packed byte, in archives beyond this size
const [END, LISTED, LOCAL] = [0x06054b50, 0x02014b50, 0x04034b50];
const [STORED, DEFLATED] = [0, 8];
const encoder = new TextEncoder();

/** What cannot be opened, in a sentence for the reader. */
export class Unreadable extends Error {}

/** Pack files as they are, below a folder. @param {Map<string, Uint8Array>} files @param {string} folder */
export function zipped(files, folder) {
  /** @type {Uint8Array[]} */
  const bodies = [];
  /** @type {Uint8Array[]} */
  const list = [];
  let offset = 0;
  for (const [path, content] of files) {
    const name = encoder.encode(folder + path);
    const sizes = [crc32(content), content.length, content.length].flatMap(littleEndian);
    const shared = [20, 0, 0, 8, 0, 0, 0, 0, 0x21, 0, ...sizes, name.length & 255, name.length >> 8, 0, 0]; // UTF-8; 1980-01-01
    const head = Uint8Array.of(0x50, 0x4b, 3, 4, ...shared);
    list.push(Uint8Array.of(0x50, 0x4b, 1, 2, 20, 0, ...shared, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ...littleEndian(offset)), name);
    bodies.push(head, name, content);
    offset += head.length + name.length + content.length;
  }
  const size = list.reduce((sum, { length }) => sum + length, 0);
  const count = [files.size & 255, files.size >> 8];
  return joined([...bodies, ...list, Uint8Array.of(0x50, 0x4b, 5, 6, 0, 0, 0, 0, ...count, ...count, ...littleEndian(size), ...littleEndian(offset), 0, 0)]);
}

/** The files in a zip, by name. Throws Unreadable. @param {Blob} blob @returns {Promise<Map<string, Entry>>} */
export async function unzipped(blob) {
  const tail = await view(blob, blob.size - 22 - 0xffff, blob.size);
  let at = tail.byteLength - 22;
  while (at >= 0 && tail.getUint32(at, true) !== END) at--;
  if (at < 0) throw new Unreadable("This is no zip file: a recording is packed as NAME.zarr.zip.");
  const [count, size, offset] = [tail.getUint16(at + 10, true), tail.getUint32(at + 12, true), tail.getUint32(at + 16, true)];
  if (count > MOST_ENTRIES || size > MOST_LISTED) throw new Unreadable("This zip file lists more files than a recording has.");
  if (offset + size > blob.size) throw new Unreadable("This zip file is not whole. Take it from a copy.");
  return listed(blob, await view(blob, offset, offset + size), count);
}

/** @param {Blob} blob @param {DataView} list @param {number} count */
function listed(blob, list, count) {
  /** @type {Map<string, Entry>} */
  const entries = new Map();
  const decoder = new TextDecoder("utf-8", { fatal: false });
  let [at, total, packed] = [0, 0, 0];
  for (let i = 0; i < count; i++) {
    if (at + 46 > list.byteLength || list.getUint32(at, true) !== LISTED) throw new Unreadable("The list of files in this zip is damaged. Take it from a copy.");
    const [flags, method, crc] = [list.getUint16(at + 8, true), list.getUint16(at + 10, true), list.getUint32(at + 16, true)];
    const [small, large, start] = [list.getUint32(at + 20, true), list.getUint32(at + 24, true), list.getUint32(at + 42, true)];
    const [letters, extra, note] = [28, 30, 32].map((place) => list.getUint16(at + place, true));
    if (at + 46 + letters > list.byteLength) throw new Unreadable("The list of files in this zip is damaged. Take it from a copy.");
    const name = decoder.decode(new Uint8Array(list.buffer, list.byteOffset + at + 46, letters));
    at += 46 + letters + extra + note;
    if (name.endsWith("/")) continue;
    const parts = name.split("/");
    const strange = parts.length > DEPTH || parts.some((part) => ["", ".", ".."].includes(part)) || /[\p{C}\\:]/u.test(name);
    if (strange) throw new Unreadable("This zip has a file under a name that no recording has.");
    if (entries.has(name)) throw new Unreadable("This zip has two files of one name.");
    if (flags & 1) throw new Unreadable("This zip has a password. Unpack it yourself, and open the folder.");
    const unusual = ![STORED, DEFLATED].includes(method) || [small, large, start].includes(0xffffffff) || (method === STORED && small !== large);
    if (unusual) throw new Unreadable("This zip is packed in a way that is not read here. Unpack it yourself, and open the folder.");
    [total, packed] = [total + large, packed + small];
    entries.set(name, { size: large, packed: method === DEFLATED, read: (from = 0, to = large) => content(blob, { method, crc, small, large, start }, from, to) });
  }
  if (packed > blob.size) throw new Unreadable("Files in this zip overlap each other. It is not opened.");
  if (total > Math.max(SMALL, MOST_RATIO * packed)) throw new Unreadable(`This zip would grow from ${packed} to ${total} bytes. It is not opened.`);
  return entries;
}

/**
 * Bytes of a file in a zip.
 *
 * @param {Blob} blob @param {{method: number, crc: number, small: number, large: number, start: number}} entry
 * @param {number} from @param {number} to
 */
async function content(blob, { method, crc, small, large, start }, from, to) {
  const head = await view(blob, start, start + 30);
  if (head.byteLength < 30 || head.getUint32(0, true) !== LOCAL) throw new Unreadable("A file in this zip is not where its list says.");
  const begin = start + 30 + head.getUint16(26, true) + head.getUint16(28, true);
  if (begin + small > blob.size) throw new Unreadable("This zip file is not whole. Take it from a copy.");
  const body = blob.slice(begin, begin + small);
  if (method === STORED && (from > 0 || to < large)) return new Uint8Array(await body.slice(from, to).arrayBuffer());
  const whole = method === STORED ? new Uint8Array(await body.arrayBuffer()) : await inflated(body, large);
  if (crc32(whole) !== crc) throw new Unreadable("A file in this zip is damaged: its checksum is another. Take it from a copy.");
  return whole.subarray(from, to);
}

/** What a deflated file holds: never more than it claims. @param {Blob} body @param {number} size */
async function inflated(body, size) {
  const whole = new Uint8Array(size);
  const reader = body.stream().pipeThrough(new DecompressionStream("deflate-raw")).getReader();
  let at = 0;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      if (at + value.length > size) throw new Unreadable("A file in this zip is longer than it says.");
      whole.set(value, at);
      at += value.length;
    }
  } catch (error) {
    void reader.cancel().catch(() => {});
    throw error instanceof Unreadable ? error : new Unreadable("A file in this zip is damaged. Take it from a copy.");
  }
  if (at !== size) throw new Unreadable("A file in this zip is shorter than it says.");
  return whole;
}

/** @param {Blob} blob @param {number} from @param {number} to */
const view = async (blob, from, to) => new DataView(await blob.slice(Math.max(0, from), to).arrayBuffer());
/** @param {number} value */
export const littleEndian = (value) => [0, 8, 16, 24].map((shift) => (value >>> shift) & 255);

/** @param {Uint8Array[]} parts */
export function joined(parts) {
  const whole = new Uint8Array(parts.reduce((sum, { length }) => sum + length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}
