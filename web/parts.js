// @ts-check
/**
 * What the player draws of a run, as this page makes it: texts of the header, numbers, and sheets of
 * pictures. As probe/figures/bundle.py and channels.py have them.
 *
 * @typedef {{width: number, height: number, data: Uint8ClampedArray}} Picture RGBA
 * @typedef {{data: Uint8Array, high: number[], shape: number[], scales: number[], kind: "numbers"}} Numbers
 * @typedef {{width: number, height: number, getContext: (kind: "2d") => any}} Canvas
 * @typedef {{kind: "sheet", shape: number[], columns: number, bitmap: Canvas}} Sheet
 * @typedef {(width: number, height: number) => any} MakeCanvas
 */

export const HEAT = [[0, 0, 4], [60, 9, 101], [140, 41, 99], [212, 72, 66], [250, 142, 9], [252, 255, 164]];
export const PANELS = [
  { part: "latents", title: "Noisy latents going in", note: "4 numbers a square, shown as colour" },
  { part: "denoised", title: "Its guess of the clean picture", note: "at this step, after guidance" },
  { part: "maps", title: "Places that attend", note: "" },
  { part: "final", title: "Finished picture", note: "after the last step" },
];
export const COLUMNS = 10; // pictures in a row of a sheet
export const CURVES = {
  guidance: { title: "What the prompt changes in the prediction", note: "root mean square of prediction with the prompt less prediction without it" },
  prediction: { title: "Size of the prediction", note: "root mean square of what the scheduler gets" },
};
export const ATTENTION = {
  unit: "% of a place's attention", note: "mean over layers and heads", of: "attention", branch: "cond", per: "words",
  about: "Where it looked: of each place's attention, the share that this word got.",
};

/** The Python that gives a channel's map, of all layers or of one layer and head. @param {{layer?: boolean, branch?: string, axis?: string}} [of] */
export function snippets({ layer = false, branch = "cond", axis = "image" } = {}) {
  const given = [...(branch === "cond" ? [] : [`branch='${branch}'`]), ...(layer ? ["layers='{layer}'", "over=()"] : [])].join(", ");
  const end = `.isel(${axis}=0)${layer ? ".isel(layer=0, head={head})" : ""}{mean}`;
  return {
    word: `run.word_maps(${given}).sel(step={step}).isel(word={word})${end}`,
    kind: `probe.analysis.by_kind(run.token_maps(${given})).sel(step={step}, kind='{kind}')${end}`,
  };
}

/** Numbers from 0 up as bytes, (..., y, x, step); each index along the first axes has a scale of its own. @param {number[]} shape @param {number} apart @returns {Numbers} */
export function numbers(shape, apart) {
  const blocks = shape.slice(0, apart).reduce((a, b) => a * b, 1);
  return { kind: "numbers", shape, scales: shape.map((size, axis) => (axis < apart ? size : 1)), high: Array(blocks).fill(0), data: new Uint8Array(shape.reduce((a, b) => a * b, 1)) };
}

/** Write the maps of the steps that there are. @param {Numbers} part @param {Float32Array[][]} steps of each, a map for each block */
export function write(part, steps) {
  const count = part.shape[part.shape.length - 1];
  part.high.forEach((_, block) => {
    let high = 0;
    for (const maps of steps) for (const value of maps[block]) if (value > high && value < Infinity) high = value;
    part.high[block] = high;
    const gain = high > 1e-30 ? 255 / high : 0;
    steps.forEach((maps, step) => maps[block].forEach((value, i) => { part.data[(block * maps[block].length + i) * count + step] = value * gain + 0.5; }));
  });
}

/** An empty sheet of pictures. @param {MakeCanvas} canvas @param {number} count @param {number} height @param {number} width @returns {Sheet} */
export function sheet(canvas, count, height, width) {
  const columns = Math.min(COLUMNS, count);
  return { kind: "sheet", shape: [count, height, width, 3], columns, bitmap: canvas(columns * width, Math.ceil(count / columns) * height) };
}

/** Put a picture, RGBA, on a sheet. @param {Sheet} sheet @param {number} index @param {Uint8ClampedArray} data */
export function place({ shape: [, height, width], columns, bitmap }, index, data) {
  const pen = bitmap.getContext("2d");
  const image = pen.createImageData(width, height);
  image.data.set(data);
  pen.putImageData(image, (index % columns) * width, Math.floor(index / columns) * height);
}

/** @param {ArrayLike<number>} values */
export function mean(values) {
  let sum = 0;
  for (let i = 0; i < values.length; i++) sum += values[i];
  return sum / values.length;
}
