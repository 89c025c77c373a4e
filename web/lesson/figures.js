// @ts-check
/**
 * The lesson's live figures: each is computed by the page's worker when it comes into view, and again
 * when the reader asks. A figure gives what computes it first.
 *
 * @typedef {import("./frame.js").About} About
 * @typedef {import("./asking.js").Drawn} Drawn
 * @typedef {import("../growing.js").Growing} Growing
 * @typedef {ReturnType<typeof frame>} Frame
 */

import { make } from "../../probe/figures/drawing.js";
import { loss } from "../diffusion/noising.js";
import { guide } from "../diffusion/guidance.js";
import { denoised } from "../diffusion/schedulers.js";
import { BOUNDS, FIRST } from "../experiment.js";
import { paintSmall } from "../painting.js";
import { photo } from "../photo.js";
import { asColourful, previewed, signed, size } from "../preview.js";
import { written } from "./article.js";
import { chart, frame, heated, latest, paint, paintOver } from "./frame.js";
import numbers from "./numbers.json" with { type: "json" };

const NEW_PAIR = "an astronaut scuba diving"; // both were seen in training, never together
const THUMBNAILS = 8;
const { picture: PICTURE, timesteps: TIMESTEPS } = numbers;
const EQUAL = 1e-6; // vectors whose cosine is so near to 1 are the same
const REACH = 3; // latents and noise are shown from -3 to 3: 99.7% of noise

/** Put a figure into its element. @param {string} name @param {HTMLElement} box @param {number} number @param {About} about @returns {() => void} computes it */
export function figure(name, box, number, about) {
  box.dataset.figure = name;
  return FIGURES[name](frame(box, name, number, about), about);
}

/** @type {Record<string, (f: Frame, about: About) => () => void>} */
export const FIGURES = { line, text, steps, noise, latents, model };

const percent = (/** @type {number} */ share, /** @type {string} */ lang) => written(share, lang, "percent");
const milliseconds = (/** @type {number} */ seconds) => Math.round(seconds * 1000);

/** The whole way: words, vectors, noise, latents, picture. @param {Frame} f @param {About} about */
function line(f, { asking }) {
  const prompt = f.prompt(f.texts.prompt, NEW_PAIR);
  const seed = f.seed(f.texts.seed, FIRST.seed);
  f.submit(f.texts.draw, () => void go(true));
  const words = make("div", "picture words", "", f.pictures);
  const list = make("p", "reading", "", words, { lang: "en" });
  make("p", "title", f.texts.words, words);
  const vectors = f.picture(f.texts.vectors, { width: 128, height: 77 });
  const [begin, end, picture] = [f.picture(f.texts.noise), f.picture(f.texts.latents), f.picture(f.texts.picture)];
  /** @type {Drawn | null} */
  let drawn = null;
  /** @type {Uint8ClampedArray | null} */
  let before = null;
  const offer = f.opener(() => drawn?.run);

  /** @param {boolean} byHand */
  async function go(byHand) {
    const wanted = f.readable(prompt);
    if (wanted === null || !seed.reportValidity()) return;
    await f.compute(async () => {
      f.say(f.said("reading"));
      const read = await asking.ask({ kind: "read", prompt: wanted });
      list.textContent = read.tokens.slice(1, read.end).join(" · ") || "–";
      const [tokens, width] = [read.ids.length, read.cond.length / read.ids.length];
      [vectors.canvas.width, vectors.canvas.height] = [width, tokens];
      paint(vectors.canvas, { width, height: tokens, data: signed(read.cond, reach(read.cond)) });
      vectors.say(f.texts.vectors, f.text("vectorsNote", { tokens, width }));
      drawn = await asking.draw({ ...FIRST, prompt: wanted, seed: Number(seed.value) }, (run) => {
        f.drawing(run);
        begun(run);
      }, byHand);
      begun(drawn.run);
      whole(drawn);
    }, byHand);
    offer();
  }

  /** @param {Growing} run that has a step at least */
  function begun(run) {
    const { preview, steps } = run;
    paintSmall(begin.canvas, previewed(steps[0].latents, preview, asColourful(steps[0].latents, steps[0].denoised)));
    const { denoised: guess } = steps[steps.length - 1];
    paintSmall(end.canvas, previewed(guess, preview));
    paintSmall(picture.canvas, previewed(guess, preview));
    const [channels, side] = [preview.slope.length, Math.sqrt(guess.length / preview.slope.length)];
    for (const [one, label] of /** @type {const} */ ([[begin, "noise"], [end, "latents"]])) one.say(f.texts[label], f.text("latentsNote", { channels, side }));
  }

  /** @param {Drawn} of */
  function whole({ run, each, decode }) {
    const [last, painted] = [/** @type {Float32Array} */ (run.latents), /** @type {import("../growing.js").Picture} */ (run.picture)];
    paintSmall(end.canvas, previewed(last, run.preview));
    paint(picture.canvas, painted);
    picture.say(f.texts.picture, f.text("pictureNote", { width: painted.width, height: painted.height }));
    const share = before ? differing(before, painted.data) : null;
    const again = share === null ? "" : share === 0 ? ` ${f.texts.same}` : ` ${f.text("differs", { share: share < 0.005 ? written(share * 100, f.lang) + "%" : percent(share, f.lang) })}`;
    before = painted.data;
    f.facts.textContent = f.text("facts", { steps: run.calls, seconds: written(each * run.calls, f.lang), each: milliseconds(each), decode: milliseconds(decode) }) + again;
  }
  return () => go(false);
}

