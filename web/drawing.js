// @ts-check
/**
 * What the page's worker does: it draws, decodes and stops, and says what comes of it.
 *
 * It is asked by messages:
 *
 *     {kind: "draw", run, prompt, negativePrompt, decodeEvery, edits, ...experiment}   see `Experiment` of sampling.js
 *     {kind: "decode", run, index, latents}                                     a picture of any latents
 *     {kind: "stop"}                                                            after the step that is computed now
 *
 * `run` and `index` are the page's own names, and come back. It answers:
 *
 *     {kind: "begun", run, words, end, timesteps, sigmas}   words of the prompt, each with its tokens
 *     {kind: "step", run, index, timestep, sigma, alphaBar, latents, input, uncond, cond, prediction, denoised, maps, picture, seconds}
 *     {kind: "picture", run, index, picture}        of "decode"
 *     {kind: "done", run, latents, picture, seconds}
 *     {kind: "stopped", run}
 *     {kind: "error", run, message, words}          words that the model never saw; none for other mistakes
 *
 * `edits` are those of experiment.js. A picture is {width, height, data}, RGBA. `maps` are of the prompt alone: of each layer
 * {layer, shape, values}, (head, pixel, token). A step's `picture` is that of its `denoised`, and
 * null where it was not decoded.
 *
 * @typedef {import("./diffusion/model.js").Model} Model
 * @typedef {import("./diffusion/tokens.js").Prompt} Prompt
 * @typedef {import("./diffusion/schedulers.js").Config} Config
 * @typedef {(message: Record<string, any>, transfer?: ArrayBuffer[]) => void} Post
 */

import { isGuided } from "./diffusion/guidance.js";
import { condition, denoise, schedule } from "./diffusion/sampling.js";
import { PromptError } from "./diffusion/tokens.js";
import { valueScale } from "./experiment.js";

/** Make the function that answers a message. @param {Model} model @param {(text: string) => Prompt} read @param {Config} config @param {Post} post */
export function drawing(model, read, config, post) {
  let current = 0; // a run goes on as long as it is the last that was asked for

  /** @param {any} message */
  async function draw({ run, prompt, negativePrompt = "", decodeEvery = 3, edits = [], ...experiment }) {
    const mine = ++current;
    const began = performance.now();
    const seconds = () => (performance.now() - began) / 1000;
    const asked = read(prompt);
    const conditioning = await condition(model, asked, read(negativePrompt), experiment.guidanceScale);
    const rows = isGuided(experiment.guidanceScale) ? 2 : 1;
    const scale = valueScale(edits, { layers: model.layers, shape: model.shapes.value_scale, words: asked.words, rows });
    post({ kind: "begun", run, words: asked.words, end: asked.end, ...schedule(config, experiment) });
    let latents;
    for await (const step of denoise(model, config, conditioning, { ...experiment, valueScale: scale })) {
      const { maps, nextLatents, ...rest } = step;
      const shown = decodeEvery > 0 && (step.index + 1) % decodeEvery === 0;
      const picture = shown ? await model.decode(step.denoised) : null;
      const own = maps.map(lastRow);
      post({ kind: "step", run, ...rest, maps: own, picture, seconds: seconds() }, own.map(({ values }) => /** @type {ArrayBuffer} */ (values.buffer)));
      latents = nextLatents;
      await pause();
      if (mine !== current) return post({ kind: "stopped", run });
    }
    post({ kind: "done", run, latents, picture: await model.decode(/** @type {Float32Array} */ (latents)), seconds: seconds() });
  }

  /** @param {any} message */
  async function decode({ run, index, latents }) {
    post({ kind: "picture", run, index, picture: await model.decode(latents) });
  }

  return async (/** @type {any} */ message) => {
    try {
      if (message.kind === "draw") await draw(message);
      else if (message.kind === "decode") await decode(message);
      else if (message.kind === "stop") current += 1;
      else throw new RangeError(`${message.kind} is no message. Send draw, decode or stop.`);
    } catch (error) {
      post({ kind: "error", run: message.run, message: String(/** @type {any} */ (error)?.message ?? error), words: error instanceof PromptError ? error.words : [] });
    }
  };
}

/** Let messages in: between two steps nothing else would. */
const pause = () => new Promise((resolve) => setTimeout(resolve));

/** The prompt's part of a layer's attention, with numbers of its own. @param {import("./diffusion/model.js").LayerMap} map */
function lastRow({ layer, shape, values }) {
  return { layer, shape: shape.slice(1), values: values.slice(values.length - values.length / shape[0]) };
}
