// @ts-check
/** Text inside a PNG: a chunk iTXt, UTF-8, before the end. */

import { crc32 } from "./checksums.js";

const END = 12; // bytes of the last chunk, IEND

/** A PNG with a text in it. @param {Uint8Array} png @param {string} keyword in Latin letters @param {string} text */
export function withText(png, keyword, text) {
  const content = new TextEncoder().encode(`iTXt${keyword}\0\0\0\0\0${text}`); // not packed; no language, no translation
  const chunk = new Uint8Array(content.length + 8);
  const view = new DataView(chunk.buffer);
  view.setUint32(0, content.length - 4);
  chunk.set(content, 4);
  view.setUint32(chunk.length - 4, crc32(content));
  const whole = new Uint8Array(png.length + chunk.length);
  whole.set(png.subarray(0, png.length - END));
  whole.set(chunk, png.length - END);
  whole.set(png.subarray(png.length - END), whole.length - END);
  return whole;
}