/** Two sentences, position by position. @param {Frame} f @param {About} about */
function text(f, { asking }) {
  const inputs = [f.prompt(f.texts.first, NEW_PAIR), f.prompt(f.texts.second, "a picture of diving")];
  f.submit(f.texts.read, () => void go(true));
  const list = make("ol", "positions", "", f.pictures);

  /** @param {boolean} byHand */
  async function go(byHand) {
    const wanted = inputs.map((input) => f.readable(input));
    if (wanted.includes(null)) return;
    await f.compute(async () => {
      f.say(f.said("reading"));
      const [one, two] = await Promise.all(wanted.map((prompt) => asking.ask({ kind: "read", prompt })));
      const width = one.cond.length / one.ids.length;
      const far = reach(one.cond);
      const rows = Math.max(one.end, two.end) + 1;
      const alike = Array.from({ length: rows }, (_, at) => cosine(vector(one.cond, at, width), vector(two.cond, at, width)));
      list.replaceChildren(heading(), ...alike.map((value, at) => position(at, value, [one, two], width, far)));
      make("li", "rest", f.text("rest", { last: one.ids.length - 1 }), list);
      const same = alike.filter((_, at) => one.ids[at] === two.ids[at]).length;
      f.facts.textContent = f.text("facts", { positions: rows, same, equal: alike.filter((value) => value > 1 - EQUAL).length });
    }, byHand);
  }

  /** What the columns are. */
  function heading() {
    const row = make("li", "position names", "", undefined, { "aria-hidden": "true" });
    make("span", "at", "", row);
    for (const key of ["first", "second"]) make("div", "token", f.texts[key], row);
    make("span", "alike", f.texts.cosine, row);
    return row;
  }

  /** @param {number} at @param {number} alike @param {any[]} read @param {number} width @param {number} far */
  function position(at, alike, read, width, far) {
    const row = make("li", "position", "");
    make("span", "at", String(at), row, { "aria-label": `${f.texts.position} ${at}` });
    for (const { ids, tokens, end, cond } of read) {
      const cell = make("div", "token", "", row);
      const special = at === 0 ? f.texts.start : at >= end ? f.texts.end : "";
      make("span", special ? "special" : "word", special || tokens[at], cell, special ? {} : { lang: "en" });
      make("small", "", f.text("id", { id: String(ids[at]) }), cell);
      const strip = make("canvas", "strip", "", cell, { width: String(width), height: "1", "aria-hidden": "true" });
      paint(strip, { width, height: 1, data: signed(vector(cond, at, width), far) });
    }
    const same = alike > 1 - EQUAL;
    const said = same ? "1" : alike.toFixed(alike > 0.9995 ? 5 : 3);
    make("span", same ? "alike same" : "alike", said, row, { "aria-label": `${f.texts.cosine} ${said}` });
    return row;
  }
  return () => go(false);
}

