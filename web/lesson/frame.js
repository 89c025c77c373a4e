// @ts-check
/**
 * What the live figures are made of: a frame with its controls, pictures and what is said of them,
 * and the paint for pictures, latents, maps and a chart.
 *
 * @typedef {import("./article.js").Lesson} Lesson
 * @typedef {ReturnType<typeof import("./asking.js").asking>} Asking
 * @typedef {{lesson: Lesson, asking: Asking, known: string[], progress: () => number, open: (run: import("../growing.js").Growing) => void}} About
 *          `progress` is the share of the model that is here
 * @typedef {{width: number, height: number, data: Uint8ClampedArray}} Picture RGBA
 */

import { make } from "../../probe/figures/drawing.js";
import { table } from "../../probe/figures/payload.js";
import { toAddress } from "../experiment.js";
import { HEAT } from "../parts.js";
import { wordsOf } from "../prompt.js";
import { filled, written } from "./article.js";
import { Stopped } from "./asking.js";

const HOT = table(HEAT);
const LONGEST = 75; // words: the tokens of a prompt less its start and end

/** A figure's frame. @param {HTMLElement} box @param {string} name @param {number} number @param {About} about */
export function frame(box, name, number, { lesson, asking, known, progress, open }) {
  const { lang, ui } = lesson;
  const texts = lesson.figures[name];
  const text = (/** @type {string} */ key, /** @type {Record<string, string | number>} */ values = {}) => filled(texts[key], values, lang);
  const said = (/** @type {string} */ key, /** @type {Record<string, string | number>} */ values = {}) => filled(ui[key], values, lang);
  const caption = make("figcaption", "", "", box);
  make("span", "number", `${said("figure", { number })} `, caption);
  caption.append(texts.title);
  const form = make("form", "controls", "", box);
  const pictures = make("div", "pictures", "", box);
  const facts = make("p", "facts", "", box);
  const state = make("div", "state", "", box);
  const bar = make("progress", "", "", state, { max: "1", value: "0", "aria-label": texts.title });
  const seen = make("p", "", "", state, { "aria-hidden": "true" });
  const heard = make("p", "heard", "", box, { role: "status" });
  const mistake = make("p", "mistake", "", box, { role: "alert" });
  mistake.hidden = true;

  /** Say how far it is; what is worth hearing goes to screen readers as well. @param {string} words @param {number | null} [share] @param {boolean} [aloud] */
  function say(words, share = null, aloud = true) {
    seen.textContent = words;
    if (aloud) heard.textContent = words;
    bar.hidden = share === null;
    if (share !== null) bar.value = share;
    state.hidden = !words;
  }

  /**
   * Do something in turn, and say what becomes of it.
   * @param {() => Promise<void>} job @param {boolean} [byHand]
   */
  async function compute(job, byHand = false) {
    box.dataset.state = "computing";
    mistake.hidden = true;
    const wait = (/** @type {boolean} */ aloud) => {
      const which = asking.wait();
      if (which === "model") say(said("loading", { share: written(progress(), lang, "percent") }), progress(), aloud);
      else if (which) say(which === "drawing" ? said("busy") : said("queued"), null, aloud);
    };
    wait(true);
    const waiting = setInterval(() => wait(false), 500);
    try {
      await asking.inTurn(() => {
        clearInterval(waiting);
        return job();
      }, byHand);
      say("");
      heard.textContent = facts.textContent;
      box.dataset.state = "computed";
    } catch (error) {
      clearInterval(waiting);
      box.dataset.state = error instanceof Stopped ? "stopped" : "failed";
      say(error instanceof Stopped ? said("stopped") : said("failed", { message: String(/** @type {any} */ (error).message ?? error) }));
    }
  }

  /** A labelled control. @param {string} label @param {string} kind of input @param {Record<string, string>} attributes */
  function field(label, kind, attributes) {
    const whole = make("label", kind, "", form);
    make("span", "", `${label} `, whole);
    return make("input", "", "", whole, { type: kind, ...attributes });
  }

  return {
    box, text, said, texts, lang, form, pictures, facts, say, compute, field,
    /** Let screen readers hear what the reader changed. @param {string} words */
    hear: (words) => { heard.textContent = words; },
    /** What is typed as a prompt. @param {string} label @param {string} value */
    prompt: (label, value) => {
      const input = field(label, "text", { list: `${lang}-words`, autocomplete: "off", autocapitalize: "off", spellcheck: "false", maxlength: "200", lang: "en" });
      input.value = value;
      return input;
    },
    /** A whole number from 0 on. @param {string} label @param {number} value */
    seed: (label, value) => {
      const input = field(label, "number", { min: "0", max: "4294967295", step: "1", inputmode: "numeric", required: "" });
      input.value = String(value);
      return input;
    },
    /** @param {string} label @param {Record<string, string>} bounds @param {string} value */
    slider: (label, bounds, value) => {
      const input = field(label, "range", bounds);
      input.value = value;
      const shown = make("output", "", value, input.parentElement);
      return { input, shown };
    },
    /** @param {string} label @param {() => void} pressed @param {Element} [parent] */
    button: (label, pressed, parent = form) => {
      const made = make("button", "", label, parent, { type: "button" });
      made.onclick = pressed;
      return made;
    },
    /** The button that sends the form. @param {string} label @param {() => void} sent */
    submit: (label, sent) => {
      form.onsubmit = (/** @type {Event} */ event) => {
        event.preventDefault();
        sent();
      };
      return make("button", "main", label, form, { type: "submit" });
    },
    /** A prompt that the model can read, or null; what is wrong is said. @param {HTMLInputElement} input */
    readable: (input) => {
      const words = wordsOf(input.value);
      const strange = [...new Set(words.filter((word) => !known.includes(word)))];
      const wrong = strange.length ? said("strange", { words: strange.map((word) => `“${word}”`).join(", "), known: known.join(", ") }) : words.length > LONGEST ? said("long", { tokens: LONGEST + 2 }) : "";
      mistake.hidden = !wrong;
      mistake.textContent = wrong;
      return wrong ? null : words.join(" ");
    },
    /** A picture with its label and a note. @param {string} label @param {{width?: number, height?: number, name?: string, parent?: Element}} [of] */
    picture: (label, { width = 128, height = 128, name = "", parent = pictures } = {}) => {
      const cell = make("div", `picture ${name}`, "", parent);
      const canvas = make("canvas", "", "", cell, { width: String(width), height: String(height), role: "img", "aria-label": label });
      const title = make("p", "title", label, cell);
      const note = make("p", "note", "", cell);
      return {
        canvas, cell,
        /** @param {string} words @param {string} [under] */
        say: (words, under = "") => {
          title.textContent = words;
          note.textContent = under;
          canvas.setAttribute("aria-label", [words, under].filter(Boolean).join(": "));
        },
      };
    },
    /** A link to the drawing view, with the same run. @param {() => import("../growing.js").Growing | undefined} run @param {Element} [parent] */
    opener: (run, parent = box) => {
      const link = make("a", "open", said("open"), make("p", "", "", parent), { href: "#drawing" });
      link.onclick = (/** @type {MouseEvent} */ event) => {
        const one = run();
        if (!one || event.metaKey || event.ctrlKey || event.shiftKey) return;
        event.preventDefault();
        open(one);
      };
      link.hidden = true;
      return () => {
        const one = run();
        link.hidden = !one;
        if (one) link.href = `${toAddress("", one.experiment, one.layers)}#drawing`;
      };
    },
    /** Say how far a drawing is. @param {import("../growing.js").Growing} run @param {number} [begin] @param {number} [share] of the whole */
    drawing: (run, begin = 0, share = 1) => {
      const reached = run.steps.length;
      say(said("drawing", { step: reached, steps: run.calls }), begin + (share * reached) / run.calls, reached === 1);
    },
  };
}

