// @ts-check
/**
 * Whether the model in this page can draw what a recording holds: its experiment, or why not. Pure.
 *
 * @typedef {import("../experiment.js").Experiment} Experiment
 */

import { BOUNDS, LONGEST } from "../experiment.js";
import { wordsOf } from "../prompt.js";

const MODEL = "emojiworld";
const [SIDE, LARGEST_SEED] = [128, 2 ** 32 - 1];
/** Names of schedulers, by the class that diffusers has for each. */
const CLASSES = new Map([
  ["DDIMScheduler", "DDIM"], ["EulerDiscreteScheduler", "Euler"], ["EulerAncestralDiscreteScheduler", "EulerAncestral"],
  ["DPMSolverMultistepScheduler", "DPM++2M"], ["PNDMScheduler", "PNDM"],
]);
/** Fields that have to be empty, and what a recording does where one is not. */
const PLAIN = {
  image: "begins from a picture", edits: "is edited", loras: "has LoRAs", negative_prompt: "has a negative prompt", guidance_rescale: "rescales guidance",
  eta: "adds noise (eta)", scheduler_options: "has options of its scheduler", clip_skip: "skips layers of the text encoder", prompt_embeds: "reads embeddings",
};
const empty = (/** @type {unknown} */ value) => !value || (typeof value === "object" && !Object.keys(value).length);

/**
 * The experiment that draws the first image of a recording in this page; a sentence, if it cannot.
 *
 * @param {Record<string, any>} recipe @param {Record<string, any>} attributes @param {string[]} known words
 * @returns {Experiment | string}
 */
export function drawable(recipe, attributes, known) {
  const no = (/** @type {string} */ why) => `It cannot be drawn here, for it ${why}.`;
  if (attributes.noising || attributes.kind === "noising") return "";
  if (attributes.model?.name !== MODEL) return "It cannot be drawn here, for this page has another model.";
  for (const [name, why] of Object.entries(PLAIN)) if (!empty(recipe[name])) return no(why);
  if ([recipe.width, recipe.height].some((side) => ![null, undefined, SIDE].includes(side))) return no("is of another size");
  const scheduler = CLASSES.get(attributes.scheduler?.class) ;
  if (!scheduler) return no("has a scheduler that this page has not");
  const { prompt, seed, guidance_scale: scale, steps } = recipe;
  const whole = (/** @type {any} */ value, /** @type {number} */ least, /** @type {number} */ most) => Number.isInteger(value) && value >= least && value <= most;
  if (!whole(steps, BOUNDS.steps.min, BOUNDS.steps.max) || !whole(seed, 0, LARGEST_SEED)) return no("has steps or a seed that this page does not take");
  if (prompt?.length > LONGEST) return no("has a longer prompt than this page takes");
  const words = typeof prompt === "string" ? wordsOf(prompt) : [];
  const isKnown = typeof prompt === "string" && words.join(" ") === prompt.toLowerCase() && words.every((word) => known.includes(word));
  if (!isKnown) return no("has words that this page does not know");
  if (typeof scale !== "number" || !(scale <= BOUNDS.guidance.max)) return no("has more guidance than this page takes");
  return { prompt: words.join(" "), seed, guidance: Math.max(scale, BOUNDS.guidance.min), steps, scheduler, edits: [] };
}
