// @ts-check
/**
 * A run of this page as a recording, NAME.zarr.zip: what `probe verify` proves and `probe view` opens.
 *
 * Attributes and variables are those of a recording that Python made when the model was exported,
 * model/recording.json. The values are this run's: latents, predictions, noise levels, the picture.
 *
 * @typedef {import("../growing.js").Growing} Growing
 * @typedef {{shape: number[], data_type: string, chunk_grid: {configuration: {chunk_shape: number[]}}, fill_value: any, dimension_names: string[], node_type: string}} Meta
 * @typedef {{attributes: Record<string, any>, metadata: Record<string, any>, unguided: string[], constants: Record<string, string>,
 *            edits: Record<string, any>, identity: string, schedulers: Record<string, any>, conventions: Record<string, string>, ends: Record<string, number>}} Template
 * @typedef {Float32Array | Float64Array | BigInt64Array | Uint8Array} Values
 */

import { crc32c } from "../checksums.js";
import { recipe } from "../experiment.js";
import { joined, littleEndian, zipped } from "./zip.js";

const TEXT = "cost/component"; // the one variable of text: its mark is of its JSON
const STEPS = ["latents/latents", "latents/prediction", "latents/prediction_cond", "latents/prediction_uncond"];
const encoder = new TextEncoder();

/** Pack a finished run. @param {Growing} run @param {Template} template @param {{software: string, created: string}} here @returns {Promise<Uint8Array<ArrayBuffer>>} */
export async function recording(run, template, here) {
  const { experiment } = run;
  const needsFile = experiment.start || experiment.edits.some((edit) => edit.kind === "noise" && edit.where);
  if (!run.picture || needsFile) throw new Error("A recording is made of a finished run that needs no picture and no noise from a file. Python records those: copy the experiment.");
  /** @type {Map<string, Uint8Array>} */
  const files = new Map();
  /** @type {string[]} */
  const lines = [];
  const guided = experiment.guidance > 1;
  /** @type {Record<string, any>} */
  const metadata = {};
  for (const [path, about] of Object.entries(template.metadata)) {
    if (!guided && !template.unguided.includes(path)) continue;
    metadata[path] = about.node_type === "array" ? sized(about, path, run, template) : about;
    const { consolidated_metadata: _, ...own } = metadata[path];
    files.set(`${path}/zarr.json`, json(own));
  }
  const arrays = Object.keys(metadata).filter((path) => metadata[path].node_type === "array");
  const values = valuesOf(run, template);
  for (const path of arrays.filter((one) => !STEPS.includes(one))) {
    const marks = path in template.constants ? constant(files, path, template.constants[path]) : chunk(files, path, metadata[path], values[path], 0);
    if (path !== "committed") lines.push(await line(path, { [path]: marks }));
  }
  for (let index = 0; index < run.calls; index++) {
    /** @type {Record<string, Uint8Array>} */
    const marks = {};
    for (const path of STEPS) if (path in metadata) marks[path] = chunk(files, path, metadata[path], stepOf(run, path, index), index);
    lines.push(await line(`step ${index}`, marks));
  }
  files.set("digests.txt", encoder.encode(lines.join("")));
  const manifest = await Promise.all([...files].map(async ([name, content]) => [name, await sha256(content)]));
  const root = { attributes: await attributes(run, template, here), zarr_format: 3, consolidated_metadata: { kind: "inline", must_understand: false, metadata }, node_type: "group" };
  manifest.push(["zarr.json", await sha256(encoder.encode(pythons(root)))]); // before its status is written
  files.set("manifest.json", json(Object.fromEntries(manifest)));
  files.set("zarr.json", json({ ...root, attributes: { ...root.attributes, status: "complete" } }));
  return zipped(files, `${run.name}.zarr/`);
}

