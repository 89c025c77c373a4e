// @ts-check
/** A card: another seed's noise is mixed into the first, by an amount, everywhere or where the reader paints. */

import { arrows, make, under } from "../probe/figures/drawing.js";
import { chosen, digits, nudged } from "./diffusion/noise.js";
import { generator } from "./diffusion/randn.js";
import { AMOUNT } from "./experiment.js";
import { paintSmall } from "./painting.js";
import { previewed } from "./preview.js";

/**
 * @typedef {import("./growing.js").Growing} Growing
 * @typedef {import("./experiment.js").Experiment} Experiment
 * @typedef {import("./experiment.js").NoiseEdit} NoiseEdit
 */

const SIDE = 16;

/** The first noise of an experiment, after its edits. @param {Experiment} experiment @param {number} channels @returns {Float32Array} (channel, place) */
export const firstNoise = ({ seed, edits }, channels) => nudged(generator(seed).normal(channels * SIDE ** 2), edits.filter((one) => one.kind === "noise"));

/** Bring the card to life. @param {{made: Element, about: Element}} card @param {(edit: NoiseEdit) => void} draw */
export function nudge({ made, about }, draw) {
  /** @type {Growing | null} */
  let run = null;
  let places = Array(SIDE ** 2).fill(false);
  let cursor = [0, 0]; // column and row, of the keyboard
  const all = make("div", "dials", "", made);
  const [label, dial] = [make("label", "dial", "noise of seed ", all), make("label", "dial", "amount ", all)];
  const seed = make("input", "", "", label, { type: "number", min: "0", max: "4294967295", step: "1", inputmode: "numeric" });
  const amount = make("input", "", "", dial, { type: "range", id: "nudge" });
  Object.assign(amount, AMOUNT, { value: "0.3" });
  const number = make("output", "", "", dial, { for: "nudge" });
  const pair = make("div", "pair", "", all);
  const [own, mixed] = ["", "nudged"].map((text) => {
    const figure = make("figure", "", "", pair);
    return { canvas: make("canvas", "", "", figure, { width: "128", height: "128", role: "img", "aria-label": `The first noise, ${text}` }), note: make("figcaption", "", text, figure) };
  });
  own.canvas.setAttribute("role", "application");
  own.canvas.className = "places";
  const row = make("div", "chips", "", all);
  const button = make("button", "", "Draw from the nudged noise", row, { type: "button" });
  const everywhere = make("button", "", "Everywhere", row, { type: "button", title: "Forget the painted places" });

  /** The edit that the dials say; nothing where the seed is none, or the run's own. @returns {NoiseEdit | null} */
  function asked() {
    const other = Number(seed.value);
    const usable = seed.value !== "" && Number.isInteger(other) && other >= 0 && other < 2 ** 32 && other !== run?.experiment.seed;
    const where = digits(places);
    return usable ? { kind: "noise", seed: other, amount: Number(amount.value), ...(where ? { where } : {}) } : null;
  }
  function show() {
    if (!run || run.experiment.start) return;
    const edit = asked();
    const count = places.filter(Boolean).length;
    number.textContent = amount.value;
    button.disabled = !edit;
    everywhere.hidden = !count;
    seed.setAttribute("aria-invalid", String(!edit));
    about.textContent = edit ? `${short(Math.sqrt(1 - edit.amount ** 2))} of its own noise and ${short(edit.amount)} of another seed’s: as noisy as before. A little keeps the layout, much loses it.` : `Choose another seed than ${run.experiment.seed}: 0 to 4294967295.`;
    const first = firstNoise({ ...run.experiment, edits: [] }, run.preview.slope.length);
    paintSmall(own.canvas, previewed(first, run.preview));
    if (count) shade(own.canvas.getContext("2d"));
    if (edit) paintSmall(mixed.canvas, previewed(nudged(first, [edit]), run.preview));
    const [column, line] = cursor;
    own.canvas.setAttribute("aria-label", `Where the first noise is changed: paint, or move with the arrow keys and choose with Enter. Column ${column}, row ${line}: ${places[line * SIDE + column] ? "changed" : "not chosen"}.`);
    own.note.textContent = count ? `changed at ${count} of 256 places` : "its own: paint where it is changed, or leave it";
    mixed.note.textContent = edit ? `with ${amount.value} of seed ${edit.seed}` : "no other noise";
  }
  /** Darken what is not chosen. @param {CanvasRenderingContext2D} pen */
  function shade(pen) {
    const size = pen.canvas.width / SIDE;
    pen.fillStyle = "rgb(0 0 0 / .68)";
    places.forEach((is, i) => is || pen.fillRect((i % SIDE) * size, Math.floor(i / SIDE) * size, size, size));
  }
  /** Choose a place and those next to it. @param {PointerEvent} event */
  function choose(event) {
    const [x, y] = under(event, own.canvas, SIDE, SIDE);
    for (const [right, down] of [[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]]) {
      const [column, line] = [x + right, y + down];
      if (Math.min(column, line) >= 0 && Math.max(column, line) < SIDE) places[line * SIDE + column] = true;
    }
    show();
  }
  own.canvas.onpointerdown = (/** @type {PointerEvent} */ event) => {
    if (event.button !== 0) return;
    own.canvas.setPointerCapture(event.pointerId);
    own.canvas.onpointermove = choose;
    choose(event);
  };
  own.canvas.onpointerup = own.canvas.onpointercancel = () => { own.canvas.onpointermove = null; };
  arrows(own.canvas, (right, down) => {
    cursor = [cursor[0] + right, cursor[1] + down].map((at) => Math.max(0, Math.min(SIDE - 1, at)));
    show();
    mark();
  }, () => {
    const at = cursor[1] * SIDE + cursor[0];
    places[at] = !places[at];
    show();
    mark();
  });
  /** Show where the keyboard is. */
  function mark() {
    const pen = own.canvas.getContext("2d");
    const size = own.canvas.width / SIDE;
    [pen.lineWidth, pen.strokeStyle] = [2, "white"];
    pen.strokeRect(cursor[0] * size + 1, cursor[1] * size + 1, size - 2, size - 2);
  }
  everywhere.onclick = () => {
    places.fill(false);
    show();
    button.focus();
  };
  seed.oninput = amount.oninput = show;
  button.onclick = () => {
    const edit = asked();
    if (edit) draw(edit);
  };

  return /** Show the noise of a run. @param {Growing} next */ (next) => {
    if (run === next) return;
    run = next;
    const before = /** @type {NoiseEdit | undefined} */ (next.experiment.edits.find(({ kind }) => kind === "noise"));
    seed.value = String(before?.seed ?? (next.experiment.seed + 1) % 2 ** 32);
    if (before) amount.value = String(before.amount);
    if (before) places = before.where ? chosen(before.where) : Array(SIDE ** 2).fill(false);
    all.hidden = next.experiment.start !== undefined;
    if (all.hidden) about.textContent = "This run began from a picture: it has no first noise of its own.";
    show();
  };
}

/** @param {number} value */
const short = (value) => String(Number(value.toFixed(2)));
