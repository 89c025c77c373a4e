// @ts-check
/**
 * How a recording that grows is followed: when to ask again, which step to show, where the focus goes.
 * Pure: no page is needed, and node tests it.
 *
 * @typedef {{state: string, text: string, command: string}} Following
 */

/** States of a recording that its writer is still working on. */
export const LIVE = ["recording", "finishing"];
const [SECOND, SLOW, SLOWEST] = [1000, 10_000, 30_000];

/**
 * Milliseconds until a run is asked for again. Infinity: never.
 * @param {string} state @param {number} took milliseconds of the last answer with something new @param {number} failures in a row
 */
export function pause(state, took, failures) {
  if (failures) return Math.min(SLOWEST, SECOND * 2 ** failures);
  if (state === "complete") return Infinity;
  return LIVE.includes(state) ? Math.min(SLOWEST, Math.max(SECOND, took)) : SLOW; // somebody may resume it
}

/**
 * The state to go on with when a run has grown: the same step, or the newest for a reader at the end.
 * @param {{step: number, from: number} & Record<string, any> | null} state null: no step was there
 * @param {number[]} before the steps that there were @param {number[]} after those that there are
 */
export function carried(state, before, after) {
  const last = after.length - 1;
  if (!state) return { step: last };
  const place = (/** @type {number} */ index) => after.indexOf(before[index]);
  const step = state.step === before.length - 1 ? last : place(state.step);
  return { ...state, step: step < 0 ? last : step, from: Math.max(0, place(state.from)) };
}

/**
 * Where in a new list of controls the one of an old list is: in the same place, or the first alike; -1: nowhere.
 * @param {string[]} before @param {number} index @param {string[]} after
 */
export function counterpart(before, index, after) {
  if (index < 0) return -1;
  return after[index] === before[index] ? index : after.indexOf(before[index]);
}

/**
 * What is said above the player: a line for each run that is not complete.
 * @param {{name: string, following: Following, problem: string}[]} runs
 */
export function lines(runs) {
  return runs
    .map(({ name, following: { state, text, command }, problem }) => ({
      state: problem ? "problem" : state,
      text: `${runs.length > 1 && (text || problem) ? `${name}: ` : ""}${problem || text}`,
      command: problem ? "" : command,
    }))
    .filter(({ text }) => text);
}
