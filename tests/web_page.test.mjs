// The page's own modules: node --test tests/web_page.test.mjs
// PAYLOADS is a folder that tests/test_web_page.py fills: a recording, and what Python makes of it.
import assert from "node:assert/strict";
import { readFile, readdir, writeFile } from "node:fs/promises";
import path from "node:path";
import test from "node:test";

import { kept, resized } from "../web/attention.js";
import { crc32, crc32c } from "../web/checksums.js";
import { chosen, digits } from "../web/diffusion/noise.js";
import * as experiments from "../web/experiment.js";
import { Growing } from "../web/growing.js";
import { COLUMNS, HEAT, PANELS } from "../web/parts.js";
import { withText } from "../web/png.js";
import { sizeOf } from "../web/photo.js";
import { previewed } from "../web/preview.js";
import { recording } from "../web/recordings/recording.js";
import { unzipped } from "../web/recordings/zip.js";
import { begun, wishes } from "../web/wishes.js";

const FOLDER = process.env.PAYLOADS;
const [SCHEDULERS, LAYERS] = [["DDIM", "Euler"], ["down_blocks.0.attn2", "mid_block.attn2"]];
const FOX = { prompt: "a fox on the moon", seed: 5, guidance: 3, steps: 30, scheduler: "DDIM", edits: [] };
const json = async (name) => JSON.parse(await readFile(path.join(FOLDER, name), "utf8"));
const floats = async (name) => {
  const bytes = await readFile(path.join(FOLDER, name));
  return new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4).slice();
};

/** A canvas as far as pictures are put on it. */
function canvas(width, height) {
  const data = new Uint8ClampedArray(4 * width * height);
  const putImageData = (image, x, y) => { for (let row = 0; row < image.height; row++) data.set(image.data.subarray(4 * row * image.width, 4 * (row + 1) * image.width), 4 * ((y + row) * width + x)); };
  const createImageData = (w, h) => ({ width: w, height: h, data: new Uint8ClampedArray(4 * w * h) });
  return { width, height, data, getContext: () => ({ putImageData, createImageData, drawImage() {} }) };
}
/** The colours of one picture of a sheet. */
function colours({ shape: [, height, width], columns, bitmap }, index) {
  const [left, top] = [(index % columns) * width, Math.floor(index / columns) * height];
  return Array.from({ length: height * width * 3 }, (_, i) => bitmap.data[4 * ((top + Math.floor(i / 3 / width)) * bitmap.width + left + (Math.floor(i / 3) % width)) + (i % 3)]);
}
const far = (one, two) => one.reduce((most, value, i) => Math.max(most, Math.abs(value - two[i])), 0);

/** The recording, step by step as the worker would say it. */
async function recorded() {
  const about = await json("about.json");
  const [latents, denoised, cond, uncond, prediction] = await Promise.all(["latents", "denoised", "cond", "uncond", "prediction"].map((name) => floats(`${name}.f32`)));
  const layers = await Promise.all(about.layers.map((_, i) => floats(`layer${i}.f32`)));
  const run = new Growing("drawing-1", { ...FOX, ...about.experiment }, about.begun, { preview: about.preview, layers: about.layers, canvas });
  const of = (values, index, count = about.sigmas.length) => values.slice((index * values.length) / count, ((index + 1) * values.length) / count);
  for (let index = 0; index < about.sigmas.length; index++) {
    const maps = about.layers.map((layer, i) => ({ layer, shape: about.shapes[i], values: of(layers[i], index) }));
    run.add({ index, latents: of(latents, index), input: of(latents, index), alphaBar: about.alpha_bars[index], seconds: index, denoised: of(denoised, index), cond: of(cond, index), uncond: of(uncond, index), prediction: of(prediction, index), maps, picture: null });
  }
  return { run, about };
}

