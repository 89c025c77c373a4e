// @ts-check
/**
 * A run of this page as the player reads it: the same header and parts as a payload of
 * probe/figures, which grow in place while it is drawn.
 *
 * @typedef {import("./attention.js").Kept} Kept
 * @typedef {import("./preview.js").Preview} Preview
 * @typedef {import("./parts.js").Picture} Picture
 * @typedef {{index: number, alphaBar: number, latents: Float32Array, input: Float32Array, denoised: Float32Array, uncond: Float32Array | null, cond: Float32Array,
 *            prediction: Float32Array, seconds: number, maps: import("./diffusion/model.js").LayerMap[], picture: Picture | null}} Step
 * @typedef {{words: {word: string, tokens: number[]}[], end: number, timesteps: number[], sigmas: number[], device?: string}} Begun
 * @typedef {{data: Uint8ClampedArray, name: string, of: import("./experiment.js").Experiment | null}} Held a picture to begin from: see `Start` of experiment.js
 */

import { THUMBNAIL, channelsOf, everyHead, kept, meanMaps, ranking, sumOf } from "./attention.js";
import { facts, recipe } from "./experiment.js";
import { ATTENTION, CURVES, HEAT, PANELS, mean, numbers, place, sheet, snippets, write } from "./parts.js";
import { asColourful, previewed, signed, size } from "./preview.js";

const FORMING = { title: "The picture as it forms", note: "its latest guess, decoded by the VAE" }; // until then
const [SIDE, PICTURE] = [16, 128]; // of latents and of pictures of the model in this page

/** A run in progress, or one that is finished. `run` is what the player mounts. */
export class Growing {
  /**
   * @param {string} name
   * @param {import("./experiment.js").Experiment} experiment
   * @param {Begun} begun
   * @param {{preview: Preview, layers: string[], canvas?: (width: number, height: number) => any}} about `canvas` makes one
   */
  constructor(name, experiment, begun, { preview, layers, canvas = (width, height) => new OffscreenCanvas(width, height) }) {
    this.name = name;
    this.experiment = experiment;
    this.begun = begun;
    this.preview = preview;
    this.layers = layers;
    this.canvas = canvas;
    this.channels = channelsOf(begun.words, begun.end);
    this.calls = begun.timesteps.length;
    /** @type {{latents: Float32Array, input: Float32Array, alphaBar: number, denoised: Float32Array, uncond: Float32Array | null, cond: Float32Array,
     *         prediction: Float32Array, seconds: number, layers: Kept[], maps: Float32Array[]}[]} */
    this.steps = [];
    /** @type {Map<number, Picture>} the guesses that were decoded, by step */
    this.pictures = new Map();
    /** @type {Float32Array | null} */
    this.latents = null; // after the last step
    /** @type {Picture | null} */
    this.picture = null;
    this.meta = this.header();
    this.parts = this.emptyParts();
    this.run = this.mounted();
  }

  /** The run for a player, which may put other parts in place of these. */
  mounted() {
    return (this.run = { meta: this.meta, parts: { ...this.parts } });
  }

  /** Whether WebGPU computed its UNet, whose last bits differ from those of the processor. */
  get onGraphicsCard() {
    return this.begun.device === "webgpu";
  }

  /** What a payload says of a run. @returns {Record<string, any>} */
  header() {
    const { experiment, begun: { timesteps, sigmas } } = this;
    const none = () => Array(this.calls).fill(null);
    const python = JSON.stringify(recipe(experiment), null, 4);
    const curves = Object.entries(CURVES).filter(([name]) => name !== "guidance" || experiment.guidance > 1);
    return {
      name: this.name, kind: "generation", prompt: experiment.prompt, facts: `${facts(experiment)}${this.onGraphicsCard ? ", UNet by WebGPU" : ""}`, status: "running",
      following: { state: "recording", text: "", command: "" },
      calls: this.calls, reached: -1, steps: timesteps.map((_, i) => i), sigma: sigmas, timestep: timesteps,
      colours: HEAT, panels: PANELS.map((panel) => (panel.part === "final" ? { ...panel, ...FORMING } : panel)), latent_names: this.preview.slope.map((_, i) => `channel ${i}`),
      offers: { readings: ["attention"], branches: [], latents: this.preview.slope.length },
      opened: `import probe\n\nrun = probe.record(${python}, output=None)\n`,
      snippets: { picture: "run.preview(run.denoised()).sel(step={step}).isel(image=0){mean}", ...snippets() }, missing: {},
      curves: Object.fromEntries(curves.map(([key, text]) => [key, { ...text, values: none() }])),
      ...ATTENTION, map_steps: timesteps.map((_, i) => i), channels: this.channels.map(({ label, kind }) => ({ label, kind })),
      shares: Object.fromEntries(["start", "words", "end", "padding"].map((kind) => [kind, none()])),
      decoded_steps: [],
    };
  }

  /** @returns {Record<string, any>} */
  emptyParts() {
    return {
      maps: numbers([this.channels.length, SIDE, SIDE, this.calls], 1),
      latents: this.sheet(this.calls, SIDE),
      denoised: this.sheet(this.calls, SIDE),
      final: this.sheet(1, PICTURE),
    };
  }

  /** @param {number} count @param {number} side */
  sheet(count, side) {
    return sheet(this.canvas, count, side, side);
  }

