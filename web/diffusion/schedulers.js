// @ts-check
/**
 * Schedulers: from the latents of one noise level to those of the next, in the single precision
 * and the order of operations of diffusers.
 *
 * `makeScheduler(name, config, steps)` makes one in its first state. Per call: `input` gives what
 * the model sees, `step` what follows its prediction.
 *
 * @typedef {{num_train_timesteps: number, beta_start: number, beta_end: number, beta_schedule: string, prediction_type: string,
 *            timestep_spacing: string, steps_offset: number, set_alpha_to_one: boolean, clip_sample?: boolean}} Config scheduler_config.json
 * @typedef {(latents: Float32Array, prediction: Float32Array, index: number, draw: () => Float32Array) => Float32Array} Step
 *          `draw` gives noise, where a scheduler asks for it
 * @typedef {{timesteps: number[], sigmas: number[], alphaBars: number[], initSigma: number, exploding: boolean, step: Step}} Kind
 *          `exploding`: the latents grow with sigma and do not keep variance one
 * @typedef {Kind & {input: (latents: Float32Array, index: number) => Float32Array,
 *                   begin: (clean: Float32Array, noise: Float32Array, index: number) => Float32Array}} Scheduler
 */

const round = Math.fround;
const root = (/** @type {number} */ value) => round(Math.sqrt(value));
const square = (/** @type {number} */ value) => round(value * value);

/** @type {Record<string, (config: Config, bars: Float32Array, steps: number) => Kind>} */
const KINDS = { DDIM: ddim, Euler: euler, EulerAncestral: eulerAncestral, "DPM++2M": dpm2m, PNDM: pndm };

/** The names of the schedulers, as an experiment has them. */
export const SCHEDULERS = Object.keys(KINDS);

/** Make a scheduler in its first state. @param {string} name @param {Config} config @param {number} steps @returns {Scheduler} */
export function makeScheduler(name, config, steps) {
  if (!Object.hasOwn(KINDS, name)) throw new RangeError(`${name} is not a scheduler here. Choose from: ${SCHEDULERS.join(", ")}.`);
  const supported = { beta_schedule: "scaled_linear", prediction_type: "epsilon", timestep_spacing: "leading", clip_sample: false, set_alpha_to_one: false };
  for (const [key, value] of Object.entries(supported)) {
    if (/** @type {Record<string, unknown>} */ (config)[key] !== value) throw new RangeError(`The scheduler's ${key} must be ${value} here.`);
  }
  if (!Number.isInteger(steps) || steps < 1) throw new RangeError(`${steps} steps cannot be run. Take a whole number from 1 on.`);
  const kind = KINDS[name](config, alphaBars(config), steps);
  const { sigmas, exploding } = kind;
  return {
    ...kind,
    input: (latents, index) => (exploding ? scaled(latents, 1, root(square(sigmas[index]) + 1)) : latents),
    begin: (clean, noise, index) => (exploding ? clean.map((value, i) => value + round(noise[i] * sigmas[index])) : mixed(clean, noise, kind.alphaBars[index])),
  };
}

/** The share of the signal's variance at each timestep of training. @param {Config} config */
export function alphaBars({ num_train_timesteps: count, beta_start, beta_end }) {
  const [low, high] = [round(Math.sqrt(beta_start)), round(Math.sqrt(beta_end))];
  const step = round(round(high - low) / (count - 1));
  const bars = new Float32Array(count);
  let product = 1; // torch multiplies in double precision
  for (let i = 0; i < count; i++) {
    const beta = square(round(i < count / 2 ? low + step * i : high - step * (count - 1 - i))); // torch.linspace, rounded once
    bars[i] = product *= round(1 - beta);
  }
  return bars;
}

/** The predicted clean latents x0. @param {Float32Array} input what the model saw @param {Float32Array} eps @param {number} alphaBar */
export function denoised(input, eps, alphaBar) {
  const [noise, signal] = [root(round(1 - alphaBar)), root(alphaBar)];
  return input.map((value, i) => round(value - round(noise * eps[i])) / signal);
}

