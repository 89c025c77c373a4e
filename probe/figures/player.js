// @ts-check
/**
 * The player: a recording, step by step. One ES module without dependencies: the dashboard, a notebook
 * and an exported page mount the same one. Numbers come as bytes, colour is applied here, so a changed
 * step, word, scale or opacity asks nobody. What a recording says reaches the page as text alone.
 *
 *     const run = await open(bytes)                      // a payload of probe.figures.bundle
 *     const player = mount(element, [run], { ask })      // ask: what is fetched when it is wanted
 *
 * @typedef {{kind: "numbers", shape: number[], scales: number[], high: number[], data: Uint8Array}} Numbers
 * @typedef {{kind: "sheet", shape: number[], columns: number, bitmap: ImageBitmap}} Sheet
 * @typedef {{label: string, kind: string}} Channel
 * @typedef {{part: string, title: string, note: string}} Panel
 * @typedef {{meta: Record<string, any>, parts: Record<string, any>, heads?: any, first?: any}} Run
 * @typedef {{step: number, channel: number, reading: string, layer: number, head: number,
 *            opacity: number, scale: "words" | "word" | "step"}} State
 * @typedef {{state?: Partial<State>, ask?: (run: number, what: Record<string, string>) => Promise<Uint8Array>,
 *            changed?: (state: State) => void, sync?: "sigma" | "step", readings?: string[]}} Options
 */

// --- pure parts: tested with node -----------------------------------------------------------------

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

/** One map (y, x) as numbers. @param {Numbers} part (channel, y, x, step) or (layer, head, y, x, step) */
export function map(part, step, first, second = 0) {
  const steps = part.shape[part.shape.length - 1];
  const [height, width] = part.shape.slice(-3, -1);
  const block = part.shape.length === 5 ? first * part.shape[1] + second : first;
  const factor = high(part, first, second) / 255;
  const values = new Float32Array(height * width);
  for (let i = 0, at = block * height * width * steps + step; i < values.length; i++, at += steps) values[i] = part.data[at] * factor;
  return { values, height, width };
}

/** The greatest value of a channel, at one step or at all. @param {Numbers} part @param {number} first @param {number} second @param {number} [step] */
export function peak(part, first, second = 0, step) {
  if (step === undefined) return high(part, first, second); // as it was scaled: the greatest of all steps
  return map(part, step, first, second).values.reduce((most, value) => Math.max(most, value), 0);
}

/** The state in an address, hostile values dropped. @param {string} query */
export function fromAddress(query) {
  const given = new URLSearchParams(query);
  const found = {};
  for (const name of ["step", "word", "layer", "head"]) {
    const value = clamp(given.get(name) ?? "", 1e6, -1);
    if (value >= 0) found[name === "word" ? "channel" : name] = value;
  }
  const opacity = given.get("opacity") ?? "";
  if (/^(0(\.\d{1,3})?|1(\.0{1,3})?)$/.test(opacity)) found.opacity = Number(opacity);
  if (["words", "word", "step"].includes(given.get("scale") ?? "")) found.scale = given.get("scale");
  return found;
}

/** An address with the state in it; everything else in it stays. @param {string} query @param {State} state @param {number} step */
export function toAddress(query, state, step) {
  const given = new URLSearchParams(query);
  const values = { step, word: state.channel, layer: state.layer, head: state.head, opacity: state.opacity, scale: state.scale };
  for (const [name, value] of Object.entries(values)) {
    if (value === -1) given.delete(name);
    else given.set(name, String(value));
  }
  return `?${given}`;
}

/** Open a payload. Throws an Error that says what is wrong with it. @param {Uint8Array} bytes @returns {Promise<Run>} */
export async function open(bytes) {
  const text = new TextDecoder();
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (bytes.length < 8 || text.decode(bytes.subarray(0, 4)) !== "PRB1") throw Error("This is no payload of probe.");
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
      parts[name] = { ...part, data };
    }),
  );
  return { meta, parts };
}

// --- drawing --------------------------------------------------------------------------------------

const scratch = new Map();

/** An image of a size to paint numbers on, made once. @param {number} width @param {number} height */
function page(width, height) {
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

/** Paint a map on a canvas, in square pixels; `top` is the value of the brightest colour. */
function paintMap(canvas, part, step, first, second, colours, top, opacity = 1) {
  const steps = part.shape[part.shape.length - 1];
  const [height, width] = part.shape.slice(-3, -1);
  const { canvas: sheet, pen, image, pixels } = page(width, height);
  const block = part.shape.length === 5 ? first * part.shape[1] + second : first;
  const gain = top > 0 ? high(part, first, second) / top : 0;
  for (let i = 0, at = block * height * width * steps + step; i < pixels.length; i++, at += steps) pixels[i] = colours[Math.min(255, part.data[at] * gain) | 0];
  pen.putImageData(image, 0, 0);
  const brush = canvas.getContext("2d");
  brush.imageSmoothingEnabled = false;
  brush.globalAlpha = opacity;
  brush.drawImage(sheet, 0, 0, canvas.width, canvas.height);
  brush.globalAlpha = 1;
}

/** Paint one picture of a sheet. @param {HTMLCanvasElement} canvas @param {Sheet} sheet @param {number} index */
function paintPicture(canvas, sheet, index) {
  const [, height, width] = sheet.shape;
  const pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  pen.imageSmoothingEnabled = false;
  pen.drawImage(sheet.bitmap, (index % sheet.columns) * width, Math.floor(index / sheet.columns) * height, width, height, 0, 0, canvas.width, canvas.height);
}

/**
 * An element with a class, text and attributes, put into a parent.
 * @param {string} tag @param {string} name @param {string} text @param {Element} [parent] @param {Record<string, string>} [attributes]
 * @returns {any}
 */
function make(tag, name = "", text = "", parent, attributes = {}) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text) element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent?.append(element);
  return element;
}

