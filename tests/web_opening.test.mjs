// Recordings opened in the page: node --test tests/web_opening.test.mjs
// OPENED is a folder that tests/test_web_opening.py fills: recordings as zip files, and what Python's player is given of each.
import assert from "node:assert/strict";
import { readFile, readdir } from "node:fs/promises";
import path from "node:path";
import test from "node:test";

import { map } from "../probe/figures/payload.js";
import { drawable } from "../web/recordings/drawable.js";
import { opened } from "../web/recordings/opening.js";
import { stored } from "../web/recordings/stored.js";
import { Unreadable, unzipped, zipped } from "../web/recordings/zip.js";

const FOLDER = process.env.OPENED;
const SIZE = 2.5; // of 255 levels: a level of the player's bytes, and of means that are rounded twice
const floats = async (...names) => {
  const bytes = await readFile(path.join(FOLDER, ...names));
  return new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4).slice();
};
const file = async (name) => new File([await readFile(path.join(FOLDER, name))], name);
const far = (one, two) => one.reduce((most, value, i) => Math.max(most, Math.abs(value - two[i])), 0);

/** A canvas as far as pictures are put on it. */
function canvas(width, height) {
  const data = new Uint8ClampedArray(4 * width * height);
  const putImageData = (image, x, y) => {
    for (let row = 0; row < image.height; row++) data.set(image.data.subarray(4 * row * image.width, 4 * (row + 1) * image.width), 4 * ((y + row) * width + x));
  };
  const createImageData = (w, h) => ({ width: w, height: h, data: new Uint8ClampedArray(4 * w * h) });
  return { width, height, data, getContext: () => ({ putImageData, createImageData }) };
}
/** The colours of one picture of a sheet. */
function colours({ shape: [, height, width], columns, bitmap }, index) {
  const [left, top] = [(index % columns) * width, Math.floor(index / columns) * height];
  return Float32Array.from({ length: height * width * 3 }, (_, i) => bitmap.data[4 * ((top + Math.floor(i / 3 / width)) * bitmap.width + left + (Math.floor(i / 3) % width)) + (i % 3)]);
}
/** Every number of a part as the player reads it, (channel, y, x, step). */
function numbersOf(part) {
  const steps = part.shape.at(-1);
  const blocks = part.shape.slice(0, -3).reduce((a, b) => a * b, 1);
  const size = part.shape.at(-3) * part.shape.at(-2) * steps;
  const found = new Float32Array(blocks * size);
  for (let block = 0; block < blocks; block++) for (let i = 0; i < size; i++) found[block * size + i] = (part.data[block * size + i] / 255) * part.high[block];
  return found;
}
const same = (one, two, what) => {
  if (Array.isArray(two)) return two.forEach((value, i) => same(one[i], value, `${what} ${i}`));
  if (typeof two === "number") return assert.ok(Math.abs(one - two) <= 2e-5 * Math.max(1, Math.abs(two)), `${what}: ${one} and ${two}`);
  assert.deepEqual(one, two, what);
};

