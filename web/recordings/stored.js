// @ts-check
/**
 * A recording as the player reads it: the same header and parts as probe/figures/bundle.py makes of
 * it. Of several images, or draws of noise, the first is shown.
 *
 * @typedef {import("./opening.js").Recording} Recording
 * @typedef {import("../preview.js").Preview} Preview
 * @typedef {{count: number, channels: number, height: number, width: number, part: Record<string, Float32Array[]>}} Latents by name, of each step (channel, y, x)
 */

import { clean, opened } from "./opening.js";
import { ATTENTION, CURVES, HEAT, PANELS, place, sheet } from "../parts.js";
import { asColourful, deviation, previewed, signed, size } from "../preview.js";
import { StoredMaps } from "./storedmaps.js";
import { Unreadable } from "./zip.js";

const MOST_STEPS = 1000;
const MOST_PIXELS = 16e6; // of a sheet; larger pictures are shown smaller
const NOISED = [
  { part: "source", title: "The picture", note: "what the VAE encoded" },
  { part: "latents", title: "With this much noise", note: "latents that go into the model" },
  { part: "noise", title: "The true noise", note: "the same at every step" },
  { part: "predicted", title: "What the model takes for noise", note: "its prediction" },
  { part: "difference", title: "Where it is wrong", note: "prediction less true noise; grey: right" },
  { part: "denoised", title: "Its guess of the clean picture", note: "at this step alone" },
  { part: "maps", title: "Places that attend", note: "" },
  { part: "decoded", title: "The guess, decoded by the VAE", note: "at this step alone" },
];
const LOSS = {
  title: "Loss: how wrong the model is about the noise",
  note: "mean square of prediction less target, mean and spread over the draws of noise; the less noise, the harder to tell from detail",
};
let number = 0;

/**
 * Read a recording for the player. Throws Unreadable.
 *
 * @param {File | File[]} source
 * @param {import("../parts.js").MakeCanvas} [canvas] makes one
 * @param {(share: number) => void} [progress] from 0 to 1, where there is much to read
 */
export async function stored(source, canvas = (width, height) => new OffscreenCanvas(width, height), progress = () => {}) {
  const run = new Stored(await opened(source), canvas);
  await run.read(progress);
  return run;
}

/** A recording that was opened. `run` is what the player mounts. */
export class Stored {
  /** @param {Recording} recording @param {import("../parts.js").MakeCanvas} canvas */
  constructor(recording, canvas) {
    this.recording = recording;
    this.canvas = canvas;
    this.name = `opened ${++number}`; // for the page alone
    const { attributes } = recording;
    this.noising = (attributes.kind ?? (attributes.noising ? "noising" : "generation")) === "noising";
    this.axis = this.noising ? "draw" : "image"; // as Python names it
    this.across = attributes.format_version > 1 ? this.axis : "image";
    this.recipe = attributes[this.noising ? "noising" : "experiment"];
    if (typeof this.recipe !== "object" || this.recipe === null) throw new Unreadable("It does not say how it was made.");
    this.status = attributes.status === "running" ? "interrupted" : clean(attributes.status, 20);
    this.onPixels = attributes.model?.f === 1;
    /** @type {Record<string, any>} */
    this.meta = {};
    /** @type {Record<string, any>} */
    this.parts = {};
    /** @type {StoredMaps | null} */
    this.maps = null;
    /** @type {Latents | null} */
    this.latents = null;
  }

  /** The run for a player, which may put other parts in place of these. */
  mounted() {
    return (this.run = { meta: this.meta, parts: { ...this.parts } });
  }

  get channels() {
    return /** @type {{label: string, kind: string}[]} */ (this.meta.channels ?? []);
  }

  /** Read what the player shows before something else is asked. @param {(share: number) => void} progress */
  async read(progress) {
    const { recording } = this;
    const one = async (/** @type {string} */ path) => {
      if (!recording.spec(path, ["step"])) throw new Unreadable(`It has no ${path}.`);
      return (await recording.numbers(path)).data;
    };
    const [committed, sigma, timestep, alphaBar] = [await one("committed"), await one("sigma"), await one("timestep"), await one("alpha_bar")];
    if (committed.length > MOST_STEPS) throw new Unreadable(`It has ${committed.length} steps, and this page shows at most ${MOST_STEPS}. probe view shows it.`);
    if ([sigma, timestep, alphaBar].some(({ length }) => length !== committed.length)) throw new Unreadable("Its noise levels are not as many as its steps.");
    const steps = [...committed.keys()].filter((i) => committed[i]);
    const at = (/** @type {ArrayLike<number>} */ values) => steps.map((i) => values[i]);
    this.meta = { ...this.header(committed.length, steps), sigma: at(sigma), timestep: at(timestep) };
    if (!steps.length) return;
    const preview = await this.preview();
    this.latents = await this.readLatents(steps);
    if (this.latents) await this.seen(this.latents, preview, at(sigma), at(alphaBar));
    await this.pictures(steps);
    await this.curves(steps);
    const maps = await StoredMaps.of(recording, this, steps, progress);
    if (typeof maps === "string") this.meta.missing.maps = maps;
    else {
      this.maps = maps;
      this.meta.offers.readings = ["attention"];
      Object.assign(this.meta, ATTENTION, maps.meta, { snippets: { ...this.meta.snippets, ...maps.meta.snippets } });
      this.parts.maps = maps.part;
    }
    if (this.noising) this.meta.panels = this.meta.panels.filter((/** @type {{part: string}} */ { part }) => part in this.parts);
  }

