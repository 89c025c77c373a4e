// @ts-check
/**
 * Random numbers as torch draws them on the CPU: the same seed gives the same picture.
 *
 * They are bit-equal to torch on an x86 processor with AVX2. Elsewhere torch itself gives other
 * last bits, by at most 2e-6.
 *
 * The polynomials of logarithm, sine and cosine are those of Cephes in single precision, by
 * Stephen L. Moshier, in the order of avx_mathfun by Giovanni Garberoglio and sse_mathfun by
 * Julien Pommier. This is an altered version of them: it computes one number at a time, and each
 * multiplication with an addition is rounded once. Their licence, zlib, is in NOTICES.md.
 *
 * @typedef {{normal: (count: number) => Float32Array}} Generator
 */

const round = Math.fround;
const TWO_PI = round(2 * Math.PI);

/** A generator in its first state: `torch.Generator().manual_seed(seed)`. @param {number | bigint} seed @returns {Generator} */
export function generator(seed) {
  const next = mersenneTwister(seed);
  /** @type {number | null} */
  let left = null; // the second number of a pair, which the next call begins with

  /** The next numbers of the standard normal distribution: `torch.randn(count)`. @param {number} count */
  function normal(count) {
    const numbers = new Float32Array(count);
    if (count >= 16) return fill(numbers, next);
    for (let i = 0; i < count; i++) {
      if (left !== null) [numbers[i], left] = [left, null];
      else [numbers[i], left] = pair(next);
    }
    return numbers;
  }
  return { normal };
}

/** Numbers of 32 random bits: MT19937 of Matsumoto and Nishimura 1998. @param {number | bigint} seed */
function mersenneTwister(seed) {
  const state = new Uint32Array(624);
  let at = 624;
  state[0] = Number(BigInt.asUintN(32, BigInt(seed))); // torch keeps the low 32 bits
  for (let i = 1; i < 624; i++) state[i] = Math.imul(state[i - 1] ^ (state[i - 1] >>> 30), 1812433253) + i;

  function twist() {
    for (let i = 0; i < 624; i++) {
      const both = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
      state[i] = state[(i + 397) % 624] ^ (both >>> 1) ^ (both & 1 ? 0x9908b0df : 0);
    }
    at = 0;
  }

  return () => {
    if (at === 624) twist();
    let bits = state[at++];
    bits ^= bits >>> 11;
    bits ^= (bits << 7) & 0x9d2c5680;
    bits ^= (bits << 15) & 0xefc60000;
    return (bits ^ (bits >>> 18)) >>> 0;
  };
}

/** Two normal numbers by Box and Muller, in double precision: how torch draws fewer than 16. @param {() => number} next */
function pair(next) {
  const uniform = () => {
    const [high, low] = [next(), next()];
    return ((high & 0x1fffff) * 2 ** 32 + low) / 2 ** 53;
  };
  const [turn, size] = [uniform(), uniform()];
  const radius = Math.sqrt(-2 * Math.log1p(-size));
  return [radius * Math.cos(2 * Math.PI * turn), radius * Math.sin(2 * Math.PI * turn)];
}

/** Fill with 16 or more numbers, 16 at a time; the last 16 are drawn anew where they overlap. @param {Float32Array} numbers @param {() => number} next */
function fill(numbers, next) {
  const count = numbers.length;
  const uniform = () => (next() & 0xffffff) / 2 ** 24;
  for (let i = 0; i < count; i++) numbers[i] = uniform();
  for (let first = 0; first + 16 <= count; first += 16) boxMuller(numbers, first);
  if (count % 16) {
    for (let i = count - 16; i < count; i++) numbers[i] = uniform();
    boxMuller(numbers, count - 16);
  }
  return numbers;
}

/** Turn 16 uniform numbers into normal ones, in single precision. @param {Float32Array} numbers @param {number} first */
function boxMuller(numbers, first) {
  for (let i = first; i < first + 8; i++) {
    const radius = round(Math.sqrt(round(-2 * logarithm(round(1 - numbers[i])))));
    const [sine, cosine] = sineAndCosine(round(TWO_PI * numbers[i + 8]));
    numbers[i] = round(radius * cosine);
    numbers[i + 8] = round(radius * sine);
  }
}

/** a * b + c of single-precision numbers, rounded once: a double holds their product exactly. @param {number} a @param {number} b @param {number} c */
const fused = (a, b, c) => round(a * b + c);

/** A polynomial by Horner's rule, the highest power first. @param {number} x @param {number[]} coefficients */
const polynomial = (x, coefficients) => coefficients.reduce((sum, coefficient) => fused(sum, x, coefficient));

/** @param {number[]} list */
const singles = (list) => list.map(round);

const LOGARITHM = singles([7.0376836292e-2, -1.151461031e-1, 1.167699874e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1]);
const SINE = singles([-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1]);
const COSINE = singles([2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2]);
const QUARTER_PI = singles([-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8]); // minus pi / 4, in three parts
const LN2 = singles([0.693359375, -2.12194440e-4]); // in two parts
const SQRT_HALF = round(Math.SQRT1_2);
const LEAST = round(2 ** -126);

const word = new Int32Array(1);
const single = new Float32Array(word.buffer);

/** @param {number} x */
function logarithm(x) {
  single[0] = Math.max(x, LEAST);
  let exponent = (word[0] >>> 23) - 126;
  word[0] = (word[0] & 0x807fffff) | 0x3f000000; // its fraction, from 0.5 to 1
  x = round(single[0] - 1);
  if (single[0] < SQRT_HALF) {
    exponent -= 1;
    x = round(x + single[0]);
  }
  const square = round(x * x);
  const tail = fused(round(x * polynomial(x, LOGARITHM)), square, round(exponent * LN2[1]));
  return fused(exponent, LN2[0], round(x + round(tail - round(square * 0.5))));
}

/** @param {number} x not below 0 */
function sineAndCosine(x) {
  const octant = (Math.trunc(round(x * round(4 / Math.PI))) + 1) & ~1;
  for (const part of QUARTER_PI) x = fused(octant, part, x);
  const square = round(x * x);
  const cosine = round(fused(round(square * polynomial(square, COSINE)), square, -round(square * 0.5)) + 1);
  const sine = fused(round(square * polynomial(square, SINE)), x, x);
  const [flipSine, flipCosine] = [octant & 4 ? -1 : 1, (octant - 2) & 4 ? 1 : -1];
  return octant & 2 ? [flipSine * cosine, flipCosine * sine] : [flipSine * sine, flipCosine * cosine];
}