const names = FOLDER ? (await readdir(FOLDER, { withFileTypes: true })).filter((entry) => entry.isDirectory()).map(({ name }) => name) : [];
for (const name of names) {
  test(`shows ${name}`, async () => {
    const { meta, shapes, heads, words } = JSON.parse(await readFile(path.join(FOLDER, name, "about.json"), "utf8"));
    const shares = [];
    const run = await stored(await file(`${name}.zarr.zip`), canvas, (share) => shares.push(share));
    assert.equal(run.meta.name, name);
    if (name === "several") assert.deepEqual(shares, meta.steps.map((_, i) => i / meta.steps.length), "its mean over images is not that of the first");
    for (const key of ["kind", "prompt", "calls", "steps", "colours"]) assert.deepEqual(run.meta[key], meta[key], key);
    const first = meta.offers.readings.filter((reading) => reading === "attention");
    assert.deepEqual(run.meta.offers, { readings: meta.steps.length ? first : [], branches: [], latents: meta.steps.length ? meta.offers.latents : 0 });
    for (const key of ["sigma", "timestep"]) same(run.meta[key], meta[key], key);
    if (!meta.steps.length) return assert.deepEqual(Object.keys(run.parts), []);
    assert.deepEqual(run.meta.latent_names, meta.latent_names);
    assert.deepEqual(Object.fromEntries(run.meta.panels.map((panel) => [panel.part, panel])), Object.fromEntries(meta.panels.map((panel) => [panel.part, panel])));
    assert.deepEqual(Object.keys(run.meta.curves), Object.keys(meta.curves));
    for (const key of Object.keys(meta.curves)) same(run.meta.curves[key].values, meta.curves[key].values, key);
    const known = name === "several" || meta.kind === "noising" || run.recipe.edits?.length;
    if (!known) assert.equal(run.meta.facts, meta.facts);
    assert.equal(run.meta.facts.includes("image 0 of 2"), name === "several");
    assert.deepEqual(Object.keys(run.parts).sort(), Object.keys(shapes).sort());
    for (const part of Object.keys(shapes)) assert.deepEqual(run.parts[part].shape, shapes[part], part);
    if (shapes.denoised) {
      const expected = await floats(name, "denoised.f32");
      const size = expected.length / meta.steps.length;
      meta.steps.forEach((_, i) => assert.ok(far(colours(run.parts.denoised, i), expected.subarray(i * size, (i + 1) * size)) <= 1, `denoised ${i}`));
    }
    if (shapes.final) assert.equal(far(colours(run.parts.final, 0), await floats(name, "final.f32")), 0);
    if (!shapes.maps) return;
    for (const key of ["channels", "unit", "note", "about", "of", "branch", "per", "map_steps"]) assert.deepEqual(run.meta[key], meta[key], key);
    assert.deepEqual(run.meta.channels.filter(({ kind }) => kind === "word").map(({ label }) => label), words);
    if (name !== "several" && meta.kind === "generation") for (const key of Object.keys(meta.shares)) same(run.meta.shares[key], meta.shares[key], `shares of ${key}`);
    const expected = await floats(name, "words.f32"); // of the first image alone, as the page shows it
    const found = await exact(run);
    assert.equal(found.length, expected.length);
    assert.ok(far(found, expected) < 1e-6, `maps of words: ${far(found, expected)}`);
    const shown = numbersOf(run.parts.maps).subarray(0, expected.length);
    assert.ok(far(shown, expected) <= Math.max(...run.parts.maps.high) / 255 / 2 + 1e-6, "as bytes");
    if (!heads || run.maps.has("query")) return;
    const more = await run.ask({ what: "heads", channel: String(heads.channel) });
    for (const key of ["layers", "heads", "map_steps", "branch"]) assert.deepEqual(more.meta[key], heads[key], key);
    same(more.meta.shares, heads.shares, "shares of layers");
    assert.deepEqual(more.parts.maps.shape, heads.shape);
    assert.ok(far(numbersOf(more.parts.maps), await floats(name, "heads.f32")) <= (SIZE * Math.max(...more.parts.maps.high)) / 255);
  });
}

/** The maps of words before they become bytes, (word, y, x, step). */
async function exact({ maps }) {
  const tokens = await maps.overview();
  const [{ size }] = maps.grids;
  const list = maps.channels.filter(({ kind }) => kind === "word");
  const found = new Float32Array(list.length * size[0] * size[1] * tokens.length);
  list.forEach(({ tokens: own }, word) => tokens.forEach((step, i) => {
    for (let place = 0; place < size[0] * size[1]; place++) found[(word * size[0] * size[1] + place) * tokens.length + i] = own.reduce((sum, token) => sum + step[token][place], 0);
  }));
  return found;
}

