// @ts-check
/**
 * What the player draws with: maps and lines on canvases, and elements of the page.
 *
 * @typedef {import("./payload.js").Numbers} Numbers
 * @typedef {import("./payload.js").Sheet} Sheet
 */
import { high, map, ranged, shading, short, table } from "./payload.js";

export const SIGNED = table([[33, 102, 172], [146, 197, 222], [247, 247, 247], [253, 184, 99], [179, 88, 6]]); // less and more
export const LINES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]; // Okabe and Ito
export const DASHES = [[], [7, 3], [2, 3], [9, 3, 2, 3]];
const scratch = new Map();

/** An image of a size to paint numbers on, made once. @param {number} width @param {number} height */
export function page(width, height) {
  const key = `${width}x${height}`;
  let found = scratch.get(key);
  if (!found) {
    const canvas = new OffscreenCanvas(width, height);
    const pen = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d"));
    const image = pen.createImageData(width, height);
    found = { canvas, pen, image, pixels: new Uint32Array(image.data.buffer) };
    scratch.set(key, found);
  }
  return found;
}

/** Put painted numbers on a canvas, in square pixels. @param {any} canvas @param {{canvas: OffscreenCanvas, pen: any, image: ImageData}} painted @param {number} opacity */
export function show(canvas, { canvas: sheet, pen, image }, opacity) {
  pen.putImageData(image, 0, 0);
  const brush = canvas.getContext("2d");
  brush.imageSmoothingEnabled = false;
  brush.globalAlpha = opacity;
  brush.drawImage(sheet, 0, 0, canvas.width, canvas.height);
  brush.globalAlpha = 1;
}

/** Paint a map, over a span of steps; `range` has the values of the first and the last colour. @param {any} canvas @param {Numbers} part @param {number[]} span @param {number} first @param {number} second @param {Uint32Array} colours @param {number[]} range */
export function paintMap(canvas, part, [from, to], first, second, colours, range, opacity = 1) {
  const steps = part.shape[part.shape.length - 1];
  const [height, width] = part.shape.slice(-3, -1);
  const sheet = page(width, height);
  const { pixels } = sheet;
  if (from === to) { // the bytes as they are
    const block = part.shape.length === 5 ? first * part.shape[1] + second : first;
    const list = ranged(colours, high(part, first, second), range);
    for (let i = 0, at = block * height * width * steps + from; i < pixels.length; i++, at += steps) pixels[i] = list[part.data[at]];
  } else {
    const shade = shading(range);
    map(part, [from, to], first, second).values.forEach((value, i) => { pixels[i] = colours[shade(value)]; });
  }
  show(canvas, sheet, opacity);
}

/** Paint one map less another, and say how far the colours reach: as far as they have to, or as far as they are told. @param {any} canvas @param {{values: Float32Array, height: number, width: number}} one @param {Float32Array} two @param {number} [told] */
export function paintLess(canvas, { values, height, width }, two, opacity = 1, told) {
  const reach = told ?? values.reduce((most, value, i) => Math.max(most, Math.abs(value - two[i])), 0);
  const sheet = page(width, height);
  values.forEach((value, i) => { sheet.pixels[i] = SIGNED[Math.round(Math.max(0, Math.min(255, 127.5 + (127.5 * (value - two[i])) / (reach || 1))))]; });
  show(canvas, sheet, opacity);
  return reach;
}

/** Show whose self-attention it is. @param {any} canvas @param {Numbers} part @param {{row: number, row_to: number, column: number, column_to: number}} square */
export function outline(canvas, part, { row, row_to, column, column_to }) {
  const [height, width] = [canvas.height / part.shape[1], canvas.width / part.shape[2]];
  const pen = canvas.getContext("2d");
  [pen.strokeStyle, pen.lineWidth] = ["#fff", 4];
  pen.strokeRect(column * width, row * height, (column_to - column + 1) * width, (row_to - row + 1) * height);
}

