// @ts-check
/** A card: another seed's noise is mixed into the first, by an amount. */

import { make } from "../probe/figures/drawing.js";
import { nudged } from "./diffusion/noise.js";
import { generator } from "./diffusion/randn.js";
import { AMOUNT } from "./experiment.js";
import { paintSmall } from "./painting.js";
import { previewed } from "./preview.js";

/**
 * @typedef {import("./growing.js").Growing} Growing
 * @typedef {import("./experiment.js").NoiseEdit} NoiseEdit
 */

/** Bring the card to life. @param {{made: Element, about: Element}} card @param {(edit: NoiseEdit) => void} draw */
export function nudge({ made, about }, draw) {
  /** @type {Growing | null} */
  let run = null;
  const all = make("div", "dials", "", made);
  const [label, dial] = [make("label", "dial", "noise of seed ", all), make("label", "dial", "amount ", all)];
  const seed = make("input", "", "", label, { type: "number", min: "0", max: "4294967295", step: "1", inputmode: "numeric" });
  const amount = make("input", "", "", dial, { type: "range", id: "nudge" });
  Object.assign(amount, AMOUNT, { value: "0.3" });
  const number = make("output", "", "", dial, { for: "nudge" });
  const pair = make("div", "pair", "", all);
  const [own, mixed] = ["the noise of this seed", "nudged"].map((text) => {
    const figure = make("figure", "", "", pair);
    return { canvas: make("canvas", "", "", figure, { width: "128", height: "128", role: "img", "aria-label": `First noise, ${text}` }), note: make("figcaption", "", text, figure) };
  });
  const button = make("button", "", "Draw from the nudged noise", all, { type: "button" });

  /** The edit that the dials say; nothing where the seed is none, or the run's own. @returns {NoiseEdit | null} */
  function asked() {
    const other = Number(seed.value);
    const usable = seed.value !== "" && Number.isInteger(other) && other >= 0 && other < 2 ** 32 && other !== run?.experiment.seed;
    return usable ? { kind: "noise", seed: other, amount: Number(amount.value) } : null;
  }
  function show() {
    if (!run || run.experiment.start) return;
    const edit = asked();
    number.textContent = amount.value;
    button.disabled = !edit;
    seed.setAttribute("aria-invalid", String(!edit));
    about.textContent = edit ? `${short(Math.sqrt(1 - edit.amount ** 2))} of its own noise and ${short(edit.amount)} of another seed’s: as noisy as before. A little keeps the layout, much loses it.` : `Choose another seed than ${run.experiment.seed}: 0 to 4294967295.`;
    const first = generator(run.experiment.seed).normal(run.preview.slope.length * 256);
    paintSmall(own.canvas, previewed(first, run.preview));
    if (edit) paintSmall(mixed.canvas, previewed(nudged(first, [edit]), run.preview));
    mixed.note.textContent = edit ? `with ${amount.value} of seed ${edit.seed}` : "no other noise";
  }
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
    all.hidden = next.experiment.start !== undefined;
    if (all.hidden) about.textContent = "This run began from a picture: it has no first noise of its own.";
    show();
  };
}

/** @param {number} value */
const short = (value) => String(Number(value.toFixed(2)));