test("shows a recording whose zip is not packed, and the one of the package by its own name", { skip: !FOLDER }, async () => {
  const [one, two] = [await stored(await file("stored.zarr.zip"), canvas), await stored(await file("whole.zarr.zip"), canvas)];
  assert.deepEqual({ ...one.meta, name: "", opened: "" }, { ...two.meta, name: "", opened: "" });
  assert.deepEqual(one.parts.maps, two.parts.maps);
  const [first, second] = [await one.ask({ what: "heads", channel: "0" }), await two.ask({ what: "heads", channel: "0" })];
  assert.deepEqual(first, second);
  assert.ok((await opened(await file("packed.zip"))).arrays.size > 60);
});

const text = (value) => new TextEncoder().encode(typeof value === "string" ? value : JSON.stringify(value));
const zip = (files) => new File([zipped(files, "small.zarr/")], "small.zarr.zip");
/** The files of a small recording. */
async function small() {
  const files = new Map();
  for (const [name, { read }] of await unzipped(await file("small.zarr.zip"))) files.set(name.replace("small.zarr/", ""), (await read()).slice());
  return files;
}
/** A small recording whose root says something else. */
async function changed(change) {
  const files = await small();
  const root = JSON.parse(new TextDecoder().decode(files.get("zarr.json")));
  const other = change(root, files) ?? root;
  return zip(files.set("zarr.json", text(other)));
}
const refused = async (source, sentence) => assert.rejects(stored(await source, canvas), (error) => {
  assert.ok(error instanceof Unreadable, error.stack);
  assert.match(error.message, sentence);
  assert.ok(error.message.length < 250 && /^[A-Z][^\n<]*\.$/.test(error.message), error.message);
  return true;
});
/** Chunks of a zip, changed at some bytes. */
function patched(bytes, signature, at, values) {
  const view = Buffer.from(bytes);
  view.set(values, view.indexOf(Buffer.from(signature)) + at);
  return new File([view], "x.zip");
}

test("refuses what is no zip of a recording", { skip: !FOLDER }, async () => {
  const bytes = await readFile(path.join(FOLDER, "whole.zarr.zip"));
  await refused(new File([], "x.zip"), /no zip file/);
  await refused(new File(["<!doctype html>".repeat(9999)], "x.zip"), /no zip file/);
  await refused(new File([bytes.subarray(0, bytes.length / 2)], "x.zip"), /no zip file/);
  await refused(new File([bytes.subarray(bytes.length / 2)], "x.zip"), /not whole/);
  await refused(new File([bytes.subarray(0, 999), bytes.subarray(1999)], "x.zip"), /not whole|damaged/);
  await refused(zip(new Map([["readme.txt", text("none")]])), /no recording in it/);
  await refused(new File([zipped(new Map([["a/zarr.json", text("{}")], ["b/zarr.json", text("{}")]]), "")], "x.zip"), /holds 2 recordings/);
  for (const name of ["../zarr.json", "/zarr.json", "a\\b/zarr.json", "a\u202eb/zarr.json", `${"a/".repeat(20)}zarr.json`]) await refused(new File([zipped(new Map([[name, text("{}")]]), "")], "x.zip"), /name that no recording has/);
  await refused(patched(bytes, "PK\x01\x02", 8, [1, 0]), /password/);
  await refused(patched(bytes, "PK\x01\x02", 10, [99, 0]), /not read here/);
  await refused(patched(bytes, "PK\x05\x06", 10, [0xff, 0xff]), /more files/);
});

test("refuses a zip that grows, before it has grown", { skip: !FOLDER }, async () => {
  const { deflateRawSync } = await import("node:zlib");
  const zeros = deflateRawSync(Buffer.alloc(400e6), { level: 9 });
  const bomb = (claimed) => {
    const whole = Buffer.from(zipped(new Map([["zarr.json", zeros]]), "small.zarr/"));
    for (const [signature, at] of [["PK\x03\x04", 8], ["PK\x01\x02", 10]]) {
      const start = whole.indexOf(Buffer.from(signature, "latin1"));
      whole.writeUInt16LE(8, start + at);
      whole.writeUInt32LE(claimed, start + at + 14);
    }
    return new File([whole], "x.zip");
  };
  const before = process.memoryUsage().arrayBuffers;
  await refused(bomb(400e6), /would grow from \d+ to 400000000 bytes/);
  await refused(bomb(20e6), /more than that of a recording/);
  await refused(bomb(5000), /longer than it says/);
  assert.ok(process.memoryUsage().arrayBuffers - before < 64e6);
});

