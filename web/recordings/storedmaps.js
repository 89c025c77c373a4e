// @ts-check
/**
 * The attention of a recording: a map for each word, start, end and padding, and one of them in every
 * layer and head. Means and words are those of probe/analysis and probe/figures/channels.py.
 *
 * @typedef {import("./opening.js").Recording} Recording
 * @typedef {import("../attention.js").Channel} Channel
 * @typedef {{group: string, size: number[], layers: string[], heads: number}} Grid of an attention map, (y, x)
 * @typedef {{across: string, axis: string}} Axis what the dimension of images, or draws of noise, is called in the file, and in Python
 */

import { THUMBNAIL, ranking, resized, thumbnail } from "../attention.js";
import { mean, numbers, snippets, write } from "../parts.js";
import { Unreadable } from "./zip.js";

const CROSS = (/** @type {string} */ across) => ["step", "token", "branch", across, "layer", "head", "y", "x"];
const NOT_RECORDED = "Attention was not recorded. Record with capture.attention: maps.";
const QUERIES = "This recording keeps queries and keys. The maps come from them: probe view shows it.";
const PARTS = ["down", "mid_", "up_b"];
const [MOST, MOST_OF_EACH] = [2 ** 27, 1024]; // numbers of all tokens' maps; tokens, layers and heads
const REST = -1; // the token that stands for all that were not kept
const STUMP = "…"; // after what was read of a word that the cut went through

/** The maps of a recording. */
export class StoredMaps {
  /**
   * Read a recording's maps; a sentence, if there are none.
   *
   * @param {Recording} recording @param {Axis} names @param {number[]} committed
   * @param {(share: number) => void} [progress]
   * @returns {Promise<StoredMaps | string>}
   */
  static async of(recording, names, committed, progress) {
    const grids = await gridsOf(recording, names.across);
    if (!grids.length) return NOT_RECORDED;
    const made = new StoredMaps(recording, names, grids);
    return (await made.read(committed, progress)) ?? made;
  }

  /** @param {Recording} recording @param {Axis} names @param {Grid[]} grids the largest first */
  constructor(recording, { across, axis }, grids) {
    this.recording = recording;
    this.across = across;
    this.axis = axis;
    this.grids = grids;
    /** @type {number[]} */
    this.steps = [];
    /** @type {Channel[]} */
    this.channels = [];
    this.branch = 0; // the last, as in overview
    this.branchName = "cond";
    /** @type {Record<string, any>} */
    this.meta = {};
    /** @type {any} */
    this.part = null;
  }

  /** @param {number[]} committed @param {(share: number) => void} [progress] @returns {Promise<string | undefined>} */
  async read(committed, progress) {
    const { recording, grids: [{ group, size }] } = this;
    const recorded = (await recording.numbers(`${group}/recorded`)).data;
    this.steps = committed.filter((step) => recorded[step]);
    if (!this.steps.length) return "No step with attention is finished yet.";
    if (this.steps.length * this.tokens(group) * size[0] * size[1] > MOST) throw new Unreadable(`Its ${group} has more maps than this page can hold. probe view shows them.`);
    const branches = await recording.texts(`${group}/branch`);
    [this.branch, this.branchName] = [branches.length - 1, branches[branches.length - 1]];
    const kinds = await this.label();
    const tokens = await this.overview(progress);
    if (typeof tokens === "string") return tokens;
    const maps = tokens.map((own) => this.channels.map(({ tokens: list }) => sum(own, list, size)));
    this.part = numbers([this.channels.length, ...size, this.steps.length], 1);
    write(this.part, maps);
    const share = (/** @type {string} */ kind) => tokens.map((own) => finite(own.reduce((all, map, i) => all + (kinds[i] === kind ? mean(map) : 0), 0)));
    this.meta = {
      branch: this.branchName, map_steps: this.steps, channels: this.channels.map(({ label, kind }) => ({ label, kind })),
      shares: { start: share("start"), words: share("word"), end: share("end"), padding: share("padding") },
      snippets: snippets({ branch: this.branchName, axis: this.axis }),
    };
  }

  /** Name the channels, and return what each token is: start, word (punctuation too), end or padding. */
  async label() {
    const { recording, branch, grids: [{ group }] } = this;
    const row = (/** @type {any[]} */ values, /** @type {number} */ count) => values.slice(branch * count, (branch + 1) * count);
    const places = [...(await recording.numbers(`${group}/token`)).data];
    const words = row(await recording.texts(`${group}/word`), places.length);
    const texts = row(await recording.texts(`${group}/token_text`), places.length);
    const indices = row([...(await recording.numbers(`${group}/word_index`)).data], places.length);
    const ends = places.filter((place, i) => place > 0 && indices[i] < 0 && texts[i] === "<|endoftext|>");
    const end = Math.min(...ends);
    const kinds = places.map((place, i) => {
      if (ends.length && place > end) return "padding";
      if (ends.length && place === end) return "end";
      if (place === REST) return "padding";
      return place === 0 ? "start" : "word";
    });
    const numbered = [...new Set(indices.filter((index) => index >= 0))].sort((a, b) => a - b);
    const listed = (/** @type {(i: number) => boolean} */ is) => [...places.keys()].filter(is);
    this.channels = numbered.map((index) => ({ label: words[indices.indexOf(index)], kind: "word", tokens: listed((i) => indices[i] === index) }));
    const last = this.channels[this.channels.length - 1];
    if (last && isSplit(recording.attributes, this.branchName)) last.label += STUMP;
    for (const kind of /** @type {const} */ (["start", "end", "padding"])) this.channels.push({ label: kind, kind, tokens: listed((i) => kinds[i] === kind) });
    return kinds;
  }