/** Paint a picture over a whole canvas. @param {HTMLCanvasElement} canvas @param {Picture} picture */
export function paint(canvas, { width, height, data }) {
  const small = new OffscreenCanvas(width, height);
  small.getContext("2d")?.putImageData(new ImageData(Uint8ClampedArray.from(data), width, height), 0, 0);
  const pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  pen.imageSmoothingEnabled = false;
  pen.globalAlpha = 1;
  pen.drawImage(small, 0, 0, canvas.width, canvas.height);
}

/** Values from 0 to `most` in the colours of heat, RGBA. @param {ArrayLike<number>} values @param {number} most @param {number} [alpha] */
export function heated(values, most, alpha = 255) {
  const data = new Uint8ClampedArray(4 * values.length);
  for (let i = 0; i < values.length; i++) {
    const colour = HOT[Math.max(0, Math.min(255, Math.round((255 * values[i]) / (most || 1))))];
    data.set([colour & 255, (colour >> 8) & 255, (colour >> 16) & 255, alpha], 4 * i);
  }
  return data;
}

/** Paint a map over what a canvas shows. @param {HTMLCanvasElement} canvas @param {Float32Array} map @param {number} most */
export function paintOver(canvas, map, most) {
  const side = Math.sqrt(map.length);
  const small = new OffscreenCanvas(side, side);
  small.getContext("2d")?.putImageData(new ImageData(heated(map, most), side, side), 0, 0);
  const pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  pen.imageSmoothingEnabled = false;
  pen.globalAlpha = 0.68;
  pen.drawImage(small, 0, 0, canvas.width, canvas.height);
  pen.globalAlpha = 1;
}

