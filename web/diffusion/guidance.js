// @ts-check
/** Guidance: how the predictions of both branches become the one that the scheduler takes. */

const round = Math.fround;

/**
 * uncond + scale * (cond - uncond): classifier-free guidance (Ho & Salimans 2022), then rescaled
 * (Lin et al. 2023, section 3.4). Without an unconditional prediction, the conditional one alone.
 *
 * @param {Float32Array | null} uncond
 * @param {Float32Array} cond
 * @param {number} scale
 * @param {number} [rescale] from 0 to 1
 */
export function guide(uncond, cond, scale, rescale = 0) {
  if (uncond === null) return cond;
  const factor = round(scale);
  const guided = cond.map((value, i) => uncond[i] + round(factor * round(value - uncond[i])));
  if (!(rescale > 0)) return guided;
  const ratio = round(deviation(cond) / deviation(guided));
  const [share, rest] = [round(rescale), round(1 - rescale)];
  return guided.map((value) => round(share * round(value * ratio)) + round(rest * value));
}

/** Whether a guidance scale asks for the unconditional prediction at all. @param {number} scale */
export const isGuided = (scale) => scale > 1;

/** The standard deviation of a sample. @param {Float32Array} values */
function deviation(values) {
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  const squares = values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  return round(Math.sqrt(squares / (values.length - 1)));
}