  /**
   * A map for each token and step, means over layers and heads of the first image; a sentence, if they are not here.
   *
   * @param {(share: number) => void} [progress]
   * @returns {Promise<Float32Array[][] | string>} (step, token) of (y, x)
   */
  async overview(progress = () => {}) {
    const { recording, grids: [{ group, size }], across } = this;
    const images = recording.arrays.get(`${group}/cross`)?.shape[3] ?? recording.arrays.get("latents/latents")?.shape[1] ?? 1;
    const spec = recording.spec(`${group}/overview`, ["token", "step", "y", "x"]);
    if (spec && (images === 1 || !this.has("cross"))) {
      const { data, shape: [tokens, steps] } = await recording.numbers(spec.path);
      const block = size[0] * size[1];
      const map = (/** @type {number} */ at) => Float32Array.from(data.subarray(at * block, (at + 1) * block));
      const every = this.steps.map((step) => Array.from({ length: tokens }, (_, token) => map(token * steps + step)));
      if (every.every((one) => one.every((values) => values.every(Number.isFinite)))) return every;
    }
    if (!this.has("cross")) return this.has("query") ? QUERIES : NOT_RECORDED;
    for (const grid of this.grids) if (!recording.spec(`${grid.group}/cross`, CROSS(across))) return NOT_RECORDED;
    const every = [];
    for (const [i, step] of this.steps.entries()) {
      progress(i / this.steps.length);
      every.push(await this.means(step));
    }
    return every;
  }

  /** @param {string} name */
  has(name) {
    return this.grids.every(({ group }) => this.recording.arrays.has(`${group}/${name}`));
  }

  /** The mean over the heads of each layer, then over the layers, for each token. @param {number} step */
  async means(step) {
    const [{ size }] = this.grids;
    const layers = this.grids.reduce((count, grid) => count + grid.layers.length, 0);
    /** @type {Float32Array[]} */
    let means = [];
    for (const { group, size: own, heads } of this.grids) {
      const maps = await this.stored(`${group}/cross`, [step, null, this.branch, 0]);
      const [block, each] = [own[0] * own[1], maps.length / this.tokens(group)];
      const tokens = Array.from({ length: this.tokens(group) }, (_, token) => {
        const total = new Float32Array(block);
        for (let i = 0; i < each; i++) total[i % block] += maps[token * each + i];
        return resized(total, own, size).map((value) => value / heads / layers);
      });
      means = means.length ? means.map((map, token) => map.map((value, i) => value + tokens[token][i])) : tokens;
    }
    return means;
  }

  /** How many tokens were kept. @param {string} group */
  tokens(group) {
    return this.recording.arrays.get(`${group}/cross`)?.shape[1] ?? 0;
  }

  /** Maps as shares: those of 8 bits are codes, (code / 255)^2. @param {string} path @param {(number | null)[]} at */
  async stored(path, at) {
    const { data } = await this.recording.numbers(path, at);
    return this.recording.arrays.get(path)?.type === "uint8" ? Float32Array.from(data, (code) => (code / 255) ** 2) : data;
  }

  /** A channel in every layer and head. @param {number} channel */
  async heads(channel) {
    const { tokens } = this.channels[channel] ?? {};
    if (!tokens || !this.has("cross")) throw new Error(this.has("query") ? QUERIES : NOT_RECORDED);
    const layers = this.grids.flatMap((grid) => grid.layers.map((path, index) => ({ path, grid, index })));
    layers.sort((a, b) => order(a.path) - order(b.path) || (a.path < b.path ? -1 : 1));
    const most = Math.max(...this.grids.map(({ heads }) => heads));
    const [none, steps] = [new Float32Array(THUMBNAIL ** 2), this.steps.length];
    const shares = layers.map(({ grid }) => Array.from({ length: grid.heads }, () => new Float32Array(steps)));
    /** @type {Float32Array[][]} */
    const small = [];
    for (const [i, step] of this.steps.entries()) {
      /** @type {Map<Grid, Float32Array>} */
      const sums = new Map();
      for (const grid of this.grids) sums.set(grid, await this.channelAt(grid, step, tokens));
      small.push(layers.flatMap(({ grid, index }, layer) => Array.from({ length: most }, (_, head) => {
        if (head >= grid.heads) return none;
        const block = grid.size[0] * grid.size[1];
        const map = /** @type {Float32Array} */ (sums.get(grid)).subarray((index * grid.heads + head) * block, (index * grid.heads + head + 1) * block);
        shares[layer][head][i] = mean(map);
        return thumbnail(map, grid.size);
      })));
    }
    const maps = numbers([layers.length, most, THUMBNAIL, THUMBNAIL, steps], 2);
    write(maps, small);
    const meta = {
      channel, layers: layers.map(({ path }) => path), heads: layers.map(({ grid }) => grid.heads),
      shares: shares.map((heads) => Array.from({ length: steps }, (_, i) => finite(heads.reduce((all, one) => all + one[i], 0) / heads.length))),
      snippets: snippets({ layer: true, branch: this.branchName, axis: this.axis }), map_steps: this.steps, branch: this.branchName,
      ranking: ranking(shares.map((heads) => heads.map(mean))),
    };
    return { meta, parts: { maps } };
  }

