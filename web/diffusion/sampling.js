// @ts-check
/**
 * The loop: a generator that yields a step after every call of the model and the scheduler. The
 * result is the last step's `nextLatents`.
 *
 * @typedef {import("./model.js").Model} Model
 * @typedef {import("./model.js").LayerMap} LayerMap
 * @typedef {import("./schedulers.js").Config} Config
 * @typedef {{cond: Float32Array, uncond: Float32Array | null}} Conditioning what the UNet is told of each branch
 * @typedef {{scheduler: string, steps: number, seed: number | bigint, guidanceScale: number, guidanceRescale?: number,
 *            picture?: Uint8ClampedArray, strength?: number, noises?: import("./noise.js").NoiseEdit[], valueScale?: (index: number) => Float32Array | undefined}} Experiment
 *          With a `picture`, RGBA, only the share `strength` of the steps is run. `noises` are edits of the first noise. `valueScale` is that of `Model.predict`, by step.
 * @typedef {{index: number, timestep: number, sigma: number, alphaBar: number, latents: Float32Array, input: Float32Array,
 *            uncond: Float32Array | null, cond: Float32Array, prediction: Float32Array, denoised: Float32Array,
 *            nextLatents: Float32Array, maps: LayerMap[]}} Step
 *          `input` is what the model saw; maps have a row for each branch: uncond, if there is one, then cond
 */

import { guide, isGuided } from "./guidance.js";
import { nudged } from "./noise.js";
import { generator } from "./randn.js";
import { denoised, makeScheduler } from "./schedulers.js";

/**
 * What the UNet is told of a prompt and, where guidance asks for it, of the negative prompt.
 *
 * @param {Model} model
 * @param {{ids: number[]}} prompt
 * @param {{ids: number[]}} negativePrompt
 * @param {number} guidanceScale
 * @returns {Promise<Conditioning>}
 */
export async function condition(model, prompt, negativePrompt, guidanceScale) {
  if (!isGuided(guidanceScale)) return { uncond: null, cond: (await model.encodeText([prompt.ids]))[0] };
  const [uncond, cond] = await model.encodeText([negativePrompt.ids, prompt.ids]);
  return { uncond, cond };
}

/** Draw a picture's latents. @param {Model} model @param {Config} config @param {Conditioning} conditioning @param {Experiment} experiment @returns {AsyncGenerator<Step>} */
export async function* denoise(model, config, conditioning, experiment) {
  const scheduler = makeScheduler(experiment.scheduler, config, experiment.steps);
  const numbers = generator(experiment.seed);
  const draw = () => numbers.normal(model.latentSize);
  const first = firstCall(experiment);
  let latents = await begin(model, scheduler, draw, experiment, first);
  const texts = conditioning.uncond ? [conditioning.uncond, conditioning.cond] : [conditioning.cond];
  for (let index = first; index < scheduler.timesteps.length; index++) {
    const [timestep, alphaBar] = [scheduler.timesteps[index], scheduler.alphaBars[index]];
    const input = scheduler.input(latents, index);
    const { eps, maps } = await model.predict(input, timestep, texts, experiment.valueScale?.(index - first));
    const [cond, uncond = null] = [...eps].reverse();
    const prediction = guide(uncond, cond, experiment.guidanceScale, experiment.guidanceRescale);
    const nextLatents = scheduler.step(latents, prediction, index, draw);
    yield { index: index - first, timestep, sigma: scheduler.sigmas[index], alphaBar, latents, input, uncond, cond, prediction, denoised: denoised(input, prediction, alphaBar), nextLatents, maps };
    latents = nextLatents;
  }
}

/** The noise levels of a run's calls, before it begins. @param {Config} config @param {Experiment} experiment */
export function schedule(config, experiment) {
  const [{ timesteps, sigmas }, first] = [makeScheduler(experiment.scheduler, config, experiment.steps), firstCall(experiment)];
  return { timesteps: timesteps.slice(first), sigmas: sigmas.slice(first) };
}

/** The first call of a run that does only a share of its steps. @param {Experiment} experiment */
function firstCall({ picture, strength = 1, steps }) {
  if (!picture) return 0;
  const run = Math.min(Math.floor(steps * strength), steps);
  if (!(run >= 1)) throw new RangeError(`A strength of ${strength} is not one whole step of ${steps}. Use more steps, or a greater strength.`);
  return steps - run;
}

/**
 * The latents that a run begins from: noise, or a picture's with noise in them.
 *
 * @param {Model} model
 * @param {import("./schedulers.js").Scheduler} scheduler
 * @param {() => Float32Array} draw
 * @param {Experiment} experiment
 * @param {number} first
 */
async function begin(model, scheduler, draw, { picture, noises = [] }, first) {
  if (!picture) return nudged(draw(), noises).map((value) => value * scheduler.initSigma);
  if (noises.length) throw new RangeError("A run that begins from a picture has no first noise of its own to edit. Begin from noise.");
  const { mean, deviation } = await model.encode(picture);
  const sample = draw(); // of the encoder's posterior, before the noise
  const clean = mean.map((value, i) => value + Math.fround(deviation[i] * sample[i]));
  return scheduler.begin(clean, draw(), first);
}
