// @ts-check
/**
 * The player: a recording, step by step. One ES module without dependencies: the dashboard, a notebook
 * and an exported page mount the same one. Numbers come as bytes, colour is applied here, so a changed
 * step, word, scale or opacity asks nobody. What a recording says reaches the page as text alone.
 *
 *     const run = await open(bytes)                      // a payload of probe.figures.bundle
 *     const player = mount(element, [run], { ask })      // ask: what is fetched when it is wanted
 *
 * @typedef {import("./payload.js").Numbers} Numbers
 * @typedef {import("./payload.js").Sheet} Sheet
 * @typedef {import("./payload.js").Channel} Channel
 * @typedef {import("./payload.js").Panel} Panel
 * @typedef {import("./payload.js").Run} Run
 * @typedef {import("./payload.js").State} State
 * @typedef {{state?: Partial<State>, ask?: (run: number, what: Record<string, string>) => Promise<Uint8Array | Run>,
 *            changed?: (state: State) => void, sync?: "sigma" | "step", full?: boolean}} Options
 */
import { DASHES, LINES, SIGNED, arrows, choice, idly, keep, make, outline, page, paintLess, paintLines, paintMap, paintPicture, show, under } from "./drawing.js";
import { ABOUT, ASKS, KINDS, clamp, closest, high, lockable, map, nearest, open, over, overlap, peak, ranged, said, shading, short, span, table, upcoming } from "./payload.js";

const AHEAD = 64e6; // bytes of maps that are prepared before somebody asks

/**
 * Put a player into an element.
 * @param {HTMLElement | ShadowRoot} root @param {Run[]} runs one to four, the first leads @param {Options} options
 */