  /** The sum of some tokens' maps, (layer, head, y, x). @param {Grid} grid @param {number} step @param {number[]} tokens */
  async channelAt({ group, size, layers, heads }, step, tokens) {
    const total = new Float32Array(layers.length * heads * size[0] * size[1]);
    for (const token of tokens) {
      const map = await this.stored(`${group}/cross`, [step, token, this.branch, 0]);
      for (let i = 0; i < total.length; i++) total[i] += map[i];
    }
    return total;
  }
}

/** The grids with attention, the largest first. Throws Unreadable where their labels do not fit. @param {Recording} recording @param {string} across @returns {Promise<Grid[]>} */
async function gridsOf(recording, across) {
  const grids = [];
  for (const path of recording.arrays.keys()) {
    const found = /^(attention\/(\d{1,5})x(\d{1,5}))\/layer$/.exec(path);
    if (!found) continue;
    const [group, size] = [found[1], [Number(found[2]), Number(found[3])]];
    const own = (/** @type {string} */ name, /** @type {string[]} */ dims) => recording.spec(`${group}/${name}`, dims);
    const [layers, token, cross] = [own("layer", ["layer"]), own("token", ["token"]), own("cross", CROSS(across))];
    const maps = cross ?? recording.arrays.get(`${group}/query`);
    const along = (/** @type {string} */ name) => maps?.shape[maps.dims.indexOf(name)];
    const fits = layers && token && along("y") === size[0] && along("x") === size[1] && along("layer") === layers.shape[0];
    if (!fits || (cross && cross.shape[1] !== token.shape[0])) throw new Unreadable(`Its ${group} does not hold what its name and labels say.`);
    if (Math.max(token.shape[0], layers.shape[0], along("head") ?? 1) > MOST_OF_EACH) throw new Unreadable(`Its ${group} has more tokens, layers or heads than a model has.`);
    for (const name of ["word", "token_text", "word_index"]) {
      if (own(name, ["branch", "token"])?.shape[1] !== token.shape[0]) throw new Unreadable(`Its ${group}/${name} does not name its tokens.`);
    }
    if (!own("recorded", ["step"])) throw new Unreadable(`It has no ${group}/recorded.`);
    if (!own("branch", ["branch"])?.shape[0]) throw new Unreadable(`It has no ${group}/branch.`);
    const overview = own("overview", ["token", "step", "y", "x"])?.shape;
    if (overview && (overview[0] !== token.shape[0] || overview[2] !== size[0] || overview[3] !== size[1])) throw new Unreadable(`Its ${group}/overview is of another size.`);
    grids.push({ group, size, layers: await recording.texts(path), heads: along("head") ?? 1 });
  }
  return grids.sort((a, b) => b.size[0] * b.size[1] - a.size[0] * a.size[1]);
}

/** Whether the cut of a prompt that is too long went through a word: letters on both sides of it. @param {Record<string, any>} attributes @param {string} branch */
function isSplit(attributes, branch) {
  const cut = attributes.cut_from_prompt?.[branch];
  if (typeof cut !== "string" || !/^[\p{L}\p{M}\p{N}]/u.test(cut)) return false;
  const texts = { cond: attributes.experiment?.prompt ?? attributes.noising?.caption, uncond: attributes.experiment?.negative_prompt };
  const read = attributes.read_as?.[branch] ?? attributes.edited_texts?.[branch] ?? texts[/** @type {"cond"} */ (branch)];
  return typeof read === "string" && read.endsWith(cut) && /[\p{L}\p{M}\p{N}]$/u.test(read.slice(0, -cut.length));
}

/** @param {Float32Array[]} maps @param {number[]} tokens @param {number[]} size */
function sum(maps, tokens, [height, width]) {
  const total = new Float32Array(height * width);
  for (const token of tokens) maps[token].forEach((value, i) => { total[i] += value; });
  return total;
}

/** Where in the network a layer is. @param {string} path */
function order(path) {
  const part = PARTS.indexOf(path.slice(0, 4));
  return part < 0 ? PARTS.length : part;
}
/** @param {number} value */
const finite = (value) => (Number.isFinite(value) ? Number(value.toPrecision(6)) : null);