test("refuses a zip whose files share their bytes", { skip: !FOLDER }, async () => {
  const whole = Buffer.from(zipped(new Map([["a", new Uint8Array(5000)]]), ""));
  const [list, end] = ["PK\x01\x02", "PK\x05\x06"].map((signature) => whole.indexOf(Buffer.from(signature, "latin1")));
  const record = (letter) => Buffer.concat([whole.subarray(list, end - 1), Buffer.from(letter)]);
  const tail = Buffer.from(whole.subarray(end));
  for (const at of [8, 10]) tail.writeUInt16LE(3, at);
  tail.writeUInt32LE(3 * (end - list), 12);
  await refused(new File([whole.subarray(0, list), ..."abc".split("").map(record), tail], "x.zip"), /overlap each other/);
});

test("refuses attributes and arrays that no recording has", { skip: !FOLDER }, async () => {
  await refused(zip((await small()).set("zarr.json", text("[".repeat(1e6)))), /no JSON/);
  await refused(zip((await small()).set("zarr.json", text(" ".repeat(9e6)))), /more than that of a recording/);
  await refused(changed(() => [1]), /not that of a recording/);
  await refused(changed(({ attributes, ...root }) => root), /not that of a recording/);
  await refused(changed((root) => void (root.attributes.format_version = 99)), /format 99, and this page reads 1 and 2/);
  await refused(changed((root) => void delete root.attributes.format_version), /no recording of probe/);
  await refused(changed((root) => void delete root.consolidated_metadata), /does not list/);
  await refused(changed((root) => void (root.attributes.experiment = null)), /how it was made/);
  const array = (name, change, sentence) => refused(changed((root) => void Object.assign(root.consolidated_metadata.metadata[name], change)), sentence);
  const chunks = (...shape) => ({ chunk_grid: { name: "regular", configuration: { chunk_shape: shape } } });
  await array("latents/latents", { shape: [3, 1, 4, 5e5, 5e5] }, /claims a shape of|has \d+ bytes, which|too large|fit its shards|no recording/);
  await array("latents/latents", { shape: [3, 1, 4, 1e4, 1e4], ...chunks(1, 1, 4, 1e4, 1e4) }, /too large/);
  await array("sigma", { shape: [1e12], ...chunks(1e12) }, /too large/);
  await array("sigma", { shape: [1e12], ...chunks(1) }, /claims a shape of 1000000000000/);
  await array("sigma", { shape: [-1] }, /no shape/);
  await array("sigma", { shape: [1.5] }, /no shape/);
  await array("sigma", { shape: "3" }, /no shape/);
  await array("sigma", { data_type: "complex128" }, /type that recordings do not have/);
  await array("sigma", { data_type: "toString" }, /type that recordings do not have/);
  await array("sigma", { dimension_names: ["<b>"] }, /does not name its dimensions/);
  await array("sigma", { dimension_names: ["image"] }, /dimensions image, and not step/);
  await array("sigma", { codecs: [{ name: "bytes" }, { name: "zstd" }, { name: "crc32c" }] }, /encoded in a way/);
  await array("sigma", { codecs: null }, /encoded in a way/);
  await array("sigma", { fill_value: { a: 1 } }, /no fill value/);
  await array("sigma", { storage_transformers: [{}] }, /third format/);
  const long = (root) => { for (const name of ["step", "timestep", "sigma", "alpha_bar", "committed"]) Object.assign(root.consolidated_metadata.metadata[name], { shape: [9e5], ...chunks(9e5), fill_value: 1 }); };
  await refused(changed((root, files) => { long(root); for (const name of [...files.keys()]) if (/\/c\./.test(name)) files.delete(name); }), /900000 steps/);
  await array("attention/4x4/cross", { dimension_names: ["step", "token", "image", "branch", "layer", "head", "y", "x"] }, /dimensions/);
  await array("attention/4x4/token", { shape: [5], ...chunks(5) }, /does not hold what its name and labels say/);
  for (const missing of ["committed", "sigma", "latents/prediction", "attention/4x4/word", "attention/4x4/recorded", "attention/4x4/branch", "attention/4x4/layer"]) {
    const source = changed((root) => void delete root.consolidated_metadata.metadata[missing]);
    if (missing === "attention/4x4/layer") assert.match((await stored(await source, canvas)).meta.missing.maps, /not recorded/);
    else await refused(source, /It has no|no predictions|does not name/);
  }
});