  /** What a payload says of a run. @param {number} calls @param {number[]} steps */
  header(calls, steps) {
    const { name } = this.recording;
    const far = steps.length < calls ? `after ${steps.length} of ${calls} steps` : "after the last step";
    const ended = { interrupted: `Interrupted ${far}.`, failed: `Ended by an error ${far}.` }[this.status] ?? "";
    return {
      name, kind: this.noising ? "noising" : "generation", prompt: clean(this.noising ? this.recipe.caption : this.recipe.prompt), facts: this.facts(), status: this.status,
      following: { state: this.status, text: ended, command: "" }, calls, reached: steps.length - 1, steps,
      colours: HEAT, panels: this.panels(0), latent_names: [], offers: { readings: [], branches: [], latents: 0 },
      opened: `import probe\n\nrun = probe.open_run(${JSON.stringify(`${name}.zarr.zip`)})\n`,
      snippets: { picture: `run.preview(run.denoised()).sel(step={step}).isel(${this.axis}=0){mean}` }, missing: {}, curves: {},
    };
  }

  /** @param {number} channels of the latents */
  panels(channels) {
    const list = this.noising ? NOISED : [{ ...PANELS[0], note: `${channels || "Some"} numbers a square, shown as colour` }, ...PANELS.slice(1)];
    /** @type {Record<string, {title?: string, note: string}>} */
    const pixels = this.noising
      ? { source: { note: "as the model gets it: no VAE" }, latents: { note: "what goes into the model" } }
      : { latents: { title: "Noisy picture going in", note: "3 numbers a pixel, shown as colour" } };
    return list.map((panel) => ({ ...panel, ...(this.onPixels ? pixels[panel.part] : {}) }));
  }

  /** How it was made, in a line. */
  facts() {
    const { recording: { attributes }, recipe } = this;
    const [model, scheduler, steps, seed] = [attributes.model?.name, attributes.scheduler?.class, recipe.steps, recipe.seed].map((value) => clean(value, 60) || "unknown");
    const several = Number(clean(this.noising ? recipe.noises : recipe.images));
    const edits = Array.isArray(recipe.edits) ? recipe.edits.length : 0;
    const made = this.noising
      ? [`noised at ${Array.isArray(recipe.timesteps) ? recipe.timesteps.length : "some"} timesteps`]
      : [scheduler.replace(/Scheduler$/, ""), `${steps} steps`, recipe.guidance_scale > 1 ? `guidance ${clean(recipe.guidance_scale, 12)}` : "no guidance"];
    return [
      `${model}${this.onPixels ? " (on pixels)" : ""}`, ...made, `seed ${seed}`,
      ...(several > 1 ? [`${this.noising ? "draw of noise" : "image"} 0 of ${several}`] : []),
      ...(edits ? [`${edits} edit${edits > 1 ? "s" : ""}`] : []),
    ].join(", ");
  }

  /** The map of latents to colours, if there is one. @returns {Promise<Preview | null>} */
  async preview() {
    const { recording } = this;
    const [slope, bias] = [recording.spec("preview/latent_to_rgb", ["channel", "rgb"]), recording.spec("preview/bias", ["rgb"])];
    if (!slope || !bias || slope.shape[1] !== 3 || bias.shape[0] !== 3 || slope.shape[0] > 64) return null;
    const [{ data }, constant] = [await recording.numbers(slope.path), await recording.numbers(bias.path)];
    if (![...data, ...constant.data].every(Number.isFinite)) return null;
    return { slope: Array.from({ length: slope.shape[0] }, (_, i) => [...data.subarray(3 * i, 3 * i + 3)]), bias: [...constant.data] };
  }

