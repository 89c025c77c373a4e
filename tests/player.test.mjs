// The pure parts of the player, probe/figures/payload.js: node --test tests/player.test.mjs
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { clamp, fromAddress, high, lockable, map, nearest, open, over, overlap, peak, ranged, said, shading, short, span, summed, table, toAddress, upcoming } from "../probe/figures/payload.js";

test("a step is said as the arrays count it and as people do", () => {
  assert.equal(said(6, 20), "6 (7th of 20)");
  assert.deepEqual([0, 1, 2, 3, 10, 11, 12, 20, 21, 110].map((step) => said(step, 200).match(/\((\S+)/)[1]), ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "111th"]);
});

test("hostile numbers fall to the default", () => {
  for (const value of ["abc", "-3", "99999999999999999999", "", "1e3", "0x1", "NaN", null, undefined, NaN, 1.5, Infinity, -1, 20, {}, [], "20"]) assert.equal(clamp(value, 20, 7), 7, String(value));
  assert.equal(clamp("19", 20, 7), 19);
  assert.equal(clamp(0, 20, 7), 0);
});

test("the address holds the state, keeps what is not its own, and drops what is hostile", () => {
  const steps = [0, 4, 8, 12];
  const state = { step: 3, channel: 2, reading: "attention", branch: "cond", per: "tokens", layer: -1, head: -1, against: 1, steps: "from", from: 1, opacity: 0.35, scale: "word" };
  const address = toAddress("?runs=a&runs=b&layer=4&reading=contribution", state, steps);
  assert.equal(address, "?runs=a&runs=b&opacity=0.35&step=12&word=2&from=4&against=1&scale=word&steps=from&per=tokens");
  assert.deepEqual(fromAddress(address, steps), { step: 3, channel: 2, from: 1, against: 1, opacity: 0.35, scale: "word", steps: "from", per: "tokens" });
  assert.deepEqual(fromAddress("?step=<img src=x>&word=-1&layer=1e9&head=%00&opacity=2&scale=javascript:1&steps=some&reading=__proto__&branch=<b>&per=1", steps), {});
  assert.equal(fromAddress("?step=3", steps).step, -1, "a step that is not recorded");
});

test("a locked range is in the address, and one that is none locks nothing", () => {
  const state = { step: 0, channel: 0, reading: "attention", branch: "cond", per: "words", layer: -1, head: -1, against: -1, steps: "one", from: 0, opacity: 0.6, scale: "locked", vmin: 0.01, vmax: 0.03571 };
  const address = toAddress("", state, [0]);
  assert.equal(address, "?opacity=0.6&step=0&word=0&scale=locked&vmin=0.01&vmax=0.03571");
  assert.deepEqual(fromAddress(address, [0]), { step: 0, channel: 0, opacity: 0.6, scale: "locked", vmin: 0.01, vmax: 0.03571 });
  assert.equal(toAddress(address, { ...state, scale: "step" }, [0]), "?opacity=0.6&step=0&word=0&scale=step", "no lock, no range");
  for (const range of ["", "&vmin=0", "&vmin=2&vmax=1", "&vmin=1&vmax=1", "&vmin=-1&vmax=1", "&vmin=0&vmax=1e999", "&vmin=0&vmax=Infinity", "&vmin=<b>&vmax=1", "&vmin=0x1&vmax=9"]) assert.deepEqual(fromAddress(`?scale=locked${range}`, [0]), {}, range);
  assert.deepEqual(fromAddress("?vmin=0&vmax=1", [0]), {}, "nothing is locked");
  assert.deepEqual(lockable(0, 0.0357149), { vmin: 0, vmax: 0.03571 });
  assert.deepEqual(lockable(0, "1e-7"), { vmin: 0, vmax: 1e-7 });
  assert.deepEqual([[0, 0], [NaN, 1], [0, undefined], [1, 1.00001]].map(([a, b]) => lockable(a, b)), [null, null, null, null]);
});

test("colours go from the least to the most of a range, and no further", () => {
  assert.deepEqual([0, 1, 1.5, 2, 9, NaN].map(shading([1, 2])), [0, 0, 128, 255, 255, 0]);
  assert.deepEqual([0, 1].map(shading([0, 0])), [0, 0], "a range of nothing");
  const colours = Uint32Array.from({ length: 256 }, (_, i) => i);
  assert.deepEqual(ranged(colours, 0.3, [0, 0.3]), colours, "a channel's own scale");
  assert.deepEqual([0, 127, 128, 255].map((byte) => ranged(colours, 2, [0, 1])[byte]), [0, 254, 255, 255]);
});

