// The trial of another place that computes the UNet: node --test tests/web_webgpu.test.mjs
// A second session of onnxruntime-web's wasm stands where the graphics card would be: node has none.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import path from "node:path";
import test from "node:test";
import { fileURLToPath } from "node:url";

import { Model, openModel } from "../web/diffusion/model.js";
import { tokenizer } from "../web/diffusion/tokens.js";
import { drawing } from "../web/drawing.js";
import { sentence } from "../web/graphics.js";
import * as ort from "../web/node_modules/onnxruntime-web/dist/ort.node.min.mjs";
import { TOLERANCE, trial } from "../web/webgpu.js";

const ROOT = fileURLToPath(new URL("..", import.meta.url));
const MODEL = path.join(ROOT, "probe", "emojiworld");
const json = async (...names) => JSON.parse(await readFile(path.join(...names), "utf8"));
const read = (name) => readFile(path.join(name.endsWith(".onnx") ? path.join(ROOT, "web", "model") : MODEL, name));

ort.env.wasm.numThreads = 1;
const manifest = await json(ROOT, "web", "model", "manifest.json");
const model = await openModel(ort, manifest, read);
const other = await openModel(ort, manifest, read, ["wasm"], ["unet"]);
const tokens = tokenizer(await json(MODEL, "tokenizer", "tokenizer.json"), await json(MODEL, "words.json"));
const texts = await model.encodeText(["", "a fox"].map((text) => tokens(text).ids));
/** A model whose calls of its own take longer. */
const slowed = (one) => Object.assign(one, {
  async predict(...given) {
    if (!this.other) await new Promise((done) => setTimeout(done, 400));
    return Model.prototype.predict.apply(this, given);
  },
});
const restored = (one) => { delete one.predict; };

test("what agrees and is faster predicts from then on, and a run says so", async () => {
  const answer = await trial(slowed(model), other, texts);
  restored(model);
  assert.deepEqual([answer.used, answer.agrees, answer.difference, model.other === other], [true, true, 0, true]);
  assert.match(sentence(answer), /^The graphics card computes the UNet from now on: \d+ ms a step on the graphics card, \d+ ms on the processor\. They differ by 0 at most\.$/);
  const told = [];
  const draw = { kind: "draw", run: 1, prompt: "a fox", scheduler: "DDIM", steps: 1, seed: 0, guidanceScale: 1, decodeEvery: 0 };
  const config = await json(MODEL, "scheduler", "scheduler_config.json");
  const unet = other.sessions.unet;
  let calls = 0;
  other.sessions.unet = Promise.resolve({ run: async (inputs) => { calls += 1; return (await unet).run(inputs); } });
  await drawing(model, tokens, config, (message) => told.push(message))(draw);
  assert.deepEqual([told[0].device, calls], ["webgpu", 1]);
  model.delegate(null);
  await drawing(model, tokens, config, (message) => told.push(message))(draw);
  assert.deepEqual([told.find(({ kind, device }) => kind === "begun" && device !== "webgpu").device, calls], ["wasm", 1]);
  other.sessions.unet = unet;
});

test("what is slower is not taken", async () => {
  const answer = await trial(model, slowed(other), texts);
  restored(other);
  assert.deepEqual([answer.used, answer.agrees, model.other], [false, true, null]);
  assert.match(sentence(answer), /^It stays on the processor, which is faster here: \d{3,} ms/);
});

test("what does not agree is not taken, however fast, nor what is no number", async () => {
  const [layers, heads, length] = model.shapes.value_scale;
  const off = new Float32Array(layers * 2 * heads * length);
  other.predict = (latents, timestep, rows) => Model.prototype.predict.call(other, latents, timestep, rows, off);
  const answer = await trial(slowed(model), other, texts);
  assert.ok(answer.difference > TOLERANCE && !answer.agrees && !answer.used && model.other === null);
  assert.match(sentence(answer), /^It stays on the processor: they differ by 0\.\d+ at most at the first step, more than 0\.001\.$/);
  other.predict = async (...given) => {
    const step = await Model.prototype.predict.apply(other, given);
    step.eps[0][7] = NaN;
    return step;
  };
  assert.deepEqual((({ used, agrees }) => [used, agrees])(await trial(model, other, texts)), [false, false]);
  restored(model);
  restored(other);
});
