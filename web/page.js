// @ts-check
/**
 * The page: what is asked for goes to the worker, what comes goes to the player.
 *
 * @typedef {import("./experiment.js").Experiment} Experiment
 * @typedef {Growing | import("./recordings/stored.js").Stored} Run drawn here, or opened: that one has no experiment of this page
 * @typedef {{words: string[], layers: string[], preview: import("./preview.js").Preview, schedulers: string[]}} Ready
 */

import { make } from "../probe/figures/drawing.js";
import * as payload from "../probe/figures/payload.js";
import { mount } from "../probe/figures/player.js";
import { keepOffline, start } from "./client.js";
import { controls } from "./controls.js";
import * as experiments from "./experiment.js";
import { offer } from "./graphics.js";
import { Growing } from "./growing.js";
import { lesson as lessonIn } from "./lesson/lesson.js";
import { opener } from "./recordings/opener.js";
import { pictureIn } from "./picture.js";
import { noising } from "./noising.js";
import { names, promptIn, wordsOf } from "./prompt.js";
import { shelf } from "./shelf.js";
import { touch } from "./touch.js";
import { begun, wishes } from "./wishes.js";

const DECODE_EVERY = 4; // a decode costs as much as two or three steps; the others are decoded when they are looked at
const GUESS = "guess"; // a picture that belongs to no run
const element = (/** @type {string} */ id) => /** @type {any} */ (document.getElementById(id));
const [form, said, bar, mistake, pictures] = ["form", "said", "progress", "mistake", "pictures"].map(element);

/** @type {Ready | null} */
let model = null;
/** @type {Run | null} the run that is looked at */
let looked = null;
/** @type {Run | null} the one beside it */
let beside = null;
/** @type {Growing | null} the one that is drawn */
let drawing = null;
/** @type {ReturnType<typeof mount> | null} */
let player = null;
/** @type {{number: number, experiment: Experiment, beside: Run | null, opening: boolean} | null} */
let asked = null;
/** @type {import("./wishes.js").Wish[]} what is drawn next */
let next = [];
let number = 0;
let trying = false; // the graphics card
/** @type {string[]} */
const known = JSON.parse(element("known").textContent);
const opened = performance.now();
const given = location.search; // what the reader came with

const prompt = promptIn(element("prompt"), element("words"), () => check());
const fields = controls(form);
const drawn = shelf(element("drawn"), element("keep"), look);
const beginning = pictureIn(element("start"), { looked: () => (looked && isOurs(looked) ? looked : null), steps: () => Number(element("steps").value) });
const change = touch(element("touch"), {
  draw: (experiment, other) => {
    draw(experiment, other);
    pictures.scrollIntoView({ behavior: "instant", block: "start" });
  },
  decode: (latents) => client.post({ kind: "decode", run: GUESS, index: 0, latents }),
});
const recordings = opener(element("open"), element("opened"), {
  known,
  say,
  show: (run) => {
    lesson.leave();
    drawn.add(run);
    look(run, null);
    element("opened").scrollIntoView({ behavior: "instant", block: "start" });
  },
  draw: (experiment, run) => {
    prompt.set(wordsOf(experiment.prompt));
    fields.set(experiment);
    if (check()) draw(experiment, run);
    pictures.scrollIntoView({ behavior: "instant", block: "start" });
  },
});
const client = start(told, (share) => {
  bar.value = share;
  say(share < 1 ? `Loading the model: ${Math.floor(share * 100)}%` : "Opening the model …", share >= 1);
});

const noise = noising(element("noising"), { ask: client.ask, begun: () => beginning.held() });
const lesson = lessonIn({ drawing: element("drawing"), lesson: element("lesson"), views: element("views"), skip: element("skip") }, { client, known, open: take, stop, progress: () => bar.value });

/** Say how far it is; what is worth hearing goes to screen readers as well. @param {string} text @param {boolean} [aloud] */
function say(text, aloud = true) {
  if (said.textContent !== text) said.textContent = text;
  if (aloud) element("heard").textContent = text;
}

/** What the controls ask for. @returns {Experiment} */
const wanted = () => ({ prompt: prompt.words().join(" "), edits: [], ...fields.values(), ...beginning.start() });

/** Say which words the model never saw. */
function check() {
  const strange = prompt.strange();
  mistake.hidden = !strange.length;
  mistake.textContent = strange.length ? `The model never saw ${strange.map((word) => `“${word}”`).join(", ")} in its training. It knows the ${known.length} words below: take out what it does not know.` : "";
  element("draw").disabled = strange.length > 0;
  return !strange.length;
}

