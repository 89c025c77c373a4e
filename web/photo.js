// @ts-check
/**
 * A picture from outside, PNG, JPEG or WebP: its size is read before it is decoded, its middle becomes
 * a square of the model's size.
 */

const [MOST_BYTES, MOST_PIXELS, LEAST] = [2 ** 26, 2 ** 26, 8]; // pixels in all, and a side: as in Python
const SIDE = 128;

/** Width and height that the head of a picture says; throws for what is no PNG, JPEG or WebP. @param {Uint8Array} bytes */
export function sizeOf(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const text = (/** @type {number} */ from, /** @type {number} */ to) => String.fromCharCode(...bytes.subarray(from, to));
  try {
    if (text(0, 8) === "\x89PNG\r\n\x1a\n") return [view.getUint32(16), view.getUint32(20)];
    if (text(0, 3) === "\xff\xd8\xff") return sizeOfJpeg(view);
    if (text(0, 4) === "RIFF" && text(8, 12) === "WEBP") return sizeOfWebp(view, text(12, 16));
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // read beyond its end
  }
  throw new Error("This is no PNG, JPEG or WebP picture. Save it as one of them.");
}

/** The size is in the frame's header; what comes before is left out. @param {DataView} view */
function sizeOfJpeg(view) {
  for (let at = 2; ; at += 2 + view.getUint16(at + 2)) {
    while (view.getUint8(at + 1) === 0xff) at++;
    const marker = view.getUint8(at + 1);
    if (view.getUint8(at) !== 0xff) throw new RangeError("no marker");
    if (marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker)) return [view.getUint16(at + 7), view.getUint16(at + 5)];
  }
}

/** @param {DataView} view @param {string} kind */
function sizeOfWebp(view, kind) {
  if (kind === "VP8X") return [24, 27].map((at) => 1 + view.getUint16(at, true) + (view.getUint8(at + 2) << 16));
  if (kind === "VP8L") return [0, 14].map((bit) => 1 + ((view.getUint32(21, true) >>> bit) & 0x3fff));
  if (kind === "VP8 ") return [26, 28].map((at) => view.getUint16(at, true) & 0x3fff);
  throw new RangeError("no picture");
}

/** The middle of a picture as 128 x 128 pixels, RGBA, over white. @param {Blob} file @returns {Promise<{data: Uint8ClampedArray, note: string}>} */
export async function photo(file) {
  if (file.size > MOST_BYTES) throw new Error(`This file has ${(file.size / 2 ** 20).toFixed(0)} MB. At most ${MOST_BYTES / 2 ** 20} can be used: save a smaller picture.`);
  const [width, height] = sizeOf(new Uint8Array(await file.arrayBuffer()));
  if (width * height > MOST_PIXELS || Math.min(width, height) < LEAST) throw new Error(`This picture has ${width} x ${height} pixels. At least ${LEAST} a side and at most ${(MOST_PIXELS / 1e6).toFixed(0)} million in all can be used.`);
  const whole = await createImageBitmap(file).catch(() => { throw new Error("This picture cannot be read: the file is damaged, or cut short."); });
  const side = Math.min(whole.width, whole.height);
  const [left, top] = [Math.floor((whole.width - side) / 2), Math.floor((whole.height - side) / 2)];
  const square = await createImageBitmap(whole, left, top, side, side, { resizeWidth: SIDE, resizeHeight: SIDE, resizeQuality: "high" });
  const pen = /** @type {OffscreenCanvasRenderingContext2D} */ (new OffscreenCanvas(SIDE, SIDE).getContext("2d"));
  pen.fillStyle = "white";
  pen.fillRect(0, 0, SIDE, SIDE);
  pen.drawImage(square, 0, 0);
  const cut = whole.width === whole.height ? "It" : `Its middle, ${side} x ${side} of ${whole.width} x ${whole.height} pixels,`;
  const note = side === SIDE && whole.width === whole.height ? "It has the model’s size, 128 x 128 pixels." : `${cut} is scaled to the model’s size, 128 x 128.`;
  for (const bitmap of [whole, square]) bitmap.close();
  return { data: pen.getImageData(0, 0, SIDE, SIDE).data, note };
}
