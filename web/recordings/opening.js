// @ts-check
/**
 * Somebody else's recording, opened in the page: which arrays are in it, each checked before a byte of
 * it is unpacked, and their values, by zarrita.
 *
 * What is refused is what probe/reading/untrusted.py refuses: names, types, sizes and codecs that no
 * recording has. Every chunk is held to its size and its CRC-32C.
 *
 * @typedef {import("./zip.js").Entry} Entry
 * @typedef {{path: string, type: string, shape: number[], chunks: number[], inner: number[] | null, dims: string[], fill: number | string, metadata: any}} Spec
 * @typedef {{data: Float32Array | Float64Array, shape: number[]}} Values
 */

import { Array as ZarrArray, get, registry } from "zarrita";
import { crc32c } from "../checksums.js";
import { Unreadable, unzipped } from "./zip.js";

const FORMATS = [1, 2];
const [MOST_ROOT, MOST_NODES, MOST_CHUNKS, MOST_LABELS, MOST_TEXT] = [8 * 2 ** 20, 2000, 10_000, 100_000, 4 * 2 ** 20];
const [MOST_CHUNK, MOST_SHARD, MOST_VALUES] = [2 ** 28, 2 ** 30, 2 ** 25]; // bytes of a chunk, and of a file of several; values that are read at once
const MOST_READ = 2 ** 32; // values of all chunks that are read until something else is asked
const BYTES = /** @type {Record<string, number>} */ ({ uint8: 1, int8: 1, uint16: 2, int16: 2, uint32: 4, int32: 4, uint64: 8, int64: 8, float16: 2, float32: 4, float64: 8 });
const SEGMENT = /^(?!\.+$|__)[A-Za-z0-9_.+-]{1,200}$/;
const UNCLEAN = /[\p{Cc}\p{Cs}\p{Zl}\p{Zp}\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/gu; // control characters, those that turn the direction of text
const PLAIN = ["bytes", "crc32c"];
const HALF_NAN = 0x7e00;

/** Somebody's text as it may be shown. @param {unknown} text @param {number} [most] letters */
export function clean(text, most = 1000) {
  const shown = ["string", "number", "boolean"].includes(typeof text) ? String(text).replace(UNCLEAN, "?") : "";
  return shown.length > most ? `${shown.slice(0, most - 1)}…` : shown;
}

/** Open NAME.zarr.zip, or the files of a folder. Throws Unreadable, with a sentence for the reader. @param {File | File[]} source @returns {Promise<Recording>} */
export async function opened(source) {
  const files = Array.isArray(source) ? new Map(source.map((file) => [file.webkitRelativePath || file.name, ofFile(file)])) : await unzipped(source);
  const top = topOf([...files.keys()]);
  const given = (Array.isArray(source) ? top : source.name).split("/").filter(Boolean).pop();
  const name = clean(given ?? "", 120).replace(/\.zip$/, "").replace(/\.zarr$/, "") || "recording";
  const root = await json(files.get(`${top}zarr.json`));
  if (root?.zarr_format !== 3 || root.node_type !== "group" || !isObject(root.attributes)) throw new Unreadable("Its zarr.json is not that of a recording.");
  const { format_version: version } = root.attributes;
  if (Number.isInteger(version) && !FORMATS.includes(version)) throw new Unreadable(`It has format ${clean(version, 20)}, and this page reads ${FORMATS.join(" and ")}.`);
  if (!FORMATS.includes(version)) throw new Unreadable("It is a zarr group, and no recording of probe.");
  const nodes = root.consolidated_metadata?.metadata;
  if (!isObject(nodes)) throw new Unreadable("Its zarr.json does not list what is in it.");
  if (Object.keys(nodes).length > MOST_NODES) throw new Unreadable("It lists more variables than a recording has.");
  /** @type {Map<string, Spec>} */
  const arrays = new Map();
  for (const [path, node] of Object.entries(nodes)) {
    if (path.split("/").length > 8 || !path.split("/").every((part) => SEGMENT.test(part))) throw new Unreadable(`It lists “${clean(path, 60)}”, which is no name of a variable.`);
    if (node?.node_type === "array") arrays.set(path, checked(path, node));
  }
  return new Recording(name, root.attributes, arrays, (path) => files.get(top + path));
}

/** A recording whose list of arrays was checked. */
export class Recording {
  /** @param {string} name @param {Record<string, any>} attributes @param {Map<string, Spec>} arrays @param {(path: string) => Entry | undefined} file */
  constructor(name, attributes, arrays, file) {
    this.name = name;
    this.attributes = attributes;
    this.arrays = arrays;
    this.file = file;
    this.taken = 0; // values of chunks that were read: those that have no file take their time as well
  }

  /** What an array is, or nothing. Throws Unreadable if it has other dimensions than are read here. @param {string} path @param {string[]} dims */
  spec(path, dims) {
    const found = this.arrays.get(path);
    if (found && found.dims.join() !== dims.join()) throw new Unreadable(`Its ${path} has the dimensions ${clean(found.dims.join(), 80)}, and not ${dims}.`);
    return found;
  }

  /**
   * Values of an array as numbers: at an index along the first axes, whole along the others.
   *
   * @param {string} path
   * @param {(number | null)[]} [at] null: the whole axis
   * @returns {Promise<Values>}
   */
  async numbers(path, at = []) {
    const spec = this.arrays.get(path);
    if (!spec || spec.type === "string") throw new Unreadable(`It has no numbers ${clean(path, 60)}.`);
    const chosen = spec.shape.map((size, axis) => at[axis] ?? null);
    const count = chosen.reduce((/** @type {number} */ all, one, axis) => all * (one === null ? spec.shape[axis] : 1), 1);
    const chunk = spec.inner ?? spec.chunks;
    this.taken += chosen.reduce((/** @type {number} */ all, one, axis) => all * (one === null ? Math.ceil(spec.shape[axis] / chunk[axis]) : 1), product(chunk));
    const large = count > MOST_VALUES || product(chunk) * BYTES[spec.type] > MOST_CHUNK || this.taken > MOST_READ;
    if (large) throw new Unreadable(`Its ${path} is too large for this page (${spec.shape.join(" x ")}). probe view shows it.`);
    chosen.forEach((one, axis) => { if (one !== null && one >= spec.shape[axis]) throw new Unreadable(`Its ${path} has no index ${one} along ${spec.dims[axis]}.`); });
    return this.guarded(path, async () => {
      const { data, shape } = /** @type {any} */ (await get(this.array(spec), chosen));
      return { data: asFloats(data, spec.type), shape };
    });
  }

  /** All texts of an array, in the order of its places. @param {string} path @returns {Promise<string[]>} */
  async texts(path) {
    const spec = this.arrays.get(path);
    if (!spec || spec.type !== "string") throw new Unreadable(`It has no texts ${clean(path, 60)}.`);
    return this.guarded(path, async () => {
      const { data } = /** @type {any} */ (await get(this.array(spec)));
      return [...data].map((text) => clean(text ?? "", 200));
    });
  }

  /** @template T @param {string} path @param {() => Promise<T>} read @returns {Promise<T>} */
  async guarded(path, read) {
    try {
      return await read();
    } catch (error) {
      const own = /** @type {any} */ (error);
      if (own instanceof Unreadable) throw own;
      if (own.cause instanceof Unreadable) throw own.cause;
      throw new Unreadable(`Its ${path} cannot be read: a chunk of it is damaged.`);
    }
  }

  /** An array as zarrita reads it. Half numbers come as their codes, which older browsers have no type for. @param {Spec} spec @returns {any} */
  array(spec) {
    const half = spec.type === "float16";
    const metadata = { ...spec.metadata, ...(half ? { data_type: "uint16", fill_value: spec.fill === "NaN" ? HALF_NAN : 0 } : {}) };
    const exact = product(spec.inner ?? spec.chunks) * BYTES[spec.type] + 4;
    const free = spec.inner !== null || spec.type === "string"; // in the size of its files
    const most = spec.inner ? MOST_SHARD : spec.type === "string" ? MOST_TEXT : exact;
    const open = (/** @type {string} */ key) => {
      const entry = this.file(key.slice(1));
      if (entry && (entry.size > most || (!free && entry.size !== exact))) throw new Unreadable(`A chunk of ${spec.path} has ${entry.size} bytes, which it cannot have.`);
      return entry;
    };
    /** @type {{key: string, bytes: Promise<Uint8Array> | null}} a file that is packed is unpacked once, for all its parts */
    const last = { key: "", bytes: null };
    const store = {
      get: async (/** @type {string} */ key) => {
        const bytes = await open(key)?.read();
        return bytes && spec.type === "string" ? texts(bytes, spec) : bytes;
      },
      getRange: async (/** @type {string} */ key, /** @type {any} */ { offset, length, suffixLength }) => {
        const entry = open(key);
        if (!entry) return undefined;
        const [from, to] = suffixLength === undefined ? [offset, offset + length] : [entry.size - suffixLength, entry.size];
        if (suffixLength === undefined && length !== exact) throw new Unreadable(`A chunk of ${spec.path} has ${clean(length, 20)} bytes, which it cannot have.`);
        if (!(from >= 0 && to <= entry.size)) throw new Unreadable(`A chunk of ${spec.path} is not where its shard says.`);
        if (!entry.packed) return entry.read(from, to);
        if (last.key !== key) [last.key, last.bytes] = [key, entry.read()];
        return (await /** @type {Promise<Uint8Array>} */ (last.bytes)).slice(from, to);
      },
    };
    return new ZarrArray(store, `/${spec.path}`, metadata);
  }
}

registry.set("crc32c", async () => /** @type {any} */ ({
  kind: "bytes_to_bytes",
  fromConfig: () => ({ kind: "bytes_to_bytes", decode: withoutSum, computeEncodedSize: (/** @type {number} */ size) => size + 4 }),
}));

/** Bytes without their checksum, which is compared: zarrita only cuts it off. @param {Uint8Array} bytes */
function withoutSum(bytes) {
  const own = bytes.subarray(0, -4);
  const sum = bytes.length < 4 ? NaN : new DataView(bytes.buffer, bytes.byteOffset + own.length, 4).getUint32(0, true);
  if (crc32c(own) !== sum) throw new Unreadable("A chunk of it does not hold its checksum: its bytes were changed. Take it from a copy.");
  return own;
}

/** A chunk of text, once its lengths are known to fit, in bytes of its own. @param {Uint8Array} bytes @param {Spec} spec */
function texts(bytes, { path, chunks, metadata }) {
  const end = bytes.length - (metadata.codecs.length > 1 ? 4 : 0);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  let at = 4;
  const count = end >= 4 ? view.getUint32(0, true) : -1;
  for (let i = 0; i < count && at + 4 <= end; i++) at += 4 + view.getUint32(at, true);
  if (count !== product(chunks) || at !== end) throw new Unreadable(`Its ${path} is not the text that it should be.`);
  return bytes.slice();
}

/** What an array is, as its metadata says. Throws Unreadable for what no recording has. @param {string} path @param {any} node @returns {Spec} */
function checked(path, node) {
  const refuse = (/** @type {string} */ what) => { throw new Unreadable(`Its ${path} ${what}.`); };
  const { data_type: type, shape, dimension_names: names, chunk_grid: grid, chunk_key_encoding: keys, codecs, fill_value: fill } = node;
  if (node.zarr_format !== 3 || node.storage_transformers?.length) refuse("is not of zarr's third format");
  if (typeof type !== "string" || !(type === "string" || Object.hasOwn(BYTES, type))) refuse("has a type that recordings do not have");
  const chunks = grid?.configuration?.chunk_shape;
  if (grid?.name !== "regular" || keys?.name !== "default" || keys.configuration?.separator !== ".") refuse("is not laid out as recordings are");
  if (!areSizes(shape, 0) || !areSizes(chunks, 1) || shape.length !== chunks.length) refuse("has no shape");
  const dims = names ?? [];
  if (!Array.isArray(dims) || dims.length !== shape.length || !dims.every((name) => /^[a-z][a-z0-9_]{0,60}$/.test(name))) refuse("does not name its dimensions");
  const inner = innerOf(codecs, type) ?? null;
  if (inner === undefined || (inner && (inner.length !== chunks.length || inner.some((size, axis) => chunks[axis] % size)))) refuse("has chunks that do not fit its shards");
  if ((inner ?? chunks).some((/** @type {number} */ size, /** @type {number} */ axis) => size > Math.max(1, shape[axis]))) refuse("has chunks that are larger than itself");
  const counts = shape.map((/** @type {number} */ size, /** @type {number} */ axis) => Math.ceil(size / chunks[axis]));
  const many = product(counts) > MOST_CHUNKS || (inner && product(chunks) / product(inner) > MOST_CHUNKS);
  if (many || Math.max(product(shape), product(chunks)) > 2 ** 47) refuse(`claims a shape of ${clean(shape.join(" x "), 60)}, which no recording has`);
  if (type === "string" && (product(shape) > MOST_LABELS || product(chunks) > MOST_LABELS)) refuse("has too many labels");
  if (type !== "string" && !(typeof fill === "number" || ["NaN", "Infinity", "-Infinity"].includes(fill))) refuse("has no fill value");
  return { path, type, shape, chunks, inner, dims, fill, metadata: { ...node, attributes: {} } };

  /** The shape of a shard's chunks; null without shards. @param {any} codecs @param {string} type @returns {number[] | null} */
  function innerOf(codecs, type) {
    const list = Array.isArray(codecs) ? codecs.map((codec) => codec?.name) : [];
    const settings = Array.isArray(codecs) ? codecs.map((codec) => codec?.configuration ?? {}) : [];
    const little = (/** @type {any} */ one) => one?.endian === undefined || one.endian === "little";
    if (type === "string" && (list.join() === "vlen-utf8" || list.join() === "vlen-utf8,crc32c")) return null;
    if (type !== "string" && list.join() === PLAIN.join() && little(settings[0])) return null;
    if (type !== "string" && list.join() === "sharding_indexed") {
      const { chunk_shape: inside, codecs: own, index_codecs: index, index_location: where = "end" } = settings[0];
      const plain = [own, index].every((one) => Array.isArray(one) && one.map((codec) => codec?.name).join() === PLAIN.join() && little(one[0].configuration));
      if (areSizes(inside, 1) && plain && where === "end") return inside;
    }
    throw new Unreadable(`Its ${path} is encoded in a way that this page does not read.`);
  }
}

/** Numbers of a JavaScript type: maps of 8 bits stay codes. @param {any} data @param {string} type @returns {Float32Array | Float64Array} */
function asFloats(data, type) {
  if (type === "float16") {
    const [list, values] = [halves(), new Float32Array(data.length)];
    for (let i = 0; i < values.length; i++) values[i] = list[data[i]]; // a loop: there may be millions
    return values;
  }
  if (type === "float32") return data;
  return type.endsWith("64") ? Float64Array.from(data, Number) : Float32Array.from(data);
}

/** @type {Float32Array | null} */
let table = null;
/** Every half number, by its code. */
function halves() {
  return (table ??= Float32Array.from({ length: 65536 }, (_, code) => {
    const [sign, exponent, fraction] = [code & 0x8000 ? -1 : 1, (code >> 10) & 31, code & 1023];
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
  }));
}

/** The folder of the recording, "" or with its slash: that of the uppermost zarr.json. @param {string[]} names */
function topOf(names) {
  const tops = names.filter((name) => name === "zarr.json" || name.endsWith("/zarr.json")).map((name) => name.slice(0, -"zarr.json".length));
  if (!tops.length) throw new Unreadable("There is no recording in it: it should hold a folder with a zarr.json.");
  const depth = (/** @type {string} */ name) => name.split("/").length;
  const least = Math.min(...tops.map(depth));
  const upper = tops.filter((name) => depth(name) === least);
  if (upper.length > 1) throw new Unreadable(`It holds ${upper.length} recordings. Unpack it, and open one of them.`);
  return upper[0];
}

/** @param {File} file @returns {Entry} */
const ofFile = (file) => ({ size: file.size, packed: false, read: async (from = 0, to = file.size) => new Uint8Array(await file.slice(from, to).arrayBuffer()) });

/** @param {Entry | undefined} entry @returns {Promise<any>} */
async function json(entry) {
  if (!entry) throw new Unreadable("It has no zarr.json.");
  if (entry.size > MOST_ROOT) throw new Unreadable(`Its zarr.json has ${entry.size} bytes, more than that of a recording.`);
  const text = new TextDecoder().decode(await entry.read());
  for (const one of [text, text.replace(/([:[,]\s*)-?(?:NaN|Infinity)(?=\s*[,\]}])/g, "$1null")]) { // a scheduler's settings may be no number
    try {
      return JSON.parse(one);
    } catch {
      continue;
    }
  }
  throw new Unreadable("Its zarr.json is no JSON.");
}

/** @param {any} value */
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
/** @param {any} value @param {number} least */
const areSizes = (value, least) => Array.isArray(value) && value.length <= 16 && value.every((size) => Number.isInteger(size) && size >= least && size < 2 ** 48);
/** @param {number[]} sizes */
const product = (sizes) => sizes.reduce((all, size) => all * size, 1);