  /** Take a step that has come. @param {Step} step */
  add(step) {
    const { meta, parts } = this;
    const layers = step.maps.map((map) => kept(map, this.begun.end));
    const { maps } = meanMaps(layers);
    this.steps.push({ latents: step.latents, input: step.input, alphaBar: step.alphaBar, denoised: step.denoised, uncond: step.uncond, cond: step.cond, prediction: step.prediction, seconds: step.seconds, layers, maps: this.channels.map(({ tokens }) => sumOf(maps, tokens)) });
    const index = this.steps.length - 1;
    write(parts.maps, this.steps.map((one) => one.maps));
    const share = (/** @type {string[]} */ kinds) => this.channels.reduce((sum, { kind }, i) => sum + (kinds.includes(kind) ? mean(this.steps[index].maps[i]) : 0), 0);
    for (const [name, kind] of [["start", "start"], ["words", "word"], ["end", "end"], ["padding", "padding"]]) meta.shares[name][index] = share([kind]);
    if (step.uncond && meta.curves.guidance) meta.curves.guidance.values[index] = size(step.cond.map((value, i) => value - /** @type {Float32Array} */ (step.uncond)[i]));
    meta.curves.prediction.values[index] = size(step.prediction);
    place(parts.latents, index, previewed(step.latents, this.preview, asColourful(step.latents, step.denoised)));
    place(parts.denoised, index, previewed(step.denoised, this.preview));
    meta.reached = index;
    if (step.picture) this.decoded(index, step.picture);
    else if (!this.pictures.size) this.form(index);
  }

  /** Until a guess is decoded, the picture that forms is the preview. @param {number} index */
  form(index) {
    const { denoised, final } = this.parts;
    const pen = final.bitmap.getContext("2d");
    pen.imageSmoothingEnabled = false;
    pen.drawImage(denoised.bitmap, (index % denoised.columns) * SIDE, Math.floor(index / denoised.columns) * SIDE, SIDE, SIDE, 0, 0, final.bitmap.width, final.bitmap.height);
  }

  /** Take the picture of a step's guess. @param {number} index @param {Picture} picture */
  decoded(index, picture) {
    if (this.pictures.has(index)) return;
    const { meta, parts } = this;
    this.run.parts.decoded = parts.decoded ??= this.sheet(this.calls, picture.width);
    this.pictures.set(index, picture);
    place(parts.decoded, meta.decoded_steps.length, picture.data);
    meta.decoded_steps.push(index);
    if (meta.status === "running") place(parts.final, 0, picture.data);
  }

  /** Take the end: the last latents and their picture. @param {Float32Array} latents @param {Picture} picture */
  finish(latents, picture) {
    [this.latents, this.picture] = [latents, picture];
    this.end("complete");
    place(this.parts.final, 0, picture.data);
  }

  /** Nothing more comes. @param {"complete" | "stopped"} status */
  end(status) {
    this.meta.status = status;
    this.meta.following = { state: "complete", text: "", command: "" };
    if (status === "complete") Object.assign(this.meta.panels.at(-1), PANELS[3]);
  }

  /** What the player asks for when it is wanted. @param {Record<string, string>} what */
  async ask({ what, channel }) {
    if (what === "heads") return this.heads(Number(channel));
    if (what === "latents") return this.latentChannel(Number(channel));
    throw new Error(`There is no ${what} in this page.`);
  }

  /** A channel in every layer and head. @param {number} channel */
  heads(channel) {
    const every = this.steps.map(({ layers }) => everyHead(layers, this.channels[channel].tokens));
    const count = this.steps[0].layers[0].heads;
    const maps = numbers([this.layers.length, count, THUMBNAIL, THUMBNAIL, this.calls], 2);
    const block = THUMBNAIL ** 2;
    write(maps, every.map(({ small }) => Array.from({ length: this.layers.length * count }, (_, i) => small.subarray(i * block, (i + 1) * block))));
    const over = (/** @type {number} */ layer, /** @type {number} */ head) => every.reduce((sum, { shares }) => sum + shares[layer][head], 0) / every.length;
    const rest = Array(this.calls - every.length).fill(null);
    const meta = {
      channel, layers: this.layers, heads: this.layers.map(() => count),
      shares: this.layers.map((_, layer) => [...every.map(({ shares }) => mean(shares[layer])), ...rest]),
      snippets: snippets({ layer: true }), map_steps: this.meta.map_steps, branch: "cond",
      ranking: ranking(this.layers.map((_, layer) => Array.from({ length: count }, (_, head) => over(layer, head)))),
    };
    return { meta, parts: { maps } };
  }

  /** One channel of the noisy latents, signed. @param {number} channel */
  latentChannel(channel) {
    const values = this.steps.map(({ latents }) => latents.subarray(channel * 256, (channel + 1) * 256));
    const reach = Math.max(...values.flatMap((one) => [...one].map(Math.abs)), 0);
    const latents = this.sheet(this.calls, SIDE);
    values.forEach((one, index) => place(latents, index, signed(one, reach)));
    const far = Number(reach.toPrecision(3));
    return { meta: { note: `channel ${channel}, from -${far} (blue) to ${far} (orange)` }, parts: { latents } };
  }
}

/** The picture of a finished run, to begin from. @param {Growing} run @returns {Held | null} */
export const pictureOf = (run) => run.picture && { data: run.picture.data, name: `${run.name}.png`, of: run.experiment.start ? null : run.experiment };