/** Latents with noise of a level in them: the forward process. @param {Float32Array} clean @param {Float32Array} noise @param {number} alphaBar */
export function mixed(clean, noise, alphaBar) {
  return sum([root(alphaBar), clean], [root(round(1 - alphaBar)), noise]);
}

/** A sum of multiples, each product and each sum rounded. @param {[number, Float32Array]} first @param {[number, Float32Array][]} rest */
function sum([factor, values], ...rest) {
  const total = values.map((value) => factor * value);
  for (const [other, more] of rest) total.forEach((value, i) => { total[i] = value + round(other * more[i]); });
  return total;
}

/** @param {Float32Array} values @param {number} factor @param {number} divisor */
const scaled = (values, factor, divisor) => values.map((value) => round(factor * value) / divisor);

/** Timesteps at equal distances, from the noisiest on: the spacing "leading". @param {Config} config @param {number} calls @param {number} [parts] */
function leading({ num_train_timesteps, steps_offset }, calls, parts = calls) {
  const stride = Math.floor(num_train_timesteps / parts);
  const first = (parts - 1) * stride + steps_offset;
  if (stride < 1 || first >= num_train_timesteps) throw new RangeError(`There are no timesteps for ${calls} steps. Take fewer.`);
  return Array.from({ length: calls }, (_, i) => (parts - 1 - i) * stride + steps_offset);
}

/** Noise levels at timesteps. @param {Float32Array} bars @param {number[]} timesteps */
function levels(bars, timesteps) {
  const alphas = timesteps.map((t) => bars[t]);
  return { timesteps, alphaBars: alphas, sigmas: alphas.map((bar) => root(round(round(1 - bar) / bar))) };
}

/** Of a scheduler that steps over sigmas: the last step ends at 0. @param {Float32Array} bars @param {number[]} timesteps */
function sigmaLevels(bars, timesteps) {
  const { sigmas } = levels(bars, timesteps);
  return { timesteps, sigmas, alphaBars: sigmas.map((sigma) => 1 / (1 + sigma ** 2)), ends: [...sigmas, 0] };
}

/** Song et al. 2021, with eta 0. @type {(config: Config, bars: Float32Array, steps: number) => Kind} */
function ddim(config, bars, steps) {
  const stride = Math.floor(config.num_train_timesteps / steps);
  const schedule = levels(bars, leading(config, steps));
  /** @type {Step} */
  const step = (latents, eps, index) => {
    const t = schedule.timesteps[index];
    const next = bars[Math.max(t - stride, 0)];
    return sum([root(next), denoised(latents, eps, bars[t])], [root(round(1 - next)), eps]);
  };
  return { ...schedule, initSigma: 1, exploding: false, step };
}

/** Karras et al. 2022, algorithm 2 without churn. @type {(config: Config, bars: Float32Array, steps: number) => Kind} */
function euler(config, bars, steps) {
  const { ends, ...schedule } = sigmaLevels(bars, leading(config, steps));
  /** @type {Step} */
  const step = (latents, eps, index) => {
    const [sigma, next] = [ends[index], ends[index + 1]];
    return sum([1, latents], [round(next - sigma), derivative(latents, eps, sigma)]);
  };
  return { ...schedule, initSigma: initSigma(schedule.sigmas), exploding: true, step };
}

/** Euler's method to a lower level of noise, then fresh noise up to the next. @type {(config: Config, bars: Float32Array, steps: number) => Kind} */
function eulerAncestral(config, bars, steps) {
  const { ends, ...schedule } = sigmaLevels(bars, leading(config, steps));
  /** @type {Step} */
  const step = (latents, eps, index, draw) => {
    const [sigma, next] = [ends[index], ends[index + 1]];
    const up = root(round(round(square(next) * round(square(sigma) - square(next))) / square(sigma)));
    const down = root(round(square(next) - square(up)));
    return sum([1, latents], [round(down - sigma), derivative(latents, eps, sigma)], [up, draw()]);
  };
  return { ...schedule, initSigma: initSigma(schedule.sigmas), exploding: true, step };
}

/** The sigma of the first noise where timesteps lead: that of data of variance one, with noise. @param {number[]} sigmas */
const initSigma = (sigmas) => root(round(square(sigmas[0]) + 1));

