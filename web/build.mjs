// @ts-check
// Build the page: node web/build.mjs FOLDER
//
// FOLDER/site is for any static host: index.html, page.js, worker.js, ort.mjs, styles, files by gzip,
// and offline.js, by which it works without a network after the first visit. FOLDER/diffusion.html is all of it in one file, which works from a disk.
import { build } from "esbuild";
import { createHash } from "node:crypto";
import { cp, mkdir, readFile, rm, writeFile } from "node:fs/promises";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";

const WEB = path.dirname(fileURLToPath(import.meta.url));
const ROOT = path.dirname(WEB);
const MODEL = path.join(ROOT, "probe", "emojiworld");
const ORT = path.join(WEB, "node_modules", "onnxruntime-web", "dist");
const ORT_MODULE = path.join(ORT, "ort.wasm.bundle.min.mjs");
const SAMPLE = path.join(ROOT, "probe", "sample.zip"); // in the folder alone: one file has no room for it
const LARGEST = 36 * 2 ** 20; // bytes of the one file
const MINIFY = { minifySyntax: false, minifyWhitespace: true, minifyIdentifiers: false };

const out = path.resolve(process.argv[2] ?? path.join(ROOT, "build", "web"));
const manifest = JSON.parse(await readFile(path.join(WEB, "model", "manifest.json"), "utf8"));
const graphs = /** @type {[string, {weights: string}][]} */ (Object.entries(manifest.graphs));
/** What the worker reads, by name. @type {Record<string, string>} */
const FILES = {
  "ort.wasm": path.join(ORT, "ort-wasm-simd-threaded.wasm"),
  "manifest.json": path.join(WEB, "model", "manifest.json"),
  "tokenizer.json": path.join(MODEL, "tokenizer", "tokenizer.json"),
  "words.json": path.join(MODEL, "words.json"),
  "scheduler_config.json": path.join(MODEL, "scheduler", "scheduler_config.json"),
  ...Object.fromEntries(graphs.map(([part]) => [`${part}.onnx`, path.join(WEB, "model", `${part}.onnx`)])),
  ...Object.fromEntries(graphs.map(([, { weights }]) => [weights, path.join(MODEL, weights)])),
};

/** What opens recordings is a file of its own, which the page loads when it is wanted. @type {import("esbuild").Plugin} */
const later = { name: "later", setup: ({ onResolve }) => onResolve({ filter: /^\.\/stored\.js$/ }, ({ path: name, kind }) => (kind === "dynamic-import" ? { path: name, external: true } : null)) };
const UNUSED = ["numcodecs/*"]; // codecs of zarrita that no recording has: opening.js refuses them before

/** One module or script of several. @param {import("esbuild").BuildOptions} options */
async function bundled(options) {
  const { outputFiles } = await build({ bundle: true, write: false, external: UNUSED, target: "es2022", charset: "utf8", legalComments: "none", ...MINIFY, ...options });
  return outputFiles?.[0].text ?? "";
}

const text = (/** @type {string} */ ...names) => readFile(path.join(...names), "utf8");
const digest = (/** @type {string} */ code) => `'sha256-${createHash("sha256").update(code).digest("base64")}'`;
const policy = (/** @type {string} */ scripts, /** @type {string} */ styles, /** @type {string} */ connect) =>
  `default-src 'none'; script-src ${scripts} 'wasm-unsafe-eval'; worker-src 'self' blob:; connect-src ${connect}; style-src ${styles}; img-src blob: data:; base-uri 'none'; form-action 'none'`;

const packed = new Map();
for (const [name, place] of Object.entries(FILES)) packed.set(name, gzipSync(await readFile(place), { level: 9 }));
const [html, pageStyle, playerStyle] = [await text(WEB, "index.html"), `${await text(WEB, "page.css")}\n${await text(WEB, "lesson", "lesson.css")}`, await text(ROOT, "probe", "figures", "player.css")];

const template = JSON.stringify({ ...JSON.parse(await text(WEB, "model", "recording.json")), software: `onnxruntime-web ${JSON.parse(await text(WEB, "package.json")).dependencies["onnxruntime-web"]}` });
const known = JSON.stringify(JSON.parse(await text(MODEL, "words.json")));
for (const product of ["site", "diffusion.html"]) await rm(path.join(out, product), { recursive: true, force: true });
await folder(path.join(out, "site"));
const size = await oneFile(path.join(out, "diffusion.html"));
console.log(`${path.join(out, "site")}: a folder for any static host`);
console.log(`${path.join(out, "diffusion.html")}: ${(size / 1e6).toFixed(1)} MB, works from a disk`);

