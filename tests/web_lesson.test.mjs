// The lesson's texts, and what it asks of the worker: node --test tests/web_lesson.test.mjs
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import test from "node:test";
import { filled, marks, places, written } from "../web/lesson/article.js";
import { asking, Stopped } from "../web/lesson/asking.js";
import { en } from "../web/lesson/en.js";
import { cosine, differing, FIGURES, psnr } from "../web/lesson/figures.js";
import { ko } from "../web/lesson/ko.js";
import { addressed } from "../web/lesson/lesson.js";

const numbers = JSON.parse(await readFile(new URL("../web/lesson/numbers.json", import.meta.url), "utf8"));
const figures = await readFile(new URL("../web/lesson/figures.js", import.meta.url), "utf8");
const frame = await readFile(new URL("../web/lesson/frame.js", import.meta.url), "utf8");
const article = await readFile(new URL("../web/lesson/article.js", import.meta.url), "utf8");

/** The texts of a block that are read as prose. */
const prose = (block) => [block.p, block.try, block.question, block.answer, block.table, ...(block.head ?? []), ...(block.rows ?? []).flat()].filter((text) => text !== undefined);
const every = ({ title, lead, chapters }) => [title, lead, ...chapters.flatMap((chapter) => [chapter.title, ...chapter.blocks.flatMap(prose)])];
const sorted = (text) => places(text).sort();
const keys = (object) => Object.keys(object).sort();

test("both languages have the same chapters, figures, keys and numbers", () => {
  assert.deepEqual(ko.chapters.map(({ id }) => id), en.chapters.map(({ id }) => id));
  en.chapters.forEach((chapter, i) => {
    const other = ko.chapters[i];
    assert.deepEqual(other.blocks.map((block) => keys(block)), chapter.blocks.map((block) => keys(block)), chapter.id);
    chapter.blocks.forEach((block, j) => {
      const [one, two] = [block, other.blocks[j]].map((texts) => prose(texts).map(sorted));
      assert.deepEqual(two, one, `${chapter.id}, block ${j}`);
      assert.equal(other.blocks[j].figure, block.figure);
      assert.equal(other.blocks[j].code, block.code);
    });
  });
  assert.deepEqual(keys(ko.terms), keys(en.terms));
  assert.deepEqual(keys(ko.ui), keys(en.ui));
  assert.deepEqual(keys(ko.figures), keys(en.figures));
  for (const [name, texts] of [...Object.entries(en.figures), ["ui", en.ui]]) {
    const other = name === "ui" ? ko.ui : ko.figures[name];
    assert.deepEqual(keys(other), keys(texts), name);
    for (const key of Object.keys(texts)) assert.deepEqual(sorted(other[key]), sorted(texts[key]), `${name}.${key}`);
  }
});

test("each chapter has a live figure, one thing to try, and a question with its answer", () => {
  for (const { chapters } of [en, ko]) {
    for (const { id, blocks } of chapters) {
      const count = (key) => blocks.filter((block) => key in block).length;
      assert.deepEqual(["figure", "try", "question", "answer"].map(count), [1, 1, 1, 1], id);
      assert.ok(blocks.find((block) => block.figure).figure in FIGURES);
    }
  }
});