test("a run is what Python's payload of the same recording is", { skip: !FOLDER }, async () => {
  const [{ run, about }, expected, maps] = [await recorded(), await json("payload.json"), await floats("maps.f32")];
  for (const name of ["channels", "colours", "panels", "latent_names", "unit", "note", "about", "of", "branch", "per", "map_steps", "steps"]) {
    const panels = run.meta.panels.map((panel) => ({ ...panel, ...PANELS.find(({ part }) => part === panel.part) }));
    assert.deepEqual(name === "panels" ? panels : run.meta[name], expected[name], name);
  }
  assert.deepEqual(HEAT, expected.colours);
  assert.deepEqual(run.meta.snippets.picture, expected.snippets.picture);
  for (const [kind, shares] of Object.entries(expected.shares)) assert.ok(far(run.meta.shares[kind], shares) < 2e-5, kind);
  for (const [name, { title, note, values }] of Object.entries(expected.curves)) {
    assert.deepEqual([run.meta.curves[name].title, run.meta.curves[name].note], [title, note]);
    assert.ok(far(run.meta.curves[name].values, values) < 2e-3, name);
  }
  const { shape, data, high } = run.parts.maps;
  assert.deepEqual(shape, [expected.channels.length, 16, 16, about.sigmas.length]);
  const block = data.length / shape[0];
  const values = Float32Array.from(data, (byte, i) => (byte * high[Math.floor(i / block)]) / 255);
  assert.ok(far(values, maps) <= Math.max(...high) / 255 + 1e-5);
  for (const part of ["latents", "denoised"]) {
    const wanted = await floats(`${part}-rgb.f32`);
    const each = wanted.length / about.sigmas.length;
    for (let index = 0; index < about.sigmas.length; index++) assert.ok(far(colours(run.parts[part], index), wanted.subarray(index * each, (index + 1) * each)) <= 1, `${part} ${index}`);
  }
});

test("a word in every layer and head is what Python makes of it", { skip: !FOLDER }, async () => {
  const [{ run }, expected, maps] = [await recorded(), await json("heads.json"), await floats("heads.f32")];
  const { meta, parts } = await run.ask({ what: "heads", channel: "1" });
  for (const name of ["channel", "layers", "heads", "map_steps", "branch"]) assert.deepEqual(meta[name], expected[name], name);
  assert.deepEqual(meta.snippets, expected.snippets);
  meta.shares.forEach((shares, layer) => assert.ok(far(shares, expected.shares[layer]) < 2e-5, layer));
  assert.deepEqual(meta.ranking.map(([layer, head]) => [layer, head]), expected.ranking.map(([layer, head]) => [layer, head]));
  const block = parts.maps.data.length / parts.maps.high.length;
  const values = Float32Array.from(parts.maps.data, (byte, i) => (byte * parts.maps.high[Math.floor(i / block)]) / 255);
  assert.deepEqual(parts.maps.shape, expected.shape);
  assert.ok(far(values, maps) <= Math.max(...parts.maps.high) / 63 + 1e-5);
});

test("a channel of the latents is signed, and what is not there is refused by name", { skip: !FOLDER }, async () => {
  const { run } = await recorded();
  const { meta, parts } = await run.ask({ what: "latents", channel: "2" });
  assert.match(meta.note, /^channel 2, from -\d/);
  const [red, , blue] = colours(parts.latents, 0);
  assert.equal(red < blue, run.steps[0].latents[512] < 0);
  await assert.rejects(run.ask({ what: "places" }), /no places in this page/);
});

test("the padding is one, and maps keep their sums", () => {
  const values = Float32Array.from({ length: 2 * 4 * 77 }, (_, i) => (i % 77) / 2926);
  const { tokens, side, values: some } = kept({ layer: "one", shape: [2, 4, 77], values }, 3);
  assert.deepEqual([tokens, side], [5, 2]);
  for (let row = 0; row < 8; row++) assert.ok(Math.abs(some.slice(row * 5, row * 5 + 5).reduce((a, b) => a + b) - 1) < 1e-5);
  assert.ok(Math.abs(some[4] - (2926 - 6) / 2926) < 1e-5);
  assert.deepEqual([...resized(Float32Array.of(0, 1, 2, 3), [2, 2], [4, 4])].map((value) => Number(value.toFixed(4))), [0, 0.25, 0.75, 1, 0.5, 0.75, 1.25, 1.5, 1.5, 1.75, 2.25, 2.5, 2, 2.25, 2.75, 3]);
});