/** How the latents change with sigma, by way of x0, as diffusers computes it. @param {Float32Array} latents @param {Float32Array} eps @param {number} sigma */
function derivative(latents, eps, sigma) {
  return latents.map((value, i) => round(value - round(value - round(sigma * eps[i]))) / sigma);
}

/** Lu et al. 2022, DPM-Solver++ (2M, midpoint). @type {(config: Config, bars: Float32Array, steps: number) => Kind} */
function dpm2m(config, bars, steps) {
  const { ends, ...schedule } = sigmaLevels(bars, leading(config, steps, steps + 1));
  const alpha = (/** @type {number} */ sigma) => round(1 / root(round(square(sigma) + 1)));
  const lambda = (/** @type {number} */ sigma) => round(round(Math.log(alpha(sigma))) - round(Math.log(round(sigma * alpha(sigma)))));
  /** @type {Float32Array | null} */
  let last = null; // the x0 of the call before
  /** @type {Step} */
  const step = (latents, eps, index) => {
    const [sigma, next] = [ends[index], ends[index + 1]];
    const noise = round(sigma * alpha(sigma));
    const clean = latents.map((value, i) => round(value - round(noise * eps[i])) / alpha(sigma));
    const h = round(lambda(next) - lambda(sigma));
    const gain = round(alpha(next) * round(round(Math.exp(-h)) - 1));
    const first = sum([round(round(next * alpha(next)) / noise), latents], [-gain, clean]);
    const before = last;
    last = clean;
    if (before === null || index === steps - 1) return first;
    const ratio = round(round(lambda(sigma) - lambda(ends[index - 1])) / h);
    const change = clean.map((value, i) => round(1 / ratio) * round(value - before[i]));
    return sum([1, first], [-round(0.5 * gain), change]);
  };
  return { ...schedule, initSigma: 1, exploding: false, step };
}

/** Liu et al. 2022, pseudo linear multistep without the Runge-Kutta steps. @type {(config: Config, bars: Float32Array, steps: number) => Kind} */
function pndm(config, bars, steps) {
  const stride = Math.floor(config.num_train_timesteps / steps);
  const rising = leading(config, steps).reverse();
  const timesteps = [...rising.slice(0, -1), ...rising.slice(-2, -1), ...rising.slice(-1)].reverse();
  /** @type {Float32Array[]} */
  const history = []; // predictions, the newest last: at most four
  let calls = 0;
  /** @type {Float32Array} */
  let first; // the latents that the first call began with
  /** @type {Step} */
  const step = (latents, eps, index) => {
    const t = timesteps[index];
    const call = calls++;
    if (call === 1) return transfer(first, halved(sum([1, eps], [1, history[0]])), bars[t + stride], bars[t]); // the first step once more
    if (call === 0) first = latents;
    history.push(eps);
    if (history.length > 4) history.shift();
    return transfer(latents, multistep(history), bars[t], bars[Math.max(t - stride, 0)]);
  };
  return { ...levels(bars, timesteps), initSigma: 1, exploding: false, step };
}

/** @param {Float32Array} values */
const halved = (values) => scaled(values, 1, 2);

/** Adams and Bashforth's prediction from up to four. @param {Float32Array[]} history */
function multistep(history) {
  const [a, b, c, d] = [...history].reverse();
  if (history.length === 1) return a;
  if (history.length === 2) return halved(sum([3, a], [-1, b]));
  if (history.length === 3) return scaled(sum([23, a], [-16, b], [5, c]), 1, 12);
  return scaled(sum([55, a], [-59, b], [37, c], [-9, d]), round(1 / 24), 1);
}

/** Formula (9) of Liu et al. 2022. @param {Float32Array} latents @param {Float32Array} eps @param {number} bar @param {number} next */
function transfer(latents, eps, bar, next) {
  const [noise, nextNoise] = [round(1 - bar), round(1 - next)];
  const divisor = round(round(bar * root(nextNoise)) + root(round(round(bar * noise) * next)));
  return sum([root(round(next / bar)), latents], [-1, scaled(eps, round(next - bar), divisor)]);
}
