// @ts-check
/**
 * The forward process: a picture is noised, the model says what it takes for noise, and how wrong it
 * is. A section of the page.
 *
 * @typedef {import("./growing.js").Growing} Growing
 * @typedef {import("./growing.js").Held} Held
 * @typedef {import("./preview.js").Preview} Preview
 */

import { DASHES, LINES, choice, make, paintLines } from "../probe/figures/drawing.js";
import { short } from "../probe/figures/payload.js";
import { noisingYaml } from "./experiment.js";
import { paintSmall } from "./painting.js";
import { previewed } from "./preview.js";
import { copying, savePicture } from "./taking.js";

export const TIMESTEPS = [999, 900, 800, 700, 600, 500, 400, 300, 200, 100, 50, 0]; // of the curve: those of experiments/noising.yaml
const FIGURES = { clean: "The picture", noisy: "With noise in it", noise: "The noise that was put in", prediction: "The noise that it sees", guess: "So the picture must be" };

/**
 * Bring the section to life. Nothing is computed before it is on the screen.
 *
 * @param {HTMLElement} section
 * @param {{ask: (question: Record<string, any>) => Promise<any>, begun: () => Held}} page `begun` is the picture to begin from
 */
export function noising(section, { ask, begun }) {
  /** @type {Growing | null} */
  let run = null;
  /** @type {{held: Held, latents: Float32Array} | null} the picture that is noised, as it was encoded */
  let clean = null;
  let [visible, busy, again] = [false, false, false];
  let chosen = false; // whether the reader has chosen a seed
  let curves = 0; // a curve goes on as long as nothing else is asked for

  make("h2", "", "Noise it: what the model learned to do", section);
  make("p", "about", "This is all its training was: noise is mixed into a picture, and the model says which part is noise. Drawing is the same backwards, step by step.", section);
  const settings = make("div", "settings", "", section);
  const which = choice(make("label", "", "noise ", settings), "Which picture is noised", [["run", "the picture I look at"], ["begun", "the picture to begin from"]], "run");
  const dial = make("label", "", "timestep ", settings);
  const timestep = make("input", "", "", dial, { type: "range", min: "0", max: "999", step: "1", value: "500", id: "timestep" });
  const share = make("output", "", "", dial, { for: "timestep" });
  const seed = make("input", "", "", make("label", "", "noise of seed ", settings), { type: "number", min: "0", max: "4294967295", step: "1", value: "5", inputmode: "numeric" });
  const told = make("label", "check", "", settings);
  const words = make("input", "", "", told, { type: "checkbox" });
  words.checked = true;
  const caption = make("span", "", "", told);
  const row = make("div", "noised", "", section);
  const figures = Object.fromEntries(Object.entries(FIGURES).map(([name, text]) => {
    const figure = make("figure", "", "", row);
    const canvas = make("canvas", "", "", figure, { width: "128", height: "128", role: "img", "aria-label": text });
    make("b", "", text, make("figcaption", "", "", figure));
    return [name, { canvas, note: make("span", "", "", figure.lastChild) }];
  }));
  const said = make("p", "loss", "", section, { role: "status" });
  const curve = make("button", "", "Loss at twelve timesteps", section, { type: "button" });
  const chart = make("figure", "curve", "", section);
  chart.hidden = true;
  const lines = make("canvas", "", "", make("div", "", "", chart), { role: "img" });
  const legend = make("figcaption", "", "", chart);
  const away = make("details", "taken", "", section);
  make("summary", "", "As an experiment for Python", away);
  const about = make("p", "", "", away);
  const code = make("pre", "", "", away, { tabindex: "0", role: "group", "aria-label": "The noising as YAML" });
  const buttons = make("div", "chips", "", away);
  copying(make("button", "", "Copy as experiment", buttons, { type: "button" }), code);
  const save = make("button", "", "The picture (PNG)", buttons, { type: "button" });
  save.onclick = () => clean && savePicture(clean.held.name, clean.held.data);

  /** What is asked for now; throws for a seed that is none. */
  function asked() {
    const whole = Number(seed.value);
    const usable = seed.value !== "" && Number.isInteger(whole) && whole >= 0 && whole < 2 ** 32;
    if (!usable) throw new Error("A seed is a whole number from 0 to 4294967295.");
    return { prompt: words.checked ? run?.experiment.prompt ?? "" : "", timestep: Number(timestep.value), seed: whole };
  }
  /** The latents of the chosen picture, encoded once. */
  async function encoded() {
    const chosen = which.value === "begun" ? begun() : run?.picture && { data: run.picture.data, name: `${run.name}.png`, of: null };
    if (!chosen) throw new Error("This run was stopped before its picture. Draw it to the end.");
    const held = { ...chosen, data: chosen.data.slice() };
    if (clean?.held.name === held.name && clean.held.data.every((level, i) => level === held.data[i])) return clean;
    const { latents } = await ask({ kind: "encode", picture: held.data });
    return (clean = { held, latents });
  }
  /** Ask the model, the newest question last; what came between is left out. */
  async function update() {
    again = true;
    curves++;
    chart.hidden = true;
    if (busy || !visible || !run) return;
    busy = true;
    while (again) {
      again = false;
      await once().catch((error) => { said.textContent = String(error.message ?? error); });
    }
    busy = false;
  }
  /** Show an answer at once, and its guess decoded when the reader rests. */
  async function once() {
    const question = asked();
    const { held, latents } = await encoded();
    for (const decode of [false, true]) {
      const answer = await ask({ kind: "noise", latents, ...question, decode });
      if (again && decode) return;
      show(held, answer, question);
      if (again) return;
    }
  }
  /** @param {Held} held @param {any} answer of the worker @param {{prompt: string, seed: number, timestep: number}} question */
  function show(held, { alphaBar, noise, noisy, prediction, denoised, loss, picture }, question) {
    const preview = /** @type {Growing} */ (run).preview;
    paintSmall(figures.clean.canvas, held.data);
    for (const [name, latents] of /** @type {[string, Float32Array][]} */ ([["noisy", noisy], ["noise", noise], ["prediction", prediction]])) paintSmall(figures[name].canvas, previewed(latents, preview));
    paintSmall(figures.guess.canvas, picture?.data ?? previewed(denoised, preview));
    share.textContent = `${question.timestep}: ${percent(1 - alphaBar)} of what it sees is noise`;
    figures.clean.note.textContent = "as latents: 16 x 16 places, 4 numbers each";
    figures.noisy.note.textContent = `${short(Math.sqrt(alphaBar))} of its latents and ${short(Math.sqrt(1 - alphaBar))} of noise: alpha_bar ${short(alphaBar)}`;
    figures.noise.note.textContent = `that of seed ${question.seed}`;
    figures.prediction.note.textContent = question.prompt ? `told “${question.prompt}”` : "told no words";
    figures.guess.note.textContent = "what is left without that noise, decoded";
    section.dataset.decoded = String(picture !== null);
    said.textContent = `Loss ${short(loss)}: the mean square of the noise that it sees less the noise that was put in. To see none would cost about 1.`;
    yaml(held, question, [question.timestep]);
  }
  /** @param {Held} held @param {{prompt: string, seed: number}} question @param {number[]} timesteps */
  function yaml(held, { prompt, seed: from }, timesteps) {
    about.textContent = `python -m probe.noising records the same in Python, from this file. It names ${held.name}: save that picture beside it.`;
    code.textContent = noisingYaml({ picture: held.name, caption: prompt, timesteps, seed: from });
  }
  /** Paint the losses that there are, on a logarithmic scale. @param {{values: (number | null)[]}[]} asking */
  function paintLogs(asking) {
    const every = asking.flatMap(({ values }) => values.filter((value) => value !== null));
    const [least, most] = [Math.min(...every), Math.max(...every)];
    const log = (/** @type {number} */ value) => Math.log(value / least);
    paintLines(lines, asking.map((line) => ({ ...line, values: line.values.map((value) => value && log(value)) })), 120, () => `loss from ${short(least)} to ${short(most)}, log scale`);
  }
  /** The loss over the timesteps, with the words and without, one point after another. */
  async function measure() {
    const mine = ++curves;
    const { seed: from } = asked();
    const prompt = run?.experiment.prompt ?? "";
    const { held, latents } = await encoded();
    /** @type {{text: string, prompt: string, values: (number | null)[], colour: string, dash: number[]}[]} */
    const both = [["with the words", prompt], ["without words", ""]].map(([text, one], i) => ({ text, prompt: one, values: TIMESTEPS.map(() => null), colour: LINES[i], dash: DASHES[i] }));
    const asking = prompt ? both : both.slice(1);
    chart.hidden = false;
    for (const [i, at] of TIMESTEPS.entries()) {
      legend.textContent = `Timestep ${i + 1} of ${TIMESTEPS.length} …`;
      for (const line of asking) {
        const { loss } = await ask({ kind: "noise", latents, timestep: at, seed: from, prompt: line.prompt, decode: false });
        if (mine !== curves) return;
        line.values[i] = loss;
        paintLogs(asking);
      }
    }
    legend.replaceChildren(...asking.map(({ text, colour }) => {
      const one = make("span", "", text);
      one.style.setProperty("--colour", colour);
      return one;
    }), ` Timestep ${TIMESTEPS[0]}, almost all noise, is on the left, ${TIMESTEPS[TIMESTEPS.length - 1]} on the right. Noise is easily seen where there is much of it, and hardly told from detail where there is little.`);
    lines.setAttribute("aria-label", asking.map(({ text, values }) => `Loss ${text}: ${values.map((value, i) => `${short(/** @type {number} */ (value))} at ${TIMESTEPS[i]}`).join(", ")}`).join(". "));
    yaml(held, { prompt, seed: from }, TIMESTEPS);
  }
  which.onchange = timestep.oninput = words.onchange = () => void update();
  seed.oninput = () => {
    chosen = true;
    void update();
  };
  curve.onclick = async () => {
    curve.disabled = true;
    await measure().catch((error) => { said.textContent = String(error.message ?? error); });
    curve.disabled = false;
  };
  new IntersectionObserver(([{ isIntersecting }]) => {
    visible = isIntersecting;
    if (visible && again) void update();
  }).observe(section);

  /** Noise the picture of a run. @param {Growing} next */
  function look(next) {
    section.hidden = false;
    if (run === next) return;
    run = next;
    if (!chosen) seed.value = String((next.experiment.seed + 1) % 2 ** 32); // its own noise is what it was drawn from
    caption.textContent = next.experiment.prompt ? `it is told “${next.experiment.prompt}”` : "there are no words to tell";
    void update();
  }
  /** The picture to begin from is another. */
  const changed = () => void (which.value === "begun" && update());
  return { look, changed };
}

/** @param {number} share */
const percent = (share) => `${(100 * share).toFixed(share > 0.99 || share < 0.1 ? 1 : 0)}%`;
