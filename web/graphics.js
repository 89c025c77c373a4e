// @ts-check
/**
 * The choice to compute on the graphics card, for those who have one that this browser can use. It is
 * tried, told, and taken only where it agrees and is faster.
 *
 * @typedef {import("./webgpu.js").Trial} Trial
 */

import { make } from "../probe/figures/drawing.js";
import { short } from "../probe/figures/payload.js";
import { inside } from "./client.js";

const [ORT, WASM] = ["ort.webgpu.mjs", "ort.webgpu.wasm.gz"];

/** Offer it. @param {Element} box @param {{ask: (question: Record<string, any>) => Promise<any>, busy: () => boolean, trying: (is: boolean) => void}} doing */
export async function offer(box, { ask, busy, trying }) {
  const gpu = /** @type {any} */ (navigator).gpu;
  if (inside() || !gpu || !(await gpu.requestAdapter().catch(() => null))) return;
  const label = make("label", "gpu", "", box);
  const chosen = /** @type {HTMLInputElement} */ (make("input", "", "", label, { type: "checkbox", id: "gpu" }));
  make("span", "", "Compute on the graphics card (WebGPU): tried first, and taken only where it agrees and is faster", label);
  const told = make("p", "", "", box, { role: "status" });
  chosen.onchange = async () => {
    if (busy()) {
      chosen.checked = !chosen.checked;
      told.textContent = "Wait until the picture is drawn.";
      return;
    }
    chosen.disabled = true;
    trying(true);
    told.textContent = chosen.checked ? "Loading 7 MB, and computing one step with both …" : "";
    try {
      const address = (/** @type {string} */ name) => new URL(name, location.href).href;
      const answer = await ask(chosen.checked ? { kind: "gpu", ort: address(ORT), wasm: address(WASM) } : { kind: "gpu" });
      chosen.checked = answer.used;
      told.textContent = sentence(answer);
    } catch (error) {
      chosen.checked = false;
      told.textContent = `WebGPU does not compute it here (${String(/** @type {any} */ (error)?.message ?? error).split("\n")[0].slice(0, 160)}). It stays on the processor.`;
    }
    chosen.disabled = false;
    trying(false);
  };
}

/** What came of it. @param {Partial<Trial>} answer */
export function sentence({ used, agrees, difference = NaN, seconds }) {
  if (!seconds) return "It is computed on the processor again.";
  const speed = `${Math.round(seconds.webgpu * 1000)} ms a step on the graphics card, ${Math.round(seconds.wasm * 1000)} ms on the processor`;
  const apart = `They differ by ${short(difference)} at most`;
  if (used) return `The graphics card computes the UNet from now on: ${speed}. ${apart}.`;
  if (agrees) return `It stays on the processor, which is faster here: ${speed}. ${apart}.`;
  return `It stays on the processor: ${apart[0].toLowerCase()}${apart.slice(1)} at the first step, more than 0.001.`;
}
