// The page's worker, with onnxruntime-web and the model itself: node --test tests/web_worker.test.mjs
// VECTORS names a file of what Python computed: see tests/test_web_drawings.py.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import path from "node:path";
import test from "node:test";
import { fileURLToPath, pathToFileURL } from "node:url";

const ROOT = fileURLToPath(new URL("..", import.meta.url));
const MODEL = path.join(ROOT, "probe", "emojiworld");
const WEB = path.join(ROOT, "web");
const ORT = path.join(WEB, "node_modules", "onnxruntime-web", "dist");
const DRAW = { kind: "draw", run: 1, prompt: "a fox on the moon", scheduler: "DDIM", steps: 3, seed: 0, guidanceScale: 5, decodeEvery: 2 };

/** What a worker has of its surroundings; messages are kept, and `until` waits for one. */
const told = [];
let waiting = () => {};
globalThis.self = { crossOriginIsolated: false, postMessage: (message, { transfer }) => { told.push(structuredClone(message, { transfer })); waiting(); } };
const { FILES } = await import("../web/worker.js");

async function until(kind) {
  for (;;) {
    const at = told.findIndex((message) => message.kind === kind || message.kind === "error");
    if (at >= 0) {
      const [message] = told.slice(at);
      const before = told.splice(0, at + 1).slice(0, at);
      assert.equal(message.kind, kind, message.message);
      return { message, before };
    }
    await new Promise((resolve) => { waiting = resolve; });
  }
}
const ask = (message) => self.onmessage({ data: message });
const { VECTORS } = process.env;
const vectors = VECTORS ? JSON.parse(await readFile(VECTORS, "utf8")) : null;
const given = { skip: vectors ? false : "needs what Python computed" };

/** Throw unless numbers agree to 1e-5 of the greatest, or of 1. */
function close(got, wanted, what) {
  const most = wanted.reduce((sum, value) => Math.max(sum, Math.abs(value)), 1);
  const off = wanted.reduce((sum, value, i) => Math.max(sum, Math.abs(value - got[i])), 0);
  assert.ok(got.length === wanted.length && off <= 1e-5 * most, `${what}: ${off} of ${most}`);
}

async function files() {
  const manifest = JSON.parse(await readFile(path.join(WEB, "model", "manifest.json"), "utf8"));
  const places = { "ort.wasm": path.join(ORT, "ort-wasm-simd-threaded.wasm"), "manifest.json": path.join(WEB, "model", "manifest.json"), "tokenizer.json": path.join(MODEL, "tokenizer", "tokenizer.json"), "words.json": path.join(MODEL, "words.json"), "scheduler_config.json": path.join(MODEL, "scheduler", "scheduler_config.json") };
  assert.deepEqual(Object.keys(places), FILES);
  for (const [part, { weights }] of Object.entries(manifest.graphs)) Object.assign(places, { [`${part}.onnx`]: path.join(WEB, "model", `${part}.onnx`), [weights]: path.join(MODEL, weights) });
  return Object.fromEntries(await Promise.all(Object.entries(places).map(async ([name, place]) => [name, new Uint8Array(await readFile(place))])));
}

test("nothing is drawn before the model is loaded", async () => {
  ask(DRAW);
  assert.match((await until("error")).message.message, /not loaded\. Send load first/);
});

test("a file that is not there is named, and the load can be tried again", async () => {
  const { "unet.onnx": _, ...rest } = await files();
  ask({ kind: "load", ort: pathToFileURL(path.join(ORT, "ort.node.min.mjs")).href, threads: 1, files: rest });
  assert.match((await until("error")).message.message, /built without unet\.onnx/);
});

test("the model is loaded, with progress", async () => {
  const all = await files();
  const words = all["words.json"];
  all["words.json"] = `data:application/json;base64,${Buffer.from(words).toString("base64")}`;
  ask({ kind: "load", ort: pathToFileURL(path.join(ORT, "ort.node.min.mjs")).href, threads: 4, files: all });
  const { message, before } = await until("ready");
  assert.deepEqual(before.at(-1), { kind: "progress", name: "words.json", bytes: words.length });
  assert.equal(message.words.length, 45);
  assert.equal(message.layers.length, 7);
});

test("every step comes as it is computed, with attention and some pictures", async () => {
  ask(DRAW);
  const { message, before } = await until("done");
  const [begun, ...steps] = before;
  assert.deepEqual(begun, { kind: "begun", run: 1, device: "wasm", words: ["a", "fox", "on", "the", "moon"].map((word, i) => ({ word, tokens: [i + 1] })), end: 6, timesteps: [667, 334, 1], sigmas: steps.map(({ sigma }) => sigma) });
  assert.deepEqual(steps.map(({ kind, index, timestep, picture }) => [kind, index, timestep, picture?.width ?? null]), [["step", 0, 667, null], ["step", 1, 334, 128], ["step", 2, 1, null]]);
  for (const { latents, denoised, uncond, cond, maps } of steps) {
    assert.deepEqual([latents, denoised, uncond, cond].map(({ length }) => length), [1024, 1024, 1024, 1024]);
    assert.deepEqual(maps.map(({ shape }) => shape).slice(0, 2), [[4, 256, 77], [4, 64, 77]]);
    for (const { values } of maps) for (let row = 0; row < values.length; row += 77) assert.ok(Math.abs(values.slice(row, row + 77).reduce((sum, share) => sum + share, 0) - 1) < 1e-5);
  }
  assert.deepEqual([message.run, message.picture.data.length, message.latents.length], [1, 4 * 128 * 128, 1024]);
  ask({ kind: "decode", run: 1, index: 1, latents: steps[1].denoised });
  const { message: decoded } = await until("picture");
  assert.deepEqual([decoded.index, decoded.picture], [1, steps[1].picture]);
});

