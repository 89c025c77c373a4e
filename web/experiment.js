// @ts-check
/**
 * What is drawn, as the page asks for it: its bounds, its place in the address, and the YAML by which
 * Python records the same. Pure: node tests it.
 *
 * @typedef {{kind: "value", word: string, from: number}} ValueEdit a word that is attended to and says nothing, from a step on
 * @typedef {{kind: "head", layer: string, head: number, from: number}} HeadEdit a head that writes nothing
 * @typedef {{kind: "noise"} & import("./diffusion/noise.js").NoiseEdit} NoiseEdit another seed's noise mixed into the first
 * @typedef {ValueEdit | HeadEdit | NoiseEdit} Edit
 * @typedef {{name: string, strength: number, picture: Uint8ClampedArray | null, of: Experiment | null}} Start a picture to begin from, RGBA, under the
 *          name that it is saved by; `of` draws it, where that is known, and `picture` is null where it is not here
 * @typedef {{prompt: string, seed: number, guidance: number, steps: number, scheduler: string, edits: Edit[], start?: Start}} Experiment
 */

import { crc32 } from "./checksums.js";
import { chosen } from "./diffusion/noise.js";
import { wordsOf } from "./prompt.js";

/** @type {Experiment} */
export const FIRST = { prompt: "a fox on the moon", seed: 5, guidance: 3, steps: 30, scheduler: "DDIM", edits: [] };
export const BOUNDS = { guidance: { min: 1, max: 15, step: 0.5 }, steps: { min: 5, max: 60, step: 1 } };
export const STRENGTH = { min: 0.2, max: 1, step: 0.05 }; // at the least one of five steps
export const AMOUNT = { min: 0.05, max: 1, step: 0.05 };
const STEPS = "num_steps"; // in an address, where the player has `steps` of its own
export const LONGEST = 300; // letters of a prompt
const [LARGEST_SEED, MOST_EDITS] = [2 ** 32 - 1, 40];

/** The experiment in an address; what is not possible is left out. @param {string} query @param {string[]} schedulers @param {string[]} layers @returns {Experiment} */
export function fromAddress(query, schedulers, layers) {
  const given = new URLSearchParams(query);
  const number = (/** @type {string} */ name, /** @type {number} */ least, /** @type {number} */ most, /** @type {number} */ fallback, digits = 0) => {
    const text = given.get(name) ?? "";
    const value = /^\d{1,10}(\.\d{1,2})?$/.test(text) ? Number(Number(text).toFixed(digits)) : NaN;
    return value >= least && value <= most ? value : fallback;
  };
  const scheduler = given.get("scheduler") ?? "";
  const seed = number("seed", 0, LARGEST_SEED, FIRST.seed);
  const start = startIn(given, number("strength", STRENGTH.min, STRENGTH.max, 0.6, 2), schedulers, layers);
  const noises = start ? [] : given.getAll("noise").slice(0, MOST_EDITS).flatMap(noise).filter((one) => one.seed !== seed);
  if (noises.some(({ where }) => where)) noises.splice(1); // Python reads it from a file, which has one noise
  const prompt = (given.get("prompt") ?? FIRST.prompt).replace(/[\p{Cc}\p{Cs}]+/gu, " ").slice(0, LONGEST);
  const steps = number(STEPS, BOUNDS.steps.min, BOUNDS.steps.max, FIRST.steps);
  const calls = start ? Math.floor(steps * start.strength) : steps;
  const words = wordsOf(prompt);
  const acts = (/** @type {ValueEdit | HeadEdit} */ one) => one.from < calls && (one.kind === "head" || words.includes(one.word));
  return {
    prompt,
    seed,
    guidance: number("guidance", BOUNDS.guidance.min, BOUNDS.guidance.max, FIRST.guidance, 2),
    steps,
    scheduler: schedulers.includes(scheduler) ? scheduler : FIRST.scheduler,
    edits: [...given.getAll("off").slice(0, MOST_EDITS).flatMap((text) => edit(text, layers)).filter(acts), ...noises],
    ...(start ? { start } : {}),
  };
}