/** What a variable is, in the length of this run. @param {any} about @param {string} path @param {Growing} run @param {Template} template @returns {Meta} */
function sized(about, path, run, template) {
  if (about.dimension_names?.[0] !== "step" && path !== "latents/scheduler_sigmas") return about;
  const whole = about.chunk_grid.configuration.chunk_shape[0] > 1;
  const length = run.calls + (path === "latents/scheduler_sigmas" ? template.ends[run.experiment.scheduler] : 0);
  const shape = [length, ...about.shape.slice(1)];
  const chunks = whole ? [length, ...about.chunk_grid.configuration.chunk_shape.slice(1)] : about.chunk_grid.configuration.chunk_shape;
  return { ...about, shape, chunk_grid: { ...about.chunk_grid, configuration: { chunk_shape: chunks } } };
}

/** The values of variables that are written once. @param {Growing} run @param {Template} template @returns {Record<string, Values>} */
function valuesOf(run, { ends, metadata }) {
  const { timesteps, sigmas } = run.begun;
  const { width, height, data } = /** @type {import("../growing.js").Picture} */ (run.picture);
  const unknown = (/** @type {string} */ path) => new Float64Array(metadata[path].dimension_names[0] === "step" ? run.calls : metadata[path].shape[0] ?? 1).fill(NaN);
  return {
    step: BigInt64Array.from(timesteps, (_, i) => BigInt(i)),
    timestep: Float64Array.from(timesteps),
    sigma: Float64Array.from(sigmas),
    alpha_bar: Float64Array.from(run.steps, ({ alphaBar }) => alphaBar),
    committed: new Uint8Array(run.calls).fill(1),
    "latents/scheduler_sigmas": Float64Array.from([...sigmas, ...Array(ends[run.experiment.scheduler]).fill(0)]),
    "latents/final_latents": /** @type {Float32Array} */ (run.latents),
    "images/final": Uint8Array.from({ length: width * height * 3 }, (_, i) => data[4 * Math.floor(i / 3) + (i % 3)]),
    "cost/unet_seconds": unknown("cost/unet_seconds"),
    "cost/step_seconds": Float64Array.from(run.steps, ({ seconds }, i) => seconds - (i ? run.steps[i - 1].seconds : 0)),
    "cost/seconds": unknown("cost/seconds"),
    "cost/peak_memory": BigInt64Array.of(0n),
  };
}

/** @param {Growing} run @param {string} path @param {number} index @returns {Float32Array} */
function stepOf({ steps }, path, index) {
  const { latents, prediction, cond, uncond } = steps[index];
  return { latents, prediction, prediction_cond: cond, prediction_uncond: /** @type {Float32Array} */ (uncond) }[/** @type {"latents"} */ (path.split("/")[1])];
}

/** Write a chunk: its values and their checksum; one of nothing but fill values has no file. @param {Map<string, Uint8Array>} files @param {string} path @param {Meta} about @param {Values} values @param {number} index @returns {Uint8Array} its mark */
function chunk(files, path, { shape, fill_value, data_type }, values, index) {
  if (values === undefined) throw new Error(`${path} has no values here. Build the page again: python3 tasks.py web.`);
  const fill = fill_value === "NaN" ? NaN : data_type === "int64" ? BigInt(fill_value) : fill_value;
  if (values.every((/** @type {any} */ value) => Object.is(value, fill))) return Uint8Array.of(0);
  const bytes = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
  const sum = littleEndian(crc32c(bytes));
  files.set(`${path}/${["c", ...shape.map((_, axis) => (axis ? 0 : index))].join(".")}`, Uint8Array.of(...bytes, ...sum));
  return Uint8Array.of(1, ...sum);
}

/** Write a variable that is the model's. @param {Map<string, Uint8Array>} files @param {string} path @param {string} text base64 of its chunk */
function constant(files, path, text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const dimensions = path === "preview/latent_to_rgb" ? 2 : 1;
  files.set(`${path}/${["c", ...Array(dimensions).fill(0)].join(".")}`, bytes);
  if (path !== TEXT) return Uint8Array.of(1, ...bytes.subarray(-4));
  return Uint8Array.of(1, ...littleEndian(crc32c(encoder.encode(`[${strings(bytes).map((one) => JSON.stringify(one)).join(", ")}]`))));
}

/** The strings of a chunk, vlen-utf8: their number, then each with its length before it. @param {Uint8Array} bytes */
function strings(bytes) {
  const view = new DataView(bytes.buffer);
  const found = [];
  let at = 4;
  for (let i = 0; i < view.getUint32(0, true); i++) {
    const length = view.getUint32(at, true);
    found.push(new TextDecoder().decode(bytes.subarray(at + 4, at + 4 + length)));
    at += 4 + length;
  }
  return found;
}