  /** Latents and predictions of the first image. @param {number[]} steps @returns {Promise<Latents | null>} */
  async readLatents(steps) {
    const { recording } = this;
    const dims = ["step", this.across, "channel", "y", "x"];
    const spec = recording.spec("latents/latents", dims);
    if (!spec) return null;
    /** @type {Record<string, Float32Array[]>} */
    const part = {};
    for (const name of ["latents", "prediction", "prediction_cond", "prediction_uncond"]) {
      const own = recording.spec(`latents/${name}`, dims);
      if (!own) continue;
      if (own.shape.join() !== spec.shape.join()) throw new Unreadable(`Its ${own.path} is not of the size of its latents.`);
      const { data } = await recording.numbers(own.path, [null, 0]);
      const each = data.length / spec.shape[0];
      part[name] = steps.map((i) => Float32Array.from(data.subarray(i * each, (i + 1) * each)));
    }
    if (!part.prediction) throw new Unreadable("It has latents, and no predictions of the model.");
    const [, , channels, height, width] = spec.shape;
    return { count: steps.length, channels, height, width, part };
  }

  /** Latents as small pictures. @param {Latents} latents @param {Preview | null} preview @param {number[]} sigma @param {number[]} alphaBar */
  async seen({ count, channels, height, width, part }, preview, sigma, alphaBar) {
    this.meta.panels = this.panels(channels);
    this.meta.latent_names = this.onPixels && channels === 3 ? ["red", "green", "blue"] : Array.from({ length: channels }, (_, i) => `channel ${i}`);
    this.meta.offers.latents = channels;
    if (!preview || preview.slope.length !== channels) {
      this.meta.missing.latents = this.meta.missing.denoised = "Not recorded. Its model came without a preview of latents.";
      return;
    }
    const { attributes } = this.recording;
    const exploding = attributes.latent_convention === "variance_exploding";
    const velocity = attributes.prediction_type === "v_prediction";
    const guesses = part.latents.map((latents, i) => {
      const scale = exploding ? (sigma[i] ** 2 + 1) ** -0.5 : 1;
      const [signal, noise] = [Math.sqrt(alphaBar[i]), Math.sqrt(1 - alphaBar[i])];
      return latents.map((value, k) => (velocity ? signal * scale * value - noise * part.prediction[i][k] : (scale * value - noise * part.prediction[i][k]) / signal));
    });
    const paint = (/** @type {string} */ name, /** @type {(i: number) => Uint8ClampedArray} */ of, many = count) => {
      const painted = (this.parts[name] = sheet(this.canvas, many, height, width));
      for (let i = 0; i < many; i++) place(painted, i, of(i));
    };
    paint("latents", (i) => previewed(part.latents[i], preview, asColourful(part.latents[i], guesses[i])));
    paint("denoised", (i) => previewed(guesses[i], preview));
    if (this.noising) await this.noises(part, guesses, preview, { exploding, velocity, sigma, alphaBar }, paint);
  }

  /**
   * Noise as colours around grey: the true one, the predicted one, and their difference.
   *
   * @param {Record<string, Float32Array[]>} part @param {Float32Array[]} guesses @param {Preview} preview
   * @param {{velocity: boolean, exploding: boolean, sigma: number[], alphaBar: number[]}} how
   * @param {(name: string, of: (i: number) => Uint8ClampedArray, many?: number) => void} paint
   */
  async noises(part, guesses, { slope }, { velocity, exploding, sigma, alphaBar }, paint) {
    const { recording } = this;
    if (!recording.spec("forward/noise", [this.across, "channel", "y", "x"])) return;
    const noise = Float32Array.from((await recording.numbers("forward/noise", [0])).data);
    if (noise.length !== guesses[0].length) return;
    const predicted = part.prediction.map((prediction, i) => {
      const [signal, level, scale] = [Math.sqrt(alphaBar[i]), Math.sqrt(1 - alphaBar[i]), exploding ? (sigma[i] ** 2 + 1) ** -0.5 : 1];
      return velocity ? prediction.map((value, k) => signal * value + level * scale * part.latents[i][k]) : prediction;
    });
    const every = new Float32Array(guesses.length * noise.length);
    guesses.forEach((guess, i) => every.set(guess, i * noise.length));
    const around = { slope: slope.map((row) => row.map((value) => value * deviation(every))), bias: [0.5, 0.5, 0.5] };
    paint("noise", () => previewed(noise, around), 1);
    paint("predicted", (i) => previewed(predicted[i], around));
    paint("difference", (i) => previewed(predicted[i].map((value, k) => value - noise[k]), around));
  }