/** Every step of a drawing, looked at. @param {Frame} f @param {About} about */
function steps(f, { asking }) {
  const prompt = f.prompt(f.texts.prompt, FIRST.prompt);
  f.submit(f.texts.draw, () => void go(true));
  const step = f.slider(f.texts.step, { min: "0", max: String(FIRST.steps - 1), step: "1" }, String(Math.round(FIRST.steps / 6)));
  const dial = f.slider(f.texts.guidance, /** @type {any} */ (Object.fromEntries(Object.entries(BOUNDS.guidance).map(([key, value]) => [key, String(value)]))), String(FIRST.guidance));
  const words = make("div", "chips", "", f.form, { role: "group", "aria-label": f.texts.word });
  const shown = Object.fromEntries(["input", "uncond", "cond", "guided", "map"].map((key) => [key, f.picture(f.texts[key].replaceAll(/\{\w+\}/g, "…"))]));
  const strip = make("div", "strip", "", f.box, { role: "group", "aria-label": f.texts.strip });
  /** @type {Drawn | null} */
  let drawn = null;
  let word = 0;
  /** @type {Map<string, import("../growing.js").Picture>} pictures of this run */
  const decoded = new Map();
  const offer = f.opener(() => drawn?.run);

  /** @param {boolean} byHand */
  async function go(byHand) {
    const wanted = f.readable(prompt);
    if (wanted === null) return;
    await f.compute(async () => {
      drawn = await asking.draw({ ...FIRST, prompt: wanted }, f.drawing, byHand);
      decoded.clear();
      chips();
      look(true);
      f.say(f.said("decoding"));
      await thumbnails(drawn.run);
    }, byHand);
    offer();
  }

  /** The words to choose from: at first the one with the greatest map. */
  function chips() {
    const { run } = /** @type {Drawn} */ (drawn);
    const most = (/** @type {number} */ i) => (run.channels[i].kind === "word" ? run.parts.maps.high[i] : 0);
    word = run.channels.reduce((best, _, i) => (most(i) > most(best) ? i : best), 0);
    words.replaceChildren(...run.channels.filter(({ kind }) => kind === "word").map(({ label }, i) => {
      const chip = make("button", "chip", label, undefined, { type: "button", lang: "en", "aria-pressed": String(i === word) });
      chip.onclick = () => {
        word = i;
        [...words.children].forEach((other, j) => other.setAttribute("aria-pressed", String(j === i)));
        look(false);
      };
      return chip;
    }));
  }

  /** @param {Growing} run */
  async function thumbnails(run) {
    const indices = [...new Set(Array.from({ length: THUMBNAILS }, (_, i) => Math.round((i * (run.calls - 1)) / (THUMBNAILS - 1))))];
    const made = indices.map((index) => {
      const button = make("button", "thumbnail", "", undefined, { type: "button", "aria-label": f.text("strips", { step: index }) });
      const canvas = make("canvas", "", "", button, { width: "128", height: "128" });
      make("span", "", String(index), button, { "aria-hidden": "true" });
      paintSmall(canvas, previewed(run.steps[index].denoised, run.preview));
      button.onclick = () => {
        step.input.value = String(index);
        look(true);
      };
      return { index, canvas, button };
    });
    strip.replaceChildren(...made.map(({ button }) => button));
    for (const { index, canvas } of made) {
      if (!run.pictures.has(index)) run.decoded(index, await asking.decode(run.steps[index].denoised));
      paint(canvas, /** @type {any} */ (run.pictures.get(index)));
    }
  }

  let moved = ""; // how far the words move the guess
  /** Show the step that is chosen. @param {boolean} rest whether pictures are decoded */
  function look(rest) {
    if (!drawn) return;
    const [{ run }, index, scale] = [drawn, Number(step.input.value), Number(dial.input.value)];
    const one = run.steps[index];
    const uncond = /** @type {Float32Array} */ (one.uncond);
    const clean = (/** @type {Float32Array} */ prediction) => denoised(one.input, prediction, one.alphaBar);
    /** @type {Record<string, Float32Array>} */
    const guesses = { input: one.latents, uncond: clean(uncond), cond: clean(one.cond), guided: clean(guide(uncond, one.cond, scale)) };
    const sigma = run.meta.sigma[index];
    const map = one.maps[word];
    const most = Math.max(...run.channels.map(({ kind }, i) => (kind === "word" ? run.parts.maps.high[i] : 0)));
    [step.shown.textContent, dial.shown.textContent] = [String(index), String(scale)];
    shown.input.say(f.texts.input, f.texts.inputNote);
    shown.uncond.say(f.texts.uncond, f.texts.uncondNote);
    moved = f.text("condNote", { moved: (sigma * size(one.cond.map((value, i) => value - uncond[i]))).toFixed(3) });
    shown.cond.say(f.texts.cond, moved);
    shown.guided.say(f.text("guided", { guidance: scale }), f.text("guidedNote", { guidance: run.experiment.guidance }));
    shown.map.say(f.text("map", { word: run.channels[word].label }), f.text("mapNote", { most: percent(Math.max(...map), f.lang) }));
    f.facts.textContent = f.text("facts", { step: index, steps: run.calls - 1, timestep: String(run.meta.timestep[index]), signal: percent(Math.sqrt(one.alphaBar), f.lang), noise: percent(Math.sqrt(1 - one.alphaBar), f.lang) });
    const key = (/** @type {string} */ name) => `${index} ${name} ${name === "guided" ? scale : ""}`;
    for (const [name, latents] of Object.entries(guesses)) {
      const picture = decoded.get(key(name));
      if (picture) paint(shown[name].canvas, picture);
      else paintSmall(shown[name].canvas, previewed(latents, run.preview, name === "input" ? asColourful(one.latents, one.denoised) : 1));
    }
    paint(shown.map.canvas, /** @type {any} */ (run.picture));
    paintOver(shown.map.canvas, map, most);
    if (rest) decodeAll({ run, guesses, key });
  }
  const decodeAll = latest(async (/** @type {{run: Growing, guesses: Record<string, Float32Array>, key: (name: string) => string}} */ { run, guesses, key }) => {
    for (const [name, latents] of Object.entries(guesses)) {
      if (!decoded.has(key(name))) decoded.set(key(name), await asking.decode(latents));
      if (run !== drawn?.run) return;
    }
    look(false);
  });
  for (const { input } of [step, dial]) {
    input.oninput = () => look(false);
    input.onchange = () => {
      look(true);
      f.hear(`${f.facts.textContent} ${f.texts.cond}: ${moved}.`);
    };
  }
  return () => go(false);
}