/**
 * A chart of points, its second axis logarithmic.
 *
 * @param {HTMLCanvasElement} canvas
 * @param {{colour: string, shape: "dot" | "ring" | "line", points: [number, number][]}[]} series
 * @param {{most: number, least: number, greatest: number, now: number | null, axis: string}} of `most` along the first axis; the second from least to greatest
 */
export function chart(canvas, series, { most, least, greatest, now, axis }) {
  const [width, height] = [canvas.clientWidth || 600, 230];
  const ratio = devicePixelRatio || 1;
  [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
  const pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  pen.scale(ratio, ratio);
  const [left, right, top, bottom] = [46, 10, 10, 40];
  const ink = getComputedStyle(canvas).color;
  const x = (/** @type {number} */ value) => left + ((width - left - right) * value) / most;
  const y = (/** @type {number} */ value) => top + ((height - top - bottom) * (Math.log(greatest) - Math.log(Math.max(value, least)))) / (Math.log(greatest) - Math.log(least));
  pen.font = "13px system-ui, sans-serif";
  pen.lineWidth = 1;
  for (let power = Math.ceil(Math.log10(least)); power <= Math.log10(greatest); power++) {
    [pen.strokeStyle, pen.fillStyle, pen.globalAlpha] = [ink, ink, 0.18];
    pen.beginPath();
    pen.moveTo(left, y(10 ** power));
    pen.lineTo(width - right, y(10 ** power));
    pen.stroke();
    [pen.globalAlpha, pen.textAlign] = [0.85, "right"];
    pen.fillText(String(10 ** power), left - 6, y(10 ** power) + 4);
  }
  pen.textAlign = "center";
  for (const value of [0, most / 2, most]) pen.fillText(String(Math.round(value)), Math.min(x(value), width - 18), height - bottom + 17);
  pen.fillText(axis, left + (width - left - right) / 2, height - 6, width - left);
  if (now !== null) {
    pen.globalAlpha = 0.35;
    pen.fillRect(x(now) - 0.5, top, 1, height - top - bottom);
  }
  pen.globalAlpha = 1;
  for (const { colour, shape, points } of series) {
    [pen.strokeStyle, pen.fillStyle, pen.lineWidth] = [colour, colour, 2];
    pen.beginPath();
    for (const [at, value] of [...points].sort((a, b) => a[0] - b[0])) {
      if (shape === "line") {
        pen.fillRect(x(at) - 2, y(value) - 2, 4, 4);
        pen.lineTo(x(at), y(value));
      }
      else {
        pen.moveTo(x(at) + 4, y(value));
        pen.arc(x(at), y(value), 4, 0, 2 * Math.PI);
      }
    }
    if (shape === "dot") pen.fill();
    else pen.stroke();
  }
}

/** Call with the last arguments, once the call before is over. @template A @param {(argument: A) => Promise<void>} call @returns {(argument: A) => void} */
export function latest(call) {
  /** @type {{argument: A} | null} */
  let next = null;
  let running = false;
  return async (argument) => {
    next = { argument };
    if (running) return;
    running = true;
    while (next) {
      const now = next.argument;
      next = null;
      await call(now);
    }
    running = false;
  };
}
