// @ts-check
/**
 * What a reader changes inside a run: a word taken out, a word or a head switched off from a step on,
 * its first noise nudged, another guidance at one step; and the experiment to take away.
 *
 * @typedef {import("./growing.js").Growing} Growing
 * @typedef {import("./experiment.js").Experiment} Experiment
 * @typedef {import("./experiment.js").Edit} Edit
 * @typedef {{step: number, layer: number, head: number}} State of the player
 * @typedef {{draw: (experiment: Experiment, beside: Growing) => void, decode: (latents: Float32Array) => void}} Doing
 */

import { keep, make } from "../probe/figures/drawing.js";
import { short } from "../probe/figures/payload.js";
import { guide } from "./diffusion/guidance.js";
import { denoised } from "./diffusion/schedulers.js";
import { BOUNDS, noiseFile, withoutWord, yaml } from "./experiment.js";
import { npy } from "./npy.js";
import { firstNoise, nudge } from "./nudge.js";
import { paint, paintSmall } from "./painting.js";
import { previewed } from "./preview.js";
import { recording } from "./recordings/recording.js";
import { copying, savePicture } from "./taking.js";

/** Bring the section to life. @param {HTMLElement} section @param {Doing} doing */
export function touch(section, { draw, decode }) {
  /** @type {Growing | null} */
  let run = null;
  /** @type {State} */
  let at = { step: 0, layer: -1, head: -1 };
  make("h2", "", "Change something inside", section);
  const cards = make("div", "touches", "", section);
  const card = (/** @type {string} */ title, /** @type {string} */ about) => {
    const made = make("div", "touch", "", cards);
    make("h3", "", title, made);
    return { made, about: make("p", "", about, made) };
  };

  const without = card("Take a word out", "The same noise is drawn without it, beside this picture.");
  const words = make("div", "chips", "", without.made, { role: "group", "aria-label": "Which word to take out" });
  const off = card("Switch it off on the way", "");
  const values = make("div", "chips", "", off.made, { role: "group", "aria-label": "Which word to switch off" });
  const head = make("button", "", "", off.made, { type: "button" });
  const noise = nudge(card("Nudge the noise", ""), (edit) => run && draw({ ...run.experiment, edits: [...run.experiment.edits.filter(({ kind }) => kind !== "noise"), edit] }, run));
  const other = card("Other guidance at this step", "");
  const dial = make("label", "dial", "guidance ", other.made);
  const scale = make("input", "", "", dial, { type: "range", id: "other-guidance" });
  Object.assign(scale, BOUNDS.guidance, { value: "8" });
  const number = make("output", "", "", dial, { for: "other-guidance" });
  const pair = make("div", "pair", "", other.made);
  const [asDrawn, asAsked] = ["as drawn", "with this guidance"].map((text) => {
    const figure = make("figure", "", "", pair);
    return { canvas: make("canvas", "", "", figure, { width: "128", height: "128", role: "img", "aria-label": `The guess ${text}` }), note: make("figcaption", "", text, figure) };
  });
  const away = make("div", "touch away", "", section);
  make("h3", "", "Take it with you", away);
  const about = make("p", "", "", away);
  const code = make("pre", "", "", away, { tabindex: "0", role: "group", "aria-label": "The experiment as YAML" });
  const buttons = make("div", "chips", "", away);
  const copy = make("button", "", "Copy as experiment", buttons, { type: "button" });
  const save = make("button", "", "Picture (PNG)", buttons, { type: "button", title: "The experiment is inside" });
  const begun = make("button", "", "The picture it began from (PNG)", buttons, { type: "button" });
  const noisy = make("button", "", "Its first noise (.npy)", buttons, { type: "button" });
  const pack = make("button", "", "Recording (.zarr.zip)", buttons, { type: "button", title: "probe verify proves it, probe view shows it" });
  const told = make("p", "", "", away, { role: "status" });

  /** From which step on something is switched off: where the reader is, but for the last. */
  const from = () => (run && at.step === run.calls - 1 ? Math.round(at.step / 3) : at.step);
  /** @param {Edit} edit */
  const edited = (edit) => run && draw({ ...run.experiment, edits: [...run.experiment.edits, edit] }, run);
  /** @param {Element} box @param {(word: string, index: number) => void} chosen @param {string} what */
  function chips(box, chosen, what) {
    const list = (run?.begun.words ?? []).map(({ word }) => word);
    box.replaceChildren(...list.map((word, index) => {
      const chip = make("button", "", word, undefined, { type: "button", "aria-label": `${what} “${word}”` });
      chip.onclick = () => chosen(word, index);
      return chip;
    }));
  }
  copying(copy, code);
  save.onclick = () => run?.picture && savePicture(`${run.name}.png`, run.picture.data, code.textContent);
  begun.onclick = () => run?.experiment.start?.picture && savePicture(run.experiment.start.name, run.experiment.start.picture);
  /** A nudge at some places, for which Python needs a file. */
  const atPlaces = () => /** @type {import("./experiment.js").NoiseEdit | undefined} */ (run?.experiment.edits.find((one) => one.kind === "noise" && one.where));
  noisy.onclick = () => {
    const [one, edit] = [/** @type {Growing} */ (run), atPlaces()];
    const { preview, experiment } = one;
    if (edit) keep(new Blob([npy(firstNoise(experiment, preview.slope.length), [1, preview.slope.length, 16, 16])]), noiseFile(experiment.seed, edit));
  };
  pack.onclick = async () => {
    try {
      const template = JSON.parse(/** @type {HTMLElement} */ (document.getElementById("recording")).textContent ?? "");
      const one = /** @type {Growing} */ (run);
      const packed = await recording(one, template, { software: template.software, created: new Date().toISOString().replace("Z", "+00:00") });
      keep(new Blob([packed], { type: "application/zip" }), `${one.name}.zarr.zip`);
      told.textContent = `Then: probe verify --model ${one.name}.zarr.zip`;
    } catch (error) {
      told.textContent = String(/** @type {any} */ (error).message ?? error);
    }
  };
  head.onclick = () => run && edited({ kind: "head", layer: run.layers[at.layer], head: at.head, from: from() });
  scale.oninput = () => guess(false);
  scale.onchange = () => guess(true);

  /** The guess at this step as another guidance would have it: nothing is computed but a sum. @param {boolean} whole whether it is decoded as well */
  function guess(whole) {
    number.textContent = scale.value;
    const step = run?.steps[at.step];
    if (!run || !step?.uncond) return;
    const latents = denoised(step.input, guide(step.uncond, step.cond, Number(scale.value)), step.alphaBar);
    paintSmall(asAsked.canvas, previewed(latents, run.preview));
    asAsked.note.textContent = `with ${scale.value}`;
    if (whole) decode(latents);
  }

  /** Show what can be changed in a run, at a step. @param {Growing} next @param {State} state */
  function show(next, state) {
    const same = run === next && at.step === state.step;
    if (run !== next) {
      run = next;
      chips(words, (_, index) => run && draw(withoutWord(run.experiment, run.begun.words, index), run), "Draw without");
      chips(values, (word) => edited({ kind: "value", word, from: from() }), "Switch off");
      code.textContent = `${next.onGraphicsCard ? "# In the page, the UNet was computed on the graphics card (WebGPU).\n" : ""}${yaml(next.experiment)}`;
      const [{ start }, places] = [next.experiment, atPlaces()];
      noisy.hidden = !places;
      about.textContent = `python -m probe.run records the same in Python, from this file.${places ? ` It names ${noiseFile(next.experiment.seed, places)}: save that noise beside it.` : ""}${start ? ` It names ${start.name}: save that picture beside it. The address holds ${start.of ? "how that picture was drawn." : "all but the picture."}` : ""}`;
      begun.hidden = !start;
      told.textContent = "";
    }
    at = { step: state.step, layer: state.layer, head: state.head };
    save.disabled = !next.picture;
    noise(next);
    section.hidden = false;
    const when = from() ? `From step ${from()} on` : "From the first step on";
    off.about.textContent = `${when} a word is still attended to and says nothing. Move to another step to begin there.`;
    head.disabled = at.layer < 0;
    head.textContent = at.layer < 0 ? "Or a head: choose one in the grid above" : `Or switch off ${next.layers[at.layer].split(".transformer")[0]}, head ${at.head}`;
    const step = next.steps[at.step];
    dial.hidden = pair.hidden = !step?.uncond;
    other.about.textContent = step?.uncond ? `Both predictions of step ${at.step} are kept: any guidance can be tried after the fact. Sigma is ${short(next.meta.sigma[at.step])}.` : "This run had no guidance: there is one prediction alone.";
    if (!step || pair.hidden) return;
    const picture = next.pictures.get(at.step);
    asDrawn.note.textContent = `as drawn, with ${next.experiment.guidance}`;
    if (picture) paint(asDrawn.canvas, picture);
    else paintSmall(asDrawn.canvas, previewed(step.denoised, next.preview));
    if (!same) guess(true);
  }
  return { show, decoded: (/** @type {import("./growing.js").Picture} */ picture) => paint(asAsked.canvas, picture) };
}
