// @ts-check
/**
 * What the lesson asks of the page's worker. Its runs have names of their own, and one thing is
 * computed after another; a run of the drawing view goes first, unless the reader asks by hand.
 *
 * @typedef {import("../experiment.js").Experiment} Experiment
 * @typedef {import("../growing.js").Picture} Picture
 * @typedef {{preview: import("../preview.js").Preview, layers: string[]}} Model
 * @typedef {{run: Growing, each: number, decode: number}} Drawn a finished run, seconds of one of its steps and of its last decode
 * @typedef {{step: (message: any) => void, resolve: (message: any) => void, reject: (error: Error) => void}} Waiting
 */

import { Growing } from "../growing.js";

const NAME = "lesson ";
const MOST = 6; // runs that are kept: some 5 MB each

/** Something else was drawn meanwhile. */
export class Stopped extends Error {}

/** @param {import("../client.js").Client} client @param {() => void} stop all that is drawn @param {(about: {model: Model, canvas?: any}, ...of: any[]) => Growing} [grow] */
export function asking(client, stop, grow = ({ model }, name, experiment, begun) => new Growing(name, experiment, begun, model)) {
  /** @type {Map<string, Waiting>} */
  const waiting = new Map();
  /** @type {Map<string, Drawn>} */
  const kept = new Map();
  /** @type {Model | null} */
  let model = null;
  let [count, busy, running, jobs] = [0, false, false, 0];
  /** @type {{resolve: (free: any) => void, reject: (error: Error) => void}[]} */
  const patient = [];
  let last = Promise.resolve();
  const free = () => model !== null && !busy;
  const go = () => {
    if (!free()) return;
    for (const { resolve } of patient.splice(0)) resolve(null);
  };

  /** Send a message and wait for its end. @param {Record<string, any>} message @param {(message: any) => void} [step] what comes before */
  function send(message, step = () => {}) {
    const run = `${NAME}${++count}`;
    return new Promise((resolve, reject) => {
      waiting.set(run, { step, resolve, reject });
      client.post({ ...message, run });
    });
  }

  /** Take what the worker says, if it is for the lesson. @param {any} message */
  function told(message) {
    if (message.kind === "error" && !model) for (const { reject } of patient.splice(0)) reject(new Error(message.message));
    const asker = waiting.get(message.run);
    if (!asker) return typeof message.run === "string" && message.run.startsWith(NAME);
    if (message.kind === "begun" || message.kind === "step") asker.step(message);
    else {
      waiting.delete(message.run);
      if (message.kind === "error") asker.reject(Object.assign(new Error(message.message), { words: message.words }));
      else if (message.kind === "stopped") asker.reject(new Stopped());
      else asker.resolve(message);
    }
    return true;
  }

  /** Do one thing after those before it, when nothing is drawn elsewhere. @template T @param {() => Promise<T>} job @param {boolean} [byHand] then what is drawn is stopped @returns {Promise<T>} */
  function inTurn(job, byHand = false) {
    if (byHand && (busy || running)) stop();
    jobs += 1;
    const turn = () => (free() ? null : new Promise((resolve, reject) => patient.push({ resolve, reject })));
    const mine = last.then(turn).then(job);
    last = mine.then(() => {}, () => {}).then(() => { jobs -= 1; }); // whoever asked hears of a failure
    return mine;
  }

  /** Draw, or take what was drawn before. @param {Experiment} experiment @param {(run: Growing) => void} [grown] after each step @param {boolean} [again] even if it was drawn before @returns {Promise<Drawn>} */
  async function draw(experiment, grown = () => {}, again = false) {
    const before = kept.get(named(experiment));
    if (before && !again) return before;
    /** @type {Growing | null} */
    let run = null;
    const { guidance, ...rest } = experiment;
    running = true;
    try {
      const done = await send({ kind: "draw", decodeEvery: 0, guidanceScale: guidance, ...rest }, (message) => {
        if (message.kind === "begun") run = grow({ model: /** @type {Model} */ (model) }, `${experiment.prompt.replaceAll(" ", "-") || "picture"}-lesson-${count}`, experiment, message);
        else if (run) {
          run.add(message);
          grown(run);
        }
      });
      const whole = /** @type {Growing} */ (/** @type {unknown} */ (run));
      whole.finish(done.latents, done.picture);
      return keep(whole, done.seconds);
    } finally {
      running = false;
    }
  }

  /** Keep a finished run. @param {Growing} run @param {number} seconds that it took @returns {Drawn} */
  function keep(run, seconds) {
    const times = run.steps.map((step) => step.seconds);
    const each = median(times.slice(1).map((time, i) => time - times[i])); // a few steps were decoded as well
    const drawn = { run, each, decode: seconds - times[times.length - 1] };
    if (run.experiment.start || run.experiment.edits.length) return drawn; // no figure asks for these
    kept.set(named(run.experiment), drawn);
    for (const old of [...kept.keys()].slice(0, -MOST)) kept.delete(old);
    return drawn;
  }

  /** The picture of latents. @param {Float32Array} latents @returns {Promise<Picture>} */
  const decode = async (latents) => (await send({ kind: "decode", index: 0, latents })).picture;

  return {
    told, inTurn, draw, keep, decode,
    ask: (/** @type {Record<string, any>} */ question) => client.ask(question),
    model: () => /** @type {Model} */ (model),
    /** What a new job would wait for. @returns {"model" | "drawing" | "figure" | null} */
    wait: () => (!model ? "model" : busy ? "drawing" : jobs ? "figure" : null),
    ready: (/** @type {Model} */ opened) => {
      model = opened;
      go();
    },
    /** The drawing view draws, or has ended. @param {boolean} is */
    busy: (is) => {
      busy = is;
      go();
    },
  };
}

/** What an experiment is kept under. @param {Experiment} experiment */
const named = (experiment) => JSON.stringify(Object.entries(experiment).sort());

/** @param {number[]} values */
function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor(sorted.length / 2)] : 0;
}
