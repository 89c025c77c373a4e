// @ts-check
/**
 * What the player is given and remembers: payloads opened, numbers read from them, the state in an
 * address. Pure: no page is needed, and node tests it.
 *
 * @typedef {{kind: "numbers", shape: number[], scales: number[], high: number[], data: Uint8Array}} Numbers
 * @typedef {{kind: "sheet", shape: number[], columns: number, bitmap: ImageBitmap}} Sheet
 * @typedef {{label: string, kind: string}} Channel
 * @typedef {{part: string, title: string, note: string}} Panel
 * @typedef {{meta: Record<string, any>, parts: Record<string, any>, heads?: any, first?: any}} Run
 * @typedef {{step: number, channel: number, reading: string, layer: number, head: number, branch: string, per: "words" | "tokens",
 *            steps: "one" | "before" | "after" | "from" | "all", from: number, against: number,
 *            opacity: number, scale: "words" | "word" | "step" | "locked", vmin?: number, vmax?: number}} State
 */

export const KINDS = ["start", "words", "end", "padding"];
export const ABOUT = { start: "The start token: attended to where nothing else is", end: "The first end token", padding: "All tokens after the first end token" };
export const ASKS = { // the question above the words, and what the map of one shows
  attention: ["Which places attend to", (/** @type {string} */ word) => `Attention to “${word}”`],
  contribution: ["Where is something written for", (/** @type {string} */ word) => `What is written for “${word}”`],
  counterfactual: ["What changes without", (/** @type {string} */ word) => `What changes without “${word}”`],
  "self-attention": ["Where does a place look? From", () => "Where these places look"],
};

/** A table of 256 colours as little-endian RGBA, between anchors of equal distance. @param {number[][]} anchors */
export function table(anchors) {
  const colours = new Uint32Array(256);
  for (let i = 0; i < 256; i++) {
    const at = (i / 255) * (anchors.length - 1);
    const low = Math.min(Math.floor(at), anchors.length - 2);
    const [r, g, b] = [0, 1, 2].map((k) => Math.round(anchors[low][k] + (anchors[low + 1][k] - anchors[low][k]) * (at - low)));
    colours[i] = ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  }
  return colours;
}

/** Which of 256 colours a number gets: the first up to `vmin`, the last from `vmax` on. @param {number[]} range */
export function shading([vmin, vmax]) {
  const gain = vmax > vmin ? 255 / (vmax - vmin) : 0;
  return (/** @type {number} */ value) => Math.max(0, Math.min(255, (value - vmin) * gain + 0.5)) | 0;
}

/** The colours of bytes of which 255 is `most`. @param {Uint32Array} colours @param {number} most @param {number[]} range */
export function ranged(colours, most, range) {
  if (range[0] === 0 && range[1] === most) return colours;
  const [shade, list] = [shading(range), new Uint32Array(256)];
  for (let byte = 0; byte < 256; byte++) list[byte] = colours[shade((byte * most) / 255)]; // a loop: drawn at every step
  return list;
}

/** A range of colours that may be locked: from 0 or more up to more than that; else nothing. @param {unknown} vmin @param {unknown} vmax */
export function lockable(vmin, vmax) {
  const [least, most] = [vmin, vmax].map((value) => (typeof value === "number" || (typeof value === "string" && /^\d{1,9}(\.\d{1,12})?(e[+-]?\d\d?)?$/.test(value)) ? Number(Number(value).toPrecision(4)) : NaN));
  return least >= 0 && most > least && most < Infinity ? { vmin: least, vmax: most } : null;
}

/** The channels that a reader may want next: words before the rest, those near the chosen one first. @param {Channel[]} channels @param {number} chosen */
export function upcoming(channels, chosen) {
  const far = (/** @type {number} */ i) => Math.abs(i - chosen) + (channels[i].kind === "word" ? 0 : channels.length);
  return channels.map((_, i) => i).sort((a, b) => far(a) - far(b));
}

