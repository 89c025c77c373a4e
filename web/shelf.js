// @ts-check
/**
 * What was drawn since the page was opened: to look at again, alone or beside another.
 *
 * @typedef {import("./growing.js").Growing} Growing
 */

import { make } from "../probe/figures/drawing.js";

const MOST = 8; // runs that are kept: some 5 MB each

/** @param {HTMLElement} section @param {(run: Growing, beside: Growing | null) => void} look */
export function shelf(section, look) {
  /** @type {{run: Growing, card: any, again: any, compare: any}[]} */
  const kept = [];
  /** @type {Growing | null} */
  let now = null;
  /** @type {Growing | null} */
  let other = null;
  const head = make("div", "head", "", section);
  make("h2", "", "What you drew", head);
  const label = make("label", "", "", head);
  const keep = make("input", "", "", label, { type: "checkbox", id: "keep" });
  make("span", "", "show the next picture beside the one I look at", label);
  const list = make("ul", "cards", "", section);

  /** Keep a run. @param {Growing} run */
  function add(run) {
    const card = make("li", "card", "");
    const again = make("button", "again", "", card, { type: "button" });
    const canvas = make("canvas", "", "", again, { width: "128", height: "128", role: "img", "aria-label": `The picture of ${run.name}` });
    canvas.getContext("2d").drawImage(run.parts.final.bitmap, 0, 0);
    make("span", "what", run.experiment.prompt || "no words", again);
    make("small", "", run.meta.facts.replace("emojiworld, ", ""), again);
    const compare = make("button", "compare", "beside", card, { type: "button" });
    again.onclick = () => look(run, null);
    compare.onclick = () => now && look(now, other === run ? null : run);
    list.prepend(card);
    kept.unshift({ run, card, again, compare });
    for (const old of kept.splice(MOST)) old.card.remove();
    section.hidden = false;
  }

  /** Say which run is looked at, and which is beside it. @param {Growing} run @param {Growing | null} beside */
  function mark(run, beside) {
    [now, other] = [run, beside];
    for (const { run: one, again, compare } of kept) {
      again.setAttribute("aria-pressed", String(one === run));
      compare.setAttribute("aria-pressed", String(one === beside));
      compare.setAttribute("aria-label", `Show ${one.name}, ${one.experiment.prompt}, beside the picture that is looked at`);
      compare.hidden = one === run;
    }
  }
  return { add, mark, runs: () => kept.map(({ run }) => run), comparing: () => keep.checked };
}