/** What the recording says of itself. @param {Growing} run @param {Template} template @param {{software: string, created: string}} here */
async function attributes({ experiment, onGraphicsCard }, template, { software, created }) {
  const { edits: few = [], ...fields } = recipe(experiment);
  const edits = few.map((/** @type {{kind: string}} */ edit) => ({ ...template.edits[edit.kind], ...edit }));
  return {
    ...template.attributes,
    experiment: { ...template.attributes.experiment, ...fields, edits, output: "runs" },
    identity: await identity(template.identity, fields, edits),
    ...(edits.length ? { parent_identity: await identity(template.identity, fields, []) } : {}),
    environment: { device: "cpu", device_name: "a web page", threads: 1, attention_backend: "onnxruntime-web", branches_batched: true, torch: "none", diffusers: "none", transformers: "none", software: onGraphicsCard ? `${software}, the UNet by WebGPU` : software },
    scheduler: template.schedulers[experiment.scheduler],
    latent_convention: template.conventions[experiment.scheduler],
    created,
    writer: { pid: 0, host: "a web page" },
  };
}

/** The hash of every field that changes what is recorded, in Python's JSON. @param {string} text @param {Record<string, any>} fields @param {Record<string, any>[]} edits */
async function identity(text, fields, edits) {
  let written = text.replace(/"guidance_scale":[\d.]+/, () => `"guidance_scale":${fields.guidance_scale}${Number.isInteger(fields.guidance_scale) ? ".0" : ""}`);
  for (const name of ["prompt", "seed", "steps", "scheduler"]) {
    const value = ascii(fields[name]);
    written = written.replace(new RegExp(`([{,]"${name}":)("[^"]*"|\\d+)(?=[,}])`, "g"), (whole, key, old) => (name === "steps" && old === '"all"' ? whole : key + value));
  }
  if (edits.length) written = written.replace(',"eta":', () => `,"edits":${compact(edits)},"eta":`); // in the order of the names
  return (await sha256(encoder.encode(written))).slice(0, 8);
}

/** A line of digests.txt. @param {string} what @param {Record<string, Uint8Array>} marks */
async function line(what, marks) {
  const parts = Object.keys(marks).sort().filter((name) => marks[name].some(Boolean)).flatMap((name) => [encoder.encode(`${name}\n${marks[name].length}\n`), marks[name]]);
  return `${await sha256(joined(parts))} ${what}\n`;
}

/** JSON as Python writes it with sorted keys. @param {any} value @returns {string} */
function pythons(value) {
  if (Array.isArray(value)) return `[${value.map(pythons).join(", ")}]`;
  if (value === null || typeof value !== "object") return ascii(value);
  return `{${Object.keys(value).sort().map((name) => `${ascii(name)}: ${pythons(value[name])}`).join(", ")}}`;
}

/** JSON as Python writes edits in the text of an identity: sorted, without blanks, an amount as a float. @param {any} value @returns {string} */
function compact(value) {
  if (Array.isArray(value)) return `[${value.map(compact).join(",")}]`;
  if (value === null || typeof value !== "object") return ascii(value);
  const float = (/** @type {string} */ name) => name === "amount" && Number.isInteger(value[name]);
  return `{${Object.keys(value).sort().map((name) => `${ascii(name)}:${float(name) ? `${value[name]}.0` : compact(value[name])}`).join(",")}}`;
}

/** A number or a text as JSON of ASCII. @param {unknown} value */
const ascii = (value) => JSON.stringify(value).replace(/[\u0080-\uffff]/g, (letter) => `\\u${letter.charCodeAt(0).toString(16).padStart(4, "0")}`);
/** @param {unknown} value */
const json = (value) => encoder.encode(JSON.stringify(value, null, 1));
/** @param {Uint8Array} bytes */
const sha256 = async (bytes) => [...new Uint8Array(await crypto.subtle.digest("SHA-256", Uint8Array.from(bytes)))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