/** An exercise of training: noise of a timestep, the prediction and the loss. @param {Frame} f @param {About} about */
function noise(f, { asking }) {
  const words = f.prompt(f.texts.words, FIRST.prompt);
  f.submit(f.texts.ask, () => void answer(true));
  const timestep = f.slider(f.texts.timestep, { min: "0", max: String(TIMESTEPS - 1), step: "1" }, String(Math.round(TIMESTEPS * 0.45)));
  let seed = 1;
  f.button(f.texts.another, () => {
    seed += 1;
    answer(true);
  });
  f.button(f.texts.sweep, () => void sweep());
  const shown = Object.fromEntries(["clean", "noisy", "added", "predicted", "mistake", "remains"].map((key) => [key, f.picture(f.texts[key])]));
  const plot = make("div", "plot", "", f.box);
  const canvas = make("canvas", "chart", "", plot, { role: "img", "aria-label": f.texts.chart });
  const legend = make("ul", "legend", "", plot);
  for (const key of ["own", "wrong", "student"]) make("li", key, f.texts[key], legend);
  make("p", "note", f.texts.chart, plot);
  /** @type {{timestep: number, loss: number, lazy: number, right: boolean}[]} */
  const measured = [];
  /** @type {Drawn | null} */
  let drawn = null;
  const offer = f.opener(() => drawn?.run);
  const colour = (/** @type {number} */ i) => getComputedStyle(legend.children[i]).borderLeftColor;

  /** The model's answer at a timestep. @param {number} at @param {string} prompt @param {boolean} decode */
  async function measure(at, prompt, decode) {
    const { run } = /** @type {Drawn} */ (drawn);
    const noised = await asking.ask({ kind: "noise", latents: run.latents, timestep: at, seed, prompt, decode });
    const lazy = loss(noised.noisy, noised.noise);
    measured.push({ timestep: at, loss: noised.loss, lazy, right: prompt === run.experiment.prompt });
    return { ...noised, lazy };
  }

  function draw() {
    const of = (/** @type {(one: typeof measured[number]) => boolean} */ which, /** @type {"loss" | "lazy"} */ key) => measured.filter(which).map((one) => /** @type {[number, number]} */ ([one.timestep, one[key]]));
    chart(canvas, [
      { colour: colour(2), shape: "line", points: of(() => true, "lazy") },
      { colour: colour(1), shape: "ring", points: of((one) => !one.right, "loss") },
      { colour: colour(0), shape: "dot", points: of((one) => one.right, "loss") },
    ], { most: TIMESTEPS - 1, least: 0.001, greatest: 5, now: Number(timestep.input.value), axis: f.texts.axis });
  }

  /** @param {boolean} rest whether pictures are decoded */
  function answer(rest) {
    timestep.shown.textContent = timestep.input.value;
    const prompt = f.readable(words);
    if (drawn && prompt !== null) ask({ at: Number(timestep.input.value), prompt, rest });
  }
  const ask = latest(async (/** @type {{at: number, prompt: string, rest: boolean}} */ { at, prompt, rest }) => {
    try {
      await show(await measure(at, prompt, rest), rest);
    } catch (error) {
      f.say(f.said("failed", { message: String(/** @type {any} */ (error).message ?? error) }));
    }
  });

  /** @param {any} noised @param {boolean} rest */
  async function show(noised, rest) {
    const { run } = /** @type {Drawn} */ (drawn);
    const channels = run.preview.slope.length;
    const first = (/** @type {Float32Array} */ values) => signed(values.subarray(0, values.length / channels), REACH);
    const channel = f.text("channelNote", { channels });
    paintSmall(shown.added.canvas, first(noised.noise));
    paintSmall(shown.predicted.canvas, first(noised.prediction));
    paintSmall(shown.mistake.canvas, first(noised.prediction.map((/** @type {number} */ value, /** @type {number} */ i) => value - noised.noise[i])));
    for (const key of ["added", "predicted"]) shown[key].say(f.texts[key], channel);
    shown.mistake.say(f.texts.mistake, channel);
    shown.clean.say(f.texts.clean, f.texts.cleanNote);
    shown.noisy.say(f.texts.noisy, f.text("noisyNote", { signal: percent(Math.sqrt(noised.alphaBar), f.lang), noise: percent(Math.sqrt(1 - noised.alphaBar), f.lang) }));
    shown.remains.say(f.texts.remains, f.texts.remainsNote);
    f.facts.textContent = f.text("facts", { timestep: String(noised.timestep), alphabar: noised.alphaBar.toFixed(4), loss: noised.loss.toPrecision(3), lazy: noised.lazy.toPrecision(3) });
    draw();
    canvas.setAttribute("aria-label", `${f.texts.chart}. ${f.facts.textContent}`);
    if (noised.picture) paint(shown.remains.canvas, noised.picture);
    else paintSmall(shown.remains.canvas, previewed(noised.denoised, run.preview));
    if (rest) f.hear(f.facts.textContent);
    if (!rest) return paintSmall(shown.noisy.canvas, previewed(noised.noisy, run.preview, asColourful(noised.noisy, /** @type {Float32Array} */ (run.latents))));
    paint(shown.noisy.canvas, await asking.decode(noised.noisy));
    f.box.dataset.shown = `${noised.timestep}`;
  }

  /** Measure at some timesteps along the whole range. */
  async function sweep() {
    const prompt = f.readable(words);
    if (prompt === null || !drawn) return;
    const all = [20, 60, 120, 200, 300, 400, 500, 600, 700, 800, 900, TIMESTEPS - 1];
    await f.compute(async () => {
      for (const [done, at] of all.entries()) {
        f.say(f.said("measuring", { done: done + 1, all: all.length }), (done + 1) / all.length, done === 0);
        await measure(at, prompt, false);
        draw();
      }
    });
  }

  timestep.input.oninput = () => answer(false);
  timestep.input.onchange = () => answer(true);
  new ResizeObserver(draw).observe(plot);
  return () => void f.compute(async () => {
    drawn = await asking.draw({ ...FIRST }, f.drawing);
    paint(shown.clean.canvas, /** @type {any} */ (drawn.run.picture));
    f.say(f.said("decoding"));
    await show(await measure(Number(timestep.input.value), FIRST.prompt, true), true);
  }).then(offer);
}

