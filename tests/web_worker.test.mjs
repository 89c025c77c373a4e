// The page's worker, with onnxruntime-web and the model itself: node --test tests/web_worker.test.mjs
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
  assert.deepEqual(begun, { kind: "begun", run: 1, words: ["a", "fox", "on", "the", "moon"].map((word, i) => ({ word, tokens: [i + 1] })), end: 6, timesteps: [667, 334, 1], sigmas: steps.map(({ sigma }) => sigma) });
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