/** Draw. @param {Experiment} experiment @param {Run | null} [other] is shown beside it @param {boolean} [opening] whether the address says where to look */
function draw(experiment, other = null, opening = false) {
  if (trying) return say("Wait: the graphics card is being tried.");
  next = [];
  asked = { number: ++number, experiment, beside: other, opening };
  if (!model) return say("It is drawn as soon as the model is here.");
  const { guidance, start, ...rest } = experiment;
  client.post({ kind: "draw", run: number, decodeEvery: DECODE_EVERY, guidanceScale: guidance, picture: start?.picture, strength: start?.strength, ...rest });
  busy(true);
}

/** Draw no further, neither this nor what was to come. */
function stop() {
  next = [];
  client.post({ kind: "stop" });
}

/** @param {boolean} is */
function busy(is) {
  lesson.busy(is);
  element("stop").hidden = !is;
  element("draw").hidden = is;
  document.body.classList.toggle("busy", is);
}

/** Look at a run, and at another beside it. @param {Run} run @param {Run | null} other @param {Record<string, any>} [state] */
function look(run, other, state = player?.state ?? {}) {
  const kept = looked || state.channel === undefined ? { ...state, channel: channelIn(run, looked, state.channel) } : state;
  [looked, beside] = [run, other];
  player?.destroy();
  element("waiting")?.remove();
  const runs = other ? [run, other] : [run];
  player = mount(pictures, runs.map((one) => one.mounted()), { state: kept, ask: (index, what) => runs[index].ask(what), changed });
  drawn.mark(run, other);
  recordings.looked(isOurs(run) ? null : run);
  if (!isOurs(run)) for (const part of ["touch", "noising"]) element(part).hidden = true;
}

/** Whether a run was drawn here. @param {Run} run @returns {run is Growing} */
function isOurs(run) {
  return "experiment" in run;
}

/** The same word in another run, else its first that names something. @param {Run} run @param {Run | null} before @param {number | undefined} channel */
function channelIn(run, before, channel) {
  const label = channel === undefined ? undefined : before?.channels[channel]?.label;
  const [same, naming] = [run.channels.findIndex((one) => one.label === label), run.channels.findIndex((one) => one.kind === "word" && names(one.label))];
  return [same, naming].find((index) => index >= 0);
}

/** Look at a run of the lesson. @param {Growing} run */
function take(run) {
  fields.set(run.experiment);
  prompt.set(wordsOf(run.experiment.prompt));
  if (!drawn.runs().includes(run)) drawn.add(run);
  look(run, null, {});
  player?.grown(run.steps.length - 1);
  say("Drawn in the lesson. Move through the steps with the arrow keys.");
}

/** The reader rests: the address says where, and what is looked at is decoded. @param {any} state */
function changed(state) {
  beginning.show();
  if (!looked || drawing || !isOurs(looked)) return;
  change.show(looked, state);
  noise.look(looked);
  const query = new URLSearchParams(payload.toAddress(experiments.toAddress(location.search, looked.experiment, looked.layers), state, looked.meta.steps));
  if (beside && isOurs(beside)) query.set("beside", experiments.toAddress("", beside.experiment, looked.layers).slice(1));
  else query.delete("beside");
  history.replaceState(null, "", `?${query}${location.hash}`);
  for (const run of beside ? [looked, beside] : [looked]) {
    if (!isOurs(run)) continue;
    const index = run === looked ? state.step : payload.nearest(run.meta.sigma, looked.meta.sigma[state.step]);
    if (run.steps[index] && !run.pictures.has(index)) client.post({ kind: "decode", run: run.name, index, latents: run.steps[index].denoised });
  }
}

/** Take what the worker says. @param {any} message */
function told(message) {
  if (lesson.told(message)) return;
  if (message.kind === "ready") return ready(message);
  if (message.kind === "picture") return decoded(message);
  if (message.kind === "error") return failed(message);
  if (message.run !== number || !model || !asked) return; // of a run that is not waited for
  if (message.kind === "begun") {
    drawing = new Growing([...message.words.map((/** @type {{word: string}} */ { word }) => word), number].join("-"), asked.experiment, message, model);
  } else if (message.kind === "step" && drawing) step(drawing, message);
  else if (message.kind === "done" && drawing) done(drawing, message);
  else if (message.kind === "stopped" && drawing) ended(drawing, `Stopped after ${drawing.steps.length} of ${drawing.calls} steps.`);
}

/** @param {Growing} run @param {any} message */
function step(run, message) {
  run.add(message);
  const reached = run.steps.length - 1;
  if (reached === 0) {
    look(run, asked?.beside ?? null, { ...player?.state, ...(asked?.opening ? payload.fromAddress(given, run.meta.steps) : {}), step: 0 });
  } else if (looked === run) player?.grown(player.state?.step === reached - 1 ? reached : undefined);
  bar.value = (reached + 1) / run.calls;
  say(`Drawing: step ${reached + 1} of ${run.calls}`, reached === 0);
}