test("latents without a colour are the bias", () => {
  assert.deepEqual([...previewed(new Float32Array(2), { slope: [[1, 0, 0]], bias: [0.5, 0, 2] })], [128, 0, 255, 255, 128, 0, 255, 255]);
  assert.equal(COLUMNS, 10);
});

test("an address holds an experiment, and gives it back", () => {
  const edits = [{ kind: "value", word: "fox", from: 6 }, { kind: "head", layer: LAYERS[1], head: 3, from: 0 }];
  const experiment = { prompt: "a fox & a “cat”", seed: 7, guidance: 7.5, steps: 20, scheduler: "Euler", edits };
  const query = experiments.toAddress("?step=3&off=value+owl+1", experiment, LAYERS);
  assert.match(query, /step=3/);
  assert.deepEqual(experiments.fromAddress(query, SCHEDULERS, LAYERS), experiment);
});

test("an address holds a nudge, and a picture that the page can draw, or its name", () => {
  const drawn = { ...FOX, prompt: "an owl", edits: [{ kind: "noise", seed: 7, amount: 0.35 }] };
  const begun = (start, edits = []) => ({ ...FOX, edits, start: { strength: 0.65, picture: null, ...start } });
  const there = (experiment) => experiments.fromAddress(experiments.toAddress("?start=old&noise=1+1", experiment, LAYERS), SCHEDULERS, LAYERS);
  assert.deepEqual(there(drawn), drawn);
  const some = { ...drawn, edits: [{ ...drawn.edits[0], where: `0f${"0".repeat(62)}` }] };
  assert.deepEqual(there(some), some);
  assert.match(experiments.facts(some), /0\.35 of the noise of seed 7 at 4 places$/);
  const from = begun({ name: "an-owl-1.png", of: drawn }, [{ kind: "value", word: "fox", from: 6 }]);
  assert.deepEqual(there(from), { ...from, start: { ...from.start, name: "picture.png" } }); // it gets its name when it is drawn
  const brushed = begun({ name: "drawing-1f.png", of: null });
  assert.deepEqual(there(brushed), brushed);
  assert.deepEqual(there(begun({ name: "copy.png", of: brushed })).start.of, null, "one picture of a picture is not held");
  assert.match(experiments.facts(from), /from a picture at strength 0\.65, “fox” off from step 6$/);
  assert.match(experiments.facts(drawn), /0\.35 of the noise of seed 7$/);
});

test("an address is drawn in an order in which pictures to begin from, and the run beside, are there", () => {
  const owl = { ...FOX, prompt: "an owl" };
  const from = (of) => ({ ...FOX, start: { name: "picture.png", strength: 0.5, picture: null, of } });
  const order = (experiment, beside) => {
    const query = experiments.toAddress(beside ? `?beside=${encodeURIComponent(experiments.toAddress("", beside, LAYERS).slice(1))}` : "", experiment, LAYERS);
    return wishes(query, experiments.fromAddress(query, SCHEDULERS, LAYERS), SCHEDULERS, LAYERS).map(({ experiment: one, beside: both, last }) => [one.prompt, one.start?.of?.prompt ?? "", both, last]);
  };
  assert.deepEqual(order(FOX), [[FOX.prompt, "", false, true]]);
  assert.deepEqual(order(from(owl)), [["an owl", "", false, false], [FOX.prompt, "an owl", false, true]]);
  assert.deepEqual(order(from(owl), owl), [["an owl", "", false, false], [FOX.prompt, "an owl", true, true]], "once");
  assert.deepEqual(order(owl, from({ ...FOX, prompt: "a cat" })), [["a cat", "", false, false], [FOX.prompt, "a cat", false, false], ["an owl", "", true, true]]);
  const run = { name: "an-owl-1", experiment: owl, picture: { data: Uint8ClampedArray.of(1) } };
  assert.deepEqual(begun(from(owl), [{ ...run, experiment: FOX }, run], LAYERS).start, { name: "an-owl-1.png", strength: 0.5, picture: run.picture.data, of: owl });
  for (const runs of [[], [{ ...run, picture: null }]]) assert.deepEqual(begun(from(owl), runs, LAYERS), FOX, "else from noise");
});

