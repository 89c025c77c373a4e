// @ts-check
/**
 * The page's worker: loads the model, then answers what drawing.js answers. The first message is
 *
 *     {kind: "load", ort, threads, files}
 *
 * `ort` is the address of onnxruntime-web's module, or none where it was built in as `self.ort`.
 * `threads` count where the page is isolated; else there is one. `files` has, by name, an address or
 * the bytes, as they are or by gzip: those of `FILES`, and each graph of manifest.json with its
 * weights. It answers:
 *
 *     {kind: "progress", name, bytes}               so many bytes of a file have come
 *     {kind: "ready", words, layers, preview, schedulers}
 *     {kind: "error", run, id, message, words}
 *
 * Beside the questions of drawing.js it answers {kind: "gpu", id, ort, wasm}: addresses of onnxruntime-web
 * with WebGPU. The UNet is tried there, and the answer {kind: "tried", id, ...Trial} is that of webgpu.js.
 * Without addresses the UNet is computed here again.
 */

import { openModel } from "./diffusion/model.js";
import { SCHEDULERS } from "./diffusion/schedulers.js";
import { tokenizer } from "./diffusion/tokens.js";
import { drawing } from "./drawing.js";
import { trial } from "./webgpu.js";

/** What is read beside graphs and weights. */
export const FILES = ["ort.wasm", "manifest.json", "tokenizer.json", "words.json", "scheduler_config.json"];

/** @type {(message: Record<string, any>, transfer?: ArrayBuffer[]) => void} */
const post = (message, transfer = []) => self.postMessage(message, { transfer });
/** @type {Promise<(message: any) => Promise<void>> | null} */
let opened = null;

/** @param {{ort?: string, threads: number, files: Record<string, string | Uint8Array>}} message */
async function load({ ort: address, threads, files }) {
  /** @type {Map<string, Promise<Uint8Array>>} */
  const reading = new Map();
  const read = (/** @type {string} */ name) => {
    const bytes = reading.get(name) ?? content(name, files[name]);
    reading.set(name, bytes);
    return bytes;
  };
  const json = async (/** @type {string} */ name) => JSON.parse(new TextDecoder().decode(await read(name)));
  const manifest = await json("manifest.json");
  for (const part of Object.keys(manifest.graphs)) void read(manifest.graphs[part].weights).catch(() => {}); // all at once; whoever needs it hears of a failure
  const ort = address ? await import(address) : /** @type {any} */ (self).ort;
  ort.env.wasm.wasmBinary = await read("ort.wasm");
  ort.env.wasm.numThreads = self.crossOriginIsolated ? threads : 1;
  const model = await openModel(ort, manifest, read);
  const words = await json("words.json");
  const prompt = tokenizer(await json("tokenizer.json"), words);
  /** @param {{ort?: string, wasm: string}} question without addresses, it is computed here again */
  const gpu = async ({ ort: module, wasm }) => {
    if (!module) return model.delegate(null), { kind: "tried", used: false };
    const own = await import(module);
    own.env.wasm.wasmBinary = await content("ort.webgpu.wasm", wasm);
    own.env.wasm.numThreads = 1;
    const other = await openModel(own, manifest, read, ["webgpu"], ["unet"]);
    return { kind: "tried", ...(await trial(model, other, await model.encodeText(["", "a fox"].map((text) => prompt(text).ids)))) };
  };
  const answer = drawing(model, prompt, await json("scheduler_config.json"), post, { gpu });
  post({ kind: "ready", words, layers: model.layers, preview: model.preview, schedulers: SCHEDULERS });
  return answer;
}

/** The bytes of a file, whose coming is told. @param {string} name @param {string | Uint8Array | undefined} place */
async function content(name, place) {
  if (place === undefined) throw new Error(`The page was built without ${name}. Build it again: python3 tasks.py web.`);
  if (typeof place !== "string") return unpacked(place);
  const response = await fetch(place);
  if (!response.ok || !response.body) throw new Error(`${name} did not come (${response.status}). Reload the page.`);
  const parts = [];
  let bytes = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    post({ kind: "progress", name, bytes: (bytes += value.length) });
  }
  return unpacked(...parts);
}

/** A file's bytes; gzip is unpacked, unless a server did it. @param {Uint8Array<any>[]} parts */
async function unpacked(...parts) {
  const [blob, [first, second]] = [new Blob(parts), parts[0] ?? []];
  const stream = first === 0x1f && second === 0x8b ? blob.stream().pipeThrough(new DecompressionStream("gzip")) : blob;
  return new Uint8Array(await (stream instanceof Blob ? stream : new Response(stream)).arrayBuffer());
}

self.onmessage = async ({ data }) => {
  try {
    if (data.kind === "load") await (opened ??= load(data));
    else if (opened) await (await opened)(data);
    else throw new Error("The model is not loaded. Send load first.");
  } catch (error) {
    if (data.kind === "load") opened = null;
    post({ kind: "error", run: data.run, id: data.id, message: String(/** @type {any} */ (error)?.message ?? error), words: [] });
  }
};
