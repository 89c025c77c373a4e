// @ts-check
/** Numbers as a file of numpy's. */

/** A .npy file of float32, in C order. @param {Float32Array} values @param {number[]} shape */
export function npy(values, shape) {
  const about = `{'descr': '<f4', 'fortran_order': False, 'shape': (${shape.join(", ")}), }`;
  const length = 64 * Math.ceil((about.length + 11) / 64) - 10; // the head is a multiple of 64 bytes
  const text = new TextEncoder().encode(`${about.padEnd(length - 1)}\n`);
  const bytes = new Uint8Array(10 + length + 4 * values.length);
  bytes.set([0x93, ...new TextEncoder().encode("NUMPY"), 1, 0, length & 255, length >> 8]);
  bytes.set(text, 10);
  const view = new DataView(bytes.buffer, 10 + length);
  values.forEach((value, i) => view.setFloat32(4 * i, value, true));
  return bytes;
}
