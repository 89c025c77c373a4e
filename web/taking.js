// @ts-check
/** What a reader takes away: text to copy, pictures to keep. */

import { keep } from "../probe/figures/drawing.js";
import { pngOf } from "./painting.js";
import { withText } from "./png.js";

/** Let a button copy an element's text. @param {HTMLButtonElement} button @param {Element} element */
export function copying(button, element) {
  const { textContent } = button;
  button.onclick = () => navigator.clipboard?.writeText(element.textContent ?? "").then(() => {
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = textContent; }, 1500);
  });
}

/** Save a square picture as a PNG. @param {string} name @param {Uint8ClampedArray} data RGBA @param {string} [experiment] lies inside */
export async function savePicture(name, data, experiment) {
  const png = await pngOf(data);
  keep(new Blob([experiment ? withText(png, "experiment", experiment) : png], { type: "image/png" }), name);
}
