// @ts-check
/**
 * The model's four parts, as onnxruntime computes them: text encoder, UNet, decoder and encoder.
 *
 * @typedef {{layers: string[], shapes: Record<string, number[]>, graphs: Record<string, {weights: string, sha256: string}>,
 *            preview: {slope: number[][], bias: number[]}}} Manifest manifest.json
 * @typedef {{layer: string, shape: number[], values: Float32Array}} LayerMap attention after its softmax, (row, head, pixel, token)
 * @typedef {{eps: Float32Array[], maps: LayerMap[]}} Prediction of each row; and of each layer, in the order they run
 * @typedef {(name: string) => Promise<Uint8Array>} ReadFile a graph, "unet.onnx", or weights, "unet/diffusion_pytorch_model.safetensors"
 */

const ERRORS = 3; // what onnxruntime tells of: no warnings of shapes that stay on the processor

/**
 * Open the model. `ort` is the module onnxruntime-web or one of the same interface. The encoder is
 * opened when it is first asked: most runs do not begin from a picture.
 *
 * @param {any} ort
 * @param {Manifest} manifest
 * @param {ReadFile} read
 * @param {string[]} [executionProviders]
 * @param {string[]} [parts] that are opened at once
 */
export async function openModel(ort, manifest, read, executionProviders = ["wasm"], parts = ["text", "unet", "decoder"]) {
  const open = async (/** @type {string} */ part) => {
    const path = manifest.graphs[part].weights;
    const [graph, data] = await Promise.all([read(`${part}.onnx`), read(path)]);
    return ort.InferenceSession.create(graph, { executionProviders, externalData: [{ path, data }], logSeverityLevel: ERRORS });
  };
  const model = new Model(ort, manifest, open);
  for (const part of parts) await model.session(part);
  return model;
}

/** The model, opened. Latents are of one picture, (channel, y, x). */
export class Model {
  /** @param {any} ort @param {Manifest} manifest @param {(part: string) => Promise<any>} open */
  constructor(ort, manifest, open) {
    this.ort = ort;
    this.open = open;
    /** @type {Record<string, Promise<any>>} */
    this.sessions = {};
    this.last = Promise.resolve();
    /** @type {Model | null} */
    this.other = null;
    this.layers = manifest.layers;
    this.shapes = manifest.shapes;
    this.preview = manifest.preview;
    this.latentSize = this.shapes.latents.reduce((product, side) => product * side, 1);
  }

  /** A part of the model, opened once; one that did not open is tried again. @param {string} part */
  session(part) {
    return (this.sessions[part] ??= this.open(part).catch((error) => {
      delete this.sessions[part];
      throw error;
    }));
  }

  /** Compute a part, after all that was asked before. @param {string} part @param {Record<string, any>} inputs @returns {Promise<any>} */
  run(part, inputs) {
    const outputs = this.last.then(async () => (await this.session(part)).run(inputs));
    this.last = outputs.catch(() => {}); // whoever asked hears of it
    return outputs;
  }

  /** Let the same UNet predict where it is computed elsewhere; null: here again. @param {Model | null} other */
  delegate(other) {
    this.other = other;
  }

  /** What the UNet is told of prompts. @param {number[][]} rows the tokens of each @returns {Promise<Float32Array[]>} */
  async encodeText(rows) {
    const ids = new this.ort.Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);
    const { text } = await this.run("text", { ids });
    return rowsOf(text);
  }

  /**
   * The noise that the UNet sees in latents, once for each text.
   *
   * @param {Float32Array} latents
   * @param {number} timestep
   * @param {Float32Array[]} texts
   * @param {Float32Array} [valueScale] how much counts what each head reads from each token, (layer, row, head, token); else 1
   * @returns {Promise<Prediction>}
   */
  async predict(latents, timestep, texts, valueScale) {
    if (this.other) return this.other.predict(latents, timestep, texts, valueScale);
    const rows = texts.length;
    const [layers, ...perRow] = this.shapes.value_scale;
    const outputs = await this.run("unet", {
      latents: this.stacked(Array(rows).fill(latents), this.shapes.latents),
      timestep: new this.ort.Tensor("int64", BigInt64Array.of(BigInt(timestep)), [1]),
      text: this.stacked(texts, this.shapes.text),
      value_scale: this.tensor(valueScale ?? new Float32Array(layers * rows * perRow[0] * perRow[1]).fill(1), [layers, rows, ...perRow]),
    });
    const maps = this.layers.map((layer) => ({ layer, shape: outputs[layer].dims, values: outputs[layer].data }));
    return { eps: rowsOf(outputs.eps), maps };
  }

  /** The picture of latents, RGBA. @param {Float32Array} latents @returns {Promise<{width: number, height: number, data: Uint8ClampedArray}>} */
  async decode(latents) {
    const { pixels } = await this.run("decoder", { latents: this.stacked([latents], this.shapes.latents) });
    const [, , height, width] = pixels.dims;
    const data = new Uint8ClampedArray(4 * height * width).fill(255);
    for (let channel = 0; channel < 3; channel++) {
      for (let i = 0; i < height * width; i++) data[4 * i + channel] = level(pixels.data[channel * height * width + i]);
    }
    return { width, height, data };
  }

  /** Mean and deviation of the latents of an RGBA picture, of the size that the model draws. @param {Uint8ClampedArray} picture */
  async encode(picture) {
    const [colours, height, width] = this.shapes.pixels;
    const places = height * width;
    if (picture?.length !== 4 * places) throw new RangeError(`The picture has ${picture?.length ?? "no"} numbers. Give ${width} x ${height} pixels, RGBA.`);
    const pixels = new Float32Array(colours * places);
    for (let channel = 0; channel < colours; channel++) {
      for (let i = 0; i < places; i++) pixels[channel * places + i] = 2 * Math.fround(picture[4 * i + channel] / 255) - 1;
    }
    const { mean, deviation } = await this.run("encoder", { pixels: this.stacked([pixels], this.shapes.pixels) });
    return { mean: rowsOf(mean)[0], deviation: rowsOf(deviation)[0] };
  }

  /** @param {Float32Array[]} rows @param {number[]} shape of each */
  stacked(rows, shape) {
    const size = rows[0].length;
    const values = new Float32Array(rows.length * size);
    rows.forEach((row, i) => values.set(row, i * size));
    return this.tensor(values, [rows.length, ...shape]);
  }

  /** @param {Float32Array} values @param {number[]} shape */
  tensor(values, shape) {
    return new this.ort.Tensor("float32", values, shape);
  }
}

/** A tensor's rows, each with numbers of its own. @param {{data: Float32Array, dims: readonly number[]}} tensor */
function rowsOf({ data, dims }) {
  const size = data.length / dims[0];
  return Array.from({ length: dims[0] }, (_, row) => data.slice(row * size, (row + 1) * size));
}

/** The level, 0 to 255, of a pixel's value from -1 to 1; a half is rounded to the even level when it is stored. @param {number} value */
const level = (value) => Math.fround(Math.fround(value * 0.5 + 0.5) * 255);
