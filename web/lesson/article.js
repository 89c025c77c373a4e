// @ts-check
/**
 * A lesson's text as elements: chapters, terms that are explained where they stand, tables, questions.
 * What is read of a text is pure, and node tests it: `marks` and `filled`.
 *
 * @typedef {{p: string} | {code: string} | {formula: string} | {figure: string} | {try: string} | {question: string, answer: string}
 *           | {table: string, head: string[], rows: string[][]}} Block
 * @typedef {{id: string, title: string, blocks: Block[]}} Chapter
 * @typedef {{lang: string, name: string, title: string, lead: string, chapters: Chapter[], terms: Record<string, string[]>,
 *            figures: Record<string, Record<string, string>>, ui: Record<string, string>}} Lesson a term is its name and what it is
 * @typedef {{kind: "text" | "strong" | "code" | "term", text: string, key?: string}} Mark
 */

import { make } from "../../probe/figures/drawing.js";

const MARK = /\[\[(?<key>[a-z]+)\|(?<term>[^\]]+)\]\]|\*(?<strong>[^*]+)\*|`(?<code>[^`]+)`/g;
const PLACE = /\{(\w+)(?::(\w+))?\}/g;

/** The parts of a text. @param {string} text @returns {Mark[]} */
export function marks(text) {
  /** @type {Mark[]} */
  const found = [];
  let at = 0;
  const plain = (/** @type {number} */ to) => to > at && found.push({ kind: "text", text: text.slice(at, to) });
  for (const match of text.matchAll(MARK)) {
    plain(match.index);
    const { key, term, strong, code } = /** @type {Record<string, string>} */ (match.groups);
    found.push(key ? { kind: "term", key, text: term } : strong ? { kind: "strong", text: strong } : { kind: "code", text: code });
    at = match.index + match[0].length;
  }
  plain(text.length);
  return found;
}

/** The names in braces in a text. @param {string} text */
export const places = (text) => [...text.matchAll(PLACE)].map(([, name]) => name);

/** A text with values for its names in braces; numbers are written as the language does. @param {string} text @param {Record<string, string | number>} values @param {string} lang */
export function filled(text, values, lang) {
  return text.replaceAll(" × ", "\u00a0×\u00a0").replace(PLACE, (_, name, form) => {
    const value = values[name];
    if (value === undefined) throw new RangeError(`{${name}} has no value in: ${text}`);
    return typeof value === "number" ? written(value, lang, form) : value;
  });
}

/** A number as text. @param {number} value @param {string} lang @param {string} [form] percent, compact or tenths */
export function written(value, lang, form) {
  const size = Math.abs(value);
  if (form === "percent") return new Intl.NumberFormat(lang, { style: "percent" }).format(value);
  if (form === "compact") return new Intl.NumberFormat(lang, { notation: "compact", compactDisplay: "long", maximumSignificantDigits: 3 }).format(value);
  if (form === "tenths") return new Intl.NumberFormat(lang, { minimumFractionDigits: 1, maximumFractionDigits: 1 }).format(value);
  return new Intl.NumberFormat(lang, size > 0 && size < 1 ? { maximumSignificantDigits: 2 } : { maximumFractionDigits: size < 100 ? 1 : 0 }).format(value);
}

/**
 * Put a lesson into its place.
 *
 * @param {Element} place @param {Lesson} lesson @param {Lesson} other the same in the other language, for the names of terms
 * @param {Record<string, number>} numbers
 * @param {(name: string, into: HTMLElement, number: number) => void} figure puts a live figure into its element
 */
export function article(place, lesson, other, numbers, figure) {
  const { lang, ui } = lesson;
  const text = (/** @type {string} */ given) => filled(given, numbers, lang);
  const whole = make("article", "lesson", "", place, { lang, id: lang, tabindex: "-1" });
  const head = make("header", "", "", whole);
  make("h1", "", lesson.title, head);
  make("p", "lead", lesson.lead, head);
  const contents = make("nav", "contents", "", whole, { "aria-label": ui.contents });
  make("h2", "", ui.contents, contents);
  const list = make("ol", "", "", contents);
  const body = make("div", "chapters", "", whole);
  let drawn = 0;

  /** @param {Element} parent @param {string} given */
  function prose(parent, given) {
    /** @type {Element | null} a term, which a line does not part from what follows without a space */
    let before = null;
    for (const { kind, text: part, key } of marks(text(given))) {
      const tail = before && kind === "text" ? /^\S*/.exec(part)?.[0] ?? "" : "";
      before?.append(tail);
      before = null;
      if (kind === "text") parent.append(part.slice(tail.length));
      else if (kind === "term") term((before = make("span", "whole", "", parent)), /** @type {string} */ (key), part);
      else make(kind, "", part, parent);
    }
    return parent;
  }

  /** A word and what it means. @param {Element} parent @param {string} key @param {string} shown */
  function term(parent, key, shown) {
    const id = `${lang}-term-${key}`;
    const button = make("button", "term", shown, make("dfn", "", "", parent), { type: "button", popovertarget: id });
    const note = make("div", "meaning", "", whole, { id, popover: "" });
    const [name, meaning] = lesson.terms[key];
    const title = make("p", "names", `${name} `, note);
    make("span", "", other.terms[key][0], title, { lang: other.lang });
    make("p", "", meaning, note);
    note.addEventListener("toggle", () => beside(note, button));
  }

  /** @param {Element} parent @param {Extract<Block, {table: string}>} block */
  function table(parent, { table: caption, head: titles, rows }) {
    const scroll = make("div", "wide", "", parent, { tabindex: "0", role: "region", "aria-label": caption });
    const made = make("table", "", "", scroll);
    make("caption", "", caption, made);
    const top = make("tr", "", "", make("thead", "", "", made));
    for (const title of titles) make(title ? "th" : "td", "", title, top, title ? { scope: "col" } : {});
    const body = make("tbody", "", "", made);
    for (const cells of rows) {
      const row = make("tr", "", "", body);
      cells.forEach((cell, i) => prose(make(i ? "td" : "th", "", "", row, i ? {} : { scope: "row" }), cell));
    }
  }

  lesson.chapters.forEach(({ id, title, blocks }, index) => {
    const number = filled(ui.chapter, { number: index + 1 }, lang);
    const name = `${lang}-${id}`;
    make("a", "", text(title), make("li", "", "", list), { href: `#${name}` });
    const section = make("section", "chapter", "", body, { id: name, "aria-labelledby": `${name}-title` });
    const heading = make("h2", "", "", section, { id: `${name}-title` });
    make("span", "number", `${number} `, heading);
    heading.append(text(title));
    for (const block of blocks) {
      if ("p" in block) prose(make("p", "", "", section), block.p);
      else if ("code" in block) make("code", "", block.code, make("pre", "", "", section));
      else if ("formula" in block) make("p", "formula", block.formula, section);
      else if ("table" in block) table(section, block);
      else if ("figure" in block) figure(block.figure, make("figure", "live", "", section, { id: `${name}-figure` }), ++drawn);
      else if ("try" in block) aside(section, "try", ui.try, block.try);
      else {
        const made = aside(section, "question", ui.question, block.question);
        const answer = make("details", "", "", made);
        make("summary", "", ui.answer, answer);
        prose(make("p", "", "", answer), block.answer);
      }
    }
    const following = lesson.chapters[index + 1];
    if (following) make("a", "next", `${ui.next}: ${text(following.title)}`, make("p", "", "", section), { href: `#${lang}-${following.id}` });
  });

  /** @param {Element} parent @param {string} kind @param {string} title @param {string} given */
  function aside(parent, kind, title, given) {
    const made = make("div", `aside ${kind}`, "", parent);
    make("h3", "", title, made);
    prose(make("p", "", "", made), given);
    return made;
  }
  return whole;
}

/** Put an explanation below its word, within the window. @param {HTMLElement} note @param {Element} word */
function beside(note, word) {
  const { left, bottom } = word.getBoundingClientRect();
  const room = document.documentElement.clientWidth - note.offsetWidth - 12;
  note.style.left = `${Math.max(12, Math.min(left, room)) + scrollX}px`;
  note.style.top = `${bottom + 6 + scrollY}px`;
}
