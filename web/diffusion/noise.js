// @ts-check
/** Edits of the first noise. */

import { generator } from "./randn.js";

/**
 * @typedef {{seed: number, amount: number}} NoiseEdit
 */

const round = Math.fround;

/** A first noise with that of other seeds mixed in, at the same variance: sqrt(1 - amount^2) own + amount other. @param {Float32Array} own @param {NoiseEdit[]} edits */
export function nudged(own, edits) {
  return edits.reduce((noise, { seed, amount }) => {
    const [keep, share] = [round(Math.sqrt(1 - amount * amount)), round(amount)];
    const other = generator(seed).normal(noise.length);
    return noise.map((value, i) => round(keep * value) + round(share * other[i]));
  }, own);
}