/** @param {Growing} run @param {any} message */
function done(run, { latents, picture, seconds }) {
  run.finish(latents, picture);
  lesson.keep(run, seconds);
  ended(run, `Drawn in ${seconds.toFixed(1)} s: ${run.calls} steps. Move through them with the arrow keys.`);
  document.body.dataset.seconds = seconds.toFixed(2);
  void keepOffline(); // after the first picture, which it would delay
}

/** @param {Growing} run @param {string} text */
function ended(run, text) {
  if (run.meta.status === "running") run.end("stopped");
  drawing = null;
  busy(false);
  bar.value = run.steps.length / run.calls;
  say(text);
  if (!run.steps.length) return; // stopped before there was anything to see
  drawn.add(run);
  drawn.mark(/** @type {Run} */ (looked), beside);
  if (next.length) return follow(run);
  if (looked !== run) return;
  const wished = asked?.opening ? payload.fromAddress(given, run.meta.steps).step : undefined;
  player?.grown(run.steps[wished ?? -1] ? wished : undefined);
}

/** Draw what comes next. @param {Growing | null} before what was drawn before it */
function follow(before) {
  const [{ experiment, beside: both, last }, ...later] = next;
  const whole = begun(experiment, drawn.runs().filter(isOurs), model?.layers ?? []);
  if (last && experiment.start) beginning.set(whole.start ?? experiment.start);
  draw(whole, both ? before : null, last);
  next = later;
}

/** @param {any} message a picture that was asked for */
function decoded({ run: name, index, picture }) {
  if (name === GUESS) return change.decoded(picture);
  for (const run of drawn.runs()) if (run.name === name && isOurs(run)) run.decoded(index, picture);
  if ([looked?.name, beside?.name].includes(name)) player?.grown();
}

/** @param {{message: string, words: string[], run?: number}} message */
function failed({ message, words, run }) {
  if (run !== undefined && run !== number) return;
  next = [];
  if (drawing) ended(drawing, `Ended by an error after ${drawing.steps.length} of ${drawing.calls} steps.`);
  busy(false);
  mistake.hidden = false;
  mistake.textContent = message;
  if (!words.length) say("It did not work.");
}

/** The model is here. @param {Ready} message */
function ready(message) {
  model = message;
  document.body.dataset.ready = ((performance.now() - opened) / 1000).toFixed(2);
  fields.offer(model.schedulers);
  void offer(element("graphics"), { ask: client.ask, busy: () => drawing !== null, trying: (is) => { trying = is; } });
  lesson.ready(model);
  lesson.whenDrawing(begin);
}

/** Draw what was asked for, or what the address asks for. */
function begin() {
  if (!model) return;
  if (asked) return void (check() && draw(asked.experiment, asked.beside));
  if (looked) return say("Ready."); // a recording was opened meanwhile
  const experiment = experiments.fromAddress(given, model.schedulers, model.layers);
  fields.set(experiment);
  if (!check()) return say("Ready.");
  next = wishes(given, { ...experiment, prompt: prompt.words().join(" ") }, model.schedulers, model.layers);
  follow(null);
}

form.addEventListener("input", beginning.show);
element("start").addEventListener("input", noise.changed);
/** Draw what the controls say. */
function drawWanted() {
  if (!check()) return;
  draw(wanted(), drawn.comparing() ? looked : null);
  const state = element("state");
  if (state.getBoundingClientRect().bottom > innerHeight * 0.6) state.scrollIntoView({ behavior: "instant", block: "start" }); // a small screen: what is drawn is below it
}

form.onsubmit = (/** @type {Event} */ event) => {
  event.preventDefault();
  prompt.set(prompt.words()); // with what is still being typed
  drawWanted();
};
element("stop").onclick = stop;
element("another").onclick = () => {
  fields.set({ seed: Math.floor(Math.random() * 10000) });
  drawWanted();
};
/** Arrow keys reach the pictures from where they mean nothing else: nothing has the focus, or the prompt in which nothing is typed. */
document.addEventListener("keydown", ({ key, target, ctrlKey, metaKey, altKey }) => {
  const idle = target === document.body || (target instanceof HTMLInputElement && target.closest("#prompt") && !target.value);
  if (!idle || element("drawing").hidden || ctrlKey || metaKey || altKey || !["ArrowLeft", "ArrowRight"].includes(key)) return;
  pictures.querySelector(".probe")?.dispatchEvent(new KeyboardEvent("keydown", { key }));
});

{
  const experiment = experiments.fromAddress(given, [], []);
  prompt.know(known);
  prompt.set(wordsOf(experiment.prompt));
  fields.set(experiment);
}