/** A picture through the VAE and back. @param {Frame} f @param {About} about */
function latents(f, { asking }) {
  const which = make("div", "chips", "", f.form, { role: "group", "aria-label": f.texts.picture });
  const choices = ["painted", "drawing"].map((key) => f.button(f.texts[key], () => void go(key, true), which));
  const label = make("label", "file", f.texts.own, which);
  const file = make("input", "", "", label, { type: "file", accept: "image/png,image/jpeg,image/webp" });
  const shown = { picture: f.picture(f.texts.picture), back: f.picture(f.texts.back), lost: f.picture(f.texts.lost) };
  const channels = make("div", "channels", "", f.pictures);
  shown.picture.cell.after(channels);
  /** @type {ReturnType<Frame["picture"]>[]} */
  let cells = [];
  /** @type {Drawn | null} */
  let drawn = null;
  let warm = false;

  /** @param {string} key @param {boolean} byHand @param {Uint8ClampedArray} [own] the picture of a file */
  async function go(key, byHand, own) {
    choices.forEach((one, i) => one.setAttribute("aria-pressed", String(["painted", "drawing"][i] === key)));
    await f.compute(async () => {
      drawn ??= await asking.draw({ ...FIRST }, f.drawing);
      const { run, each } = drawn;
      const data = own ?? (key === "painted" ? /** @type {any} */ (run.picture).data : stranger());
      f.say(f.said("decoding"));
      if (!warm) await asking.ask({ kind: "encode", picture: data }); // the encoder is opened at its first call
      warm = true;
      const [began, { latents: squeezed }, encoded] = [performance.now(), await asking.ask({ kind: "encode", picture: data }), performance.now()];
      const back = await asking.decode(squeezed);
      const [encode, decode] = [(encoded - began) / 1000, (performance.now() - encoded) / 1000];
      const decibels = psnr(data, back.data).toFixed(1);
      const numbers = (data.length / 4) * 3;
      paint(shown.picture.canvas, { width: PICTURE, height: PICTURE, data });
      shown.picture.say(f.texts.picture, f.text("pictureNote", { values: numbers }));
      paintChannels(squeezed, run.preview.slope.length);
      paint(shown.back.canvas, back);
      shown.back.say(f.texts.back, f.text("backNote", { psnr: decibels }));
      paintSmall(shown.lost.canvas, heated(difference(data, back.data), 64));
      shown.lost.say(f.texts.lost, f.texts.lostNote);
      f.facts.textContent = `${f.text("facts", { pixels: numbers, latents: squeezed.length, psnr: decibels, encode: milliseconds(encode), decode: milliseconds(decode) })} ${f.text("times", { step: milliseconds(each), ratio: written(decode / each, f.lang) })}`;
      f.box.dataset.psnr = decibels;
    }, byHand);
  }

  /** @param {Float32Array} squeezed @param {number} count */
  function paintChannels(squeezed, count) {
    if (!cells.length) cells = Array.from({ length: count }, (_, channel) => f.picture(f.text("channel", { channel }), { parent: channels, width: 64, height: 64 }));
    cells.forEach(({ canvas, say }, channel) => {
      paintSmall(canvas, signed(squeezed.subarray((channel * squeezed.length) / count, ((channel + 1) * squeezed.length) / count), REACH));
      say(f.text("channel", { channel }), f.text("latentsNote", { values: squeezed.length / count }));
    });
  }

  /** @param {File | undefined} one */
  async function read(one) {
    if (!one) return;
    try {
      await go("own", true, (await photo(one)).data);
    } catch {
      f.say(f.texts.unread);
    }
  }
  file.onchange = () => {
    void read(file.files[0]);
    file.value = ""; // so that the same one can be taken again
  };
  const ours = (/** @type {DragEvent} */ event) => { // and not of the drawing view
    event.preventDefault();
    event.stopPropagation();
  };
  f.box.ondragover = ours;
  f.box.ondrop = (event) => {
    ours(event);
    void read(event.dataTransfer?.files[0]);
  };
  return () => void go("painted", false);
}

