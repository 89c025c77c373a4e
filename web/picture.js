// @ts-check
/**
 * A picture to begin from: painted here, a file, or the picture that is looked at; and its strength.
 *
 * @typedef {import("./growing.js").Growing} Growing
 * @typedef {import("./experiment.js").Start} Start
 * @typedef {import("./growing.js").Held} Held
 */

import { make } from "../probe/figures/drawing.js";
import { crc32 } from "./checksums.js";
import { STRENGTH } from "./experiment.js";
import { pictureOf } from "./growing.js";
import { photo } from "./photo.js";

const [SIDE, UNDOS] = [128, 30];
const COLOURS = { black: "#20222a", white: "#ffffff", red: "#d7263d", orange: "#f28c28", yellow: "#f7d038", green: "#3f9b4b", blue: "#2f6fd0", sky: "#a9d6f5", brown: "#8a5a34", grey: "#9a9da6" };

/**
 * Bring the panel to life.
 *
 * @param {HTMLDetailsElement} panel
 * @param {{looked: () => Growing | null, steps: () => number}} page
 */
export function pictureIn(panel, { looked, steps }) {
  const summary = make("summary", "", "", panel);
  const all = make("div", "begin", "", panel);
  const canvas = make("canvas", "", "", all, { width: String(SIDE), height: String(SIDE), role: "img" });
  const pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d", { willReadFrequently: true }));
  const tools = make("div", "tools", "", all);
  make("p", "", "Paint here, with mouse, finger or pen; or choose, paste or drop a picture. It stays on this device.", tools);
  const colours = make("div", "colours", "", tools, { role: "group", "aria-label": "Colour of the brush" });
  const row = make("div", "chips", "", tools);
  const size = make("input", "", "", make("label", "dial", "brush ", row), { type: "range", min: "2", max: "40", value: "14" });
  const [undo, fill, clear] = ["Undo", "Fill", "Clear"].map((text) => make("button", "", text, row, { type: "button" }));
  const from = make("div", "chips", "", tools);
  const choose = make("button", "", "Choose a file", from, { type: "button" });
  const file = make("input", "", "", from, { type: "file", accept: "image/png,image/jpeg,image/webp", tabindex: "-1", "aria-label": "A picture to begin from" });
  file.hidden = true;
  const take = make("button", "", "The picture I look at", from, { type: "button" });
  const dial = make("label", "dial", "strength ", tools);
  const strength = make("input", "", "", dial, { type: "range", id: "strength" });
  Object.assign(strength, STRENGTH, { value: "0.6" });
  const number = make("output", "", "", dial, { for: "strength" });
  const use = make("input", "", "", undefined, { type: "checkbox", id: "begin" });
  make("label", "check", "", tools).append(use, "begin the next drawing from it");
  const said = make("p", "", "", tools, { role: "status" });
  make("button", "", "Draw from this picture", tools, { type: "submit" }).onclick = () => { use.checked = true; };

  let colour = COLOURS.black;
  /** @type {Pick<Held, "name" | "of"> | null} what is on the canvas, where it was not painted here */
  let origin = null;
  /** @type {{image: ImageData, origin: Pick<Held, "name" | "of"> | null}[]} */
  const before = [];

  const pixels = () => pen.getImageData(0, 0, SIDE, SIDE);
  function show() {
    const whole = steps();
    const run = Math.floor(whole * Number(strength.value));
    number.textContent = `${strength.value}: ${run} of ${whole} steps`;
    summary.textContent = use.checked ? `Begins from a picture, strength ${strength.value}` : "Begin from a picture";
    panel.classList.toggle("used", use.checked);
    undo.disabled = !before.length;
    take.disabled = !looked()?.picture;
    canvas.setAttribute("aria-label", `The picture to begin from: ${origin?.name ?? "painted here"}. Without a pointer, choose a file or take the picture you look at.`);
  }
  /** Keep what is on the canvas for an undo, before it becomes something else. @param {Pick<Held, "name" | "of"> | null} next */
  function turn(next) {
    before.push({ image: pixels(), origin });
    if (before.length > UNDOS) before.shift();
    origin = next;
  }
  /** Put a picture on the canvas. @param {Held} held @param {string} note */
  function put({ data, name, of }, note) {
    turn({ name, of });
    pen.putImageData(new ImageData(Uint8ClampedArray.from(data), SIDE, SIDE), 0, 0);
    used(note);
  }
  /** It is meant to be used. @param {string} [note] */
  function used(note = "") {
    use.checked = true;
    said.textContent = note;
    told();
  }
  /** Show it, and let the page know that the picture is another. */
  function told() {
    show();
    panel.dispatchEvent(new Event("input", { bubbles: true }));
  }
  /** Take a file, or say why not. @param {Blob | null | undefined} blob */
  async function open(blob) {
    if (!blob) return;
    panel.open = true;
    try {
      const { data, note } = await photo(blob);
      put({ data, name: named("photo", data), of: null }, note);
    } catch (error) {
      said.textContent = String(/** @type {any} */ (error).message ?? error);
    }
  }

  for (const [name, value] of Object.entries(COLOURS)) {
    const button = make("button", "colour", "", colours, { type: "button", "aria-label": name === "white" ? "white, the eraser" : name, "aria-pressed": String(value === colour), title: name });
    button.style.setProperty("--colour", value);
    button.onclick = () => {
      colour = value;
      for (const other of colours.children) other.setAttribute("aria-pressed", String(other === button));
    };
  }
  const place = (/** @type {PointerEvent} */ event) => {
    const { left, top, width, height } = canvas.getBoundingClientRect();
    return [((event.clientX - left) / width) * SIDE, ((event.clientY - top) / height) * SIDE];
  };
  canvas.onpointerdown = (/** @type {PointerEvent} */ event) => {
    if (event.button !== 0) return;
    event.preventDefault();
    canvas.setPointerCapture(event.pointerId);
    turn(null);
    Object.assign(pen, { strokeStyle: colour, lineWidth: Number(size.value), lineCap: "round", lineJoin: "round" });
    let last = place(event);
    const line = (/** @type {PointerEvent} */ next) => {
      pen.beginPath();
      pen.moveTo(last[0], last[1]);
      for (const one of next.getCoalescedEvents?.() ?? []) pen.lineTo(...(last = /** @type {[number, number]} */ (place(one))));
      last = place(next);
      pen.lineTo(last[0], last[1]);
      pen.stroke();
    };
    line(event);
    canvas.onpointermove = line;
  };
  canvas.onpointerup = canvas.onpointercancel = () => {
    if (canvas.onpointermove) used();
    canvas.onpointermove = null;
  };
  undo.onclick = () => {
    const last = before.pop();
    if (!last) return;
    pen.putImageData(last.image, 0, 0);
    origin = last.origin;
    told();
  };
  fill.onclick = () => {
    turn(null);
    wash(colour);
    used();
  };
  clear.onclick = () => {
    turn(null);
    wash(COLOURS.white);
    use.checked = false;
    said.textContent = "";
    told();
  };
  const wash = (/** @type {string} */ with_) => {
    pen.fillStyle = with_;
    pen.fillRect(0, 0, SIDE, SIDE);
  };
  choose.onclick = () => file.click();
  file.onchange = async () => {
    await open(file.files?.[0]);
    file.value = ""; // the same file can be chosen again
  };
  take.onclick = () => {
    const held = looked() && pictureOf(/** @type {Growing} */ (looked()));
    if (held) put(held, `The picture of ${held.name.replace(".png", "")}.`);
  };
  /** Pictures are taken anywhere on the page, other files here alone: to say what is wrong with them. @param {DragEvent} event */
  const isOurs = (event) => panel.contains(/** @type {Node} */ (event.target)) || [...(event.dataTransfer?.items ?? [])].some(({ type }) => type.startsWith("image/"));
  document.body.addEventListener("dragover", (event) => {
    if (isOurs(event)) event.preventDefault();
  });
  document.body.addEventListener("drop", (event) => {
    if (!isOurs(event)) return;
    event.preventDefault();
    void open(event.dataTransfer?.files[0]);
  });
  document.addEventListener("paste", (event) => {
    const pasted = [...(event.clipboardData?.files ?? [])].find(({ type }) => type.startsWith("image/"));
    if (!pasted || !panel.checkVisibility()) return; // text goes where it always goes, and a lesson takes no picture
    event.preventDefault();
    void open(pasted);
  });
  panel.ontoggle = strength.oninput = use.onchange = show;
  wash(COLOURS.white);
  show();
  panel.hidden = false;

  return {
    show,
    /** What is on the canvas. @returns {Held} */
    held() {
      const { data } = pixels();
      return { data, ...(origin ?? { name: named("drawing", data), of: null }) };
    },
    /** What the next drawing begins from. @returns {{start?: Start}} */
    start() {
      if (!use.checked) return {};
      const { data: picture, ...named } = this.held();
      return { start: { ...named, picture, strength: Number(strength.value) } };
    },
    /** Take what an address says; a picture that is not in it is asked for. @param {Start} start */
    set(start) {
      strength.value = String(start.strength);
      if (start.picture) return put({ data: start.picture, name: start.name, of: start.of }, "");
      panel.open = true;
      said.textContent = `This address begins from ${start.name}, a picture that no address can hold. Choose or paint it here, and draw.`;
      show();
    },
  };
}

/** A name that is the same for the same picture. @param {string} kind @param {Uint8ClampedArray} data */
const named = (kind, data) => `${kind}-${crc32(new Uint8Array(data.buffer, data.byteOffset, data.byteLength)).toString(16).padStart(8, "0")}.png`;