test("pictures say their size, and what is none is refused", { skip: !FOLDER }, async () => {
  const names = await readdir(path.join(FOLDER, "pictures"));
  assert.ok(names.length >= 7);
  for (const name of names) {
    const bytes = await readFile(path.join(FOLDER, "pictures", name));
    assert.deepEqual(sizeOf(bytes).join("x"), name.split("-")[0], name);
    for (const cut of [0, 2, 9, 13]) assert.throws(() => sizeOf(bytes.subarray(0, cut)), /no PNG, JPEG or WebP picture\. Save it as one/, `${name}, ${cut} bytes`);
  }
  const none = ['<svg xmlns="http://www.w3.org/2000/svg"/>', "GIF89a", "just text", "RIFF1234WEBPVP9 ................", "\xff\xd8\xff\xe0\0\x04\0\0text instead of a marker"];
  for (const text of none) assert.throws(() => sizeOf(Buffer.from(text, "latin1")), /no PNG, JPEG or WebP/, text);
});

test("an address of no sense is the first experiment", () => {
  const hostile = `?seed=-1&guidance=1e9&num_steps=9999&scheduler=constructor&off=head+9.9+1&off=value+<b>+1&off=__proto__&noise=7+2&noise=99999999999+1&noise=5+0.5&noise=&noise=7+1+0f&noise=7+1+${"0".repeat(64)}&noise=7+1+${"g".repeat(64)}&strength=9`;
  assert.deepEqual(experiments.fromAddress(hostile, SCHEDULERS, LAYERS), { ...experiments.FIRST });
  assert.deepEqual(experiments.fromAddress("?start=../../etc/passwd<b>&strength=9&noise=7+1", SCHEDULERS, LAYERS), { ...experiments.FIRST, start: { name: "picture.png", strength: 0.6, picture: null, of: null } });
  assert.equal(experiments.fromAddress(`?prompt=${"a%00".repeat(900)}`, SCHEDULERS, LAYERS).prompt.length, 300);
  assert.deepEqual(experiments.fromAddress("?seed=4294967295&guidance=1", SCHEDULERS, LAYERS), { ...experiments.FIRST, seed: 4294967295, guidance: 1 });
});

test("an address switches off nothing that is not there", () => {
  const edits = (query) => experiments.fromAddress(`?prompt=a+fox&num_steps=20&${query}`, SCHEDULERS, LAYERS).edits.map((one) => one.word ?? one.head);
  assert.deepEqual(edits("off=value+cat+0&off=value+fox+19&off=value+fox+20&off=head+1.2+20&off=head+1.2+3"), ["fox", 2]);
  assert.deepEqual(edits("start=a.png&strength=0.5&off=value+fox+10&off=value+a+9"), ["a"]);
  const nudges = (query) => experiments.fromAddress(query, SCHEDULERS, LAYERS).edits.map(({ seed }) => seed);
  assert.deepEqual(nudges("?noise=7+0.3&noise=8+0.5"), [7, 8]);
  assert.deepEqual(nudges(`?noise=7+0.3&noise=8+0.5+${"0f".repeat(32)}`), [7], "a noise in a file is alone");
  const of = { layers: LAYERS, shape: [2, 3, 5], words: [], rows: 2 };
  assert.throws(() => experiments.valueScale([{ kind: "head", layer: LAYERS[1], head: 3, from: 0 }], of), /has no head 3\. It has 3: 0 to 2\./);
});

test("a word that is taken out is not switched off any more", () => {
  const words = ["a", "fox", "and", "a", "cat"].map((word) => ({ word }));
  const off = (...list) => list.map((word) => ({ kind: "value", word, from: 0 }));
  const run = { ...FOX, prompt: "a fox and a cat", edits: [...off("a", "fox"), { kind: "noise", seed: 7, amount: 0.3 }] };
  assert.deepEqual(experiments.withoutWord(run, words, 1), { ...run, prompt: "a and a cat", edits: [...off("a"), run.edits[2]] });
  assert.deepEqual(experiments.withoutWord(run, words, 0), { ...run, prompt: "fox and a cat" }, "there is another one");
});

