// @ts-check
/**
 * The UNet on the graphics card, by WebGPU: used where its first step is that of wasm, and faster.
 *
 * @typedef {import("./diffusion/model.js").Model} Model
 * @typedef {{used: boolean, agrees: boolean, difference: number, seconds: {wasm: number, webgpu: number}}} Trial
 *          `difference` is the greatest between predictions and between maps; `seconds` are of a call, guided
 */

import { generator } from "./diffusion/randn.js";

export const TOLERANCE = 1e-3;
const [SEED, TIMESTEP] = [5, 999];
const [ROUNDS, LONGEST] = [5, 1]; // calls that are timed, for a second at most

/**
 * Compute one first step with both, and let the one on the graphics card predict for the other if it should.
 *
 * @param {Model} model @param {Model} gpu @param {Float32Array[]} texts of both rows
 * @returns {Promise<Trial>}
 */
export async function trial(model, gpu, texts) {
  model.delegate(null);
  const latents = generator(SEED).normal(model.latentSize);
  const timed = async (/** @type {Model} */ one) => {
    const step = await one.predict(latents, TIMESTEP, texts); // the first compiles its shaders
    const began = performance.now();
    const seconds = () => (performance.now() - began) / 1000;
    let rounds = 0;
    for (; rounds < ROUNDS && (!rounds || seconds() < LONGEST); rounds++) await one.predict(latents, TIMESTEP, texts);
    return { values: [...step.eps, ...step.maps.map(({ values }) => values)], seconds: seconds() / rounds };
  };
  const [slow, fast] = [await timed(model), await timed(gpu)];
  const difference = slow.values.reduce((most, values, i) => Math.max(most, apart(values, fast.values[i])), 0);
  const agrees = difference <= TOLERANCE;
  const used = agrees && fast.seconds < slow.seconds;
  if (used) model.delegate(gpu);
  return { used, agrees, difference, seconds: { wasm: slow.seconds, webgpu: fast.seconds } };
}

/** The greatest difference; NaN if one is not a number. @param {Float32Array} one @param {Float32Array} two */
function apart(one, two) {
  if (one.length !== two.length) return NaN;
  return one.reduce((most, value, i) => Math.max(most, Math.abs(value - two[i])), 0);
}
