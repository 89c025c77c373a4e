// @ts-check
/**
 * The forward process: known noise is mixed into clean latents at a timestep, and the model is asked
 * for it. Nothing is drawn. The definitions are those of a noising in Python, without guidance.
 *
 * @typedef {import("./model.js").Model} Model
 * @typedef {import("./schedulers.js").Config} Config
 * @typedef {{timestep: number, alphaBar: number, noise: Float32Array, noisy: Float32Array, prediction: Float32Array,
 *            denoised: Float32Array, loss: number}} Noised
 *          `noisy` is sqrt(alphaBar) clean + sqrt(1 - alphaBar) noise, `prediction` the noise that the model sees in it, `denoised`
 *          the clean latents if that were right, `loss` the mean square of prediction less noise
 */

import { generator } from "./randn.js";
import { alphaBars, denoised, mixed } from "./schedulers.js";

/**
 * Noise clean latents, and ask the model for the noise.
 *
 * @param {Model} model
 * @param {Config} config
 * @param {Float32Array} text what the UNet is told
 * @param {{latents: Float32Array, timestep: number, seed: number | bigint}} of clean latents, the timestep of training, the seed of the noise
 * @returns {Promise<Noised>}
 */
export async function noised(model, config, text, { latents, timestep, seed }) {
  const bars = alphaBars(config);
  if (!(timestep in bars)) throw new RangeError(`${timestep} is no timestep. Take a whole number from 0 to ${bars.length - 1}.`);
  if (latents?.length !== model.latentSize) throw new RangeError(`The latents have ${latents?.length ?? "no"} numbers. Give ${model.latentSize}.`);
  const [alphaBar, noise] = [bars[timestep], generator(seed).normal(model.latentSize)];
  const noisy = mixed(latents, noise, alphaBar);
  const { eps: [prediction] } = await model.predict(noisy, timestep, [text]);
  return { timestep, alphaBar, noise, noisy, prediction, denoised: denoised(noisy, prediction, alphaBar), loss: loss(prediction, noise) };
}

/** The mean square of the difference. @param {Float32Array} prediction @param {Float32Array} noise */
export const loss = (prediction, noise) => prediction.reduce((sum, value, i) => sum + (value - noise[i]) ** 2, 0) / noise.length;