/** A folder for a static host. @param {string} site */
async function folder(site) {
  await mkdir(path.join(site, "files"), { recursive: true });
  /** @type {Record<string, {bytes: number, address: string}>} */
  const listed = {};
  for (const [name, bytes] of packed) {
    const address = `files/${name.replaceAll("/", "-")}.gz`;
    listed[name] = { bytes: bytes.length, address };
    await writeFile(path.join(site, address), bytes);
  }
  await writeFile(path.join(site, "page.js"), await bundled({ entryPoints: [path.join(WEB, "page.js")], format: "esm", plugins: [later] }));
  await writeFile(path.join(site, "stored.js"), await bundled({ entryPoints: [path.join(WEB, "recordings", "stored.js")], format: "esm" }));
  await writeFile(path.join(site, "worker.js"), await bundled({ entryPoints: [path.join(WEB, "worker.js")], format: "esm" }));
  await cp(ORT_MODULE, path.join(site, "ort.mjs"));
  await cp(path.join(ORT, "ort.webgpu.bundle.min.mjs"), path.join(site, "ort.webgpu.mjs")); // for those who choose it: not kept for use without a network
  await writeFile(path.join(site, "ort.webgpu.wasm.gz"), gzipSync(await readFile(path.join(ORT, "ort-wasm-simd-threaded.asyncify.wasm")), { level: 9 }));
  await cp(SAMPLE, path.join(site, "sample.zarr.zip"));
  await writeFile(path.join(site, "page.css"), pageStyle);
  await writeFile(path.join(site, "player.css"), playerStyle);
  await writeFile(path.join(site, "index.html"), html.replace("POLICY", policy("'self'", "'self'", "'self'")).replace("FILES", () => JSON.stringify(listed)).replace("WORDS", known).replace("RECORDING", () => template));
  const files = ["./", "page.js", "stored.js", "sample.zarr.zip", "worker.js", "ort.mjs", "page.css", "player.css", ...Object.values(listed).map(({ address }) => address)];
  const name = createHash("sha256");
  for (const file of files) name.update(await readFile(path.join(site, file === "./" ? "index.html" : file)));
  const built = JSON.stringify({ name: name.digest("hex").slice(0, 16), files });
  await writeFile(path.join(site, "offline.js"), `self.BUILT = ${built};\n${await bundled({ entryPoints: [path.join(WEB, "offline.js")], format: "iife" })}`);
  await cp(path.join(WEB, "licences"), path.join(site, "licences"), { recursive: true });
  await cp(path.join(WEB, "NOTICES.md"), path.join(site, "NOTICES.md"));
}

/** All in one file. From a disk, browsers start only workers that import nothing. @param {string} file */
async function oneFile(file) {
  const page = await bundled({ entryPoints: [path.join(WEB, "page.js")], format: "esm" });
  const contents = `import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";\nself.ort = ort;\nimport "./worker.js";\n`;
  const worker = await bundled({ stdin: { contents, resolveDir: WEB }, format: "iife", define: { "import.meta.url": "self.location.href" }, external: ["module", "worker_threads", ...UNUSED] });
  const listed = Object.fromEntries([...packed].map(([name, bytes]) => [name, { bytes: bytes.length }]));
  const block = (/** @type {string} */ id, /** @type {string} */ kind, /** @type {string} */ content) => `<script type="${kind}" id="${id}">${content}</script>\n`;
  const closed = (/** @type {string} */ code) => code.replaceAll("</script", "<\\/script").replaceAll("<!--", "<\\!--");
  const [style, code] = [`${playerStyle}\n${pageStyle}`, closed(`${page}`)];
  const licences = [["onnxruntime", "LICENSE"], ["onnxruntime", "ThirdPartyNotices.txt"], ["zarrita", "LICENSE"]];
  const notices = (await Promise.all([text(WEB, "NOTICES.md"), ...licences.map((names) => text(WEB, "licences", ...names))])).join("\n\n");
  const blocks = [...packed].map(([name, bytes]) => block(`file:${name}`, "application/octet-stream", bytes.toString("base64"))).join("");
  const whole = html
    .replace("POLICY", policy(`${digest(code)} blob:`, digest(style), "data:"))
    .replace("FILES", () => JSON.stringify(listed))
    .replace("WORDS", known)
    .replace("RECORDING", () => template)
    .replace('<link rel="stylesheet" href="player.css">\n', () => `<style>${style}</style>\n`)
    .replace('<link rel="stylesheet" href="page.css">\n', "")
    .replace('<script type="module" src="page.js"></script>', () => `${block("notices", "text/plain", closed(notices))}${blocks}${block("worker-code", "text/plain", closed(worker))}<script type="module">${code}</script>`);
  if (whole.length > LARGEST) throw new Error(`The one file has ${whole.length} bytes, more than ${LARGEST}.`);
  await writeFile(file, whole);
  return whole.length;
}
