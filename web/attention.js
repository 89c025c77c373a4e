// @ts-check
/**
 * The attention of a step, as the player shows it: a map for each word, then start, end and padding.
 *
 * Means are those of probe/analysis: over the heads of each layer, brought to the largest grid, then
 * over the layers.
 *
 * @typedef {{layer: string, heads: number, side: number, tokens: number, values: Float32Array}} Kept (head, pixel, token): the prompt's tokens
 *          from start to end, then all padding as one
 * @typedef {{label: string, kind: "word" | "start" | "end" | "padding", tokens: number[]}} Channel a map, and the tokens that it is the sum of
 */

export const THUMBNAIL = 16; // the side of a map among layers and heads
const RANKED = 6; // heads that are named

/** A layer's attention without what nobody asks for: the padding is summed. @param {import("./diffusion/model.js").LayerMap} map @param {number} end @returns {Kept} */
export function kept({ layer, shape: [heads, pixels, length], values }, end) {
  const tokens = end + 2;
  const some = new Float32Array(heads * pixels * tokens);
  for (let row = 0; row < heads * pixels; row++) {
    for (let token = 0; token < length; token++) some[row * tokens + Math.min(token, end + 1)] += values[row * length + token];
  }
  return { layer, heads, side: Math.sqrt(pixels), tokens, values: some };
}

/** What the player lists of a prompt. @param {{word: string, tokens: number[]}[]} words @param {number} end @returns {Channel[]} */
export function channelsOf(words, end) {
  return [
    ...words.map(({ word, tokens }) => ({ label: word, kind: /** @type {"word"} */ ("word"), tokens })),
    { label: "start", kind: "start", tokens: [0] },
    { label: "end", kind: "end", tokens: [end] },
    { label: "padding", kind: "padding", tokens: [end + 1] },
  ];
}

/** The mean over layers and heads: a map of the largest grid for each token. @param {Kept[]} layers @returns {{side: number, maps: Float32Array[]}} */
export function meanMaps(layers) {
  const side = Math.max(...layers.map((layer) => layer.side));
  const maps = Array.from({ length: layers[0].tokens }, () => new Float32Array(side * side));
  for (const layer of layers) {
    maps.forEach((map, token) => {
      const sum = new Float32Array(layer.side ** 2);
      for (let head = 0; head < layer.heads; head++) for (let i = 0; i < sum.length; i++) sum[i] += layer.values[(head * sum.length + i) * layer.tokens + token];
      resized(sum, [layer.side, layer.side], [side, side]).forEach((value, i) => { map[i] += value / layer.heads / layers.length; });
    });
  }
  return { side, maps };
}

/** The sum of some tokens' maps. @param {Float32Array[]} maps @param {number[]} tokens */
export function sumOf(maps, tokens) {
  const sum = Float32Array.from(maps[tokens[0]]);
  for (const token of tokens.slice(1)) maps[token].forEach((value, i) => { sum[i] += value; });
  return sum;
}

/** A map of another size, interpolated between the centres of its places. @param {Float32Array} map @param {number[]} from (y, x) @param {number[]} to (y, x) */
export function resized(map, from, to) {
  if (from[0] === to[0] && from[1] === to[1]) return map;
  const [rows, columns] = from.map((size, axis) => Array.from({ length: to[axis] }, (_, i) => {
    const at = Math.min(Math.max(((i + 0.5) * size) / to[axis] - 0.5, 0), size - 1);
    const low = Math.floor(at);
    return { low, high: Math.min(low + 1, size - 1), part: at - low };
  }));
  return Float32Array.from({ length: to[0] * to[1] }, (_, i) => {
    const [y, x] = [rows[Math.floor(i / to[1])], columns[i % to[1]]];
    const across = (/** @type {number} */ row) => map[row * from[1] + x.low] * (1 - x.part) + map[row * from[1] + x.high] * x.part;
    return across(y.low) * (1 - y.part) + across(y.high) * y.part;
  });
}

/** A map as a square of THUMBNAIL: the mean over what a place covers, or its places repeated. @param {Float32Array} map @param {number[]} size (y, x) */
export function thumbnail(map, [height, width]) {
  const means = height > THUMBNAIL || width > THUMBNAIL;
  const [rows, columns] = [height, width].map((size) => Array.from({ length: THUMBNAIL }, (_, i) => (means ? covered(i, size) : [[Math.floor((i * size) / THUMBNAIL), 1]])));
  return Float32Array.from({ length: THUMBNAIL ** 2 }, (_, i) => {
    let sum = 0;
    for (const [y, of] of rows[Math.floor(i / THUMBNAIL)]) for (const [x, share] of columns[i % THUMBNAIL]) sum += of * share * map[y * width + x];
    return sum;
  });
}

/** The places that a place of a thumbnail covers, each with its share. @param {number} i @param {number} size @returns {number[][]} */
function covered(i, size) {
  const [low, high] = [(i * size) / THUMBNAIL, ((i + 1) * size) / THUMBNAIL];
  return Array.from({ length: Math.ceil(high) - Math.floor(low) }, (_, k) => Math.floor(low) + k).filter((place) => place < size)
    .map((place) => [place, ((Math.min(high, place + 1) - Math.max(low, place)) * THUMBNAIL) / size]);
}

/**
 * A channel in every layer and head at one step, each as a square of THUMBNAIL, and its shares.
 *
 * @param {Kept[]} layers of one step
 * @param {number[]} tokens
 * @returns {{small: Float32Array, shares: number[][]}} (layer, head, y, x), and (layer, head)
 */
export function everyHead(layers, tokens) {
  const [heads, size] = [Math.max(...layers.map((layer) => layer.heads)), THUMBNAIL ** 2];
  const small = new Float32Array(layers.length * heads * size);
  const shares = layers.map((layer, index) => Array.from({ length: layer.heads }, (_, head) => {
    const pixels = layer.side ** 2;
    const map = new Float32Array(pixels);
    for (let i = 0; i < pixels; i++) for (const token of tokens) map[i] += layer.values[(head * pixels + i) * layer.tokens + token];
    small.set(thumbnail(map, [layer.side, layer.side]), (index * heads + head) * size);
    return map.reduce((sum, value) => sum + value, 0) / pixels;
  }));
  return { small, shares };
}

/** The heads that give a channel most, as (layer, head, share). @param {number[][]} shares means over steps, (layer, head) */
export function ranking(shares) {
  const every = shares.flatMap((heads, layer) => heads.map((share, head) => [layer, head, Number(share.toPrecision(4))]));
  return every.sort((a, b) => b[2] - a[2]).slice(0, RANKED);
}