/** Whole number in [0, count), else the default. @param {unknown} value @param {number} count @param {number} fallback */
export function clamp(value, count, fallback) {
  const number = typeof value === "string" && /^-?\d{1,9}$/.test(value) ? Number(value) : value;
  if (typeof number !== "number" || !Number.isInteger(number) || number < 0 || number >= count) return fallback;
  return number;
}

/** Where in `sigmas` the noise level is nearest, by its logarithm. @param {number[]} sigmas @param {number} sigma */
export function nearest(sigmas, sigma) {
  const log = (/** @type {number} */ value) => Math.log(Math.max(value ?? 0, 1e-4));
  return closest(sigmas.map(log), log(sigma));
}

/** The index of the number that is nearest. @param {number[]} list @param {number} wanted */
export function closest(list, wanted) {
  return list.reduce((best, value, i) => (Math.abs(value - wanted) < Math.abs(list[best] - wanted) ? i : best), 0);
}

/** "6 (7th of 20)": a step as the arrays count it, and as people do. @param {number} step @param {number} calls */
export function said(step, calls) {
  const n = step + 1;
  const ending = n % 100 >= 11 && n % 100 <= 13 ? "th" : ["th", "st", "nd", "rd"][n % 10] ?? "th";
  return `${step} (${n}${ending} of ${calls})`;
}

/** A number in few digits. @param {number | null | undefined} value */
export function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "not finite";
  if (value === 0) return "0";
  return Math.abs(value) >= 1000 || Math.abs(value) < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

/** The index of the greatest value's scale for an index along the first axis. @param {Numbers} part @param {number} first @param {number} [second] */
export function high(part, first, second = 0) {
  const [a, b] = part.scales;
  return part.high[(a > 1 ? first : 0) * (b ?? 1) + ((b ?? 1) > 1 ? second : 0)];
}

/** One map (y, x) as numbers: at one step, or the mean from a first to a last. @param {Numbers} part (channel, y, x, step) or (layer, head, y, x, step) @param {number[]} span @param {number} first @param {number} [second] */
export function map(part, [from, to], first, second = 0) {
  const steps = part.shape[part.shape.length - 1];
  const [height, width] = part.shape.slice(-3, -1);
  const block = part.shape.length === 5 ? first * part.shape[1] + second : first;
  const factor = high(part, first, second) / 255 / (to - from + 1);
  const values = new Float32Array(height * width);
  for (let i = 0, at = block * height * width * steps; i < values.length; i++, at += steps) {
    let sum = 0;
    for (let step = from; step <= to; step++) sum += part.data[at + step];
    values[i] = sum * factor;
  }
  return { values, height, width };
}

/** The mean of numbers from a first to a last. @param {ArrayLike<number | null>} values @param {number[]} span */
export function over(values, [from, to]) {
  let sum = 0;
  for (let i = from; i <= to; i++) sum += values[i] ?? 0;
  return sum / (to - from + 1);
}

/** The greatest value of a channel, over a span of steps or over all. @param {Numbers} part @param {number} first @param {number} second @param {number[]} [span] */
export function peak(part, first, second = 0, span) {
  if (!span) return high(part, first, second); // as it was scaled: the greatest of all steps
  return map(part, span, first, second).values.reduce((most, value) => Math.max(most, value), 0);
}

/** How much two maps are in one place, from 0 to 1: the cosine of the angle between them. @param {Float32Array} one @param {Float32Array} two */
export function overlap(one, two) {
  let [both, a, b] = [0, 0, 0];
  one.forEach((value, i) => { both += value * two[i]; a += value * value; b += two[i] * two[i]; });
  return a && b ? Math.min(1, both / Math.sqrt(a * b)) : NaN;
}

/** The first and the last step that are shown together. @param {State} state @param {number} last */
export function span({ step, steps, from }, last) {
  if (steps === "all") return [0, last];
  if (steps === "before") return [0, step];
  if (steps === "after") return [step, last];
  if (steps === "from") return [Math.min(from, step, last), Math.min(Math.max(from, step), last)];
  return [step, step];
}

