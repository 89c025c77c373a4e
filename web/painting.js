// @ts-check
/** Pictures on canvases, and out of them. */

/** A picture of the canvas's size. @param {HTMLCanvasElement} canvas @param {{width: number, height: number, data: Uint8ClampedArray}} picture */
export function paint(canvas, { width, height, data }) {
  canvas.getContext("2d")?.putImageData(new ImageData(Uint8ClampedArray.from(data), width, height), 0, 0);
}

/** A square picture over a whole canvas. @param {HTMLCanvasElement} canvas @param {Uint8ClampedArray} data RGBA */
export function paintSmall(canvas, data) {
  const side = Math.sqrt(data.length / 4);
  const small = new OffscreenCanvas(side, side);
  small.getContext("2d")?.putImageData(new ImageData(Uint8ClampedArray.from(data), side, side), 0, 0);
  const pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, 0, 0, canvas.width, canvas.height);
}

/** A square picture as the bytes of a PNG. @param {Uint8ClampedArray} data RGBA, opaque @returns {Promise<Uint8Array<ArrayBuffer>>} */
export async function pngOf(data) {
  const side = Math.sqrt(data.length / 4);
  const canvas = new OffscreenCanvas(side, side);
  canvas.getContext("2d")?.putImageData(new ImageData(Uint8ClampedArray.from(data), side, side), 0, 0);
  return new Uint8Array(await (await canvas.convertToBlob({ type: "image/png" })).arrayBuffer());
}