/** Two prompts from the same noise, and what their attention goes to. @param {Frame} f @param {About} about */
function model(f, { asking }) {
  const inputs = [f.prompt(f.texts.first, "a cat and a dog"), f.prompt(f.texts.second, "a cat next to a dog")];
  const seed = f.seed(f.texts.seed, FIRST.seed);
  f.submit(f.texts.draw, () => void go(true));
  const cells = inputs.map(() => {
    const cell = f.picture("…");
    const bar = make("div", "shares", "", cell.cell, { "aria-hidden": "true" });
    return { ...cell, parts: ["start", "words", "end", "padding"].map((kind) => [kind, make("span", kind, "", bar)]) };
  });
  /** @type {(Drawn | undefined)[]} */
  const drawn = [];
  const offers = inputs.map((_, i) => f.opener(() => drawn[i]?.run, cells[i].cell));

  /** @param {boolean} byHand */
  async function go(byHand) {
    const wanted = inputs.map((input) => f.readable(input));
    if (wanted.includes(null) || !seed.reportValidity()) return;
    await f.compute(async () => {
      for (const [i, prompt] of wanted.entries()) {
        const experiment = { ...FIRST, prompt: /** @type {string} */ (prompt), seed: Number(seed.value) };
        drawn[i] = await asking.draw(experiment, (run) => {
          f.drawing(run, i / 2, 0.5);
          paintSmall(cells[i].canvas, previewed(run.steps[run.steps.length - 1].denoised, run.preview));
        }, byHand);
        show(i, /** @type {Drawn} */ (drawn[i]).run);
        offers[i]();
      }
      f.facts.textContent = f.text("facts", { seed: seed.value });
    }, byHand);
  }

  /** @param {number} i @param {Growing} run */
  function show(i, run) {
    const { canvas, say, parts } = cells[i];
    paint(canvas, /** @type {any} */ (run.picture));
    const shares = Object.fromEntries(Object.entries(run.meta.shares).map(([kind, values]) => [kind, mean(/** @type {number[]} */ (values))]));
    say(f.text("picture", { prompt: run.experiment.prompt }), f.text("shares", { words: percent(shares.words, f.lang), start: percent(shares.start, f.lang), rest: percent(shares.end + shares.padding, f.lang) }));
    for (const [kind, part] of parts) part.style.flexGrow = String(shares[kind]);
  }
  return () => void go(false);
}