test("edits become factors: words in the prompt's row, heads in both", () => {
  const of = { layers: LAYERS, shape: [2, 3, 5], words: [{ word: "a", tokens: [1] }, { word: "fox", tokens: [2, 3] }, { word: "a", tokens: [4] }], rows: 2 };
  assert.equal(experiments.valueScale([], of), undefined);
  assert.equal(experiments.valueScale([{ kind: "noise", seed: 7, amount: 0.3 }], of), undefined);
  const scale = experiments.valueScale([{ kind: "value", word: "fox", from: 2 }, { kind: "head", layer: LAYERS[1], head: 2, from: 1 }], of);
  assert.equal(scale(0), undefined);
  const zeros = (index) => [...scale(index)].flatMap((value, i) => (value === 0 ? [i] : []));
  const head = [0, 1].flatMap((row) => [0, 1, 2, 3, 4].map((token) => ((1 * 2 + row) * 3 + 2) * 5 + token));
  assert.deepEqual(zeros(1), head);
  const fox = [0, 1].flatMap((layer) => [0, 1, 2].flatMap((head_) => [2, 3].map((token) => ((layer * 2 + 1) * 3 + head_) * 5 + token)));
  assert.deepEqual(zeros(2), [...new Set([...head, ...fox])].sort((a, b) => a - b));
});

test("places are digits, and none where all or none are chosen", () => {
  const places = Array.from({ length: 256 }, (_, i) => [0, 3, 255].includes(i));
  const where = digits(places);
  assert.equal(where, `9${"0".repeat(62)}1`);
  assert.deepEqual(chosen(where), places);
  for (const is of [true, false]) assert.equal(digits(Array(256).fill(is)), undefined);
});

test("a text lies in a PNG before its end", () => {
  assert.equal(crc32(new TextEncoder().encode("123456789")), 0xcbf43926);
  const png = Uint8Array.from([1, 2, 3, ...Array(12).fill(9)]);
  const whole = withText(png, "experiment", "é: 1\n");
  assert.deepEqual([...whole.subarray(0, 3)], [1, 2, 3]);
  assert.deepEqual([...whole.subarray(-12)], Array(12).fill(9));
  assert.equal(whole.length, png.length + 12 + "experiment".length + 5 + 6);
});

test("a run is packed as a recording, for Python to prove", { skip: !FOLDER }, async () => {
  assert.equal(crc32c(new TextEncoder().encode("123456789")), 0xe3069283);
  const template = JSON.parse(await readFile(new URL("../web/model/recording.json", import.meta.url), "utf8"));
  const { run, about } = await recorded();
  await assert.rejects(recording(run, template, {}), /made of a finished run/);
  const [latents, picture] = [await floats("final.f32"), await floats("picture.f32")];
  const data = Uint8ClampedArray.from({ length: 4 * 128 * 128 }, (_, i) => (i % 4 < 3 ? picture[3 * Math.floor(i / 4) + (i % 4)] : 255));
  run.finish(latents, { width: 128, height: 128, data });
  await writeFile(path.join(FOLDER, "page.zarr.zip"), await recording(run, template, { software: "a test", created: about.created }));
  run.begun.device = "webgpu";
  const [[, root]] = [...await unzipped(new Blob([await recording(run, template, { software: "a test", created: about.created })]))].filter(([name]) => /^[^/]*\/zarr\.json$/.test(name));
  assert.equal(JSON.parse(new TextDecoder().decode(await root.read())).attributes.environment.software, "a test, the UNet by WebGPU");
  assert.match(run.header().facts, /, UNet by WebGPU$/);
  run.experiment.edits = [{ kind: "value", word: "scuba", from: 6 }, { kind: "head", layer: about.layers[2], head: 3, from: 0 }, { kind: "noise", seed: 7, amount: 1 }];
  await writeFile(path.join(FOLDER, "edited.zarr.zip"), await recording(run, template, { software: "a test", created: about.created }));
  Object.assign(run.experiment, { edits: [], start: { name: "fox.png", strength: 0.5, picture: null, of: null } });
  await assert.rejects(recording(run, template, {}), /needs no picture/);
  Object.assign(run.experiment, { edits: [{ kind: "noise", seed: 7, amount: 1, where: "f".repeat(64) }], start: undefined });
  await assert.rejects(recording(run, template, {}), /no noise from a file/);
});
