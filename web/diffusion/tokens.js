// @ts-check
/**
 * A prompt as the model reads it: CLIP's byte-level byte pairs, from the model's tokenizer.json.
 *
 * @typedef {{word: string, tokens: number[]}} Word a word as it was typed, and the positions of its tokens
 * @typedef {{ids: number[], tokens: string[], words: Word[], end: number}} Prompt `tokens` are the texts of all 77; `end` is the position of the one that ends the prompt
 * @typedef {{model: {vocab: Record<string, number>, merges: (string | string[])[]}}} TokenizerFile
 */

const LENGTH = 77; // tokens of every prompt: CLIP's
const LAST = "</w>"; // at the end of a word's last piece
// Apart from spaces and punctuation, all is a word or a part of one: letters with their marks, digits, symbols.
const WORD = /[\p{L}\p{M}\p{N}\p{S}\p{C}]+(?:['\u2019][\p{L}\p{M}\p{N}\p{S}\p{C}]+)*/gu;
const PIECE = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/gu;

/** A prompt that the model cannot be asked: words it never saw, or too many. */
export class PromptError extends Error {
  /** @param {string} message @param {string[]} [words] those that the model never saw */
  constructor(message, words = []) {
    super(message);
    this.name = "PromptError";
    this.words = words;
  }
}

/** Make the function that reads prompts. @param {TokenizerFile} file tokenizer.json @param {string[]} known the words of words.json @returns {(text: string) => Prompt} */
export function tokenizer({ model }, known) {
  const ranks = new Map(model.merges.map((pair, rank) => [typeof pair === "string" ? pair : pair.join(" "), rank]));
  const letters = byteLetters();
  const vocabulary = new Map(Object.entries(model.vocab));
  const id = (/** @type {string} */ piece) => /** @type {number} */ (vocabulary.get(piece));
  const [START, END] = ["<|startoftext|>", "<|endoftext|>"];

  return (text) => {
    const small = text.normalize("NFC").toLowerCase();
    const words = [...small.matchAll(WORD)].map((match) => ({ word: match[0], from: match.index, to: match.index + match[0].length, tokens: /** @type {number[]} */ ([]) }));
    refuse(words.map(({ word }) => word), known);
    const pieces = [START];
    for (const match of small.matchAll(PIECE)) {
      const bytes = bytesOf(match[0], match.index);
      let at = 0;
      for (const piece of merged(bytes.map(({ byte }) => letters[byte]), ranks)) {
        const [from, last] = [bytes[at], bytes[(at += piece.replace(LAST, "").length) - 1]];
        for (const word of words) if (from.place < word.to && last.place >= word.from) word.tokens.push(pieces.length);
        pieces.push(piece);
      }
    }
    const end = pieces.length;
    if (end >= LENGTH) throw new PromptError(`The prompt has ${end + 1} tokens. Write at most ${LENGTH}.`);
    const every = [...pieces, ...Array(LENGTH - end).fill(END)]; // the first of them ends the prompt
    return { ids: every.map(id), tokens: every.map((piece) => textOf(piece, letters)), words: words.map(({ word, tokens }) => ({ word, tokens })), end };
  };
}

/** The bytes of a text in UTF-8, each with the place of its character. @param {string} text @param {number} from */
function bytesOf(text, from) {
  return [...text.matchAll(/./gsu)].flatMap(({ 0: character, index }) => [...new TextEncoder().encode(character)].map((byte) => ({ byte, place: from + index })));
}

/** The text of a piece; bytes that are a part of a character alone are shown as \xe2. @param {string} piece @param {string[]} letters */
function textOf(piece, letters) {
  const bytes = Uint8Array.from(piece.replace(LAST, ""), (letter) => letters.indexOf(letter));
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    return Array.from(bytes, (byte) => (byte < 128 ? String.fromCharCode(byte) : `\\x${byte.toString(16)}`)).join("");
  }
}

/** Throw for words that the model never saw, each named once. @param {string[]} words @param {string[]} known */
function refuse(words, known) {
  const allowed = new Set(known);
  const strange = [...new Set(words.filter((word) => !allowed.has(word)))];
  if (!strange.length) return;
  const named = strange.map((word) => `'${word}'`).join(", ");
  throw new PromptError(`The model never saw ${named} in its training. Its words: ${known.join(" ")}.`, strange);
}

/** The letters by which a byte-level vocabulary shows the 256 bytes (the alphabet of GPT-2). */
function byteLetters() {
  const shown = (/** @type {number} */ byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  let hidden = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(shown(byte) ? byte : hidden++));
}

/** A word's pieces: the pair with the lowest rank is merged until none is left. @param {string[]} letters @param {Map<string, number>} ranks */
function merged(letters, ranks) {
  let pieces = [...letters.slice(0, -1), letters.at(-1) + LAST];
  for (;;) {
    const pairs = pieces.slice(1).map((piece, i) => `${pieces[i]} ${piece}`);
    const best = pairs.reduce((low, pair) => ((ranks.get(pair) ?? Infinity) < (ranks.get(low) ?? Infinity) ? pair : low), "");
    if (!best) return pieces;
    const next = [];
    for (let i = 0; i < pieces.length; i++) next.push(pairs[i] === best ? pieces[i] + pieces[++i] : pieces[i]);
    pieces = next;
  }
}
