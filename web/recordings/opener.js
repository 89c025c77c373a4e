// @ts-check
/**
 * Recordings from the reader's disk: a button, a place to drop one, and the sample. What reads them is
 * loaded when it is first wanted.
 *
 * @typedef {import("./stored.js").Stored} Stored
 * @typedef {import("../experiment.js").Experiment} Experiment
 * @typedef {{show: (run: Stored) => void, draw: (experiment: Experiment, run: Stored) => void, say: (text: string, aloud?: boolean) => void, known: string[]}} Doing
 */

import { make } from "../../probe/figures/drawing.js";
import { inside } from "../client.js";
import { drawable } from "./drawable.js";

const SAMPLE = "sample.zarr.zip";

/** Bring the section to life, and the line above a recording's pictures. @param {HTMLElement} section @param {HTMLElement} line @param {Doing} doing */
export function opener(section, line, { show, draw, say, known }) {
  make("h2", "", "Open a recording", section);
  make("p", "about", "A run that this page saved, or one that probe recorded in Python, of any model: NAME.zarr.zip. It is read here, and goes nowhere.", section);
  const zone = make("div", "zone", "", section);
  const pick = (/** @type {string} */ text, /** @type {Record<string, string>} */ attributes) => {
    const label = make("label", "pick", "", zone);
    const input = /** @type {HTMLInputElement} */ (make("input", "", "", label, { type: "file", ...attributes }));
    make("span", "", text, label);
    input.onchange = () => {
      void open([...(input.files ?? [])]);
      input.value = ""; // so that the same one can be opened again
    };
  };
  pick("Open a recording …", { accept: ".zip", id: "open-file" });
  if ("webkitdirectory" in HTMLInputElement.prototype) pick("or its folder …", { webkitdirectory: "", id: "open-folder" });
  const sample = make("button", "", "The sample", zone, { type: "button", id: "open-sample", title: "“An astronaut scuba diving”, recorded in Python" });
  sample.hidden = inside(); // one file has no room for it
  make("span", "hint", "or drop one anywhere on this page", zone);
  const told = make("p", "told", "", section);
  const about = make("p", "", "", line);
  const again = make("button", "", "Draw it here, beside it", line, { type: "button" });
  sample.onclick = () => void open([]);

  let last = Promise.resolve(); // what is opened
  const doc = document.documentElement;
  const hasFiles = (/** @type {DragEvent} */ event) => event.dataTransfer?.types.includes("Files");
  doc.addEventListener("dragover", (event) => {
    if (event.defaultPrevented || !hasFiles(event)) return; // that place takes files of its own
    event.preventDefault();
    section.classList.add("over");
  });
  for (const kind of ["dragleave", "drop"]) doc.addEventListener(kind, () => section.classList.remove("over"));
  doc.addEventListener("drop", (event) => {
    if (event.defaultPrevented || !hasFiles(event)) return;
    event.preventDefault();
    void open([...(event.dataTransfer?.files ?? [])].slice(0, 1));
  });

  /** Read a recording after those before it: the last that was asked for is looked at. @param {File[]} files */
  function open(files) {
    last = last.then(() => read(files));
    return last;
  }
  /** Read a recording and show it; the sample, where no files are given. @param {File[]} files */
  async function read(files) {
    const far = (/** @type {number} */ share) => say((told.textContent = `Opening … ${Math.floor(share * 100)}%`), share === 0);
    far(0);
    try {
      const { stored } = await import("./stored.js");
      const run = await stored(files.length ? (files[0].webkitRelativePath ? files : files[0]) : await theSample(), undefined, far);
      told.textContent = "";
      show(run);
      say(`${run.meta.name} is open. ${run.meta.following.text}`.trim());
    } catch (error) {
      const named = files.length ? `${(files[0].webkitRelativePath.split("/")[0] || files[0].name).slice(0, 100)} cannot be opened. ` : "";
      told.textContent = `${named}${/** @type {any} */ (error)?.message ?? error}`;
      say(told.textContent);
    }
  }

  /** Say above the pictures what is looked at, if it was opened, and offer to draw what the model of this page draws as well. @param {Stored | null} run */
  function looked(run) {
    line.hidden = !run;
    if (!run) return;
    const experiment = drawable(run.recipe, run.recording.attributes, known);
    again.hidden = typeof experiment === "string";
    about.textContent = `A recording, ${run.meta.name}: ${run.meta.facts}. ${typeof experiment === "string" ? experiment : ""}`;
    again.onclick = () => typeof experiment === "object" && draw(experiment, run);
  }
  return { looked };
}

/** The sample of the package, which lies beside the page. */
async function theSample() {
  const response = await fetch(SAMPLE);
  if (!response.ok) throw new Error(`The sample did not come (${response.status}). Build the page again: python3 tasks.py web.`);
  return new File([await response.blob()], SAMPLE);
}
