// @ts-check
/**
 * The lesson in the page: `#en`, `#ko`, and their chapters as `#en-noise`. Every other address is that
 * of the drawing view, which keeps its state meanwhile.
 *
 * @typedef {import("../growing.js").Growing} Growing
 */

import { make } from "../../probe/figures/drawing.js";
import { article } from "./article.js";
import { asking } from "./asking.js";
import { en } from "./en.js";
import { figure } from "./figures.js";
import { ko } from "./ko.js";
import numbers from "./numbers.json" with { type: "json" };

/** @type {Record<string, import("./article.js").Lesson>} */
const LESSONS = { en, ko };
const VIEWS = { en: ["Draw", "Lesson", "수업"], ko: ["그리기", "Lesson", "수업"] };

/** The language and the chapter of an address, or null for another view. @param {string} hash */
export function addressed(hash) {
  const [, lang, chapter] = /^#(en|ko)(?:-([a-z]+))?(?:-[a-z]+)?$/.exec(hash) ?? [];
  if (!lang) return null;
  return { lang, chapter: LESSONS[lang].chapters.some(({ id }) => id === chapter) ? chapter : null };
}

/**
 * Bring the lesson to life.
 *
 * @param {{drawing: HTMLElement, lesson: HTMLElement, views: HTMLElement, skip: HTMLAnchorElement}} places
 * @param {{client: import("../client.js").Client, known: string[], open: (run: Growing) => void, stop: () => void,
 *          progress: () => number}} about `open` looks at a run in the drawing view, `stop` lets it draw no further; `progress` is the share of
 *          the model that is here
 */
export function lesson(places, { client, known, open, stop, progress }) {
  const ask = asking(client, stop);
  const title = document.title;
  const skipped = { text: places.skip.textContent ?? "", href: places.skip.hash };
  /** @type {Record<string, HTMLElement>} */
  const articles = {};
  /** @type {Record<string, number>} where each view was scrolled to */
  const scrolled = {};
  /** @type {(() => void) | null} what the drawing view does when it is first seen */
  let later = null;
  let now = "";
  /** @type {string | null} the address that is shown */
  let shown = null;

  /** @param {string} lang */
  function write(lang) {
    const [texts, other] = [LESSONS[lang], LESSONS[lang === "en" ? "ko" : "en"]];
    const words = make("datalist", "", "", places.lesson, { id: `${lang}-words` });
    for (const value of known) make("option", "", "", words, { value });
    return article(places.lesson, texts, other, numbers, (name, box, number) => {
      const compute = figure(name, box, number, { lesson: texts, asking: ask, known, progress, open: look });
      const eye = new IntersectionObserver(([entry]) => {
        if (!entry.isIntersecting) return;
        eye.disconnect();
        compute();
      });
      eye.observe(box);
    });
  }

  /** @param {Growing} run */
  function look(run) {
    leave();
    open(run);
  }

  /** Go to the drawing view, to look at what is there. */
  function leave() {
    later = null;
    if (now === "drawing") return;
    history.pushState(null, "", "#drawing");
    scrolled.drawing = 0;
    route();
  }

  /** Show what the address names. */
  function route() {
    if (location.hash === shown) return; // both events may tell of one move
    shown = location.hash;
    const wanted = addressed(location.hash);
    const view = wanted?.lang ?? "drawing";
    const changed = view !== now;
    if (changed) {
      if (now) scrolled[now] = scrollY;
      now = view;
      if (wanted) articles[view] ??= write(view);
      places.drawing.hidden = wanted !== null;
      places.lesson.hidden = wanted === null;
      for (const [lang, one] of Object.entries(articles)) one.hidden = lang !== view;
      const lang = wanted?.lang ?? "en";
      document.documentElement.lang = lang;
      document.title = wanted ? LESSONS[lang].title : title;
      places.skip.textContent = wanted ? LESSONS[lang].ui.skip : skipped.text;
      places.skip.href = wanted ? `#${lang}` : skipped.href;
      [...places.views.children].forEach((link, i) => {
        link.textContent = VIEWS[/** @type {"en" | "ko"} */ (lang)][i];
        if (/** @type {HTMLAnchorElement} */ (link).hash === (wanted ? `#${lang}` : "#drawing")) link.setAttribute("aria-current", "page");
        else link.removeAttribute("aria-current");
      });
      dispatchEvent(new Event("resize")); // what was painted while it was hidden had no width
    }
    if (wanted?.chapter) document.getElementById(`${view}-${wanted.chapter}`)?.scrollIntoView({ behavior: "instant" });
    else if (changed || wanted) scrollTo({ top: changed ? (scrolled[view] ?? 0) : 0, behavior: "instant" });
    if (!wanted) begin();
  }

  function begin() {
    const task = later;
    later = null;
    task?.();
  }

  for (const kind of ["dragover", "drop"]) {
    places.lesson.addEventListener(kind, (event) => { // figures take pictures; elsewhere in the lesson nobody does, neither the drawing view nor the browser
      const { dataTransfer } = /** @type {DragEvent} */ (event);
      if (event.defaultPrevented || ![...(dataTransfer?.items ?? [])].some(({ type }) => type.startsWith("image/"))) return;
      event.preventDefault();
      event.stopPropagation();
      if (dataTransfer) dataTransfer.dropEffect = "none";
    });
  }
  for (const moved of ["hashchange", "popstate"]) addEventListener(moved, route); // back to another query is no change of the hash
  route();
  return {
    leave,
    told: ask.told,
    keep: ask.keep,
    busy: ask.busy,
    ready: ask.ready,
    /** Do something when the drawing view is seen: at once, if it is. @param {() => void} task */
    whenDrawing: (task) => {
      later = task;
      if (now === "drawing") begin();
    },
  };
}
