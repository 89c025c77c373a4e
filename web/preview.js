// @ts-check
/**
 * Latents as small pictures: by the linear map that is fitted to the VAE when the model is exported.
 *
 * @typedef {{slope: number[][], bias: number[]}} Preview (channel, rgb), and (rgb)
 */

const [LESS, EVEN, MORE] = [[33, 102, 172], [247, 247, 247], [179, 88, 6]]; // colours of a signed number

/** Latents (channel, place) as RGBA. @param {Float32Array} latents @param {Preview} preview @param {number} [factor] of the latents */
export function previewed(latents, { slope, bias }, factor = 1) {
  const places = latents.length / slope.length;
  const data = new Uint8ClampedArray(4 * places).fill(255);
  for (let i = 0; i < places; i++) {
    for (let k = 0; k < 3; k++) data[4 * i + k] = 255 * slope.reduce((sum, row, channel) => sum + row[k] * factor * latents[channel * places + i], bias[k]);
  }
  return data;
}

/** The factor that makes noisy latents as colourful as clean ones. @param {Float32Array} noisy @param {Float32Array} clean */
export const asColourful = (noisy, clean) => deviation(clean) / deviation(noisy) || 1;

/** One channel as RGBA, blue below 0 and orange above, as far as `reach`. @param {Float32Array} values @param {number} reach */
export function signed(values, reach) {
  const data = new Uint8ClampedArray(4 * values.length).fill(255);
  values.forEach((value, i) => {
    const share = Math.abs(value) / (reach || 1);
    for (let k = 0; k < 3; k++) data[4 * i + k] = EVEN[k] * (1 - share) + (value < 0 ? LESS : MORE)[k] * share;
  });
  return data;
}

/** The root of the mean square. @param {Float32Array} values */
export const size = (values) => Math.sqrt(values.reduce((sum, value) => sum + value ** 2, 0) / values.length);

/** The standard deviation. @param {Float32Array} values */
export function deviation(values) {
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  return size(values.map((value) => value - mean));
}