test("refuses arrays that are not there and would take all memory, or all time", { skip: !FOLDER }, async () => {
  /** A recording of 1000 steps whose chunks have no file. */
  const endless = (side, crossChunks, latentChunks) => changed((root, files) => {
    const all = root.consolidated_metadata.metadata;
    const sized = (path, shape, chunks, fill) => {
      Object.assign(all[path], { shape, chunk_grid: { name: "regular", configuration: { chunk_shape: chunks } }, codecs: [{ name: "bytes", configuration: { endian: "little" } }, { name: "crc32c" }], fill_value: fill });
      for (const name of [...files.keys()]) if (name.startsWith(`${path}/c.`)) files.delete(name);
    };
    for (const [path, about] of Object.entries(all)) if (about.dimension_names?.join() === "step") sized(path, [1000], [1000], path === "alpha_bar" ? 0.5 : 1);
    for (const name of ["latents", "prediction"]) sized(`latents/${name}`, [1000, 1, 4, 8, 8], latentChunks, 0);
    delete all["attention/4x4/overview"];
    sized("attention/4x4/cross", [1000, 3, 1, 1, 2, 2, side, side], crossChunks, 0);
    const moved = JSON.parse(JSON.stringify(root).replaceAll("attention/4x4", `attention/${side}x${side}`));
    for (const [name, bytes] of [...files]) if (name.startsWith("attention/4x4/")) files.set(name.replace("4x4", `${side}x${side}`), bytes);
    return moved;
  });
  const [small, one] = [[1, 1, 4, 8, 8], [1, 3, 1, 1, 2, 2, 1024, 1024]];
  await refused(endless(1024, one, small), /more maps than this page can hold/);
  await refused(endless(64, [1, 3, 1, 1, 2, 2, 64, 64], [1, 1, 1, 2 ** 13, 2 ** 13]), /chunks that are larger than itself/);
  await refused(changed((root) => {
    const all = root.consolidated_metadata.metadata;
    for (const about of Object.values(all)) about.dimension_names?.forEach((name, axis) => { if (name === "token") about.shape[axis] = 3000; });
  }), /more tokens, layers or heads than a model has/);
  await refused(endless(128, [1000, 1, 1, 1, 2, 2, 128, 128], small), /cross is too large for this page/);
});

test("refuses chunks that were changed", { skip: !FOLDER }, async () => {
  const sigma = "sigma/c.0";
  await refused(zip((await small()).set(sigma, text("short"))), /5 bytes, which it cannot have/);
  const flip = async (name) => {
    const files = await small();
    files.get(name)[9] ^= 1;
    return zip(files);
  };
  await refused(flip(sigma), /checksum/);
  await refused(flip("latents/latents/c.1.0.0.0.0"), /checksum/);
  await refused(flip("attention/4x4/word/c.0.0"), /not the text|checksum/);
  const shard = async (change) => {
    const files = await small();
    const name = [...files.keys()].find((one) => one.startsWith("attention/4x4/cross/c.1"));
    change(files.get(name));
    for (const one of [...files.keys()]) if (one.includes("overview/c")) files.delete(one); // else it is not read
    return zip(files);
  };
  await refused(shard((bytes) => { bytes[3] ^= 1; }), /checksum/);
  await refused(shard((bytes) => { bytes[bytes.length - 9] ^= 1; }), /checksum/);
});

