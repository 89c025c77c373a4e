// How the dashboard follows a recording, probe/dashboard/following.js: node --test tests/following.test.mjs
import assert from "node:assert/strict";
import test from "node:test";

import { carried, counterpart, lines, pause } from "../probe/dashboard/following.js";

test("a recording is asked for each second, a slow one less often, a complete one never", () => {
  assert.equal(pause("recording", 40, 0), 1000);
  assert.equal(pause("finishing", 1800, 0), 1800, "the server rests half of the time");
  assert.equal(pause("recording", 1e9, 0), 30_000);
  assert.equal(pause("complete", 40, 0), Infinity);
  for (const state of ["interrupted", "failed"]) assert.equal(pause(state, 40, 0), 10_000, "somebody may resume it");
});

test("asking slows down while something is wrong", () => {
  assert.deepEqual([1, 2, 3, 4, 5, 6, 400].map((failures) => pause("recording", 40, failures)), [2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000]);
});

test("a reader at the end goes on with the newest step, any other stays", () => {
  const [before, after] = [[0, 1, 2], [0, 1, 2, 3, 4]];
  const state = { from: 1, channel: 2, reading: "contribution" };
  assert.deepEqual(carried({ ...state, step: 2 }, before, after), { ...state, step: 4 });
  assert.deepEqual(carried({ ...state, step: 1 }, before, after), { ...state, step: 1 });
  assert.deepEqual(carried(null, [], after), { step: 4 }, "from the first step on at the end");
  assert.deepEqual(carried({ ...state, step: 0 }, [4, 8], [8, 12]), { ...state, step: 1, from: 0 }, "a step that is gone");
  assert.deepEqual(carried({ ...state, step: 0, from: 0 }, [4, 8], [0, 4, 8]), { ...state, step: 1, from: 1 }, "by its number, not its place");
});

test("the focus goes to the same control, else to one alike", () => {
  const before = ["BUTTON play", "SELECT What is shown", "BUTTON cat", "BUTTON cat"];
  assert.equal(counterpart(before, 3, before), 3);
  assert.equal(counterpart(before, 2, ["BUTTON play", "BUTTON cat"]), 1);
  assert.equal(counterpart(before, 1, ["BUTTON play"]), -1);
  assert.equal(counterpart(before, -1, before), -1);
});

test("only what is not complete is spoken of, by name where there are several", () => {
  const one = { name: "cat", problem: "", following: { state: "recording", text: "recording: 1 of 3 steps", command: "" } };
  const two = { name: "dog", problem: "", following: { state: "complete", text: "", command: "" } };
  const gone = { name: "fox", problem: "", following: { state: "interrupted", text: "Interrupted", command: "resume" } };
  assert.deepEqual(lines([one]), [{ state: "recording", text: "recording: 1 of 3 steps", command: "" }]);
  assert.deepEqual(lines([two]), []);
  assert.deepEqual(lines([one, two, gone]).map(({ text, command }) => [text, command]), [["cat: recording: 1 of 3 steps", ""], ["fox: Interrupted", "resume"]]);
  assert.deepEqual(lines([{ ...gone, problem: "It is damaged." }]), [{ state: "problem", text: "It is damaged.", command: "" }]);
});