export function mount(root, runs, { state: wished = {}, ask, changed = () => {}, sync = "sigma", full = true } = {}) {
  root.querySelector(":scope > .probe")?.remove();
  const lead = runs[0];
  const box = make("section", "probe", "", /** @type {any} */ (root), { tabindex: "0", "aria-label": `Replay of ${lead.meta.prompt || "a run without a prompt"}` });
  const steps = /** @type {number[]} */ (lead.meta.steps);
  if (!steps.length) {
    make("p", "empty", "No step of this recording is finished yet.", box);
    return { box, state: null, go() {}, repaint() {}, grown() {}, choose() {}, destroy: () => box.remove() };
  }
  const colours = table(lead.meta.colours);
  const last = steps.length - 1;
  const offers = ask && full ? lead.meta.offers : { readings: lead.meta.offers.readings.slice(0, 1), branches: [], latents: 0 };
  const channelsOf = (/** @type {Run} */ run) => /** @type {Channel[]} */ (run.meta.channels ?? []);
  let names = channelsOf(lead);
  /** The busiest word. */
  const busiest = () => names.reduce((best, channel, i) => (channel.kind === "word" && (names[best].kind !== "word" || high(lead.parts.maps, i) > high(lead.parts.maps, best)) ? i : best), 0);
  /** @type {State} */
  const state = { step: Math.round(last / 3), channel: busiest(), reading: "attention", branch: lead.meta.branch ?? "cond", per: "words", layer: -1, head: -1, against: -1, steps: "one", from: 0, opacity: 0.6, scale: "words", ...wished };
  state.step = clamp(state.step, steps.length, Math.round(last / 3));
  state.from = clamp(state.from, steps.length, 0);
  state.channel = state.reading === "attention" && state.per === "words" ? clamp(state.channel, names.length, busiest()) : clamp(state.channel, 1e4, 0);
  if (!offers.readings.includes(state.reading)) state.reading = offers.readings[0] ?? "attention";
  if (!offers.branches.includes(state.branch)) state.branch = lead.meta.branch ?? "cond";
  if (!offers.branches.length) state.per = "words";
  if (state.scale === "locked" && !lockable(state.vmin, state.vmax)) state.scale = "words";
  const views = []; // drawn again at every change
  const [asked, here, tops] = [new Map(), new WeakMap(), new Map()]; // what was asked for; what of that has come; the greatest values, found once
  let means = new WeakMap(); // of each channel over places, by step
  const eyes = [];
  const square = { row: 0, row_to: 0, column: 0, column_to: 0 }; // whose self-attention is shown
  let [paper, wanted] = ["", ""]; // the page's colour; which maps are shown, in words
  let [playing, dead, frame, then, settled, wide, fresh] = [false, false, 0, 0, 0, 0, 0]; // fresh: how often a run has grown

  const label = () => names[state.channel]?.label ?? "";
  const title = () => ASKS[state.reading][1](label());
  const at = (/** @type {Run} */ run, step = state.step) => (run === lead || sync === "step" ? Math.min(step, run.meta.steps.length - 1) : nearest(run.meta.sigma, lead.meta.sigma[step]));
  /** The first and last of a run's maps that are shown together. @param {Run} run */
  const mapAt = (run) => span(state, last).map((step) => closest(run.meta.map_steps ?? [], run.meta.steps[at(run, step)]));
  /** Where a run has a word, the second time for one that is there twice; -1: nowhere. @param {Run} run @param {number} [index] */
  function channelOf(run, index = state.channel) {
    if (run === lead) return index in names ? index : -1;
    const alike = (/** @type {Channel} */ channel) => channel.label === names[index]?.label && channel.kind === names[index]?.kind;
    const before = names.slice(0, index).filter(alike).length;
    return channelsOf(run).flatMap((channel, i) => (alike(channel) ? [i] : []))[before] ?? -1;
  }

  /** The range that a reader locked. */
  const locked = () => (state.scale === "locked" ? [state.vmin ?? 0, state.vmax ?? 0] : null);
  /** The values of the first and the last colour. @param {Run} run @param {number} channel */
  const reach = (run, channel) => locked() ?? [0, top(run, channel)];
  /** The greatest value that the colours reach. @param {Run} run @param {number} channel */
  function top(run, channel) {
    if (state.scale === "step") return peak(run.parts.maps, channel, 0, mapAt(run));
    const key = `${runs.indexOf(run)} ${channel} ${state.scale} ${wanted}`;
    let found = tops.get(key);
    if (found === undefined) tops.set(key, (found = topOf(run, channel)));
    return found;
  }
  /** @param {Run} run @param {number} channel */
  function topOf(run, channel) {
    if (state.scale === "word") return Math.max(...runs.map((other) => (other.parts.maps && channelOf(other) >= 0 ? high(other.parts.maps, channelOf(other)) : 0)));
    if (channelsOf(run)[channel].kind !== "word") return high(run.parts.maps, channel); // start and padding outshine every word
    return Math.max(...runs.flatMap((other) => channelsOf(other).map((one, i) => (one.kind === "word" && other.parts.maps ? high(other.parts.maps, i) : 0))));
  }
  const isShare = (/** @type {Run} */ run) => ["attention", "self-attention", undefined].includes(run.meta.of);
  const amount = (/** @type {number} */ value, /** @type {Run} */ run) => (isShare(run) ? `${short(value * 100)}%` : short(value));

  /** A channel's mean over all places, step by step. @param {Numbers} part @param {number} channel */
  function means_of(part, channel) {
    const found = means.get(part) ?? [];
    means.set(part, found);
    found[channel] ??= Float32Array.from({ length: part.shape[3] }, (_, i) => {
      const { values } = map(part, [i, i], channel);
      return values.reduce((sum, value) => sum + value, 0) / values.length;
    });
    return found[channel];
  }

  /** Draw what a section shows only while it is on the screen. @param {Element} section @param {() => void} view */
  function seen(section, view) {
    let [visible, late] = [true, false];
    if (typeof IntersectionObserver !== "undefined") {
      const eye = new IntersectionObserver(([entry]) => {
        visible = entry.isIntersecting;
        if (visible && late) view();
        late = false;
      });
      eye.observe(section);
      eyes.push(eye);
    }
    return () => {
      if (visible) view();
      else late = true;
    };
  }

  /** Ask once for more of a run; what comes is opened. @param {Run} run @param {Record<string, string>} what */
  function more(run, what) {
    const key = JSON.stringify([runs.indexOf(run), what]);
    const ready = asked.get(key) ?? Promise.resolve(ask?.(runs.indexOf(run), what)).then((more) => (more instanceof Uint8Array ? open(more) : more ?? Promise.reject(Error("Nothing more is here."))));
    asked.set(key, ready);
    ready.then((found) => here.set(ready, found), () => asked.delete(key));
    return ready;
  }

  // The question.
  const question = make("div", "question", "", box, { role: "group", "aria-label": "Which word" });
  const asking = make("span", "ask", "", question);
  const chips = make("span", "chips", "", question);
  const mark = make("span", "ask", "?", question);
  views.push(() => [...chips.children].forEach((chip, i) => chip.setAttribute("aria-pressed", String(i === state.channel))));

  // The pictures, a row for each run.
  const panels = /** @type {Panel[]} */ (lead.meta.panels);
  const tip = make("p", "tip", "");
  for (const run of runs) {
    const level = runs.length > 1 && make("small", "", "", make("h2", "who", `${run.meta.name}: ${run.meta.facts}`, box));
    if (level) views.push(() => { level.textContent = ` step ${said(run.meta.steps[at(run)], run.meta.calls)}, sigma ${short(run.meta.sigma[at(run)])}`; });
    const row = make("div", runs.length > 2 ? "row several" : "row", "", box);
    panels.forEach((panel, number) => row.append(panel.part === "maps" ? mapFigure(run, number) : pictureFigure(run, panel, number)));
  }
  /** A figure's frame. @param {string} part @param {number} number @param {string} text @param {string} below */
  function frameOf(part, number, text, below) {
    const made = make("figure", part);
    const caption = make("figcaption", "", "", made);
    make("b", "", `${number + 1}`, caption);
    const [name, note] = [make("span", "", text, caption), make("small", "", below, made)];
    const canvas = make("canvas", "", "", made, { role: "img" });
    const empty = make("p", "empty", "", made);
    return { made, caption, name, note, canvas, empty };
  }
  /** Give a canvas the size of what it shows, in square pixels. @param {any} canvas @param {Numbers | Sheet} part */
  function fit(canvas, part) {
    const [height, width] = part.kind === "sheet" ? part.shape.slice(1, 3) : part.shape.slice(-3, -1);
    const size = Math.max(1, Math.floor(512 / Math.max(height, width)));
    if (canvas.width === width * size && canvas.height === height * size) return;
    [canvas.width, canvas.height] = [width * size, height * size];
    canvas.style.aspectRatio = `${width} / ${height}`;
  }
  /** Which picture of a sheet is the one of now. @param {Run} run @param {string} part */
  const frameAt = (run, part) => (run.parts[part].shape[0] === 1 ? 0 : part === "decoded" ? closest(run.meta.decoded_steps, run.meta.steps[at(run)]) : at(run));
  /** @param {Run} run @param {Panel} panel @param {number} number */
  function pictureFigure(run, panel, number) {
    const own = /** @type {Panel} */ (run.meta.panels.find((/** @type {Panel} */ { part }) => part === panel.part) ?? panel);
    const { made, caption, name, note, canvas, empty } = frameOf(panel.part, number, own.title, own.note);
    empty.textContent = run.meta.missing[panel.part] ?? "Not recorded.";
    canvas.hidden = !(empty.hidden = panel.part in run.parts);
    if (canvas.hidden) return made;
    let shown = "";
    views.push(() => {
      const index = frameAt(run, panel.part);
      if (shown === `${index} ${fresh}`) return;
      shown = `${index} ${fresh}`;
      if (panel.part !== "latents") [name.textContent, note.textContent] = [own.title, own.note];
      fit(canvas, run.parts[panel.part]);
      paintPicture(canvas, run.parts[panel.part], index);
      canvas.setAttribute("aria-label", `${own.title}, step ${said(run.meta.steps[at(run)], run.meta.calls)}`);
    });
    if (panel.part !== "latents" || !offers.latents) return made;
    const whole = run.parts.latents;
    const channel = choice(caption, "Which channel of the latents", [["", "as colour"], ...run.meta.latent_names.map((/** @type {string} */ name, /** @type {number} */ i) => [String(i), name])], "");
    channel.onchange = async () => {
      const { value } = channel;
      try {
        const found = value === "" ? { meta: own, parts: { latents: whole } } : await more(run, { what: "latents", channel: value });
        if (dead || channel.value !== value) return;
        [note.textContent, run.parts.latents, shown] = [found.meta.note, found.parts.latents, ""];
        draw();
      } catch (error) {
        note.textContent = String(/** @type {any} */ (error).message ?? error);
      }
    };
    return made;
  }
  /** @param {Run} run @param {number} number */
  function mapFigure(run, number) {
    const { made, name, note, canvas, empty } = frameOf("maps", number, "Places that attend", "");
    cells(run, canvas);
    views.push(() => {
      const channel = channelOf(run);
      name.textContent = title();
      const nothing = run.parts.maps ? (channel < 0 ? `“${label()}” is not in this prompt.` : "") : run.meta.missing.maps ?? "Not recorded.";
      empty.textContent = nothing;
      canvas.hidden = !(empty.hidden = !nothing);
      if (nothing) return;
      const single = run.heads && state.layer >= 0;
      const source = single ? run.heads.parts.maps : run.parts.maps;
      fit(canvas, source);
      const behind = run.parts.decoded ? "decoded" : run.parts.denoised ? "denoised" : "";
      if (behind) paintPicture(canvas, run.parts[behind], frameAt(run, behind));
      else canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
      const [from, to] = mapAt(run);
      const when = from === to ? "" : `, mean over ${to - from + 1} steps, sigma ${short(lead.meta.sigma[span(state, last)[0]])} to ${short(lead.meta.sigma[span(state, last)[1]])}`;
      const other = single ? -1 : channelOf(run, state.against);
      if (other >= 0) {
        const most = paintLess(canvas, map(source, [from, to], channel), map(source, [from, to], other).values, state.opacity, locked()?.[1]);
        note.textContent = `“${label()}” (orange) less “${names[state.against].label}” (blue)${when}`;
        if (run === lead) legend([-most, most], "less");
        return;
      }
      const [a, b] = single ? [state.layer, state.head] : [channel, 0];
      const reached = !single ? reach(run, channel) : locked() ?? [0, peak(source, a, b, state.scale === "step" ? mapAt(run) : undefined)];
      paintMap(canvas, source, [from, to], a, b, colours, reached, state.opacity);
      note.textContent = (single ? `${layerName(run.heads.meta.layers[a])}, head ${b}, alone` : run.meta.note) + when;
      if (run === lead) legend(reached, single && !locked() ? "head" : state.scale);
      if (run.meta.of === "self-attention") outline(canvas, source, square);
    });
    return made;
  }
  const layerName = (/** @type {string} */ path) => path.split(".transformer")[0];
  if (runs.length === 2) differences(runs[0], runs[1]);

  /** What is not the same in two runs: their difference, or one drawn over the other. @param {Run} one @param {Run} two */
  function differences(one, two) {
    const head = make("div", "who between", "", box);
    const text = make("h2", "", "", head);
    const how = choice(head, "How the two are compared", [["difference", "difference"], ["wipe", "wipe"]], "difference");
    const edge = make("input", "", "", head, { type: "range", min: "0", max: "1", step: "0.01", "aria-label": "Where the wipe is" });
    edge.value = "0.5";
    how.onchange = edge.oninput = () => draw();
    views.push(() => {
      edge.hidden = how.value !== "wipe";
      text.textContent = edge.hidden ? "Difference of the two: pictures without sign, four times as bright; attention first less second" : `Left ${one.meta.name}, right ${two.meta.name}`;
    });
    const row = make("div", "row", "", box);
    for (const panel of panels) {
      const made = make("figure", panel.part, "", row);
      const [canvas, note, empty] = [make("canvas", "", "", made, { role: "img", "aria-label": `The two compared: ${panel.title}` }), make("small", "", "", made), make("p", "empty", "", made)];
      views.push(seen(made, () => {
        const [a, b] = [one, two].map((run) => run.parts[panel.part]);
        const sizes = [a, b].map((part) => part && (part.kind === "sheet" ? part.shape.slice(1, 3) : part.shape.slice(-3, -1)));
        const [first, second] = [channelOf(one), channelOf(two)];
        empty.textContent = !a || !b ? "Not recorded in both." : sizes[0].join() !== sizes[1].join() && !(how.value === "wipe" && sizes[0][0] * sizes[1][1] === sizes[0][1] * sizes[1][0]) ? `Not of one size: ${sizes.map((size) => size.join(" x ")).join(" and ")}. Pictures of one shape can be wiped.` : a.kind === "numbers" && (first < 0 || second < 0) ? "Not in both prompts." : "";
        note.textContent = "";
        canvas.hidden = !(empty.hidden = !empty.textContent);
        if (canvas.hidden) return;
        fit(canvas, a);
        const pen = canvas.getContext("2d");
        const paint = (/** @type {Run} */ run, /** @type {number} */ channel) => {
          if (a.kind === "sheet") paintPicture(canvas, run.parts[panel.part], frameAt(run, panel.part));
          else paintMap(canvas, run.parts.maps, mapAt(run), channel, 0, colours, reach(run, channel));
        };
        if (how.value === "wipe") {
          const left = canvas.width * Number(edge.value);
          paint(one, first);
          pen.save();
          pen.beginPath();
          pen.rect(left, 0, canvas.width, canvas.height);
          pen.clip();
          paint(two, second);
          pen.restore();
          pen.fillStyle = "#fff";
          pen.fillRect(left - 1, 0, 3, canvas.height);
        } else if (a.kind === "sheet") {
          paint(one, first);
          pen.globalCompositeOperation = "difference";
          paint(two, second);
          pen.globalCompositeOperation = "lighter";
          for (let i = 0; i < 2; i++) pen.drawImage(canvas, 0, 0);
          pen.globalCompositeOperation = "source-over";
        } else {
          const most = paintLess(canvas, map(a, mapAt(one), first), map(b, mapAt(two), second).values, 1, locked()?.[1]);
          note.textContent = `blue: less, orange: more; ${locked() ? "locked at" : "at this step up to"} ${amount(most, lead)}`;
        }
      }));
    }
  }

  /** Numbers under the pointer, a cell cursor for the keyboard, and places to look from. @param {Run} run @param {any} canvas */
  function cells(run, canvas) {
    let [row, column, began] = [0, 0, /** @type {number[] | null} */ (null)];
    canvas.setAttribute("aria-label", "A map. Arrow keys read single places.");
    const shape = () => (run.heads && state.layer >= 0 ? run.heads : run).parts.maps.shape.slice(-3, -1);
    const tell = () => {
      const channel = channelOf(run);
      const single = run.heads && state.layer >= 0;
      if (channel < 0) return;
      const { values, height, width } = single ? map(run.heads.parts.maps, mapAt(run), state.layer, state.head) : map(run.parts.maps, mapAt(run), channel);
      [row, column] = [Math.max(0, Math.min(height - 1, row)), Math.max(0, Math.min(width - 1, column))];
      const whose = state.reading === "self-attention" ? "" : ` to “${label()}”`;
      tip.textContent = `Row ${row}, column ${column} of ${height} x ${width}: ${amount(values[row * width + column], run)}${whose}.`;
    };
    const look = (/** @type {number[]} */ [r, c]) => {
      if (state.reading !== "self-attention") return;
      const [rows, columns] = [[r, row].sort((a, b) => a - b), [c, column].sort((a, b) => a - b)];
      Object.assign(square, { row: rows[0], row_to: rows[1], column: columns[0], column_to: columns[1] });
      read({});
    };
    canvas.onpointermove = (/** @type {PointerEvent} */ event) => {
      const [height, width] = shape();
      [column, row] = under(event, canvas, width, height);
      tell();
    };
    canvas.onpointerdown = () => { began = [row, column]; };
    canvas.onpointerup = () => { if (began) look(began); began = null; };
    arrows(canvas, (right, down) => {
      [row, column] = [row + down, column + right];
      tell();
    }, () => look([row, column]));
  }

  // What is under the pictures: the number, what is shown, the scale, the opacity.
  const tools = make("div", "tools", "", box);
  tools.append(tip);
  /** A labelled choice. @param {string} text @param {string} about @param {[string, string][]} options @param {keyof State} name */
  function tool(text, about, options, name) {
    const holder = make("label", "", `${text} `, tools);
    const select = choice(holder, about, options, String(state[name]));
    holder.hidden = options.length < 2;
    return select;
  }
  const pairs = (/** @type {string[]} */ values) => /** @type {[string, string][]} */ (values.map((value) => [value, value]));
  const reading = tool("show", "What is shown", pairs(offers.readings), "reading");
  const branch = tool("of the", "Branch of guidance", offers.branches.map((/** @type {string} */ name) => [name, name === "cond" ? "prompt" : "negative prompt"]), "branch");
  const per = tool("by", "Words or single tokens", pairs(offers.branches.length ? ["words", "tokens"] : []), "per");
  reading.onchange = branch.onchange = per.onchange = () => read({ ...(reading.value !== state.reading && locked() ? { scale: "words" } : {}), reading: reading.value, branch: branch.value || state.branch, per: per.value || "words" });
  const many = tool("at", "Which steps", [["one", "this step"], ["before", "steps up to here"], ["after", "steps from here on"], ["from", "steps between"], ["all", "all steps"]], "steps");
  many.onchange = () => {
    if (many.value === "from") tip.textContent = `The other end stays at step ${said(steps[state.step], lead.meta.calls)}: move on from here.`;
    choose({ steps: many.value, from: state.step });
  };
  const scale = tool("scale", "Scale of the colours", [["words", "one for all words"], ["word", "each word's own"], ["step", "this step's own"], ["locked", "locked"]], "scale");
  scale.onchange = () => choose(scale.value === "locked" ? locking() : { scale: scale.value });
  const less = choice(make("label", "", "less ", tools), "Another word to take away", [["-1", "nothing"]], "-1");
  less.onchange = () => choose({ against: Number(less.value), layer: -1, head: -1 });
  const opacities = make("label", "", "overlay ", tools);
  const opacity = make("input", "", "", opacities, { type: "range", min: "0", max: "1", step: "0.05", "aria-label": "Opacity of the map over the picture" });
  opacity.value = String(state.opacity);
  opacity.oninput = () => choose({ opacity: Number(opacity.value) });
  const key = make("span", "key", "", tools);
  const bar = make("span", "bar", "", key, { "aria-hidden": "true" });
  const ends = make("span", "ends", "", key);
  const [lowest, highest] = ["Least of the colours", "Most of the colours"].map((text, i) => {
    if (i) make("span", "", "to", ends);
    return make("input", "", "", ends, { type: "number", min: "0", step: "any", "aria-label": text });
  });
  const range = make("span", "", "", key);
  const lock = make("button", "lock", "Lock range", key, { type: "button", title: "Keep this range whatever else is chosen" });
  let [present, before] = [[0, 1], "words"]; // the range that is shown; the scale without the lock
  const locking = () => ({ scale: "locked", ...(lockable(0, present[1]) ?? { vmin: 0, vmax: 1 }) });
  lock.onclick = () => choose(locked() ? { scale: before } : locking());
  lowest.onchange = highest.onchange = () => {
    const [vmin, vmax] = [lowest, highest].map((end) => Number(end.value || NaN) / (isShare(lead) ? 100 : 1));
    const given = lockable(vmin, vmax);
    if (!given) tip.textContent = live.textContent = "The range stays: it goes from 0 or more up to more than that.";
    choose(given ?? {});
  };
  tools.hidden = !offers.readings.length;
  const gradient = (/** @type {Uint32Array} */ list) => `linear-gradient(90deg, ${[0, 64, 128, 191, 255].map((i) => `rgb(${list[i] & 255} ${(list[i] >> 8) & 255} ${(list[i] >> 16) & 255})`)})`;
  const grounds = { sequential: gradient(colours), signed: gradient(SIGNED) };
  /** @param {number[]} shown the values of the first and the last colour @param {string} how */
  function legend(shown, how) {
    present = shown;
    if (!locked()) before = state.scale;
    const unit = isShare(lead) ? 100 : 1;
    [lowest.value, highest.value] = [state.vmin ?? 0, state.vmax ?? 0].map((value) => String(Number((value * unit).toPrecision(4))));
    ends.hidden = !locked();
    lock.setAttribute("aria-pressed", String(!ends.hidden));
    const why = { words: names[state.channel].kind === "word" ? "the same for every word and step" : "the same at every step", word: "the same at every step", step: "at this step alone", head: "this head's own", less: locked() ? "locked" : "here alone" }[how];
    bar.style.background = grounds[how === "less" ? "signed" : "sequential"];
    range.textContent = how === "locked" ? `${isShare(lead) ? "%, " : ""}locked` : `${shown[0] ? amount(shown[0], lead) : 0} to ${amount(shown[1], lead)}, ${why}`;
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
  const now = make("output", "", "", time);
  const [live, film] = [make("p", "live", "", box, { "aria-live": "polite" }), make("div", "film", "", dock)];
  const strip = make("canvas", "", "", film, { role: "img", "aria-label": "The guess of the clean picture at every step" });
  const cursor = make("div", "cursor", "", film);
  const curve = make("canvas", "curve", "", film, { role: "img", "aria-label": "Noise level sigma over the steps, on a log scale" });
  const line = make("div", "line", "", film);
  const guessed = lead.parts.denoised;
  strip.hidden = !guessed;
  views.push(() => {
    slider.value = String(state.step);
    const [from, to] = span(state, last);
    cursor.style.left = `${(from / steps.length) * 100}%`;
    cursor.style.width = `${(100 * (to - from + 1)) / steps.length}%`;
    line.style.left = `${((state.step + 0.5) / steps.length) * 100}%`;
    const [sigma, t] = [lead.meta.sigma[state.step], lead.meta.timestep[state.step]];
    now.textContent = `step ${said(steps[state.step], lead.meta.calls)}   sigma ${short(sigma)}   t ${short(t)}`;
    slider.setAttribute("aria-valuetext", now.textContent);
  });

  /** Paint what does not change with the step: the film strip and the curve. */
  function paintFilm() {
    const [ratio, width] = [devicePixelRatio || 1, film.clientWidth];
    if (!width) return;
    const each = width / steps.length;
    if (guessed) {
      const [, height, wide] = guessed.shape;
      const side = Math.min(each - 2, 48);
      [strip.width, strip.height] = [Math.round(width * ratio), Math.round(Math.min(48, side * (height / wide)) * ratio)];
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
    paintLines(curve, [{ values: logs.map((/** @type {number} */ value) => value - least) }], 54, () => text);
  }

  // Below: how attention is shared out, every word, every layer and head.
  const below = make("div", "below", "", box);
  sharesView();
  /** What all of the attention goes to. */
  function sharesView() {
    const section = make("section", "shares", "", below, { "aria-label": "What all of the attention goes to" });
    const heading = make("h2", "", "", section);
    const stack = make("div", "stack", "", section);
    const pieces = KINDS.map((kind) => {
      const piece = make("button", kind, "", stack, { type: "button" });
      piece.onclick = () => choose({ channel: kind === "words" ? busiest() : Math.max(0, names.findIndex((channel) => channel.kind === kind)) });
      return piece;
    });
    const list = make("p", "shared", "", section);
    const shown = KINDS.map((kind) => make("span", kind, "", list));
    make("small", "", "Each place's attention adds up to 100%. What no word needs goes to start, end or padding; to which of them differs between models.", section);
    views.push(() => {
      section.hidden = !lead.meta.shares;
      if (section.hidden) return;
      heading.textContent = `What all of the attention goes to, ${state.steps === "one" ? "at this step" : "mean over the steps chosen"}`;
      KINDS.forEach((kind, i) => {
        const share = over(lead.meta.shares[kind], mapAt(lead));
        pieces[i].style.flexGrow = String(Math.max(share, 0.004));
        shown[i].textContent = pieces[i].title = `${kind} ${(share * 100).toFixed(1)}%`;
        pieces[i].setAttribute("aria-label", shown[i].textContent);
      });
    });
  }
  const every = make("section", "every", "", below);
  const everyTitle = make("h2", "", "", every);
  const small = make("div", "small", "", every);
  let chosen = new Float32Array(); // the map of the word that is chosen
  let thumbs = []; // views of the small maps, made anew with the words
  views.push(() => {
    every.hidden = !names.length || state.reading === "self-attention";
    everyTitle.textContent = `Every ${state.per === "tokens" ? "token" : "word"}, ${{ words: "all on one scale", word: "each on its own scale", step: "each on its own scale at this step", locked: "all on the locked scale" }[state.scale]}, and its overlap with “${label()}” (1: the same places)`;
    if (every.hidden) return;
    chosen = map(lead.parts.maps, mapAt(lead), state.channel).values;
    for (const thumb of thumbs) thumb();
  });
  /** A small map of a word. @param {Channel} channel @param {number} number */
  function thumbOf(channel, number) {
    const [height, width] = lead.parts.maps.shape.slice(-3, -1);
    const made = make("button", "thumb", "", small, { type: "button" });
    const canvas = make("canvas", "", "", made, { width: String(width), height: String(height) });
    make("small", "", channel.label, made);
    const [text, alike] = [make("small", "number", "", made), make("small", "number", "", made)];
    made.onclick = () => choose({ channel: number });
    made.onpointerenter = made.onfocus = () => prepare(number);
    return seen(made, () => {
      const index = mapAt(lead);
      paintMap(canvas, lead.parts.maps, index, number, 0, colours, reach(lead, number));
      text.textContent = amount(over(means_of(lead.parts.maps, number), index), lead);
      alike.textContent = number === state.channel ? "chosen" : `overlap ${overlap(map(lead.parts.maps, index, number).values, chosen).toFixed(2)}`;
      made.setAttribute("aria-pressed", String(number === state.channel));
    });
  }
  let prepare = async (/** @type {number} */ channel) => {}; // fetch one word in every layer and head before it is chosen
  if (ask && offers.readings.length) headsView(below);

  /** One word in every layer and head. @param {Element} parent */
  function headsView(parent) {
    const section = make("section", "heads", "", parent);
    const heading = make("h2", "", "", section);
    const holder = make("div", "holder", "", section);
    const [across, down] = [make("div", "across", "", holder), make("div", "down", "", holder)];
    const canvas = make("canvas", "", "", holder, { role: "img", "aria-label": "Maps of every layer and head" });
    const about = make("p", "tip", "", section);
    const best = make("p", "best", "", section);
    const all = make("button", "", "All layers and heads together", section, { type: "button" });
    all.onclick = () => choose({ layer: -1, head: -1 });
    const layered = make("figure", "layered", "", section);
    const layeredTitle = make("figcaption", "", "", layered);
    const plot = make("div", "film", "", layered);
    const [byLayer, mark] = [make("canvas", "", "", plot, { role: "img" }), make("div", "line", "", plot)];
    let key = "";
    const load = () => {
      const next = `${state.channel} ${wanted} ${fresh}`;
      if (key === next) return;
      key = next;
      runs.forEach((run) => {
        const channel = channelOf(run);
        delete run.heads;
        if (channel < 0 || !run.parts.maps) return;
        const coming = headsOf(run, channel);
        if (here.has(coming)) return arrived(run, here.get(coming));
        coming.then((found) => {
          if (key !== next || dead) return;
          arrived(run, found);
          draw();
          ahead();
        }, (error) => { about.textContent = String(error.message ?? error); });
      });
    };
    const headsOf = (/** @type {Run} */ run, /** @type {number} */ channel) => more(run, { what: "heads", channel: String(channel), ...(full ? { branch: state.branch, per: state.per } : {}) });
    const prepared = new Set(); // words, of the maps that are shown
    let [preparing, room] = [false, full ? AHEAD : 0];
    prepare = async (index) => {
      if (state.reading !== "attention" || room <= 0 || prepared.has(`${index} ${wanted}`)) return;
      prepared.add(`${index} ${wanted}`);
      const having = runs.filter((run) => run.parts.maps && channelOf(run, index) >= 0);
      const found = await Promise.all(having.map((run) => headsOf(run, channelOf(run, index)))).catch(() => []);
      for (const { parts } of found) room -= parts.maps.data.length;
    };
    /** Prepare the other words, one after the other, while nothing else is to do. */
    function ahead() {
      if (preparing || runs.some(({ meta }) => ["recording", "finishing"].includes(meta.following.state))) return; // at each new step all would be made anew
      const next = upcoming(names, state.channel).find((index) => !prepared.has(`${index} ${wanted}`));
      if (next === undefined || room <= 0) return;
      preparing = true;
      idly(() => {
        preparing = false;
        if (!dead && !section.hidden) prepare(next).then(ahead);
      });
    }
    /** Take the maps of a run's heads. Of the first run, name the parts of the network, the heads, and those that give most. @param {Run} run @param {Run} found */
    const arrived = (run, found, { meta, parts: { maps } } = found) => {
      run.heads = found;
      if (run !== lead) return;
      const parts = meta.layers.map((/** @type {string} */ layer) => layer.split("_")[0]);
      across.replaceChildren(...[...new Set(parts)].map((part) => {
        const name = make("span", "", part);
        name.style.flexGrow = String(parts.filter((/** @type {string} */ other) => other === part).length);
        return name;
      }));
      down.replaceChildren(...Array.from({ length: maps.shape[1] }, (_, head) => make("span", "", `head ${head}`)));
      best.replaceChildren("Heads that give it most, mean over the steps: ", ...meta.ranking.map((/** @type {number[]} */ [layer, head, share]) => {
        const button = make("button", "", `${layerName(meta.layers[layer]).replace(/_blocks?\./, " ").replace("attentions.", "")}, head ${head}: ${short(share * 100)}%`, undefined, { type: "button" });
        button.onclick = () => choose({ layer, head, against: -1 });
        return button;
      }));
      state.layer = clamp(state.layer, meta.layers.length, -1);
      state.head = state.layer < 0 ? -1 : clamp(state.head, meta.heads[state.layer], 0);
      const sheet = page(maps.shape[4], meta.layers.length);
      const most = Math.max(...meta.shares.flat().map((/** @type {number | null} */ value) => value ?? 0));
      meta.shares.flat().forEach((/** @type {number | null} */ value, /** @type {number} */ i) => { sheet.pixels[i] = colours[Math.round((255 * (value ?? 0)) / (most || 1))]; });
      [byLayer.width, byLayer.height] = [sheet.canvas.width, sheet.canvas.height];
      show(byLayer, sheet, 1);
      byLayer.style.height = `${Math.max(60, meta.layers.length * 9)}px`;
      layeredTitle.textContent = `Share that “${label()}” gets, layer by layer (down) and step by step (across): 0 to ${short(most * 100)}%`;
      byLayer.setAttribute("aria-label", layeredTitle.textContent);
    };
    const spot = (/** @type {PointerEvent} */ event) => (lead.heads ? under(event, canvas, lead.heads.parts.maps.shape[0], lead.heads.parts.maps.shape[1]) : [-1, -1]);
    const tell = (/** @type {number} */ layer, /** @type {string} */ head, step = mapAt(lead)) => {
      if (!lead.heads || !(layer in lead.heads.meta.layers)) return;
      about.textContent = `${layerName(lead.heads.meta.layers[layer])}${head}. This layer gives “${label()}” ${short(over(lead.heads.meta.shares[layer], step) * 100)}% of its attention.`;
    };
    canvas.onpointermove = (/** @type {PointerEvent} */ event) => { const [layer, head] = spot(event); tell(layer, `, head ${head}`); };
    canvas.onclick = (/** @type {PointerEvent} */ event) => { const [layer, head] = spot(event); choose({ layer, head, against: -1 }); };
    plot.onpointermove = (/** @type {PointerEvent} */ event) => {
      const [step, layer] = under(event, plot, byLayer.width, byLayer.height);
      tell(layer, `, step ${lead.heads?.meta.map_steps[step]}`, [step, step]);
    };
    plot.onpointerdown = (/** @type {PointerEvent} */ event) => go(under(event, plot, steps.length, 1)[0]);
    arrows(canvas, (right, low) => {
      if (!lead.heads) return;
      const [layers, heads] = lead.heads.parts.maps.shape;
      choose({ layer: Math.max(0, Math.min(layers - 1, state.layer + right)), head: Math.max(0, Math.min(heads - 1, state.head + low)), against: -1 });
      tell(state.layer, `, head ${state.head}`);
    });
    const relevant = () => names.length > 0 && state.reading === "attention";
    views.unshift(seen(section, () => { if (relevant()) load(); })); // before all that shows one head alone
    const paint = seen(section, () => {
      heading.textContent = `“${label()}” in every layer and head, ${locked() ? "all on the locked scale" : "each on its own scale"}`;
      all.hidden = state.layer < 0;
      best.hidden = layered.hidden = !lead.heads;
      if (!lead.heads) return;
      const { maps } = lead.heads.parts;
      const [layers, heads, height, width] = maps.shape;
      const sheet = page(layers * width, heads * height);
      const cellOf = span(state, last)[0] === span(state, last)[1] ? quick : mean;
      for (let layer = 0; layer < layers; layer++) for (let head = 0; head < heads; head++) cellOf(sheet.pixels, maps, layer, head);
      const cell = Math.max(20, Math.min(64, Math.floor(((wide > 820 ? (wide - 36) / 2 : wide) - 60) / layers)));
      if (canvas.width !== layers * cell || canvas.height !== heads * cell) {
        [canvas.width, canvas.height] = [layers * cell, heads * cell];
        [across.style.width, down.style.height] = [`${canvas.width}px`, `${canvas.height}px`];
      }
      show(canvas, sheet, 1);
      const brush = canvas.getContext("2d");
      brush.fillStyle = paper;
      for (let layer = 1; layer < layers; layer++) brush.fillRect(layer * cell - 1, 0, 2, canvas.height);
      for (let head = 1; head < heads; head++) brush.fillRect(0, head * cell - 1, canvas.width, 2);
      mark.style.left = `${((state.step + 0.5) / steps.length) * 100}%`;
      canvas.setAttribute("aria-label", `Maps of “${label()}”: ${layers} layers across, ${heads} heads down. Arrow keys choose one.`);
      if (state.layer < 0) return;
      [brush.strokeStyle, brush.lineWidth] = ["#fff", 3];
      brush.strokeRect(state.layer * cell + 1.5, state.head * cell + 1.5, cell - 3, cell - 3);
    });
    /** Colour one head's map at one step. @param {Uint32Array} pixels @param {Numbers} maps @param {number} layer @param {number} head */
    function quick(pixels, maps, layer, head) {
      const [layers, heads, height, width, count] = maps.shape;
      const reached = locked();
      const list = reached ? ranged(colours, high(maps, layer, head), reached) : colours;
      let from = (layer * heads + head) * height * width * count + mapAt(lead)[0];
      for (let y = 0; y < height; y++) {
        const to = (head * height + y) * layers * width + layer * width;
        for (let x = 0; x < width; x++, from += count) pixels[to + x] = list[maps.data[from]];
      }
    }
    /** Colour one head's mean over steps. @param {Uint32Array} pixels @param {Numbers} maps @param {number} layer @param {number} head */
    function mean(pixels, maps, layer, head) {
      const { values, width } = map(maps, mapAt(lead), layer, head);
      const shade = shading(locked() ?? [0, high(maps, layer, head)]);
      values.forEach((value, i) => { pixels[(head * (values.length / width) + Math.floor(i / width)) * maps.shape[0] * width + layer * width + (i % width)] = colours[shade(value)]; });
    }
    views.push(() => {
      section.hidden = !relevant();
      if (!section.hidden) paint();
    });
  }

  // Numbers over the steps.
  const plots = Object.values(lead.meta.curves ?? {}).filter((each) => each.values.length > 1).map((each) => plotOf(each.title, each.note, () => [each], () => {
    const spread = each.spread?.[state.step];
    return short(each.values[state.step]) + (spread ? ` ± ${short(spread)}` : "");
  }));
  const plain = { meta: lead.meta, maps: lead.parts.maps }; // attention, whatever else is shown
  if (plain.maps && plain.meta.map_steps.length > 1) plots.push(plotOf("Attention that each word gets", "mean over places, layers and heads", () => channelsOf(/** @type {any} */ (plain)).flatMap((channel, i) => (channel.kind !== "word" ? [] : [{
    values: Array.from(means_of(plain.maps, i), (value, step) => (step > (lead.meta.reached ?? last) ? null : value)), colour: LINES[i % LINES.length], dash: DASHES[Math.floor(i / LINES.length) % DASHES.length], label: channel.label,
  }])), () => {
    const same = channelsOf(/** @type {any} */ (plain)).findIndex((channel) => channel.label === label());
    return same < 0 ? "" : `“${label()}” ${short(100 * over(means_of(plain.maps, same), span(state, last).map((step) => closest(plain.meta.map_steps, steps[step]))))}%`;
  }));
  if (plots.length) below.insertBefore(make("h2", "curves", "Over the steps"), below.querySelector("figure.plot"));
  /** Lines over the steps, with the number at this one. @param {string} text @param {string} note @param {() => any[]} lines @param {() => string} number */
  function plotOf(text, note, lines, number) {
    const made = make("figure", "plot", "", below);
    const value = make("output", "", "", make("figcaption", "", text, made));
    const plot = make("div", "film", "", made);
    const canvas = make("canvas", "", "", plot, { role: "img", "aria-label": `${text}, over the steps` });
    const mark = make("div", "line", "", plot);
    const legends = make("p", "legends", "", made);
    make("small", "", note, made);
    views.push(() => {
      mark.style.left = `${((state.step + 0.5) / steps.length) * 100}%`;
      value.textContent = number();
    });
    plot.onpointerdown = plot.onpointermove = drag(plot);
    return () => {
      const drawn = lines();
      legends.replaceChildren(...drawn.filter((each) => each.label).map((each) => {
        const entry = make("span", each.dash.length ? "dashed" : "", each.label);
        entry.style.setProperty("--swatch", each.colour);
        return entry;
      }));
      paintLines(canvas, drawn, 90);
    };
  }
  // What a reader takes away.
  const away = make("details", "away", "", box);
  make("summary", "", "Numbers, files and code", away);
  const body = make("div", "", "", away);
  const buttons = make("div", "buttons", "", body);
  const stem = () => `${lead.meta.name}-step-${steps[state.step]}`;
  make("button", "", "Picture (PNG)", buttons, { type: "button" }).onclick = () => box.querySelector("figure.maps canvas:not([hidden]), .row canvas:not([hidden])")?.toBlob((/** @type {Blob} */ blob) => keep(blob, `${stem()}.png`));
  const numbersButton = make("button", "", "Numbers (CSV)", buttons, { type: "button" });
  numbersButton.onclick = () => keep(new Blob([csv()], { type: "text/csv" }), `${stem()}.csv`);
  const code = make("pre", "code", "", body, { tabindex: "0" });
  const copy = make("button", "", "Copy as Python", buttons, { type: "button" });
  copy.onclick = () => navigator.clipboard?.writeText(code.textContent).then(() => { copy.textContent = "Copied"; setTimeout(() => { copy.textContent = "Copy as Python"; }, 1500); });
  const sheetHolder = make("div", "table", "", body);
  /** The map that is shown, as numbers. */
  const shownMap = () => (lead.heads && state.layer >= 0 ? map(lead.heads.parts.maps, mapAt(lead), state.layer, state.head) : map(lead.parts.maps, mapAt(lead), channelOf(lead)));
  /** The numbers over the steps as rows of text, the names first. */
  function curveRows() {
    const every = Object.entries(lead.meta.curves ?? {});
    const names = ["step", "t", "sigma", ...every.flatMap(([name, { spread }]) => (spread ? [name, `${name} spread`] : [name]))];
    return [names, ...steps.map((step, i) => [step, lead.meta.timestep[i], lead.meta.sigma[i], ...every.flatMap(([, { values, spread }]) => (spread ? [values[i], spread[i]] : [values[i]]))].map((value) => String(value ?? "")))];
  }
  function csv() {
    if (channelOf(lead) < 0 || !lead.parts.maps) return curveRows().map((row) => row.join(",")).join("\n") + "\n";
    const { values, height, width } = shownMap();
    return Array.from({ length: height }, (_, y) => Array.from(values.subarray(y * width, (y + 1) * width), (value) => value.toPrecision(4)).join(",")).join("\n") + "\n";
  }
  /** The Python that gives the array that is shown. */
  function snippet() {
    const kind = names[state.channel]?.kind;
    const list = lead.heads && state.layer >= 0 ? lead.heads.meta.snippets : lead.meta.snippets;
    const line = names.length ? (kind !== "word" && list.kind) || list.word : list.picture;
    const [from, to] = (names.length ? mapAt(lead) : span(state, last)).map((i) => (names.length ? lead.meta.map_steps : steps)[i]);
    const filled = { step: from === to ? from : `slice(${from}, ${to})`, mean: from === to ? "" : ".mean('step')", word: state.channel, kind: { start: "BOS", end: "EOS", padding: "rest" }[kind] ?? "", layer: lead.heads?.meta.layers[state.layer], head: state.head };
    return lead.meta.opened + Object.entries(filled).reduce((text, [name, value]) => text.replaceAll(`{${name}}`, () => String(value)), line);
  }
  away.ontoggle = () => draw();
  views.push(() => {
    if (!away.open) return;
    code.textContent = snippet();
    sheetHolder.replaceChildren();
    const sheet = make("table", "", "", sheetHolder);
    if (channelOf(lead) < 0 || !lead.parts.maps) {
      curveRows().forEach((cells, i) => {
        const row = make("tr", "", "", sheet);
        for (const cell of cells) make(i ? "td" : "th", "", i ? short(Number(cell)) : cell, row);
      });
      return;
    }
    const { values, height, width } = shownMap();
    make("caption", "", `${title()}, step ${said(steps[state.step], lead.meta.calls)}, ${lead.meta.unit}; rows are y, columns x`, sheet);
    for (let y = 0; y < height; y++) {
      const row = make("tr", "", "", sheet);
      make("th", "", String(y), row, { scope: "row" });
      for (let x = 0; x < width; x++) make("td", "", short(values[y * width + x] * (isShare(lead) ? 100 : 1)), row);
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
    if (state.against === state.channel) state.against = -1;
    [scale.value, many.value, less.value] = [state.scale, state.steps, String(state.against)];
    draw();
    rest();
  }
  /** Say it and tell the page, once the reader rests. */
  function rest() {
    clearTimeout(settled);
    settled = window.setTimeout(() => {
      if (playing || dead) return;
      live.textContent = now.textContent + (names.length ? `, “${label()}”` : "");
      changed({ ...state });
    }, 250);
  }
  /** @param {number} step */
  function go(step) {
    const next = Math.max(0, Math.min(lead.meta.reached ?? last, step)); // a run that is drawn has no more
    if (next !== state.step) choose({ step: next });
  }
  /** Name the words anew: those of the branch, the tokens, or the places that are shown. */
  function relabel() {
    names = channelsOf(lead);
    mark.hidden = !names.length;
    question.hidden = !names.length && lead.meta.kind === "noising";
    asking.textContent = names.length ? ASKS[state.reading][0] : (lead.meta.missing.maps ?? "");
    chips.replaceChildren(...names.map((channel, i) => {
      const chip = make("button", `chip ${channel.kind}`, channel.label, undefined, { type: "button" });
      if (ABOUT[channel.kind]) chip.title = ABOUT[channel.kind];
      chip.onclick = () => choose({ channel: i });
      chip.onpointerenter = chip.onfocus = () => prepare(i);
      return chip;
    }));
    small.replaceChildren();
    thumbs = state.reading === "self-attention" ? [] : names.map(thumbOf);
    less.replaceChildren();
    for (const [value, text] of [["-1", "nothing"], ...names.map((channel, i) => [String(i), `“${channel.label}”`])]) make("option", "", text, less, { value });
    less.value = String(state.against in names ? state.against : -1);
    less.parentElement.hidden = names.length < 2;
  }
  /** Show another reading of the run, and the words that it has. @param {Partial<State>} change */
  async function read(change) {
    const before = names[state.channel];
    Object.assign(state, change);
    [reading.value, branch.value, per.value] = [state.reading, state.branch, state.per];
    const places = state.reading === "self-attention";
    const mine = (wanted = [state.reading, state.branch, state.per, ...(places ? Object.values(square) : [])].join(" "));
    let failed = "";
    await Promise.all(runs.map(async (run) => {
      run.first ??= { meta: run.meta, parts: { maps: run.parts.maps } };
      const plain = state.reading === "attention" && state.per === "words" && state.branch === run.first.meta.branch;
      const what = places ? { what: "places", branch: state.branch, ...square } : { what: "maps", of: state.reading, branch: state.branch, per: state.per };
      try {
        const found = plain ? run.first : await more(run, /** @type {any} */ (what));
        if (mine !== wanted || dead) return;
        const picture = run.first.meta.snippets.picture;
        run.meta = { ...run.meta, ...found.meta, snippets: { picture, ...found.meta.snippets } };
        run.parts = { ...run.parts, maps: found.parts.maps };
      } catch (error) {
        failed = String(/** @type {any} */ (error).message ?? error);
      }
    }));
    if (mine !== wanted || dead) return;
    if (!failed || lead.meta.of === state.reading) relabel();
    tip.textContent = failed || lead.meta.about;
    const same = names.findIndex((channel) => channel.label === before?.label && channel.kind === before?.kind);
    choose({ layer: -1, head: -1, against: -1, channel: same >= 0 ? same : names.length ? busiest() : 0 });
  }
  slider.oninput = () => go(Number(slider.value));
  [back.onclick, on.onclick] = [() => go(state.step - 1), () => go(state.step + 1)];
  film.onpointerdown = film.onpointermove = drag(film);
  /** Go to the step under the pointer. @param {HTMLElement} over */
  function drag(over) {
    return (/** @type {PointerEvent} */ event) => {
      if (event.buttons) go(under(event, over, steps.length, 1)[0]);
    };
  }
  const tick = (/** @type {number} */ when) => {
    if (!playing || dead) return;
    if (when - then >= 1000 / Number(speed.value)) {
      then = when;
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
    wide = box.clientWidth; // read once: between two changes it would cost more than drawing
    paper = getComputedStyle(box).backgroundColor;
    paintFilm();
    for (const plot of plots) plot();
    draw();
  };
  dark.addEventListener("change", repaint);
  const watch = new ResizeObserver(() => {
    if (box.clientWidth && box.clientWidth !== wide) repaint();
  });
  watch.observe(box);
  relabel();
  tip.textContent = names.length ? "Point at a place of the map to read its number." : "";
  repaint();
  if (state.reading !== "attention" || state.per !== "words" || state.branch !== (lead.meta.branch ?? state.branch)) {
    const given = { layer: state.layer, head: state.head, against: state.against, channel: state.channel };
    read({}).then(() => choose({ ...given, channel: clamp(given.channel, names.length, busiest()) }));
  }
  /** Draw what has come: a run that is being drawn grows in place. @param {number} [step] */
  function grown(step = state.step) {
    [fresh, state.step, means] = [fresh + 1, step, new WeakMap()];
    for (const kept of [tops, asked]) kept.clear();
    repaint();
    rest();
  }
  function destroy() {
    dead = true;
    stop();
    for (const eye of [watch, ...eyes]) eye.disconnect();
    dark.removeEventListener("change", repaint);
    box.remove();
  }
  return { box, state, go, stop, repaint, grown, choose, destroy };
}
