// Draw a table of experiments as the page does, for tests/test_web_drawings.py:
//   node tests/web_drawings.mjs TABLE.json FOLDER
// Of each, FOLDER gets the picture (RGB) and the latents (float32), by its place in the table.
import { readFile, writeFile } from "node:fs/promises";
import path from "node:path";
import { fileURLToPath } from "node:url";

import { openModel } from "../web/diffusion/model.js";
import { condition, denoise } from "../web/diffusion/sampling.js";
import { tokenizer } from "../web/diffusion/tokens.js";
import * as ort from "../web/node_modules/onnxruntime-web/dist/ort.node.min.mjs";

const ROOT = fileURLToPath(new URL("..", import.meta.url));
const MODEL = path.join(ROOT, "probe", "emojiworld");
const [table, folder] = process.argv.slice(2);
const json = async (...names) => JSON.parse(await readFile(path.join(...names), "utf8"));

ort.env.wasm.numThreads = 1;
const read = (name) => readFile(path.join(name.endsWith(".onnx") ? path.join(ROOT, "web", "model") : MODEL, name));
const model = await openModel(ort, await json(ROOT, "web", "model", "manifest.json"), read);
const tokens = tokenizer(await json(MODEL, "tokenizer", "tokenizer.json"), await json(MODEL, "words.json"));
const config = await json(MODEL, "scheduler", "scheduler_config.json");

for (const [i, { prompt, negativePrompt, picture, off, ...experiment }] of (await json(table)).entries()) {
  if (picture) experiment.picture = Uint8ClampedArray.from(await readFile(path.join(folder, picture)));
  if (off) experiment.valueScale = (index) => switchedOff(off, index);
  const conditioning = await condition(model, tokens(prompt), tokens(negativePrompt), experiment.guidanceScale);
  let last;
  for await (const step of denoise(model, config, conditioning, experiment)) last = step;
  const { data } = await model.decode(last.nextLatents);
  await writeFile(path.join(folder, `${i}.rgb`), data.filter((_, at) => at % 4 < 3));
  await writeFile(path.join(folder, `${i}.latents`), last.nextLatents);
}

/** In the prompt's row, one token is read by nobody from a step on. */
function switchedOff({ token, from }, index) {
  const [layers, heads, length] = model.shapes.value_scale;
  const scale = new Float32Array(layers * 2 * heads * length).fill(1);
  if (index < from) return undefined;
  for (let layer = 0; layer < layers; layer++) for (let head = 0; head < heads; head++) scale[((layer * 2 + 1) * heads + head) * length + token] = 0;
  return scale;
}