/** @param {ArrayLike<number>} values */
const mean = (values) => Array.from(values).reduce((sum, value) => sum + value, 0) / values.length;
/** The vector at a position. @param {Float32Array} values @param {number} at @param {number} width */
const vector = (values, at, width) => values.subarray(at * width, (at + 1) * width);
/** How far colours reach: 99 of 100 numbers. @param {Float32Array} values */
const reach = (values) => [...values].map(Math.abs).sort((a, b) => a - b)[Math.floor(values.length * 0.99)];

/** @param {Float32Array} one @param {Float32Array} two */
export function cosine(one, two) {
  const product = (/** @type {Float32Array} */ a, /** @type {Float32Array} */ b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
  return product(one, two) / Math.sqrt(product(one, one) * product(two, two));
}

/** The share of pixels that differ. @param {Uint8ClampedArray} one @param {Uint8ClampedArray} two RGBA */
export function differing(one, two) {
  let count = 0;
  for (let i = 0; i < one.length; i += 4) if (one[i] !== two[i] || one[i + 1] !== two[i + 1] || one[i + 2] !== two[i + 2]) count += 1;
  return count / (one.length / 4);
}

/** Mean absolute difference of each pixel, in levels of 255. @param {Uint8ClampedArray} one @param {Uint8ClampedArray} two RGBA */
function difference(one, two) {
  return Float32Array.from({ length: one.length / 4 }, (_, i) => [0, 1, 2].reduce((sum, k) => sum + Math.abs(one[4 * i + k] - two[4 * i + k]), 0) / 3);
}

/** Peak signal-to-noise ratio of two pictures, in decibels. @param {Uint8ClampedArray} one @param {Uint8ClampedArray} two RGBA */
export function psnr(one, two) {
  let sum = 0;
  for (let i = 0; i < one.length; i++) if (i % 4 < 3) sum += (one[i] - two[i]) ** 2;
  return 10 * Math.log10(255 ** 2 / (sum / ((one.length / 4) * 3)));
}

/** A pen on an empty picture. @returns {any} */
const square = () => new OffscreenCanvas(PICTURE, PICTURE).getContext("2d", { willReadFrequently: true });

/** A drawing from outside of the model's world, with fine lines: that of experiments/deep_dive.py. */
function stranger() {
  const pen = square();
  const fill = (/** @type {string} */ colour, /** @type {number[]} */ [left, top, right, bottom]) => {
    pen.fillStyle = colour;
    pen.fillRect(left, top, right - left, bottom - top);
  };
  fill("rgb(214 234 248)", [0, 0, PICTURE, PICTURE]);
  fill("rgb(120 170 90)", [0, 92, PICTURE, PICTURE]);
  pen.fillStyle = "rgb(176 58 46)";
  pen.beginPath();
  for (const [x, y] of [[30, 62], [64, 34], [98, 62]]) pen.lineTo(x, y);
  pen.fill();
  fill("rgb(245 222 179)", [38, 62, 90, 106]);
  for (let offset = 0; offset < 52; offset += 4) fill("rgb(160 120 80)", [38 + offset, 62, 39 + offset, 106]);
  return pen.getImageData(0, 0, PICTURE, PICTURE).data;
}
