// @ts-check
/**
 * What the page's worker does: it draws, decodes and stops, answers questions, and says what comes of it.
 *
 * It is asked by messages:
 *
 *     {kind: "draw", run, prompt, negativePrompt, decodeEvery, edits, ...experiment}   see `Experiment` of sampling.js
 *     {kind: "decode", run, index, latents}                                     a picture of any latents
 *     {kind: "stop"}                                                            after the step that is computed now
 *
 * `run` and `index` are the page's own names, and come back. It answers:
 *
 *     {kind: "begun", run, words, end, device, timesteps, sigmas}   words of the prompt, each with its tokens; `device`, wasm or webgpu, computes the UNet
 *     {kind: "step", run, index, timestep, sigma, alphaBar, latents, input, uncond, cond, prediction, denoised, maps, picture, seconds}
 *     {kind: "picture", run, index, picture}        of "decode"
 *     {kind: "done", run, latents, picture, seconds}
 *     {kind: "stopped", run}
 *     {kind: "error", run, id, message, words}      words that the model never saw; none for other mistakes
 *
 * Questions have an `id`, which comes back, with an error as well:
 *
 *     {kind: "read", id, prompt}                    what the UNet is told of a prompt
 *     {kind: "encode", id, picture}                 the latents of a picture, RGBA of 128 x 128
 *     {kind: "noise", id, latents, timestep, seed, prompt, decode}              the forward process: see `Noised` of noising.js
 *
 *     {kind: "text", id, tokens, ids, words, end, cond}     the texts of all 77 tokens; `cond` is (token, feature), (77, 128)
 *     {kind: "encoded", id, latents}                the mean of the encoder's posterior, as the UNet knows latents
 *     {kind: "noised", id, timestep, alphaBar, noise, noisy, prediction, denoised, loss, picture}
 *
 * They are answered one at a time, in their order, while nothing is drawn: a draw or a stop waits for one of them at most. The
 * `latents` of "noise" are clean, (channel, y, x); its `picture` is that of `denoised`, null unless `decode`.
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
import { noised } from "./diffusion/noising.js";
import { condition, denoise, schedule } from "./diffusion/sampling.js";
import { PromptError } from "./diffusion/tokens.js";
import { valueScale } from "./experiment.js";

/** Make the function that answers a message. @param {Model} model @param {(text: string) => Prompt} read @param {Config} config @param {Post} post @param {Record<string, (message: any) => Promise<Record<string, any>>>} [more] questions */
export function drawing(model, read, config, post, more = {}) {
  let current = 0; // a run goes on as long as it is the last that was asked for
  /** @type {Set<Promise<void>>} */
  const drawn = new Set(); // that is not yet ended
  let answered = Promise.resolve();

  /** @param {any} message */
  async function draw({ run, prompt, negativePrompt = "", decodeEvery = 3, edits = [], ...experiment }) {
    const mine = ++current;
    const began = performance.now();
    const seconds = () => (performance.now() - began) / 1000;
    const asked = read(prompt);
    const conditioning = await condition(model, asked, read(negativePrompt), experiment.guidanceScale);
    const rows = isGuided(experiment.guidanceScale) ? 2 : 1;
    const noises = edits.filter((/** @type {import("./experiment.js").Edit} */ { kind }) => kind === "noise");
    const scale = valueScale(edits, { layers: model.layers, shape: model.shapes.value_scale, words: asked.words, rows });
    const levels = schedule(config, experiment);
    post({ kind: "begun", run, words: asked.words, end: asked.end, device: model.other ? "webgpu" : "wasm", ...levels });
    let latents;
    for await (const step of denoise(model, config, conditioning, { ...experiment, noises, valueScale: scale })) {
      const { maps, nextLatents, ...rest } = step;
      const shown = decodeEvery > 0 && (step.index + 1) % decodeEvery === 0 && step.index + 1 < levels.timesteps.length; // then comes the picture itself
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

  /** The answers to questions. @type {Record<string, (message: any) => Promise<Record<string, any>>>} */
  const questions = {
    ...more,
    async read({ prompt }) {
      const asked = read(prompt);
      const [cond] = await model.encodeText([asked.ids]);
      return { kind: "text", ...asked, cond };
    },
    async encode({ picture }) {
      return { kind: "encoded", latents: (await model.encode(picture)).mean };
    },
    async noise({ prompt, decode: wanted, ...of }) {
      const [text] = await model.encodeText([read(prompt).ids]);
      const answer = await noised(model, config, text, of);
      return { kind: "noised", ...answer, picture: wanted ? await model.decode(answer.denoised) : null };
    },
  };

  /** Answer a question after those before it, when nothing is drawn. @param {any} message */
  function answer(message) {
    const mine = answered.then(async () => {
      await pause(); // a draw or a stop may have come
      while (drawn.size) await Promise.allSettled(drawn);
      post({ ...(await questions[message.kind](message)), id: message.id });
    });
    answered = mine.catch(() => {}); // whoever asked hears of it
    return mine;
  }

  /** Draw, and let questions wait. @param {any} message */
  function drawFirst(message) {
    const mine = draw(message);
    drawn.add(mine);
    return mine.finally(() => drawn.delete(mine));
  }

  return async (/** @type {any} */ message) => {
    try {
      if (message.kind === "draw") await drawFirst(message);
      else if (message.kind === "decode") await decode(message);
      else if (message.kind === "stop") current += 1;
      else if (Object.hasOwn(questions, message.kind)) await answer(message);
      else throw new RangeError(`${message.kind} is no message. Send draw, decode, stop, ${Object.keys(questions).join(" or ")}.`);
    } catch (error) {
      const { run, id } = message;
      post({ kind: "error", run, id, message: String(/** @type {any} */ (error)?.message ?? error), words: error instanceof PromptError ? error.words : [] });
    }
  };
}

/** Let messages in: between two steps nothing else would. */
const pause = () => new Promise((resolve) => setTimeout(resolve));

/** The prompt's part of a layer's attention, with numbers of its own. @param {import("./diffusion/model.js").LayerMap} map */
function lastRow({ layer, shape, values }) {
  return { layer, shape: shape.slice(1), values: values.slice(values.length - values.length / shape[0]) };
}
