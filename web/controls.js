// @ts-check
/** The numbers beside the prompt: seed, guidance, steps and scheduler. */

import { make } from "../probe/figures/drawing.js";
import { BOUNDS, FIRST } from "./experiment.js";

/**
 * @typedef {{seed: number, guidance: number, steps: number, scheduler: string}} Values
 */

/** Bring the controls to life. @param {HTMLFormElement} form */
export function controls(form) {
  const field = (/** @type {string} */ name) => /** @type {any} */ (form.querySelector(`#${name}`));
  const [seed, guidance, steps, scheduler] = ["seed", "guidance", "steps", "scheduler"].map(field);
  const show = () => {
    field("guidance-value").textContent = Number(guidance.value) > 1 ? guidance.value : "1: none";
    field("steps-value").textContent = steps.value;
  };
  for (const [name, bounds] of Object.entries(BOUNDS)) Object.assign(field(name), bounds);
  guidance.oninput = steps.oninput = show;

  /** @param {Partial<Values>} values */
  function set(values) {
    for (const [control, value] of /** @type {[any, any][]} */ ([[seed, values.seed], [guidance, values.guidance], [steps, values.steps]])) {
      if (value !== undefined) control.value = String(value);
    }
    if (values.scheduler !== undefined) {
      if (![...scheduler.options].some(({ value }) => value === values.scheduler)) offer([values.scheduler]);
      scheduler.value = values.scheduler;
    }
    show();
  }
  /** @param {string[]} names */
  function offer(names) {
    const { value } = scheduler;
    scheduler.replaceChildren(...names.map((name) => make("option", "", name, undefined, { value: name })));
    if (names.includes(value)) scheduler.value = value;
  }
  /** @returns {Values} */
  function values() {
    const whole = Number(seed.value);
    if (seed.value === "" || !Number.isInteger(whole) || whole < 0 || whole > 2 ** 32 - 1) seed.value = String(FIRST.seed);
    return { seed: Number(seed.value), guidance: Number(guidance.value), steps: Number(steps.value), scheduler: scheduler.value };
  }
  return { set, offer, values };
}
