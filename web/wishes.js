// @ts-check
/**
 * What an address wishes to see, in the order in which it is drawn: pictures to begin from, then the
 * run beside, then the run itself. Pure: node tests it.
 *
 * @typedef {import("./experiment.js").Experiment} Experiment
 * @typedef {{experiment: Experiment, beside: boolean, last: boolean}} Wish `beside`: shown with what was drawn before it
 */

import { fromAddress, toAddress } from "./experiment.js";
import { pictureOf } from "./growing.js";

/** @param {string} query @param {Experiment} wished the experiment in it @param {string[]} schedulers @param {string[]} layers @returns {Wish[]} */
export function wishes(query, wished, schedulers, layers) {
  const text = new URLSearchParams(query).get("beside");
  const other = text === null ? null : fromAddress(text, schedulers, layers);
  const before = [wished.start?.of, other?.start?.of, other].flatMap((one) => one ?? []);
  const once = before.filter((one, i) => before.findIndex((earlier) => same(earlier, one, layers)) === i);
  return [...once.map((experiment) => ({ experiment, beside: false, last: false })), { experiment: wished, beside: other !== null, last: true }];
}

/** The experiment with the picture that it begins from, or from noise if none of the runs has drawn it. @param {Experiment} experiment @param {import("./growing.js").Growing[]} runs @param {string[]} layers @returns {Experiment} */
export function begun(experiment, runs, layers) {
  const { start, ...rest } = experiment;
  if (!start || start.picture) return experiment;
  const drawn = start.of && runs.find((run) => same(run.experiment, /** @type {Experiment} */ (start.of), layers));
  const held = drawn && pictureOf(drawn);
  return held ? { ...rest, start: { strength: start.strength, name: held.name, picture: held.data, of: held.of } } : rest;
}

/** @param {Experiment} one @param {Experiment} two @param {string[]} layers */
const same = (one, two, layers) => toAddress("", one, layers) === toAddress("", two, layers);
