// @ts-check
/** Edits of the first noise. */

import { generator } from "./randn.js";

/**
 * @typedef {{seed: number, amount: number, where?: string}} NoiseEdit `where` has a bit for each place, row by row, as hexadecimal digits;
 *          without it, everywhere
 */

const round = Math.fround;

/** A first noise, (channel, place), with that of other seeds mixed in, at the same variance: sqrt(1 - amount^2) own + amount other. @param {Float32Array} own @param {NoiseEdit[]} edits */
export function nudged(own, edits) {
  return edits.reduce((noise, { seed, amount, where }) => {
    const places = where && chosen(where);
    const [keep, share] = [round(Math.sqrt(1 - amount * amount)), round(amount)];
    const other = generator(seed).normal(noise.length);
    return noise.map((value, i) => (places && !places[i % places.length] ? value : round(keep * value) + round(share * other[i])));
  }, own);
}

/** Which places the digits say. @param {string} where */
export const chosen = (where) => [...where].flatMap((digit) => [8, 4, 2, 1].map((bit) => (parseInt(digit, 16) & bit) !== 0));

/** The digits of places, or none for all or none of them. @param {boolean[]} places */
export function digits(places) {
  if (places.every((one) => one === places[0])) return undefined;
  return Array.from({ length: places.length / 4 }, (_, i) => places.slice(4 * i, 4 * i + 4).reduce((sum, one) => 2 * sum + Number(one), 0).toString(16)).join("");
}