const WHOLE = { step: "step", word: "channel", layer: "layer", head: "head", from: "from", against: "against" };
const ONE_OF = {
  scale: ["words", "word", "step", "locked"],
  steps: ["one", "before", "after", "from", "all"],
  reading: ["attention", "contribution", "counterfactual", "self-attention"],
  branch: ["cond", "uncond"],
  per: ["words", "tokens"],
};
const DEFAULTS = { steps: "one", reading: "attention", branch: "cond", per: "words" };

/** The state in an address, hostile values dropped. @param {string} query @param {number[]} numbered the steps that there are */
export function fromAddress(query, numbered) {
  const given = new URLSearchParams(query);
  const found = {};
  for (const [name, field] of Object.entries(WHOLE)) {
    const value = clamp(given.get(name) ?? "", 1e6, -1);
    if (value >= 0) found[field] = name === "step" || name === "from" ? numbered.indexOf(value) : value;
  }
  const opacity = given.get("opacity") ?? "";
  if (/^(0(\.\d{1,3})?|1(\.0{1,3})?)$/.test(opacity)) found.opacity = Number(opacity);
  for (const [name, values] of Object.entries(ONE_OF)) if (values.includes(given.get(name) ?? "")) found[name] = given.get(name);
  if (found.scale !== "locked") return found;
  const range = lockable(given.get("vmin"), given.get("vmax"));
  if (!range) delete found.scale;
  Object.assign(found, range);
  return found;
}

/** An address with the state in it, but for defaults; everything else in it stays. @param {string} query @param {State} state @param {number[]} numbered the steps that there are */
export function toAddress(query, state, numbered) {
  const given = new URLSearchParams(query);
  /** @type {Record<string, any>} */
  const values = { opacity: state.opacity };
  for (const [name, field] of Object.entries(WHOLE)) values[name] = state[field];
  for (const name of Object.keys(ONE_OF)) values[name] = state[name];
  values.step = numbered[state.step];
  values.from = state.steps === "from" ? numbered[state.from] : undefined;
  for (const name of ["vmin", "vmax"]) values[name] = state.scale === "locked" ? state[name] : undefined;
  for (const [name, value] of Object.entries(values)) {
    if (value === -1 || value === undefined || value === DEFAULTS[name]) given.delete(name);
    else given.set(name, String(value));
  }
  return `?${given}`;
}

/** Bytes from their differences along the last axis, in place. @param {Uint8Array} data @param {number} steps */
export function summed(data, steps) {
  for (let row = 0; row < data.length; row += steps) {
    for (let at = row + 1; at < row + steps; at++) data[at] += data[at - 1]; // modulo 256
  }
  return data;
}

/** Open a payload. Throws an Error that says what is wrong with it. @param {Uint8Array} bytes @returns {Promise<Run>} */
export async function open(bytes) {
  const text = new TextDecoder();
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (bytes.length < 8 || text.decode(bytes.subarray(0, 4)) !== "PRB2") throw Error("This is no payload of probe.");
  const start = 8 + view.getUint32(4, true);
  const { meta, parts: listed } = JSON.parse(text.decode(bytes.subarray(8, start)));
  const parts = {};
  await Promise.all(
    Object.entries(listed).map(async ([name, part]) => {
      const blob = new Blob([bytes.slice(start + part.at, start + part.at + part.size)]);
      if (part.kind === "sheet") {
        parts[name] = { ...part, bitmap: await createImageBitmap(blob) };
        return;
      }
      const stream = blob.stream().pipeThrough(new DecompressionStream("deflate"));
      const data = new Uint8Array(await new Response(stream).arrayBuffer());
      if (data.length !== part.shape.reduce((/** @type {number} */ a, /** @type {number} */ b) => a * b, 1)) throw Error(`The part ${name} is not whole.`);
      parts[name] = { ...part, data: summed(data, part.shape[part.shape.length - 1]) };
    }),
  );
  return { meta, parts };
}