test("no number is written into the prose", () => {
  for (const lesson of [en, ko]) {
    const texts = [...every(lesson), ...Object.values(lesson.terms).flat(), ...Object.values(lesson.figures).flatMap(Object.values), ...Object.values(lesson.ui)];
    for (const text of texts) {
      const bare = text.replace(/\{\w+(:\w+)?\}/g, "").replace(/`[^`]*`/g, "").replace(/(Rombach|Ho) et al\. \d{4}/g, "").replaceAll("Stable Diffusion v1", "").replace(/(?<![\d.,])[01](?!\d|[.,]\d)/g, "");
      assert.doesNotMatch(bare, /[0-9]/, text);
    }
  }
});

test("the numbers of the text are those of the file, each is used, and the text is filled", () => {
  const used = new Set(every(en).flatMap(places));
  assert.deepEqual([...used].sort(), keys(numbers));
  for (const lesson of [en, ko]) for (const text of every(lesson)) assert.doesNotMatch(filled(text, numbers, lesson.lang), /[{}]|NaN|undefined/);
  assert.throws(() => filled("{nothing}", numbers, "en"), /nothing/);
});

test("a term is explained once, where it first stands; Korean gives the English word there", () => {
  for (const lesson of [en, ko]) {
    const terms = every(lesson).flatMap((text) => marks(text)).filter(({ kind }) => kind === "term");
    assert.deepEqual(terms.map(({ key }) => key).sort(), keys(lesson.terms), lesson.lang);
    for (const { key, text } of terms) if (lesson === ko) assert.match(text, /\([A-Za-z -]+\)/, key);
  }
});

test("every text of a figure is shown by it", () => {
  const code = figures + frame;
  for (const [name, texts] of Object.entries(en.figures)) {
    for (const key of Object.keys(texts)) assert.match(code, new RegExp(`texts\\.${key}\\b|"${key}"`), `${name}.${key}`);
  }
  for (const key of Object.keys(en.ui)) assert.match(code + article + "ui.skip", new RegExp(`ui\\.${key}\\b|said\\("${key}"`), key);
});

test("marks are read, and numbers are written as a language writes them", () => {
  assert.deepEqual(marks("a *b* [[key|c d]] `e`."), [{ kind: "text", text: "a " }, { kind: "strong", text: "b" }, { kind: "text", text: " " }, { kind: "term", key: "key", text: "c d" }, { kind: "text", text: " " }, { kind: "code", text: "e" }, { kind: "text", text: "." }]);
  assert.deepEqual(marks("<img src=x>"), [{ kind: "text", text: "<img src=x>" }]);
  assert.equal(written(49152, "en"), "49,152");
  assert.equal(written(2.7, "ko"), "2.7");
  assert.equal(written(0.0316, "en"), "0.032");
  assert.equal(written(859520964, "en", "compact"), "860 million");
  assert.equal(written(859520964, "ko", "compact"), "8.6억");
  assert.equal(written(7.989, "en", "tenths"), "8.0");
  assert.equal(written(0.3022, "ko", "percent"), "30%");
});

test("an address names a language and a chapter, or the drawing view", () => {
  assert.deepEqual(addressed("#en"), { lang: "en", chapter: null });
  assert.deepEqual(addressed("#ko-noise"), { lang: "ko", chapter: "noise" });
  assert.deepEqual(addressed("#ko-nothing"), { lang: "ko", chapter: null });
  for (const hash of ["", "#drawing", "#pictures", "#fr", "#en<script>", "#constructor", "#en-noise'\""]) assert.equal(addressed(hash), null, hash);
});

/** A worker that says what it is told to say, and keeps what it was asked. */
function worker() {
  const posted = [];
  const grown = [];
  const client = { post: (message) => posted.push(message), ask: async (question) => ({ ...question, answered: true }) };
  const grow = (_, name, experiment, { timesteps }) => ({ name, experiment, calls: timesteps.length, steps: [], add(step) { this.steps.push(step); grown.push(step); }, finish(latents, picture) { Object.assign(this, { latents, picture }); } });
  const ask = asking(client, () => client.post({ kind: "stop" }), grow);
  return { posted, grown, ask };
}
const FOX = { prompt: "a fox", seed: 1, guidance: 3, steps: 2, scheduler: "DDIM", edits: [] };
const soon = () => new Promise((resolve) => setTimeout(resolve));

function draws(ask, run) {
  ask.told({ kind: "begun", run, words: [], end: 3, timesteps: [9, 1], sigmas: [2, 1] });
  for (const seconds of [0.1, 0.2]) ask.told({ kind: "step", run, seconds });
  return ask.told({ kind: "done", run, latents: [1], picture: "picture", seconds: 0.5 });
}

test("the lesson takes its own answers alone, and draws a picture once", async () => {
  const { posted, ask } = worker();
  ask.ready({});
  const drawn = ask.draw(FOX);
  assert.equal(posted.length, 1);
  const { run, guidanceScale, decodeEvery } = posted[0];
  assert.deepEqual([guidanceScale, decodeEvery], [3, 0]);
  for (const other of [1, undefined, "a-fox-1", "guess"]) assert.equal(ask.told({ kind: "step", run: other }), false, String(other));
  assert.equal(draws(ask, run), true);
  const { each, decode, run: grown } = await drawn;
  assert.ok(Math.abs(each - 0.1) < 1e-9 && Math.abs(decode - 0.3) < 1e-9);
  assert.equal(grown.picture, "picture");
  assert.equal((await ask.draw({ ...FOX, prompt: "a fox" })).run, grown);
  assert.equal(posted.length, 1, "what was drawn is not drawn again");
  void ask.draw(FOX, () => {}, true);
  assert.equal(posted.length, 2, "unless the reader wants it again");
  assert.equal(ask.told({ kind: "step", run }), true, "what comes late is not for the drawing view either");
});

test("a picture that the drawing view drew is used; one with edits is not what a figure asks for", async () => {
  const { posted, ask } = worker();
  const { prompt, ...rest } = FOX;
  const run = { experiment: { ...rest, prompt }, steps: [{ seconds: 1 }, { seconds: 2 }] };
  ask.keep(run, 3);
  assert.equal((await ask.draw(FOX)).run, run);
  ask.keep({ ...run, experiment: { ...FOX, seed: 2, edits: [{ kind: "value" }] } }, 3);
  void ask.draw({ ...FOX, seed: 2, edits: [{ kind: "value" }] });
  assert.equal(posted.length, 1);
});

test("one thing is computed after another, and what is drawn elsewhere goes first unless the reader asks", async () => {
  const { posted, ask } = worker();
  const done = [];
  const job = (name) => async () => { done.push(name); };
  assert.equal(ask.wait(), "model");
  const first = ask.inTurn(job("before the model"));
  await soon();
  assert.deepEqual(done, []);
  ask.busy(true);
  ask.ready({});
  await soon();
  assert.deepEqual([done, posted, ask.wait()], [[], [], "drawing"], "the drawing view draws");
  const second = ask.inTurn(job("by hand"), true);
  assert.deepEqual(posted, [{ kind: "stop" }]);
  ask.busy(false);
  assert.equal(ask.wait(), "figure");
  await Promise.all([first, second]);
  assert.deepEqual(done, ["before the model", "by hand"]);
  await assert.rejects(ask.inTurn(async () => { throw new Error("broken"); }), /broken/);
  await ask.inTurn(job("after a failure"));
  assert.equal(done.at(-1), "after a failure");
  await soon();
  assert.equal(ask.wait(), null);
});

test("a drawing that another stops is told so, and a mistake as well", async () => {
  const { posted, ask } = worker();
  ask.ready({});
  const stopped = assert.rejects(ask.draw(FOX), Stopped);
  ask.told({ kind: "stopped", run: posted[0].run });
  await stopped;
  const failed = assert.rejects(ask.draw({ ...FOX, seed: 3 }), /never saw/);
  ask.told({ kind: "error", run: posted[1].run, message: "The model never saw it.", words: ["it"] });
  await failed;
  const broken = worker();
  const waits = assert.rejects(broken.ask.inTurn(async () => {}), /did not come/);
  await soon();
  assert.equal(broken.ask.told({ kind: "error", message: "unet.onnx did not come." }), false, "the page says it as well");
  await waits;
});

test("measures of pictures and vectors", () => {
  const [black, grey] = [0, 51].map((value) => Uint8ClampedArray.from({ length: 16 }, (_, i) => (i % 4 === 3 ? 255 : value)));
  assert.ok(Math.abs(psnr(black, grey) - 20 * Math.log10(5)) < 1e-9);
  assert.equal(psnr(black, black), Infinity);
  const other = Uint8ClampedArray.from(black);
  other[1] = 1;
  assert.deepEqual([differing(black, black), differing(black, other)], [0, 0.25]);
  assert.ok(Math.abs(cosine(Float32Array.of(1, 1), Float32Array.of(1, 0)) - Math.SQRT1_2) < 1e-6);
});
