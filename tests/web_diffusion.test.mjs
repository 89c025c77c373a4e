// The page's own model code, web/diffusion: node --test tests/web_diffusion.test.mjs
// VECTORS names a file of what Python computed: see tests/test_web_diffusion.py.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { guide, isGuided } from "../web/diffusion/guidance.js";
import { generator } from "../web/diffusion/randn.js";
import { SCHEDULERS, denoised, makeScheduler } from "../web/diffusion/schedulers.js";
import { PromptError, tokenizer } from "../web/diffusion/tokens.js";

const { VECTORS } = process.env;
const vectors = VECTORS ? JSON.parse(readFileSync(VECTORS, "utf8")) : null;
const STEP_AFTER_STEP = 3e-6; // roundings add up, and are not the same on every CPU
const given = { skip: vectors ? false : "needs what Python computed" };
const model = (name) => JSON.parse(readFileSync(new URL(`../probe/emojiworld/${name}`, import.meta.url), "utf8"));
const read = tokenizer(model("tokenizer/tokenizer.json"), model("words.json"));
const config = model("scheduler/scheduler_config.json");

/** Throw unless numbers agree to a share of the greatest, or of 1. */
function close(got, wanted, what, share = 1e-6) {
  assert.equal(got.length, wanted.length, what);
  const most = wanted.reduce((sum, value) => Math.max(sum, Math.abs(value)), 1);
  const off = wanted.reduce((sum, value, i) => Math.max(sum, Math.abs(value - got[i])), 0);
  assert.ok(off <= share * most, `${what}: ${off} of ${most}`); // NaN is not close
}

test("random numbers are those of torch, draw after draw", given, () => {
  for (const { seed, draws } of vectors.randn.generators) {
    const numbers = generator(BigInt(seed));
    draws.forEach((wanted, i) => {
      const got = numbers.normal(wanted.length);
      if (vectors.randn.exact || wanted.length < 16) assert.deepEqual([...got], wanted, `seed ${seed}, draw ${i}`);
      else wanted.forEach((value, at) => assert.ok(Math.abs(value - got[at]) <= 2e-6, `seed ${seed}, draw ${i}, ${at}`));
    });
  }
});

test("prompts are read as Python reads them", given, () => {
  for (const { text, ids, tokens, words, spans, end } of vectors.prompts) {
    const prompt = read(text);
    assert.deepEqual(prompt.tokens, tokens, text);
    assert.deepEqual(prompt.ids, ids, text);
    assert.deepEqual(prompt.words.map(({ word }) => word), words.map((word) => word.toLowerCase()), text);
    assert.deepEqual(prompt.words.map(({ tokens }) => tokens), spans, text);
    assert.equal(prompt.end, end, text);
  }
});

test("words that the model never saw are named, each once, with those it knows", () => {
  const strange = { "a Zebra, a zebra on the MOON reading": ["zebra", "reading"], "fox 7": ["7"], "🐱 fox": ["🐱"], "fox's car": ["fox's"], "fóx": ["fóx"], "<b>fox</b>": ["<b>fox<", "b>"], "<|endoftext|>": ["<|endoftext|>"], "a\nfox": ["a\nfox"] };
  for (const [text, words] of Object.entries(strange)) {
    assert.throws(() => read(text), (error) => {
      assert.ok(error instanceof PromptError && /^The model never saw '.*' in its training\. Its words: a above .* unicorn\.$/s.test(error.message), text);
      assert.deepEqual(error.words, words);
      return true;
    });
  }
  assert.throws(() => read("fox ".repeat(76)), /The prompt has 78 tokens\. Write at most 77\./);
  assert.equal(read("fox ".repeat(75)).end, 76);
});

test("schedulers have diffusers' noise levels and steps", given, () => {
  for (const { name, steps, begin, noise, clean, predictions, seed, schedule, initSigma, inputs, latents, alphaBars, denoised: cleans } of vectors.schedulers) {
    const scheduler = makeScheduler(name, config, steps);
    const what = (index) => `${name}, ${steps} steps, call ${index}`;
    assert.deepEqual(scheduler.timesteps.slice(begin), schedule.timesteps, name);
    close(scheduler.sigmas.slice(begin), schedule.sigmas, name);
    close(scheduler.alphaBars.slice(begin), alphaBars, name);
    assert.equal(scheduler.exploding, schedule.exploding);
    close([scheduler.initSigma], [initSigma], name);
    const numbers = generator(seed);
    const noises = Float32Array.from(noise);
    let now = begin ? scheduler.begin(Float32Array.from(clean), noises, begin) : noises.map((value) => value * scheduler.initSigma);
    schedule.timesteps.forEach((_, i) => {
      const index = begin + i;
      const input = scheduler.input(now, index);
      const prediction = Float32Array.from(predictions[i]);
      close(input, inputs[i], what(index), STEP_AFTER_STEP);
      close(denoised(input, prediction, scheduler.alphaBars[index]), cleans[i], what(index), STEP_AFTER_STEP);
      now = scheduler.step(now, prediction, index, () => numbers.normal(noise.length));
      close(now, latents[i], what(index), STEP_AFTER_STEP);
    });
  }
});

test("a scheduler that cannot be made says why", () => {
  assert.deepEqual(SCHEDULERS, ["DDIM", "Euler", "EulerAncestral", "DPM++2M", "PNDM"]);
  assert.throws(() => makeScheduler("toString", config, 5), /toString is not a scheduler here\. Choose from: DDIM, Euler/);
  assert.throws(() => makeScheduler("DDIM", { ...config, prediction_type: "v_prediction" }, 5), /prediction_type must be epsilon here/);
  for (const steps of [0, -1, 1.5, NaN, Infinity]) assert.throws(() => makeScheduler("DDIM", config, steps), /Take a whole number/);
  for (const name of SCHEDULERS) assert.throws(() => makeScheduler(name, config, 1000), /There are no timesteps for 1000 steps\. Take fewer\./);
});

test("guidance and its rescale are those of Python", given, () => {
  for (const { uncond, cond, scale, rescale, guided } of vectors.guidance) {
    close(guide(Float32Array.from(uncond), Float32Array.from(cond), scale, rescale), guided, `${scale}, ${rescale}`);
  }
  assert.deepEqual([0, 0.5, 1, 1.0001, 7.5].map(isGuided), [false, false, false, true, true]);
  const alone = Float32Array.of(1, 2);
  assert.equal(guide(null, alone, 7.5, 0.7), alone);
});
