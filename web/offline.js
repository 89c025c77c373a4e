// @ts-check
/**
 * The page's service worker: it keeps the built page for use without a network, and gives it the
 * headers by which browsers let it use several threads, where the host does not.
 *
 * The build writes `BUILT` before this code: the build's own name, and the files of the page.
 */

/** @type {{name: string, files: string[]}} */
const built = /** @type {any} */ (self).BUILT;
const worker = /** @type {any} */ (self);
const HEADERS = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp", "Cross-Origin-Resource-Policy": "same-origin" };
const OWN = "diffusion-"; // caches of this page; there may be others on its host

worker.addEventListener("install", (/** @type {any} */ event) => event.waitUntil(keep()));
worker.addEventListener("activate", (/** @type {any} */ event) => event.waitUntil(take()));
worker.addEventListener("fetch", (/** @type {any} */ event) => {
  const { request } = event;
  if (request.method === "GET" && request.url.startsWith(worker.registration.scope)) event.respondWith(answer(request));
});

/** Keep all files of the page, then take the place of an older build. */
async function keep() {
  await (await caches.open(OWN + built.name)).addAll(built.files);
  await worker.skipWaiting();
}

/** Forget what older builds kept, and answer for pages that are open. */
async function take() {
  for (const name of await caches.keys()) if (name.startsWith(OWN) && name !== OWN + built.name) await caches.delete(name);
  await worker.clients.claim();
}

/** A file as it was kept, else as the host has it. @param {Request} request */
async function answer(request) {
  const kept = await (await caches.open(OWN + built.name)).match(request, { ignoreSearch: true });
  const found = kept ?? (await fetch(request));
  const headers = new Headers(found.headers);
  for (const [name, value] of Object.entries(HEADERS)) headers.set(name, value);
  return new Response(found.body, { status: found.status, statusText: found.statusText, headers });
}