  /** The finished picture, the one it began from, and guesses that were decoded. @param {number[]} steps */
  async pictures(steps) {
    const { recording, meta, parts, across } = this;
    const paint = async (/** @type {string} */ path, /** @type {number[]} */ indices, /** @type {(index: number) => (number | null)[]} */ at) => {
      const [height, width] = recording.arrays.get(path)?.shape.slice(-3) ?? [];
      const less = Math.max(1, Math.ceil(Math.sqrt((indices.length * height * width) / MOST_PIXELS)));
      const painted = sheet(this.canvas, indices.length, Math.ceil(height / less), Math.ceil(width / less));
      for (const [i, index] of indices.entries()) place(painted, i, rgba((await recording.numbers(path, at(index))).data, width, painted.shape, less));
      return painted;
    };
    const rgb = (/** @type {string} */ path, /** @type {string[]} */ first) => {
      const spec = recording.spec(path, [...first, "y", "x", "rgb"]);
      return spec && spec.type === "uint8" && spec.shape.at(-1) === 3 && spec.shape.every(Boolean) ? spec : null;
    };
    if (rgb("decoded/picture", ["decoded_step", across]) && recording.spec("decoded/decoded_step", ["decoded_step"]) && !this.onPixels) {
      const decoded = [...(await recording.numbers("decoded/decoded_step")).data];
      const there = [...decoded.keys()].filter((i) => steps.includes(decoded[i]));
      if (there.length) {
        meta.decoded_steps = there.map((i) => decoded[i]);
        parts.decoded = await paint("decoded/picture", there, (i) => [i, 0]);
      }
    }
    if (rgb("source/picture", [])) parts.source = await paint("source/picture", [0], () => []);
    if (this.status === "complete" && rgb("images/final", [across])) parts.final = await paint("images/final", [0], () => [0]);
    else meta.missing.final = "Not yet: the picture is painted after the last step.";
  }

  /** Numbers for each step. @param {number[]} steps */
  async curves(steps) {
    const { curves } = this.meta;
    const finite = (/** @type {number} */ value) => (Number.isFinite(value) ? Number(value.toPrecision(6)) : null);
    const along = async (/** @type {string} */ path) => {
      if (!this.recording.spec(path, ["step"])) return null;
      const { data } = await this.recording.numbers(path);
      return steps.map((i) => finite(data[i]));
    };
    const [loss, spread] = [await along("forward/loss_mean"), await along("forward/loss_spread")];
    if (loss && spread) curves.loss = { ...LOSS, values: loss, spread };
    if (!this.latents) return;
    const { prediction, prediction_cond: cond, prediction_uncond: uncond } = this.latents.part;
    const apart = cond?.map((values, i) => uncond && finite(size(values.map((value, k) => value - uncond[i][k]))));
    if (cond && uncond) curves.guidance = { ...CURVES.guidance, values: apart };
    curves.prediction = { ...CURVES.prediction, values: prediction.map((values) => finite(size(values))) };
  }

  /** What the player asks for when it is wanted. @param {Record<string, string>} what */
  async ask({ what, channel }) {
    this.recording.taken = 0;
    if (what === "heads" && this.maps) return this.maps.heads(Number(channel));
    if (what === "latents" && this.latents) return this.latentChannel(Number(channel));
    throw new Error("This page does not read that from a recording. probe view does.");
  }

  /** One channel of the noisy latents, signed. @param {number} channel */
  latentChannel(channel) {
    const { count, height, width, part } = /** @type {Latents} */ (this.latents);
    const block = height * width;
    const values = part.latents.map((latents) => latents.slice(channel * block, (channel + 1) * block).map((value) => (Number.isFinite(value) ? value : 0)));
    const reach = values.reduce((most, one) => one.reduce((high, value) => Math.max(high, Math.abs(value)), most), 0);
    const latents = sheet(this.canvas, count, height, width);
    values.forEach((one, index) => place(latents, index, signed(one, reach)));
    const far = Number(reach.toPrecision(3));
    return { meta: { note: `${this.meta.latent_names[channel]}, from -${far} (blue) to ${far} (orange)` }, parts: { latents } };
  }
}

/**
 * A picture (y, x, rgb) as RGBA, each side divided by a whole number.
 *
 * @param {ArrayLike<number>} rgb @param {number} wide @param {number[]} shape of the smaller one @param {number} less
 */
function rgba(rgb, wide, [, height, width], less) {
  const data = new Uint8ClampedArray(4 * height * width).fill(255);
  for (let i = 0; i < height * width; i++) {
    const from = (Math.floor(i / width) * less * wide + (i % width) * less) * 3;
    for (let k = 0; k < 3; k++) data[4 * i + k] = rgb[from + k];
  }
  return data;
}