/** The picture that an address begins from: an experiment that draws it, or its name alone. @param {URLSearchParams} given @param {number} strength @param {string[]} schedulers @param {string[]} layers @returns {Start | null} */
function startIn(given, strength, schedulers, layers) {
  const text = given.get("start");
  if (text === null) return null;
  const drawn = text.includes("prompt=") && !new URLSearchParams(text).has("start");
  return { name: /^[a-z0-9-]{1,60}\.png$/.test(text) ? text : "picture.png", strength, picture: null, of: drawn ? fromAddress(text, schedulers, layers) : null };
}

/** A nudge as an address has it: "7 0.3" mixes in 0.3 of the noise of seed 7; the places may follow. @param {string} text @returns {NoiseEdit[]} */
function noise(text) {
  const found = /^(\d{1,10}) ([01](?:\.\d{1,2})?)(?: ([0-9a-f]{64}))?$/.exec(text);
  const [seed, amount, where] = found ? [Number(found[1]), Number(found[2]), found[3]] : [-1, 0];
  const usable = seed >= 0 && seed <= LARGEST_SEED && amount > 0 && amount <= 1 && !/^0+$/.test(where ?? "");
  return usable ? [{ kind: "noise", seed, amount, ...(where ? { where } : {}) }] : [];
}

/** An edit as an address has it: "value fox 6" or "head 3.1 6", layer 3 and head 1. @param {string} text @param {string[]} layers @returns {(ValueEdit | HeadEdit)[]} */
function edit(text, layers) {
  const value = /^value (\p{L}{1,40}) (\d{1,3})$/u.exec(text);
  if (value) return [{ kind: "value", word: value[1].toLowerCase(), from: Number(value[2]) }];
  const head = /^head (\d{1,3})\.(\d{1,3}) (\d{1,3})$/.exec(text);
  if (!head || !(Number(head[1]) in layers)) return [];
  return [{ kind: "head", layer: layers[Number(head[1])], head: Number(head[2]), from: Number(head[3]) }];
}

/** The address of an experiment; what else is in it stays. @param {string} query @param {Experiment} experiment @param {string[]} layers */
export function toAddress(query, { edits, start, ...fields }, layers) {
  const given = new URLSearchParams(query);
  for (const [name, value] of Object.entries(fields)) given.set(name === "steps" ? STEPS : name, String(value));
  for (const name of ["off", "noise", "start", "strength"]) given.delete(name);
  for (const one of edits) {
    if (one.kind === "noise") given.append("noise", [one.seed, one.amount, one.where ?? ""].join(" ").trim());
    else given.append("off", one.kind === "value" ? `value ${one.word} ${one.from}` : `head ${layers.indexOf(one.layer)}.${one.head} ${one.from}`);
  }
  if (start) {
    given.set("start", start.of && !start.of.start ? toAddress("", start.of, layers).slice(1) : start.name);
    given.set("strength", String(start.strength));
  }
  return `?${given}`;
}

/** The experiment without a word of its prompt; one that is not there any more cannot be switched off. @param {Experiment} experiment @param {{word: string}[]} words @param {number} index @returns {Experiment} */
export function withoutWord({ edits, ...fields }, words, index) {
  const rest = words.flatMap(({ word }, i) => (i === index ? [] : [word]));
  return { ...fields, prompt: rest.join(" "), edits: edits.filter((one) => one.kind !== "value" || rest.includes(one.word)) };
}

/** How it was made, in a line. @param {Experiment} experiment */
export function facts({ scheduler, steps, guidance, seed, edits, start }) {
  const guided = guidance > 1 ? `guidance ${guidance}` : "no guidance";
  return [`emojiworld, ${scheduler}, ${steps} steps, ${guided}, seed ${seed}`, ...(start ? [`from a picture at strength ${start.strength}`] : []), ...edits.map(inWords)].join(", ");
}

/** An edit in words. @param {Edit} edit */
export function inWords(edit) {
  if (edit.kind === "noise") return `${edit.amount} of the noise of seed ${edit.seed}${edit.where ? ` at ${chosen(edit.where).filter(Boolean).length} places` : ""}`;
  const what = edit.kind === "value" ? `“${edit.word}”` : `${edit.layer.split(".transformer")[0]} head ${edit.head}`;
  return `${what} off${edit.from ? ` from step ${edit.from}` : ""}`;
}