test("a run stops after its step, when it is told or another is asked for", async () => {
  ask({ ...DRAW, run: 2, steps: 30, decodeEvery: 0 });
  await until("step");
  ask({ kind: "stop" });
  const { message, before } = await until("stopped");
  assert.equal(message.run, 2);
  assert.ok(before.length <= 1);
  ask({ ...DRAW, run: 3, steps: 30, decodeEvery: 0 });
  await until("step");
  ask({ ...DRAW, run: 4, steps: 1, guidanceScale: 1, decodeEvery: 0 });
  const { message: last, before: both } = await until("done");
  assert.equal(last.run, 4);
  assert.deepEqual(both.filter(({ kind }) => kind === "stopped").map(({ run }) => run), [3]);
  assert.equal(both.find(({ kind, run }) => kind === "step" && run === 4).uncond, null);
});

test("a mistake is told, and the next run goes on", async () => {
  ask({ ...DRAW, run: 5, prompt: "a zebra" });
  const { message } = await until("error");
  assert.deepEqual([message.run, message.words], [5, ["zebra"]]);
  ask({ ...DRAW, run: 6, scheduler: "Fast" });
  assert.match((await until("error")).message.message, /Fast is not a scheduler here/);
  ask({ kind: "paint", run: 7 });
  assert.match((await until("error")).message.message, /paint is no message/);
});

test("a prompt is read, a picture encoded and noised as Python does it", given, async () => {
  const { prompt, picture, rows, clean } = vectors;
  ask({ kind: "read", id: "words", prompt });
  const { message: text } = await until("text");
  for (const name of ["tokens", "ids", "end"]) assert.deepEqual(text[name], vectors[name], name);
  assert.deepEqual([text.id, text.words[1]], ["words", { word: "fox", tokens: [2] }]);
  close(text.cond, vectors.cond, "cond");
  ask({ kind: "encode", id: "picture", picture: Uint8ClampedArray.from(picture) });
  const { message: encoded } = await until("encoded");
  assert.equal(encoded.id, "picture");
  close(encoded.latents, clean, "clean");
  for (const [id, { timestep, seed, picture: wanted, ...row }] of rows.entries()) {
    ask({ kind: "noise", id, latents: Float32Array.from(clean), timestep, seed, prompt, decode: true });
    const { message } = await until("noised");
    assert.deepEqual([message.id, message.timestep], [id, timestep]);
    close([message.alphaBar, message.loss], [row.alphaBar, row.loss], `timestep ${timestep}: ${message.alphaBar}, ${message.loss}`);
    for (const name of ["noise", "noisy", "prediction", "denoised"]) close(message[name], row[name], `timestep ${timestep}, ${name}`);
    const colours = message.picture.data.filter((_, i) => i % 4 < 3);
    assert.ok(wanted.every((level, i) => Math.abs(level - colours[i]) <= 1), `timestep ${timestep}, picture`);
  }
});

test("questions come back in their order, and let a draw go first", async () => {
  const latents = new Float32Array(1024);
  for (let id = 0; id < 40; id++) ask({ kind: "noise", id, latents, timestep: 25 * id, seed: 0, prompt: "a fox", decode: id === 39 });
  ask({ ...DRAW, run: 8, decodeEvery: 0 });
  const { before } = await until("done");
  assert.ok(before.filter(({ kind }) => kind === "noised").length <= 1, `${before.map(({ kind }) => kind)}`);
  ask({ ...DRAW, run: 9, steps: 30, decodeEvery: 0 });
  await until("begun");
  ask({ kind: "stop" });
  const { before: both } = await until("stopped");
  assert.ok(both.filter(({ kind }) => kind === "noised").length <= 1);
  const answers = [...before, ...both].filter(({ kind }) => kind === "noised");
  while (answers.length < 40) answers.push((await until("noised")).message);
  assert.deepEqual(answers.map(({ id }) => id), [...Array(40).keys()]);
  assert.deepEqual(answers.map(({ picture }) => picture !== null), answers.map(({ id }) => id === 39));
});

test("a question that has no answer says why, with its id", async () => {
  const latents = new Float32Array(1024);
  const wrong = {
    "has 3 numbers\\. Give 128 x 128": { kind: "encode", picture: new Uint8ClampedArray(3) },
    "has no numbers": { kind: "encode" },
    "1000 is no timestep\\. Take a whole number from 0 to 999": { kind: "noise", latents, timestep: 1000, seed: 0, prompt: "" },
    "0\\.5 is no timestep": { kind: "noise", latents, timestep: 0.5, seed: 0, prompt: "" },
    "have 5 numbers\\. Give 1024": { kind: "noise", latents: new Float32Array(5), timestep: 1, seed: 0, prompt: "" },
    "never saw 'zebra'": { kind: "read", prompt: "a zebra" },
  };
  for (const [why, message] of Object.entries(wrong)) {
    ask({ ...message, id: why });
    const { message: told } = await until("error");
    assert.deepEqual([told.id, told.run], [why, undefined]);
    assert.match(told.message, new RegExp(why));
  }
  ask({ kind: "read", id: 1, prompt: "" });
  assert.equal((await until("text")).message.end, 1);
});