test("words near the chosen one are prepared first, the others last", () => {
  const channels = ["word", "word", "word", "word", "start", "padding"].map((kind) => ({ label: "", kind }));
  assert.deepEqual(upcoming(channels, 2), [2, 1, 3, 0, 4, 5]);
  assert.deepEqual(upcoming([], 0), []);
});

test("the mean over a span leaves nothing out", () => {
  assert.equal(over([9, 1, null, 5], [1, 3]), 2);
});

test("a span of steps lies within the run", () => {
  const all = ["one", "before", "after", "from", "all"].map((steps) => span({ step: 6, steps, from: 9 }, 19));
  assert.deepEqual(all, [[6, 6], [0, 6], [6, 19], [6, 9], [0, 19]]);
  assert.deepEqual(span({ step: 9, steps: "from", from: 6 }, 19), [6, 9]);
});

test("overlap is the cosine of two maps", () => {
  assert.equal(overlap(new Float32Array([1, 0]), new Float32Array([0, 1])), 0);
  assert.ok(Math.abs(overlap(new Float32Array([1, 1]), new Float32Array([0, 1])) - Math.SQRT1_2) < 1e-6);
  assert.ok(Number.isNaN(overlap(new Float32Array([0, 0]), new Float32Array([0, 1]))));
});

test("a map of many steps is their mean", () => {
  const part = { kind: "numbers", shape: [1, 1, 2, 3], scales: [1, 1, 1, 1], high: [2], data: new Uint8Array([255, 0, 0, 51, 102, 153]) };
  assert.deepEqual([...map(part, [0, 0], 0).values].map((value) => value.toFixed(3)), ["2.000", "0.400"]);
  assert.deepEqual([...map(part, [0, 2], 0).values].map((value) => value.toFixed(3)), ["0.667", "0.800"]);
});

test("bytes are summed from their differences, each row by itself", () => {
  assert.deepEqual([...summed(new Uint8Array([250, 10, 255, 1, 2, 3]), 3)], [250, 4, 3, 1, 3, 6]);
});

test("runs are synced by the logarithm of sigma", () => {
  assert.equal(nearest([10, 1, 0.1, 0.01], 0.5), 1);
  assert.equal(nearest([10, 1, 0.1, 0.01], 0.2), 2);
  assert.equal(nearest([10, 1, 0], 0), 2);
});

test("a table of colours begins and ends with its anchors", () => {
  const colours = table([[0, 0, 4], [60, 9, 101], [252, 255, 164]]);
  const rgba = (value) => [value & 255, (value >> 8) & 255, (value >> 16) & 255, value >>> 24];
  assert.deepEqual([rgba(colours[0]), rgba(colours[255])], [[0, 0, 4, 255], [252, 255, 164, 255]]);
  assert.equal(colours.length, 256);
});

test("numbers are short", () => {
  assert.deepEqual([0, 2.7562, 0.0357, 1e-5, 12345, NaN, null].map(short), ["0", "2.76", "0.0357", "1.0e-5", "1.2e+4", "not finite", "not finite"]);
});

test("what is no payload is refused", async () => {
  await assert.rejects(open(new Uint8Array([1, 2, 3])), /no payload/);
  await assert.rejects(open(new TextEncoder().encode("PNG!0000{}")), /no payload/);
});

test("numbers are those that Python wrote", { skip: process.env.PAYLOAD ? false : "set PAYLOAD and EXPECTED to what probe.figures.bundle wrote" }, async () => {
  const run = await open(new Uint8Array(readFileSync(process.env.PAYLOAD)));
  const expected = JSON.parse(readFileSync(process.env.EXPECTED, "utf8"));
  assert.deepEqual(run.meta, expected.meta);
  for (const one of expected.maps) {
    const { values, height, width } = map(run.parts.maps, [one.step, one.step], one.first, one.second);
    assert.deepEqual([height, width], one.shape);
    values.forEach((value, i) => assert.ok(Math.abs(value - one.values[i]) < 1e-6 * (1 + one.values[i]), `${i}: ${value} is not ${one.values[i]}`));
    assert.ok(peak(run.parts.maps, one.first, one.second, [one.step, one.step]) <= high(run.parts.maps, one.first, one.second) * 1.000001);
  }
});
