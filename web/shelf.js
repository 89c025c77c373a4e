// @ts-check
/**
 * What was drawn since the page was opened: to look at again, alone or beside another.
 *
 * @typedef {import("./growing.js").Growing | import("./recordings/stored.js").Stored} Run
 */

import { make } from "../probe/figures/drawing.js";

const MOST = 8; // runs that are kept: some 5 MB each

/** @param {HTMLElement} section @param {HTMLInputElement} keep whether the next run is shown beside the one that is looked at @param {(run: Run, beside: Run | null) => void} look */
export function shelf(section, keep, look) {
  /** @type {{run: Run, card: any, again: any, compare: any}[]} */
  const kept = [];
  /** @type {Run | null} */
  let now = null;
  /** @type {Run | null} */
  let other = null;
  make("h2", "", "What you drew or opened", section);
  const list = make("ul", "cards", "", section);

  /** Keep a run. @param {Run} run */
  function add(run) {
    const card = make("li", "card", "");
    const again = make("button", "again", "", card, { type: "button" });
    const canvas = make("canvas", "", "", again, { width: "128", height: "128", role: "img", "aria-label": `The picture of ${run.meta.name}` });
    cover(canvas, run);
    make("span", "what", run.meta.prompt || "no words", again);
    make("small", "", run.meta.facts.replace("emojiworld, ", ""), again);
    const compare = make("button", "compare", "beside", card, { type: "button" });
    again.onclick = () => look(run, null);
    compare.onclick = () => now && look(now, other === run ? null : run);
    list.prepend(card);
    kept.unshift({ run, card, again, compare });
    for (const old of kept.splice(MOST)) old.card.remove();
    section.hidden = false;
  }

  /** Say which run is looked at, and which is beside it. @param {Run} run @param {Run | null} beside */
  function mark(run, beside) {
    [now, other] = [run, beside];
    for (const { run: one, again, compare } of kept) {
      again.setAttribute("aria-pressed", String(one === run));
      compare.setAttribute("aria-pressed", String(one === beside));
      compare.setAttribute("aria-label", `Show ${one.meta.name}, ${one.meta.prompt}, beside the picture that is looked at`);
      compare.hidden = one === run;
    }
  }
  return { add, mark, runs: () => kept.map(({ run }) => run), comparing: () => keep.checked };
}

/** The finished picture on a card; of a run without one, its last guess. @param {any} canvas @param {Run} run */
function cover(canvas, { parts: { final, denoised, source } }) {
  const { shape: [count, height, width] = [0], columns = 1, bitmap } = final ?? source ?? denoised ?? {};
  const pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = width > canvas.width;
  if (!count) return;
  const [wide, high] = [width, height].map((size) => (size / Math.max(width, height)) * canvas.width);
  const from = [((count - 1) % columns) * width, Math.floor((count - 1) / columns) * height];
  pen.drawImage(bitmap, ...from, width, height, (canvas.width - wide) / 2, (canvas.height - high) / 2, wide, high);
}