/** The column and row under the pointer. @param {PointerEvent} event @param {Element} element @param {number} columns @param {number} rows */
function under(event, element, columns, rows) {
  const place = element.getBoundingClientRect();
  return [Math.floor(((event.clientX - place.left) / place.width) * columns), Math.floor(((event.clientY - place.top) / place.height) * rows)];
}

/** Let the arrow keys move within an element that has focus. @param {any} element @param {(right: number, down: number) => void} move */
function arrows(element, move) {
  element.tabIndex = 0;
  element.onkeydown = (/** @type {KeyboardEvent} */ event) => {
    const way = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[event.key];
    if (!way) return;
    move(way[0], way[1]);
    event.preventDefault();
    event.stopPropagation();
  };
}

/** A choice. @param {Element} parent @param {string} label @param {[string, string][]} options value and text @param {string} value */
function choice(parent, label, options, value) {
  const select = make("select", "", "", parent, { "aria-label": label });
  for (const [one, text] of options) make("option", "", text, select, { value: one });
  select.value = value;
  return select;
}

/** Give a file to the reader to keep. @param {Blob} blob @param {string} name */
function keep(blob, name) {
  const link = make("a", "", "", undefined, { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// --- the player -----------------------------------------------------------------------------------

const KINDS = ["start", "words", "end", "padding"];

/**
 * Put a player into an element.
 * @param {HTMLElement | ShadowRoot} root @param {Run[]} runs one to four, the first leads @param {Options} options
 */
export function mount(root, runs, { state: wished = {}, ask, changed = () => {}, sync = "sigma", readings: ways } = {}) {
  root.querySelector(":scope > .probe")?.remove();
  const lead = runs[0];
  const box = make("section", "probe", "", /** @type {any} */ (root), { tabindex: "0", "aria-label": `Replay of ${lead.meta.prompt || "a run without a prompt"}` });
  const steps = /** @type {number[]} */ (lead.meta.steps);
  if (!steps.length) {
    make("p", "empty", "No step of this recording is finished yet.", box);
    return { box, state: null, go() {}, repaint() {}, destroy: () => box.remove() };
  }
  const colours = table(lead.meta.colours);
  const signed = table([[33, 102, 172], [146, 197, 222], [247, 247, 247], [253, 184, 99], [179, 88, 6]]); // colours of less and more
  const last = steps.length - 1;
  // The busiest word first.
  const first = /** @type {Channel[]} */ (lead.meta.channels ?? []).reduce((best, channel, i) => (channel.kind === "word" && high(lead.parts.maps, i) > high(lead.parts.maps, best) ? i : best), 0);
  /** @type {State} */
  const state = { step: Math.round(last / 3), channel: first, reading: "attention", layer: -1, head: -1, opacity: 0.6, scale: "words", ...wished };
  state.step = clamp(state.step, steps.length, Math.round(last / 3));
  state.channel = clamp(state.channel, (lead.meta.channels ?? []).length, first);
  const views = []; // drawn again at every change
  const asked = new Map();
  const tops = new Map(); // the greatest values, found once
  const means = new WeakMap(); // of each channel over places, by step
  const eyes = [];
  let paper = "";
  let playing = false, frame = 0, then = 0, settled = 0, dead = false;

  const channelsOf = (/** @type {Run} */ run) => /** @type {Channel[]} */ (run.meta.channels ?? []);
  const names = channelsOf(lead); // of attention; another reading may have fewer
  const label = () => names[state.channel]?.label ?? "";
  const at = (/** @type {Run} */ run) => (run === lead || sync === "step" ? Math.min(state.step, run.meta.steps.length - 1) : nearest(run.meta.sigma, lead.meta.sigma[state.step]));
  const mapAt = (/** @type {Run} */ run) => closest(run.meta.map_steps ?? [], run.meta.steps[at(run)]);
  /** Where a run has a word, the second time for one that is there twice; -1: nowhere. @param {Run} run @param {number} [index] */
  function channelOf(run, index = state.channel) {
    const alike = (/** @type {Channel} */ channel) => channel.label === names[index]?.label && channel.kind === names[index]?.kind;
    const before = names.slice(0, index).filter(alike).length;
    const found = channelsOf(run).flatMap((channel, i) => (alike(channel) ? [i] : []));
    return found[before] ?? -1;
  }

  /** The greatest value that the colours reach. @param {Run} run @param {number} channel */
  function top(run, channel) {
    if (state.scale === "step") return peak(run.parts.maps, channel, 0, mapAt(run));
    const key = `${runs.indexOf(run)} ${channel} ${state.scale} ${run.meta.of}`;
    let found = tops.get(key);
    if (found === undefined) tops.set(key, (found = topOf(run, channel)));
    return found;
  }
  /** @param {Run} run @param {number} channel */
  function topOf(run, channel) {
    const part = run.parts.maps;
    if (state.scale === "word") return Math.max(...runs.map((other) => (other.parts.maps && channelOf(other) >= 0 ? high(other.parts.maps, channelOf(other)) : 0)));
    const isWord = channelsOf(run)[channel].kind === "word";
    const highs = runs.flatMap((other) => channelsOf(other).map((one, i) => ((one.kind === "word") === isWord && other.parts.maps ? high(other.parts.maps, i) : 0)));
    return isWord ? Math.max(...highs) : high(part, channel); // start and padding outshine every word
  }
  const amount = (/** @type {number} */ value, /** @type {Run} */ run) => (run.meta.of === "attention" || !run.meta.of ? `${short(value * 100)}%` : short(value));

  /** A channel's mean over all places at a step. @param {Numbers} part @param {number} channel @param {number} step */
  function mean(part, channel, step) {
    const found = means.get(part) ?? [];
    means.set(part, found);
    found[channel] ??= Float32Array.from({ length: part.shape[3] }, (_, i) => {
      const { values } = map(part, i, channel);
      return values.reduce((sum, value) => sum + value, 0) / values.length;
    });
    return found[channel][step];
  }

  /** Draw what a section shows only while it is on the screen. @param {Element} section @param {() => void} view */
  function seen(section, view) {
    let visible = true;
    let late = false;
    if (typeof IntersectionObserver !== "undefined") {
      const eye = new IntersectionObserver(([entry]) => {
        visible = entry.isIntersecting;
        if (visible && late) view();
        late = false;
      });
      eye.observe(section);
      eyes.push(eye);
    }
    views.push(() => {
      if (visible) view();
      else late = true;
    });
  }

  /** Ask once for more of a run; what comes is opened. @param {Run} run @param {Record<string, string>} what */
  function more(run, what) {
    const key = JSON.stringify([runs.indexOf(run), what]);
    const ready = asked.get(key) ?? Promise.resolve(ask?.(runs.indexOf(run), what)).then((bytes) => (bytes ? open(bytes) : Promise.reject(Error("Nothing more is here."))));
    asked.set(key, ready);
    ready.catch(() => asked.delete(key));
    return ready;
  }

  // The question.
  const question = make("div", "question", "", box, { role: "group", "aria-label": "Which places attend to" });
  make("span", "ask", "Which places attend to", question);
  const chips = names.map((channel, i) => {
    const chip = make("button", `chip ${channel.kind}`, channel.label, question, { type: "button" });
    if (channel.kind !== "word") chip.title = { start: "The start token: attended to where nothing else is", end: "The first end token", padding: "All tokens after the first end token" }[channel.kind] ?? "";
    chip.onclick = () => choose({ channel: i, layer: state.layer, head: state.head });
    return chip;
  });
  if (chips.length) make("span", "ask", "?", question);
  else make("span", "ask", lead.meta.missing.maps ? `No attention was recorded. ${lead.meta.missing.maps}` : "", question);
  views.push(() => chips.forEach((chip, i) => {
    chip.setAttribute("aria-pressed", String(i === state.channel));
    chip.disabled = channelOf(lead, i) < 0;
  }));

  // The pictures, a row for each run.
  const panels = /** @type {Panel[]} */ (lead.meta.panels);
  const tip = make("p", "tip", "");
  for (const run of runs) {
    if (runs.length > 1) make("h2", "who", `${run.meta.name}: ${run.meta.facts}`, box);
    const row = make("div", runs.length > 2 ? "row several" : "row", "", box);
    panels.forEach((panel, number) => row.append(figure(run, panel, number)));
  }
  /** @param {Run} run @param {Panel} panel @param {number} number */
  function figure(run, panel, number) {
    const made = make("figure", panel.part);
    const title = make("figcaption", "", "", made);
    make("b", "", `${number + 1}`, title);
    const name = make("span", "", panel.title, title);
    const note = make("small", "", panel.note, made);
    const missing = run.meta.missing[panel.part];
    const part = run.parts[panel.part];
    if (!part) {
      make("p", "empty", `Not recorded. ${missing ?? ""}`, made);
      return made;
    }
    const canvas = make("canvas", "", "", made, { width: "256", height: "256" });
    const [height, width] = part.kind === "sheet" ? part.shape.slice(1, 3) : part.shape.slice(-3, -1);
    const size = Math.max(1, Math.floor(512 / Math.max(height, width)));
    canvas.width = width * size;
    canvas.height = height * size;
    canvas.style.aspectRatio = `${width} / ${height}`;
    if (part.kind === "sheet") {
      canvas.setAttribute("role", "img");
      views.push(() => {
        const index = part.shape[0] === 1 ? 0 : panel.part === "decoded" ? closest(run.meta.decoded_steps, run.meta.steps[at(run)]) : at(run);
        if (canvas.dataset.shown === String(index)) return;
        paintPicture(canvas, part, index);
        canvas.dataset.shown = String(index);
        canvas.setAttribute("aria-label", `${panel.title}, step ${said(run.meta.steps[at(run)], run.meta.calls)}`);
      });
    } else {
      cells(run, canvas);
      views.push(() => {
        const channel = channelOf(run);
        name.textContent = `Places that attend to “${label()}”`;
        if (channel < 0) {
          canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
          note.textContent = `“${label()}” is not in this prompt.`;
          return;
        }
        const decoded = run.parts.decoded;
        if (decoded) paintPicture(canvas, decoded, closest(run.meta.decoded_steps, run.meta.steps[at(run)]));
        else if (run.parts.denoised) paintPicture(canvas, run.parts.denoised, at(run));
        else canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
        const single = run.heads && state.layer >= 0;
        const source = single ? run.heads.parts.maps : run.parts.maps;
        const [a, b] = single ? [state.layer, state.head] : [channel, 0];
        const greatest = single ? peak(source, a, b, state.scale === "step" ? mapAt(run) : undefined) : top(run, channel);
        paintMap(canvas, source, mapAt(run), a, b, colours, greatest, state.opacity);
        note.textContent = single ? `${run.heads.meta.layers[a].split(".transformer")[0]}, head ${b}, alone` : lead.meta.note;
        if (run === lead) legend(greatest, single ? "head" : state.scale);
      });
    }
    return made;
  }
  // What is not the same in two runs.
  if (runs.length === 2) {
    const [one, two] = runs;
    make("h2", "who", "Difference of the two: pictures without sign, four times as bright; attention first less second", box);
    const row = make("div", "row", "", box);
    for (const panel of panels) {
      const made = make("figure", panel.part, "", row);
      const [a, b] = runs.map((run) => run.parts[panel.part]);
      const alike = a && b && JSON.stringify(a.shape.slice(-3, -1)) === JSON.stringify(b.shape.slice(-3, -1)) && a.kind === b.kind;
      if (!alike) {
        make("p", "empty", a && b ? "Not of one size." : "Not recorded in both.", made);
        continue;
      }
      const [height, width] = a.kind === "sheet" ? a.shape.slice(1, 3) : a.shape.slice(-3, -1);
      const size = Math.max(1, Math.floor(512 / Math.max(height, width)));
      const canvas = make("canvas", "", "", made, { role: "img", "aria-label": `Difference: ${panel.title}`, width: String(width * size), height: String(height * size) });
      const note = make("small", "", "", made);
      seen(made, () => {
        if (a.kind === "sheet") {
          const pen = canvas.getContext("2d");
          pen.globalCompositeOperation = "source-over";
          paintPicture(canvas, a, a.shape[0] === 1 ? 0 : at(one));
          pen.globalCompositeOperation = "difference";
          paintPicture(canvas, b, b.shape[0] === 1 ? 0 : at(two));
          pen.globalCompositeOperation = "lighter";
          for (let i = 0; i < 2; i++) pen.drawImage(canvas, 0, 0);
          pen.globalCompositeOperation = "source-over";
          return;
        }
        const [first, second] = [channelOf(one), channelOf(two)];
        if (first < 0 || second < 0) return;
        const [x, y] = [map(one.parts.maps, mapAt(one), first).values, map(two.parts.maps, mapAt(two), second).values];
        const least = x.map((value, i) => value - y[i]);
        const far = least.reduce((most, value) => Math.max(most, Math.abs(value)), 0) || 1;
        const sheet = page(width, height);
        least.forEach((value, i) => { sheet.pixels[i] = signed[Math.round(127.5 + 127.5 * Math.max(-1, Math.min(1, value / far)))]; });
        sheet.pen.putImageData(sheet.image, 0, 0);
        const pen = canvas.getContext("2d");
        pen.imageSmoothingEnabled = false;
        pen.drawImage(sheet.canvas, 0, 0, canvas.width, canvas.height);
        note.textContent = `blue: less, orange: more; at this step up to ${amount(far, lead)}`;
      });
    }
  }

  /** Numbers under the pointer, and a cell cursor for the keyboard. @param {Run} run @param {any} canvas */
  function cells(run, canvas) {
    let [row, column] = [0, 0];
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", "Map of attention. Arrow keys read single places.");
    const tell = () => {
      const channel = channelOf(run);
      const single = run.heads && state.layer >= 0;
      if (channel < 0) return;
      const { values, height, width } = single ? map(run.heads.parts.maps, mapAt(run), state.layer, state.head) : map(run.parts.maps, mapAt(run), channel);
      [row, column] = [Math.max(0, Math.min(height - 1, row)), Math.max(0, Math.min(width - 1, column))];
      tip.textContent = `Row ${row}, column ${column} of ${height} x ${width}: ${amount(values[row * width + column], run)} to “${label()}”.`;
    };
    canvas.onpointermove = (/** @type {PointerEvent} */ event) => {
      const [height, width] = (run.heads && state.layer >= 0 ? run.heads : run).parts.maps.shape.slice(-3, -1);
      [column, row] = under(event, canvas, width, height);
      tell();
    };
    arrows(canvas, (right, down) => {
      [row, column] = [row + down, column + right];
      tell();
    });
  }

  // What is under the pictures: the number, the scale, the opacity, and how attention is shared out.
  const tools = make("div", "tools", "", box);
  tools.append(tip);
  if (chips.length) tip.textContent = "Point at a place of the map to read its number.";
  const readings = make("label", "reading", "", tools);
  const offered = ["attention", ...(ask ? ways ?? lead.meta.readings ?? [] : [])];
  const reading = choice(readings, "What is shown for a word", offered.map((name) => [name, name]), state.reading);
  readings.hidden = offered.length < 2;
  reading.onchange = () => read(reading.value);
  const scale = choice(make("label", "", "scale ", tools), "Scale of the colours", [["words", "one for all words"], ["word", "each word's own"], ["step", "this step's own"]], state.scale);
  scale.onchange = () => choose({ scale: scale.value });
  const opacities = make("label", "", "overlay ", tools);
  const opacity = make("input", "", "", opacities, { type: "range", min: "0", max: "1", step: "0.05", "aria-label": "Opacity of the map over the picture" });
  opacity.value = String(state.opacity);
  opacity.oninput = () => choose({ opacity: Number(opacity.value) });
  const key = make("span", "key", "", tools);
  const bar = make("span", "bar", "", key, { "aria-hidden": "true" });
  bar.style.background = `linear-gradient(90deg, ${lead.meta.colours.map((/** @type {number[]} */ one) => `rgb(${one})`)})`;
  const range = make("span", "", "", key);
  tools.hidden = !chips.length;
  /** @param {number} greatest @param {string} how */
  function legend(greatest, how) {
    const why = { words: names[state.channel].kind === "word" ? "the same for every word and step" : "the same at every step", word: "the same at every step", step: "at this step alone", head: "this head's own" }[how];
    range.textContent = `0 to ${amount(greatest, lead)}, ${why}`;
  }

  // Time.
  const dock = make("div", "dock", "", box);
  const time = make("div", "time", "", dock);
  const play = make("button", "play", "▶ Play", time, { type: "button" });
  const back = make("button", "", "◀", time, { type: "button", "aria-label": "One step back" });
  const slider = make("input", "", "", time, { type: "range", min: "0", max: String(last), step: "1", "aria-label": "Step" });
  const on = make("button", "", "▶", time, { type: "button", "aria-label": "One step on" });
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const speed = choice(time, "Steps a second", [2, 4, 8, 16].map((value) => [String(value), `${value} steps/s`]), calm ? "2" : "8");
  const told = make("output", "", "", time);
  const [live, film] = [make("p", "live", "", box, { "aria-live": "polite" }), make("div", "film", "", dock)];
  const strip = make("canvas", "", "", film, { role: "img", "aria-label": "The guess of the clean picture at every step" });
  const cursor = make("div", "cursor", "", film);
  const curve = make("canvas", "curve", "", film, { role: "img", "aria-label": "Noise level sigma over the steps, on a log scale" });
  const line = make("div", "line", "", film);
  const guessed = lead.parts.denoised;
  strip.hidden = !guessed;
  views.push(() => {
    slider.value = String(state.step);
    const where = (state.step + 0.5) / steps.length;
    cursor.style.left = `${(state.step / steps.length) * 100}%`;
    cursor.style.width = `${100 / steps.length}%`;
    line.style.left = `${where * 100}%`;
    const [sigma, t] = [lead.meta.sigma[state.step], lead.meta.timestep[state.step]];
    told.textContent = `step ${said(steps[state.step], lead.meta.calls)}   sigma ${short(sigma)}   t ${short(t)}`;
    slider.setAttribute("aria-valuetext", told.textContent);
  });

  /** Paint what does not change with the step: the film strip and the curve. */
  function paintFilm() {
    const ratio = devicePixelRatio || 1;
    const width = film.clientWidth;
    if (!width) return;
    const each = width / steps.length;
    if (guessed) {
      const [, height, wide] = guessed.shape;
      const side = Math.min(each - 2, 48);
      strip.width = Math.round(width * ratio);
      strip.height = Math.round(Math.min(48, side * (height / wide)) * ratio);
      strip.style.height = `${strip.height / ratio}px`;
      const pen = strip.getContext("2d");
      pen.scale(ratio, ratio);
      pen.imageSmoothingEnabled = side < wide;
      for (let i = 0; i < steps.length; i++) {
        pen.drawImage(guessed.bitmap, (i % guessed.columns) * wide, Math.floor(i / guessed.columns) * height, wide, height, i * each + (each - side) / 2, 0, side, strip.height / ratio);
      }
    }
    const logs = lead.meta.sigma.map((/** @type {number | null} */ value) => Math.log10(Math.max(value ?? 1e4, 1e-3)));
    const least = Math.min(...logs);
    const text = `sigma (noise over signal) from ${short(lead.meta.sigma[0])} to ${short(lead.meta.sigma[last])}, log scale`;
    paintCurve(curve, { values: logs.map((/** @type {number} */ value) => value - least) }, 54, text);
  }

  // Below: how attention is shared out, every word, every layer and head.
  const below = make("div", "below", "", box);
  if (lead.meta.shares) {
    const shares = make("section", "shares", "", below, { "aria-label": "What all of the attention goes to" });
    make("h2", "", "What all of the attention goes to, at this step", shares);
    const stack = make("div", "stack", "", shares);
    const pieces = KINDS.map((kind) => {
      const piece = make("button", kind, "", stack, { type: "button" });
      const index = names.findIndex((channel) => channel.kind === kind);
      piece.onclick = () => choose({ channel: kind === "words" ? first : index });
      return piece;
    });
    const list = make("p", "shared", "", shares);
    const shown = KINDS.map((kind) => make("span", kind, "", list));
    views.push(() => {
      KINDS.forEach((kind, i) => {
        const share = lead.meta.shares[kind][mapAt(lead)] ?? 0;
        pieces[i].style.flexGrow = String(Math.max(share, 0.004));
        const text = `${kind} ${(share * 100).toFixed(1)}%`;
        pieces[i].title = text;
        pieces[i].setAttribute("aria-label", text);
        shown[i].textContent = text;
      });
    });
  }
  if (chips.length) {
    const every = make("section", "every", "", below);
    const title = make("h2", "", "", every);
    const small = make("div", "small", "", every);
    const [height, width] = lead.parts.maps.shape.slice(-3, -1);
    names.forEach((channel, number) => {
      const made = make("button", "thumb", "", small, { type: "button" });
      const canvas = make("canvas", "", "", made, { width: String(width), height: String(height) });
      make("small", "", channel.label, made);
      const text = make("small", "number", "", made);
      made.onclick = () => choose({ channel: number });
      seen(made, () => {
        const i = channelOf(lead, number);
        made.hidden = i < 0;
        if (i < 0) return;
        paintMap(canvas, lead.parts.maps, mapAt(lead), i, 0, colours, top(lead, i));
        text.textContent = amount(mean(lead.parts.maps, i, mapAt(lead)), lead);
        made.setAttribute("aria-pressed", String(number === state.channel));
      });
    });
    views.push(() => {
      title.textContent = `Every word at this step, ${{ words: "all words on one scale", word: "each on its own scale", step: "each on its own scale at this step" }[state.scale]}`;
    });
    if (ask) headsView(below);
  }

  /** One word in every layer and head. @param {Element} parent */
  function headsView(parent) {
    const section = make("section", "heads", "", parent);
    const title = make("h2", "", "", section);
    const holder = make("div", "holder", "", section);
    const across = make("div", "across", "", holder);
    const down = make("div", "down", "", holder);
    const canvas = make("canvas", "", "", holder, { role: "img", "aria-label": "Maps of every layer and head" });
    const about = make("p", "tip", "", section);
    const all = make("button", "", "All layers and heads together", section, { type: "button" });
    all.onclick = () => choose({ layer: -1, head: -1 });
    let wanted = "";
    const load = () => {
      const key = `${state.channel}`;
      if (wanted === key) return;
      wanted = key;
      runs.forEach((run) => {
        const channel = channelOf(run);
        delete run.heads;
        if (channel < 0 || !run.parts.maps) return;
        more(run, { what: "heads", channel: String(channel) }).then((found) => {
          if (wanted !== key || dead) return;
          run.heads = found;
          if (run === lead) axes(found.meta.layers, found.parts.maps.shape[1]);
          state.layer = clamp(state.layer, found.meta.layers.length, -1);
          state.head = state.layer < 0 ? -1 : clamp(state.head, found.meta.heads[state.layer], 0);
          draw();
        }, (error) => { about.textContent = String(error.message ?? error); });
      });
    };
    /** Name the parts of the network and the heads beside the grid. @param {string[]} layers @param {number} heads */
    const axes = (layers, heads) => {
      const parts = layers.map((layer) => layer.split("_")[0]);
      across.replaceChildren(...[...new Set(parts)].map((part) => {
        const span = make("span", "", part);
        span.style.flexGrow = String(parts.filter((other) => other === part).length);
        return span;
      }));
      down.replaceChildren(...Array.from({ length: heads }, (_, head) => make("span", "", `head ${head}`)));
    };
    const spot = (/** @type {PointerEvent} */ event) => (lead.heads ? under(event, canvas, lead.heads.parts.maps.shape[0], lead.heads.parts.maps.shape[1]) : [-1, -1]);
    const tell = (/** @type {number} */ layer, /** @type {number} */ head) => {
      if (!lead.heads || layer < 0) return;
      const share = lead.heads.meta.shares[layer][mapAt(lead)];
      about.textContent = `${lead.heads.meta.layers[layer].split(".transformer")[0]}, head ${head}. This layer gives “${label()}” ${short(share * 100)}% of its attention.`;
    };
    canvas.onpointermove = (/** @type {PointerEvent} */ event) => { const [layer, head] = spot(event); tell(layer, head); };
    canvas.onclick = (/** @type {PointerEvent} */ event) => { const [layer, head] = spot(event); choose({ layer, head }); };
    arrows(canvas, (right, down) => {
      if (!lead.heads) return;
      const [layers, heads] = lead.heads.parts.maps.shape;
      choose({ layer: Math.max(0, Math.min(layers - 1, state.layer + right)), head: Math.max(0, Math.min(heads - 1, state.head + down)) });
      tell(state.layer, state.head);
    });
    seen(section, () => {
      load();
      title.textContent = `“${label()}” in every layer and head, each on its own scale`;
      all.hidden = state.layer < 0;
      if (!lead.heads) return;
      const { maps } = lead.heads.parts;
      const [layers, heads, height, width, count] = maps.shape;
      const { canvas: sheet, pen, image, pixels } = page(layers * width, heads * height);
      const index = mapAt(lead);
      for (let layer = 0; layer < layers; layer++) {
        for (let head = 0; head < heads; head++) {
          let from = ((layer * heads + head) * height * width) * count + index;
          for (let y = 0; y < height; y++) {
            const to = (head * height + y) * layers * width + layer * width;
            for (let x = 0; x < width; x++, from += count) pixels[to + x] = colours[maps.data[from]];
          }
        }
      }
      pen.putImageData(image, 0, 0);
      const cell = Math.max(20, Math.min(64, Math.floor((holder.clientWidth - 60) / layers)));
      if (canvas.width !== layers * cell || canvas.height !== heads * cell) {
        [canvas.width, canvas.height] = [layers * cell, heads * cell];
        across.style.width = `${canvas.width}px`;
        down.style.height = `${canvas.height}px`;
      }
      const brush = canvas.getContext("2d");
      brush.imageSmoothingEnabled = false;
      brush.drawImage(sheet, 0, 0, canvas.width, canvas.height);
      brush.fillStyle = paper;
      for (let layer = 1; layer < layers; layer++) brush.fillRect(layer * cell - 1, 0, 2, canvas.height);
      for (let head = 1; head < heads; head++) brush.fillRect(0, head * cell - 1, canvas.width, 2);
      if (state.layer >= 0) {
        brush.strokeStyle = "#fff";
        brush.lineWidth = 3;
        brush.strokeRect(state.layer * cell + 1.5, state.head * cell + 1.5, cell - 3, cell - 3);
      }
      canvas.setAttribute("aria-label", `Maps of “${label()}”: ${layers} layers across, ${heads} heads down. Arrow keys choose one.`);
    });
  }

  // Numbers over the steps.
  const drawn = Object.values(lead.meta.curves ?? {}).filter((curve) => curve.values.length > 1);
  if (drawn.length) make("h2", "curves", "Over the steps", below);
  const plots = drawn.map((curve) => {
    const made = make("figure", "plot", "", below);
    const title = make("figcaption", "", curve.title, made);
    const number = make("output", "", "", title);
    const plot = make("div", "film", "", made);
    const canvas = make("canvas", "", "", plot, { role: "img", "aria-label": `${curve.title}, over the steps` });
    const mark = make("div", "line", "", plot);
    make("small", "", curve.note, made);
    views.push(() => {
      mark.style.left = `${((state.step + 0.5) / steps.length) * 100}%`;
      const spread = curve.spread?.[state.step];
      number.textContent = short(curve.values[state.step]) + (spread ? ` ± ${short(spread)}` : "");
    });
    plot.onpointerdown = plot.onpointermove = drag(plot);
    return () => paintCurve(canvas, curve);
  });
  /** @param {any} canvas @param {any} curve @param {number} [tall] @param {string} [text] */
  function paintCurve(canvas, curve, tall = 90, text) {
    const [width, ratio] = [canvas.parentElement.clientWidth, devicePixelRatio || 1];
    if (!width) return;
    [canvas.width, canvas.height] = [Math.round(width * ratio), tall * ratio];
    const spread = curve.spread ?? curve.values.map(() => 0);
    const top = Math.max(...curve.values.map((/** @type {number} */ value, /** @type {number} */ i) => (value ?? 0) + (spread[i] ?? 0))) || 1;
    const place = (/** @type {number} */ value, /** @type {number} */ i) => [((i + 0.5) * width) / curve.values.length, tall - 4 - ((tall - 22) * value) / top];
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.strokeStyle = pen.fillStyle = getComputedStyle(box).color;
    pen.lineWidth = 1.5;
    pen.beginPath();
    curve.values.forEach((/** @type {number} */ value, /** @type {number} */ i) => value !== null && pen.lineTo(...place(value, i)));
    pen.stroke();
    pen.globalAlpha = 0.45;
    spread.forEach((/** @type {number} */ one, /** @type {number} */ i) => {
      if (!one || curve.values[i] === null) return;
      const [x, y] = place(curve.values[i] + one, i);
      pen.fillRect(x - 1, y, 2, place(curve.values[i] - one, i)[1] - y);
    });
    pen.globalAlpha = 0.8;
    pen.font = "12px system-ui, sans-serif";
    if (text) pen.fillText(text, 4, tall - 6);
    else pen.fillText(`0 to ${short(top)}`, 4, 12);
  }

  // What a reader takes away.
  const away = make("details", "away", "", box);
  make("summary", "", "Numbers, files and code", away);
  const body = make("div", "", "", away);
  const buttons = make("div", "buttons", "", body);
  const pictureButton = make("button", "", "Picture (PNG)", buttons, { type: "button" });
  pictureButton.onclick = () => box.querySelector("figure.maps canvas, .row canvas")?.toBlob((/** @type {Blob} */ blob) => keep(blob, `${lead.meta.name}-step-${steps[state.step]}.png`));
  const numbersButton = make("button", "", "Numbers (CSV)", buttons, { type: "button" });
  numbersButton.onclick = () => keep(new Blob([csv()], { type: "text/csv" }), `${lead.meta.name}-step-${steps[state.step]}.csv`);
  numbersButton.hidden = !chips.length;
  const code = make("pre", "code", "", body, { tabindex: "0" });
  const copy = make("button", "", "Copy as Python", buttons, { type: "button" });
  copy.onclick = () => navigator.clipboard?.writeText(code.textContent).then(() => { copy.textContent = "Copied"; setTimeout(() => { copy.textContent = "Copy as Python"; }, 1500); });
  const holder = make("div", "table", "", body);
  function csv() {
    const { values, height, width } = map(lead.parts.maps, mapAt(lead), Math.max(0, channelOf(lead)));
    return Array.from({ length: height }, (_, y) => Array.from(values.subarray(y * width, (y + 1) * width), (value) => value.toPrecision(4)).join(",")).join("\n") + "\n";
  }
  away.ontoggle = () => draw();
  views.push(() => {
    if (!away.open) return;
    const kind = names[state.channel]?.kind;
    const snippet = chips.length ? lead.meta.snippets[kind === "word" ? state.reading : "kind"] : lead.meta.snippets.denoised;
    code.textContent = snippet.replaceAll("{step}", String(chips.length ? lead.meta.map_steps[mapAt(lead)] : steps[state.step])).replaceAll("{word}", String(state.channel)).replaceAll("{kind}", { start: "BOS", end: "EOS", padding: "rest" }[kind] ?? "");
    holder.replaceChildren();
    if (channelOf(lead) < 0) return;
    const { values, height, width } = map(lead.parts.maps, mapAt(lead), channelOf(lead));
    const sheet = make("table", "", "", holder);
    make("caption", "", `“${label()}” at step ${said(steps[state.step], lead.meta.calls)}, ${lead.meta.unit}; rows are y, columns x`, sheet);
    for (let y = 0; y < height; y++) {
      const row = make("tr", "", "", sheet);
      make("th", "", String(y), row, { scope: "row" });
      for (let x = 0; x < width; x++) make("td", "", short(values[y * width + x] * (lead.meta.of === "attention" ? 100 : 1)), row);
    }
  });

  // Moving.
  function draw() {
    if (dead) return;
    const began = performance.now();
    for (const view of views) view();
    box.dataset.step = String(steps[state.step]);
    box.dataset.ms = (performance.now() - began).toFixed(2);
  }
  /** @param {Partial<State> | any} change */
  function choose(change) {
    Object.assign(state, change);
    scale.value = state.scale;
    draw();
    rest();
  }
  /** Say it and tell the page, once the reader rests. */
  function rest() {
    clearTimeout(settled);
    settled = window.setTimeout(() => {
      if (playing || dead) return;
      live.textContent = told.textContent + (chips.length ? `, “${label()}”` : "");
      changed({ ...state });
    }, 250);
  }
  /** @param {number} step */
  function go(step) {
    const next = Math.max(0, Math.min(last, step));
    if (next !== state.step) choose({ step: next });
  }
  /** Show another reading of attention. @param {string} name */
  async function read(name) {
    reading.value = state.reading = name;
    let failed = false;
    await Promise.all(runs.map(async (run) => {
      if (!run.parts.maps) return;
      run.first ??= { meta: run.meta, maps: run.parts.maps };
      try {
        const found = name === "attention" ? { meta: run.first.meta, parts: { maps: run.first.maps } } : await more(run, { what: "maps", of: name });
        if (state.reading !== name || dead) return;
        const { channels: _, ...rest } = found.meta;
        run.meta = { ...run.meta, ...rest, channels: found.meta.channels, shares: run.meta.shares };
        run.parts = { ...run.parts, maps: found.parts.maps };
      } catch (error) {
        failed = true;
        tip.textContent = String(/** @type {any} */ (error).message ?? error);
      }
    }));
    if (state.reading === name && !failed) tip.textContent = lead.meta.about;
    choose({ layer: -1, head: -1, channel: channelOf(lead) < 0 ? Math.max(0, names.findIndex((_, i) => channelOf(lead, i) >= 0)) : state.channel });
  }
  slider.oninput = () => go(Number(slider.value));
  [back.onclick, on.onclick] = [() => go(state.step - 1), () => go(state.step + 1)];
  film.onpointerdown = film.onpointermove = drag(film);
  /** Go to the step under the pointer. @param {HTMLElement} over */
  function drag(over) {
    return (/** @type {PointerEvent} */ event) => {
      if (!event.buttons) return;
      go(under(event, over, steps.length, 1)[0]);
    };
  }
  const tick = (/** @type {number} */ now) => {
    if (!playing || dead) return;
    if (now - then >= 1000 / Number(speed.value)) {
      then = now;
      if (state.step === last) return stop();
      go(state.step + 1);
    }
    frame = requestAnimationFrame(tick);
  };
  function stop() {
    [playing, play.textContent] = [false, "▶ Play"];
    cancelAnimationFrame(frame);
    rest();
  }
  play.onclick = () => {
    if (playing) return stop();
    [playing, play.textContent] = [true, "❚❚ Pause"];
    if (state.step === last) go(0);
    frame = requestAnimationFrame(tick);
  };
  box.onkeydown = (/** @type {KeyboardEvent} */ event) => {
    const target = /** @type {HTMLElement} */ (event.composedPath()[0]);
    if (event.ctrlKey || event.metaKey || event.altKey || target.tagName === "SELECT" || target.tagName === "INPUT") return;
    const move = { ArrowRight: 1, ArrowLeft: -1, PageDown: 5, PageUp: -5, Home: -steps.length, End: steps.length }[event.key];
    if (event.key === " " && target === box) play.click();
    else if (move) go(state.step + move);
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const repaint = () => {
    paper = getComputedStyle(box).backgroundColor;
    paintFilm();
    for (const plot of plots) plot();
    draw();
  };
  dark.addEventListener("change", repaint);
  let wide = 0;
  const watch = new ResizeObserver(() => {
    if (box.clientWidth && box.clientWidth !== wide) {
      wide = box.clientWidth;
      repaint();
    }
  });
  watch.observe(box);
  repaint();
  if (state.reading !== "attention") read(state.reading);
  function destroy() {
    dead = true;
    stop();
    for (const eye of [watch, ...eyes]) eye.disconnect();
    dark.removeEventListener("change", repaint);
    box.remove();
  }
  return { box, state, go, stop, repaint, choose, destroy };
}