test("refuses nothing that can be shown, and shows text as text", { skip: !FOLDER }, async () => {
  const markup = '<img src=x onerror="window.pwned=1">';
  const run = await stored(await changed((root) => {
    Object.assign(root.attributes.experiment, { prompt: `${markup}\u202e\u0000`, steps: markup, seed: { toString: 1 }, edits: {} });
    Object.assign(root.attributes, { model: null, scheduler: 7, cut_from_prompt: 3, status: "weird" });
  }), canvas);
  assert.equal(run.meta.prompt, `${markup}??`);
  assert.match(run.meta.facts, /^unknown, unknown, .*onerror?.* steps, .*seed unknown$|^unknown, unknown, <img src=… steps, .*seed unknown$/);
  assert.equal(run.meta.following.text, "");
});

test("refuses or shows whatever one field of a recording is", { skip: !FOLDER }, async () => {
  const odd = [null, -1, 0, 2 ** 40, "", "x", [], {}, [null], true];
  const places = [];
  const walk = (value, at) => {
    if (typeof value === "object" && value !== null) for (const key of Object.keys(value)) walk(value[key], [...at, key]);
    if (at.length) places.push(at);
  };
  const files = await small();
  const root = JSON.parse(new TextDecoder().decode(files.get("zarr.json")));
  walk(root, []);
  const every = places.filter((_, i) => i % 7 === 0); // a seventh of all fields, each with one odd value
  for (const [i, place] of every.entries()) {
    const other = structuredClone(root);
    const holder = place.slice(0, -1).reduce((value, key) => value[key], other);
    holder[place.at(-1)] = odd[i % odd.length];
    try {
      await stored(zip(new Map(files).set("zarr.json", text(other))), canvas);
    } catch (error) {
      assert.ok(error instanceof Unreadable, `${place.join(".")} as ${JSON.stringify(odd[i % odd.length])}: ${error.stack}`);
    }
  }
  assert.ok(every.length > 50);
});

test("shows a folder as its zip", { skip: !FOLDER }, async () => {
  const files = [];
  for (const [name, { read }] of await unzipped(await file("wide.zarr.zip"))) {
    const one = new File([await read()], path.basename(name));
    Object.defineProperty(one, "webkitRelativePath", { value: name });
    files.push(one);
  }
  const [folder, packed] = [await stored(files, canvas), await stored(await file("wide.zarr.zip"), canvas)];
  assert.deepEqual(folder.meta, packed.meta);
  assert.deepEqual(folder.parts.maps, packed.parts.maps);
});

test("shows which recordings this page can draw", { skip: !FOLDER }, async () => {
  const known = ["an", "astronaut", "scuba", "diving"];
  const asked = async (name, change = {}) => {
    const { recipe, recording } = await stored(await file(`${name}.zarr.zip`), canvas);
    return drawable({ ...recipe, ...change }, recording.attributes, known);
  };
  assert.deepEqual(await asked("sample"), { prompt: "an astronaut scuba diving", seed: 5, guidance: 3, steps: 20, scheduler: "DDIM", edits: [] });
  assert.match(await asked("whole"), /another model/);
  assert.equal(await asked("sample-noising"), "");
  const no = { width: 64, edits: [{}], negative_prompt: "a cat", prompt: "<b>an</b>", seed: -1, steps: 9e9, guidance_scale: 99, image: "x.png", loras: [1], eta: 1 };
  assert.match(await asked("sample", { prompt: Array(101).fill("an").join(" ") }), /^It cannot be drawn here, for it has a longer prompt than this page takes\.$/);
  for (const [name, value] of Object.entries(no)) assert.match(await asked("sample", { [name]: value }), /^It cannot be drawn here, for it [A-Za-z ()]+\.$/, name);
});