/** Paint one picture of a sheet. @param {HTMLCanvasElement} canvas @param {Sheet} sheet @param {number} index */
export function paintPicture(canvas, sheet, index) {
  const [, height, width] = sheet.shape;
  const pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  pen.imageSmoothingEnabled = false;
  pen.drawImage(sheet.bitmap, (index % sheet.columns) * width, Math.floor(index / sheet.columns) * height, width, height, 0, 0, canvas.width, canvas.height);
}

/** Paint lines from 0 up, over the steps. @param {any} canvas @param {any[]} lines @param {number} tall @param {(top: number) => string} [text] */
export function paintLines(canvas, lines, tall, text = (top) => `0 to ${short(top)}`) {
  const [width, ratio] = [canvas.parentElement.clientWidth, devicePixelRatio || 1];
  if (!width) return;
  [canvas.width, canvas.height] = [Math.round(width * ratio), tall * ratio];
  const top = Math.max(...lines.flatMap(({ values, spread }) => values.map((/** @type {number} */ value, /** @type {number} */ i) => (value ?? 0) + (spread?.[i] ?? 0)))) || 1;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const ink = getComputedStyle(canvas).color;
  pen.font = "12px system-ui, sans-serif";
  for (const { values, spread = [], colour, dash = [] } of lines) {
    const place = (/** @type {number} */ value, /** @type {number} */ i) => [((i + 0.5) * width) / values.length, tall - 4 - ((tall - 22) * value) / top];
    pen.strokeStyle = pen.fillStyle = colour ?? ink;
    [pen.lineWidth, pen.globalAlpha] = [1.5, 1];
    pen.setLineDash(dash);
    pen.beginPath();
    values.forEach((/** @type {number} */ value, /** @type {number} */ i) => value !== null && pen.lineTo(...place(value, i)));
    pen.stroke();
    pen.globalAlpha = 0.45;
    spread.forEach((/** @type {number} */ one, /** @type {number} */ i) => {
      if (!one || values[i] === null) return;
      const [x, y] = place(values[i] + one, i);
      pen.fillRect(x - 1, y, 2, place(values[i] - one, i)[1] - y);
    });
  }
  [pen.globalAlpha, pen.fillStyle] = [0.8, ink];
  pen.fillText(text(top), 4, tall === 54 ? tall - 6 : 12);
}

/**
 * An element with a class, text and attributes, put into a parent.
 * @param {string} tag @param {string} name @param {string} text @param {Element} [parent] @param {Record<string, string>} [attributes]
 * @returns {any}
 */
export function make(tag, name = "", text = "", parent, attributes = {}) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text) element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent?.append(element);
  return element;
}

/** The column and row under the pointer. @param {PointerEvent} event @param {Element} element @param {number} columns @param {number} rows */
export function under(event, element, columns, rows) {
  const place = element.getBoundingClientRect();
  return [Math.floor(((event.clientX - place.left) / place.width) * columns), Math.floor(((event.clientY - place.top) / place.height) * rows)];
}

/** Let the arrow keys move within an element that has focus, and Enter choose. @param {any} element @param {(right: number, down: number) => void} move @param {() => void} [enter] */
export function arrows(element, move, enter) {
  element.tabIndex = 0;
  element.onkeydown = (/** @type {KeyboardEvent} */ event) => {
    const way = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[event.key];
    if (way) move(way[0], way[1]);
    else if (event.key === "Enter" && enter) enter();
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
}

/** A choice. @param {Element} parent @param {string} label @param {[string, string][]} options value and text @param {string} value */
export function choice(parent, label, options, value) {
  const select = make("select", "", "", parent, { "aria-label": label });
  for (const [one, text] of options) make("option", "", text, select, { value: one });
  select.value = value;
  return select;
}

/** Do something once the page has nothing else to do. @param {() => void} task */
export function idly(task) {
  if (typeof requestIdleCallback === "undefined") setTimeout(task, 200); // Safari
  else requestIdleCallback(task);
}

/** Give a file to the reader to keep. @param {Blob} blob @param {string} name */
export function keep(blob, name) {
  const link = make("a", "", "", undefined, { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
