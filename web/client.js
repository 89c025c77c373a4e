// @ts-check
/**
 * The page's end of the worker: it starts the worker, hands it the files and says how far they are.
 *
 * The built page lists its files in an element `files`: {name: {bytes, address?}}. Without an address
 * a file lies in the page itself, by gzip and base64, as the element `file:NAME`; so does the
 * worker's code, as `worker-code`.
 *
 * @typedef {{bytes: number, address?: string}} Listed
 * @typedef {{post: (message: Record<string, any>) => void, ask: (question: Record<string, any>) => Promise<any>}} Client
 *          `ask` sends a question of drawing.js, without its id, once the model is there; its promise has the answer, or an
 *          error whose `words` the model never saw
 */

/** Start the worker and load the model. @param {(message: any) => void} told what the worker answers @param {(share: number) => void} progress @returns {Client} */
export function start(told, progress) {
  /** @type {Record<string, Listed>} */
  const listed = JSON.parse(element("files").textContent ?? "{}");
  const isLarge = (/** @type {string} */ name) => listed[name].bytes > 1e5; // the others are read while the model is opened
  const total = Object.keys(listed).filter(isLarge).reduce((sum, name) => sum + listed[name].bytes, 0);
  /** @type {Map<string, number>} */
  const come = new Map();
  const came = (/** @type {string} */ name, /** @type {number} */ bytes) => {
    if (isLarge(name)) come.set(name, Math.min(bytes, listed[name].bytes));
    progress([...come.values()].reduce((sum, one) => sum + one, 0) / total);
  };
  const worker = open();
  /** @type {Map<number, {resolve: (answer: any) => void, reject: (error: Error) => void}>} */
  const waiting = new Map();
  let isReady = false;
  /** @type {() => void} */
  let opened;
  const ready = new Promise((resolve) => { opened = () => resolve((isReady = true)); });
  let questions = 0;
  worker.onmessage = ({ data }) => {
    const asker = waiting.get(data.id);
    waiting.delete(data.id);
    if (data.kind === "progress" && isReady) return; // the encoder is fetched when it is asked
    if (data.kind === "progress") came(data.name, data.bytes);
    else if (!asker) told(data);
    else if (data.kind === "error") asker.reject(Object.assign(new Error(data.message), { words: data.words }));
    else asker.resolve(data);
    if (data.kind === "ready") opened();
  };
  worker.onerror = (event) => {
    const message = event.message || "This browser does not start the page's worker. Try a newer one.";
    for (const { reject } of waiting.values()) reject(new Error(message)); // nobody else answers them
    waiting.clear();
    told({ kind: "error", message, words: [] });
  };
  void files(listed, came).then((contents) => worker.postMessage({ kind: "load", ort: inside() ? undefined : new URL("ort.mjs", location.href).href, threads: Math.min(4, navigator.hardwareConcurrency || 1), files: contents }));
  return {
    post: (message) => worker.postMessage(message),
    ask: async (question) => {
      await ready;
      const id = ++questions;
      worker.postMessage({ ...question, id });
      return new Promise((resolve, reject) => waiting.set(id, { resolve, reject }));
    },
  };
}

/**
 * Keep the page for use without a network, and for threads at the next visit. A page that is isolated
 * by its own host, as `probe web` does it, needs neither on this machine.
 */
export async function keepOffline() {
  const near = ["127.0.0.1", "localhost"].includes(location.hostname) && self.crossOriginIsolated;
  if (inside() || near || !("serviceWorker" in navigator)) return;
  await navigator.serviceWorker.register("offline.js").catch(() => {}); // the page works without
  await navigator.serviceWorker.ready;
  document.body.dataset.offline = "kept";
}

/** Whether all lies in the page itself. */
export const inside = () => document.getElementById("worker-code") !== null;

/** From a disk, browsers start workers of what the page holds alone, and only without imports. */
function open() {
  const code = document.getElementById("worker-code");
  if (!code) return new Worker(new URL("worker.js", location.href), { type: "module" });
  return new Worker(URL.createObjectURL(new Blob([code.textContent ?? ""], { type: "text/javascript" })));
}

/** The address of each file, or its bytes. @param {Record<string, Listed>} listed @param {(name: string, bytes: number) => void} came */
async function files(listed, came) {
  /** @type {Record<string, string | Uint8Array>} */
  const contents = {};
  for (const [name, { bytes, address }] of Object.entries(listed)) {
    if (address) contents[name] = new URL(address, location.href).href;
    else {
      const holder = element(`file:${name}`);
      contents[name] = decoded(holder.textContent ?? "");
      holder.remove(); // the text need not be kept
      came(name, bytes);
      await new Promise((done) => setTimeout(done)); // so that the progress is painted
    }
  }
  return contents;
}

/** Bytes from base64. @param {string} text */
function decoded(text) {
  const letters = atob(text.trim());
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  return bytes;
}

/** @param {string} id */
function element(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`The page was built without ${id}. Build it again: python3 tasks.py web.`);
  return found;
}
