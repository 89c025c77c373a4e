// @ts-check
/**
 * The prompt as chips: words that are typed, picked, or taken from those that the model knows.
 *
 * @typedef {{words: () => string[], set: (words: string[]) => void, know: (known: string[]) => void, strange: () => string[]}} Prompt
 */

import { make } from "../probe/figures/drawing.js";

const WORD = /[\p{L}\p{M}\p{N}\p{S}]+/gu;
/** The words by what they are for; those that are in no group come last. */
const GROUPS = {
  who: "astronaut cat crab dog dragon fish fox frog ghost lion octopus owl panda penguin robot snowman turtle unicorn",
  what: "balloon car football guitar pizza rocket scuba diving party picture",
  where: "beach city desert forest moon snow",
  between: "a an the on in at above next to and of",
};

/** Whether a word names something; “a” and “of” do not. @param {string} word */
export const names = (word) => !GROUPS.between.split(" ").includes(word.toLowerCase());

/** The words of a text. @param {string} text */
export const wordsOf = (text) => [...text.normalize("NFC").toLowerCase().matchAll(WORD)].map(([word]) => word);

/** The known words in groups, each with its name. @param {string[]} known @returns {[string, string[]][]} */
export function grouped(known) {
  const groups = Object.entries(GROUPS).map(([name, text]) => /** @type {[string, string[]]} */ ([name, text.split(" ").filter((word) => known.includes(word))]));
  const placed = new Set(groups.flatMap(([, words]) => words));
  const rest = known.filter((word) => !placed.has(word));
  return rest.length ? [...groups, ["other", rest]] : groups;
}

/**
 * Put the prompt into its elements.
 *
 * @param {Element} box of the chips @param {Element} shelf of the known words @param {() => void} changed
 * @returns {Prompt}
 */
export function promptIn(box, shelf, changed) {
  /** @type {string[]} */
  let words = [];
  /** @type {string[]} */
  let known = [];
  const chips = make("span", "chips", "", box);
  const input = /** @type {HTMLInputElement} */ (make("input", "", "", box, { type: "text", list: "completion", "aria-label": "Add a word to the prompt", autocomplete: "off", autocapitalize: "off", spellcheck: "false", maxlength: "300", enterkeyhint: "done" }));
  const empty = make("button", "empty", "Clear", box, { type: "button", "aria-label": "Take all words out", title: "Take all words out" });
  const completion = make("datalist", "", "", box, { id: "completion" });
  box.addEventListener("pointerdown", (event) => {
    if (event.target !== box && event.target !== chips) return;
    event.preventDefault();
    input.focus();
  });

  function show() {
    chips.replaceChildren(...words.map((word, index) => {
      const chip = make("button", isStrange(word) ? "chip strange" : "chip", word, undefined, { type: "button", "aria-label": `Take “${word}” out`, title: "Take it out" });
      make("span", "cross", "×", chip, { "aria-hidden": "true" });
      chip.onclick = () => {
        set(words.filter((_, i) => i !== index));
        /** @type {HTMLElement} */ (chips.children[Math.min(index, words.length - 1)] ?? input).focus();
      };
      return chip;
    }));
    empty.hidden = !words.length;
    input.placeholder = words.length ? "" : "Type a word, or take one from below";
  }
  /** @param {string[]} next */
  function set(next) {
    words = next;
    show();
    changed();
  }
  const isStrange = (/** @type {string} */ word) => known.length > 0 && !known.includes(word);
  /** Take what is typed. */
  function commit() {
    const typed = wordsOf(input.value);
    input.value = "";
    if (typed.length) set([...words, ...typed]);
  }
  /** Make text of the chips, all of it selected: what is typed next takes its place. */
  function write() {
    input.value = [...words, ...wordsOf(input.value)].join(" ");
    set([]);
    input.select();
  }
  empty.onclick = () => {
    input.value = "";
    set([]);
    input.focus();
  };
  input.oninput = (event) => {
    const { inputType } = /** @type {InputEvent} */ (event);
    if (inputType?.startsWith("delete")) return;
    const picked = !inputType || inputType === "insertReplacementText";
    if (picked || /\s$/.test(input.value) || wordsOf(input.value).length > 1) commit();
  };
  input.onkeydown = (event) => {
    if (event.key === "Enter" && input.value.trim()) commit(); // and then the form is sent
    else if (event.key === "a" && (event.ctrlKey || event.metaKey) && words.length) {
      event.preventDefault();
      write();
    } else if (event.key === "Backspace" && !input.value && words.length) set(words.slice(0, -1));
  };
  input.onblur = commit;

  return {
    words: () => [...words, ...wordsOf(input.value)],
    set,
    strange: () => [...new Set(words.filter(isStrange))],
    know: (list) => {
      known = list;
      completion.replaceChildren(...list.map((value) => make("option", "", "", undefined, { value })));
      shelf.replaceChildren(...grouped(list).map(([name, some]) => {
        const row = make("p", "group", "", undefined, { role: "group", "aria-label": `Words: ${name}` });
        make("span", "name", name, row, { "aria-hidden": "true" });
        for (const word of some) {
          const button = make("button", "", word, row, { type: "button" });
          button.onclick = () => set([...words, word]);
        }
        return row;
      }));
      show();
    },
  };
}