/** The fields that Python has for it. @param {Experiment} experiment */
export function recipe({ prompt, seed, guidance, steps, scheduler, edits, start }) {
  const begun = start ? { image: start.name, strength: start.strength } : {};
  const made = edits.map((one) => one.kind === "noise" ? (one.where ? { kind: "noise", file: noiseFile(seed, one) } : one) : {
    ...(one.kind === "value" ? { kind: "value", words: [one.word] } : { kind: "head", layers: [one.layer], heads: [one.head], how: "zero" }),
    ...(one.from ? { steps: `${one.from}:` } : {}),
  });
  return { model: "emojiworld", dtype: "float32", prompt, ...begun, scheduler, steps, guidance_scale: guidance, seed, ...(made.length ? { edits: made } : {}) };
}

/** The name of the file with a first noise that was changed at some places: the same for the same noise. @param {number} own @param {NoiseEdit} edit */
export const noiseFile = (own, { seed, amount, where }) => `noise-${crc32(new TextEncoder().encode([own, seed, amount, where].join(" "))).toString(16).padStart(8, "0")}.npy`;

/** A file for `python -m probe.run FILE`. @param {Experiment} experiment */
export const yaml = (experiment) => written(recipe(experiment));

/** A file for `python -m probe.noising FILE`, one draw of noise. @param {{picture: string, caption: string, timesteps: number[], seed: number}} fields */
export const noisingYaml = ({ picture, caption, timesteps, seed }) => written({ model: "emojiworld", dtype: "float32", picture, caption, timesteps, noises: 1, seed });

/** Fields as YAML; what is JSON is YAML. @param {Record<string, any>} recipe */
export function written({ edits = [], ...fields }) {
  const quoted = (/** @type {unknown} */ value) => JSON.stringify(value).replace(/[\u007f-\u{10ffff}]/gu, (letter) => `\\U${letter.codePointAt(0)?.toString(16).padStart(8, "0")}`);
  const lines = Object.entries(fields).map(([name, value]) => `${name}: ${quoted(value)}`);
  if (edits.length) lines.push("edits:", ...edits.map((one) => `  - ${quoted(one)}`));
  return `${lines.join("\n")}\n`;
}

/**
 * What a call of the UNet is told of edits: a factor for what each head reads from each token. The
 * words are switched off in the prompt alone, heads in both branches.
 *
 * @param {Edit[]} edits
 * @param {{layers: string[], shape: number[], words: {word: string, tokens: number[]}[], rows: number}} of shape (layer, head, token)
 * @returns {((index: number) => Float32Array | undefined) | undefined}
 */
export function valueScale(edits, { layers, shape: [count, heads, length], words, rows }) {
  const inside = edits.filter((one) => one.kind !== "noise");
  if (!inside.length) return undefined;
  const none = inside.find((one) => one.kind === "head" && one.head >= heads);
  if (none?.kind === "head") throw new RangeError(`${none.layer.split(".transformer")[0]} has no head ${none.head}. It has ${heads}: 0 to ${heads - 1}.`);
  return (index) => {
    const now = inside.filter(({ from }) => index >= from);
    if (!now.length) return undefined;
    const scale = new Float32Array(count * rows * heads * length).fill(1);
    const off = (/** @type {number} */ layer, /** @type {number} */ row, /** @type {number} */ head, /** @type {number[]} */ tokens) => {
      for (const token of tokens) scale[((layer * rows + row) * heads + head) * length + token] = 0;
    };
    for (const one of now) {
      if (one.kind === "head") for (let row = 0; row < rows; row++) off(layers.indexOf(one.layer), row, one.head, [...Array(length).keys()]);
      else {
        const tokens = words.filter(({ word }) => word === one.word).flatMap((word) => word.tokens);
        for (let layer = 0; layer < count; layer++) for (let head = 0; head < heads; head++) off(layer, rows - 1, head, tokens);
      }
    }
    return scale;
  };
}
