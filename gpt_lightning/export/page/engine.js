"use strict";
// Runs a model of gpt_lightning in a worker. The models are those of model/gpt.py and
// model/lecture.py, with the same names; windows and random numbers are those of generation/, so
// that the same seed gives the same text as the command `generate`.
//
// Legend: T tokens of the window, n new tokens, C channels (n_embd), H heads, D head size (C / H),
// V vocabulary. A matrix (n, C) is a Float32Array, one row after the other.

// --- weights -------------------------------------------------------------------------------------

function float16(bits) {
  const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

// {name: {data, shape}} in fp32. The rows of int8 tensors follow their scales, which are in fp16.
function readWeights(tensors, buffer) {
  const halves = Float32Array.from({ length: 1 << 16 }, (_, bits) => float16(bits));
  const weights = {};
  for (const { name, shape, dtype, offset } of tensors) {
    const size = shape.reduce((a, b) => a * b, 1), data = new Float32Array(size);
    if (dtype === "fp32") {
      data.set(new Float32Array(buffer, offset, size));
    } else if (dtype === "fp16") {
      const bits = new Uint16Array(buffer, offset, size);
      for (let i = 0; i < size; i++) data[i] = halves[bits[i]];
    } else {
      const rows = shape[0], width = size / rows;
      const scales = new Uint16Array(buffer, offset, rows);
      const integers = new Int8Array(buffer, offset + 2 * rows, size);
      for (let i = 0; i < size; i++) data[i] = integers[i] * halves[scales[Math.floor(i / width)]];
    }
    weights[name] = { data, shape };
  }
  return weights;
}

// --- layers --------------------------------------------------------------------------------------

// x (n, K) times the transpose of weight (N, K), plus bias (N): (n, N).
function linear(x, { data, shape: [N, K] }, bias) {
  const n = x.length / K, out = new Float32Array(n * N);
  let t = 0;
  for (; t + 4 <= n; t += 4) { // four rows by two: a number is read once for several products
    const a = t * K, b = a + K, c = b + K, d = c + K;
    for (let j = 0; j < N; j += 2) {
      const next = Math.min(j + 1, N - 1), v = j * K, w = next * K;
      let av = 0, bv = 0, cv = 0, dv = 0, aw = 0, bw = 0, cw = 0, dw = 0;
      for (let k = 0; k < K; k++) {
        const xa = x[a + k], xb = x[b + k], xc = x[c + k], xd = x[d + k];
        const first = data[v + k], second = data[w + k];
        av += xa * first; bv += xb * first; cv += xc * first; dv += xd * first;
        aw += xa * second; bw += xb * second; cw += xc * second; dw += xd * second;
      }
      const row = t * N;
      out[row + j] = av; out[row + N + j] = bv; out[row + 2 * N + j] = cv;
      out[row + 3 * N + j] = dv;
      out[row + next] = aw; out[row + N + next] = bw; out[row + 2 * N + next] = cw;
      out[row + 3 * N + next] = dw;
    }
  }
  for (; t < n; t++) {
    for (let j = 0; j < N; j++) out[t * N + j] = dot(x, t * K, data, j * K, K);
  }
  if (bias) for (let i = 0; i < out.length; i++) out[i] += bias[i % N];
  return out;
}

// Four sums, so that an addition does not wait for the one before it.
function dot(x, a, y, b, length) {
  let sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0, k = 0;
  for (; k + 4 <= length; k += 4) {
    sum0 += x[a + k] * y[b + k];
    sum1 += x[a + k + 1] * y[b + k + 1];
    sum2 += x[a + k + 2] * y[b + k + 2];
    sum3 += x[a + k + 3] * y[b + k + 3];
  }
  for (; k < length; k++) sum0 += x[a + k] * y[b + k];
  return sum0 + sum1 + sum2 + sum3;
}

// LayerNorm of each row of x (n, width); weight and bias (width) are optional.
function norm(x, width, weight, bias) {
  const out = new Float32Array(x.length);
  for (let row = 0; row < x.length; row += width) {
    let mean = 0, variance = 0;
    for (let i = row; i < row + width; i++) mean += x[i] / width;
    for (let i = row; i < row + width; i++) variance += (x[i] - mean) ** 2 / width;
    const factor = 1 / Math.sqrt(variance + 1e-5);
    for (let i = 0; i < width; i++) {
      out[row + i] = (x[row + i] - mean) * factor * (weight ? weight[i] : 1) + (bias ? bias[i] : 0);
    }
  }
  return out;
}

function add(x, y) {
  return x.map((value, i) => value + y[i]);
}

// Queries, keys and values (n, C) from qkv (n, 3 C).
function split(qkv, C) {
  return [0, 1, 2].map(part => {
    const out = new Float32Array(qkv.length / 3);
    for (let i = 0; i < out.length; i += C) {
      out.set(qkv.subarray(3 * i + part * C, 3 * i + (part + 1) * C), i);
    }
    return out;
  });
}

// Stores the keys and values of earlier tokens, so that a model computes only the new tokens.
class KVCache {
  constructor({ block_size, n_embd, n_head }) {
    Object.assign(this, { size: block_size * n_embd, H: n_head, D: n_embd / n_head });
    this.length = 0; // tokens whose keys and values are stored
    this.layers = [];
  }

  // Store k and v (n, C) of the new tokens; attend from q to all tokens so far.
  attend(layer, q, k, v, scale, watch) {
    const { H, D, length } = this, C = H * D, out = new Float32Array(q.length);
    this.layers[layer] ??= [new Float32Array(this.size), new Float32Array(this.size)];
    const [keys, values] = this.layers[layer];
    keys.set(k, length * C);
    values.set(v, length * C);
    for (let t = 0; t < q.length / C; t++) {
      for (let h = 0; h < H; h++) {
        const head = t * C + h * D, scores = new Float32Array(length + t + 1);
        for (let s = 0; s < scores.length; s++) {
          scores[s] = scale * dot(q, head, keys, s * C + h * D, D);
        }
        const weights = softmax(scores);
        for (let s = 0; s < scores.length; s++) {
          const weight = weights[s], from = s * C + h * D;
          for (let i = 0; i < D; i++) out[head + i] += weight * values[from + i];
        }
        if (watch && (t + 1) * C === q.length) watch.attention.push(weights);
      }
    }
    return out;
  }
}

function softmax(scores, temperature = 1) {
  let largest = -Infinity, sum = 0;
  for (const score of scores) largest = Math.max(largest, score);
  const weights = scores.map(score => Math.exp((score - largest) / temperature));
  for (const weight of weights) sum += weight;
  return weights.map(weight => weight / sum);
}

// --- models --------------------------------------------------------------------------------------

class Model {
  constructor(config, weights) {
    Object.assign(this, { config, weights });
  }

  linear(name, x) {
    return linear(x, this.weights[`${name}.weight`], this.weights[`${name}.bias`]?.data);
  }

  // Add the embedding of row[i] to row i of x (n, C).
  addEmbeddings(x, name, rows) {
    const { data, shape: [, C] } = this.weights[`${name}.weight`];
    rows.forEach((row, t) => {
      for (let i = 0; i < C; i++) x[t * C + i] += data[row * C + i];
    });
  }

  // Logits (rows, V) of the last tokens of the window ids (T). `watch` receives, for the last of
  // them, the attention weights (T) of each head, and the logits (V) after the embedding and each
  // block.
  forward(ids, cache, rows, watch) {
    const C = this.config.n_embd, last = x => x.slice(-C);
    let x = this.embed(ids, cache.length);
    watch?.logits.push(this.head(last(x)));
    for (let layer = 0; layer < this.config.n_layer; layer++) {
      x = this.block(layer, x, ids, cache, watch);
      watch?.logits.push(this.head(last(x)));
    }
    cache.length = ids.length;
    return this.head(x.subarray(-rows * C));
  }
}

const PAIR_ROWS = 1 << 15, NGRAM_ROWS = 16381;

class GPT extends Model {
  constructor(config, weights) {
    super(config, weights);
    const half = config.n_embd / config.n_head / 2, size = config.block_size * half;
    const angle = i => Math.floor(i / half) * 10_000 ** (-(i % half) / half);
    this.cos = Float32Array.from({ length: size }, (_, i) => Math.cos(angle(i)));
    this.sin = Float32Array.from({ length: size }, (_, i) => Math.sin(angle(i)));
  }

  // Normalized sum of the embeddings of each token and of the n-grams that end with it: (n, C).
  // N-grams that begin before the window are filled up with its first token.
  embed(ids, first) {
    const { n_embd: C, n_gram, vocab_size, ngram_base } = this.config;
    const base = ngram_base || vocab_size, x = new Float32Array((ids.length - first) * C);
    let ngrams = ids.slice(first); // as numbers whose digits are tokens
    this.addEmbeddings(x, "token_embedding", ngrams);
    for (let n = 1, factor = base; n < n_gram; n++) {
      const name = n === 1 ? "pair_embedding" : `ngram_embeddings.${n - 2}`;
      const rows = this.weights[`${name}.weight`].shape[0];
      ngrams = ngrams.map((ngram, t) => ngram + factor * ids[Math.max(0, first + t - n)]);
      this.addEmbeddings(x, name, ngrams.map(ngram => ngram % rows));
      factor = factor * base % (PAIR_ROWS * NGRAM_ROWS); // so that numbers stay exact
    }
    return norm(x, C);
  }

  block(layer, x, ids, cache, watch) {
    const { n_embd: C, n_head } = this.config, D = C / n_head, name = `blocks.${layer}`;
    let [q, k, v] = split(this.linear(`${name}.attn.qkv`, norm(x, C)), C);
    q = this.rotate(norm(q, D), cache.length, D);
    k = this.rotate(norm(k, D), cache.length, D);
    this.addEmbeddings(v, `${name}.attn.value_embedding`, ids.slice(cache.length));
    const out = cache.attend(layer, q, k, v, D ** -0.5, watch);
    x = add(x, this.linear(`${name}.attn.proj`, out));
    const hidden = this.linear(`${name}.mlp.fc`, norm(x, C)).map(h => Math.max(0, h) ** 2);
    return add(x, this.linear(`${name}.mlp.proj`, hidden));
  }

  // Rotate pairs of channels of x (n, C) by angles proportional to the position.
  rotate(x, first, D) {
    const { n_embd: C } = this.config, half = D / 2;
    for (let head = 0; head < x.length; head += D) {
      const table = (first + Math.floor(head / C)) * half;
      for (let i = 0; i < half; i++) {
        const cos = this.cos[table + i], sin = this.sin[table + i];
        const left = x[head + i], right = x[head + half + i];
        x[head + i] = left * cos - right * sin;
        x[head + half + i] = right * cos + left * sin;
      }
    }
    return x;
  }

  head(x) {
    return this.linear("lm_head", norm(x, this.config.n_embd));
  }
}

// Abramowitz and Stegun, 7.1.26; its error is below 2e-7.
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const terms = [1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592];
  return Math.sign(x) * (1 - t * terms.reduce((sum, term) => sum * t + term) * Math.exp(-x * x));
}

const ACTIVATIONS = {
  relu: x => Math.max(0, x),
  gelu: x => x / 2 * (1 + erf(x / Math.SQRT2)),
  gelu_tanh: x => x / 2 * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
};

class LectureGPT extends Model {
  norm(name, x) {
    const { norm: on, n_embd } = this.config, weights = this.weights;
    if (!on) return x;
    return norm(x, n_embd, weights[`${name}.weight`].data, weights[`${name}.bias`]?.data);
  }

  embed(ids, first) {
    const x = new Float32Array((ids.length - first) * this.config.n_embd);
    this.addEmbeddings(x, "token_embedding_table", ids.slice(first));
    this.addEmbeddings(x, "position_embedding_table", [...ids.keys()].slice(first));
    return x;
  }

  block(layer, x, ids, cache, watch) {
    const { n_embd: C, n_head, scaled, residual, proj, ffwd, activation } = this.config;
    const name = `blocks.${layer}`, join = out => residual ? add(x, out) : out;
    const scale = scaled ? (C / n_head) ** -0.5 : 1;
    const [q, k, v] = split(this.linear(`${name}.sa.qkv`, this.norm(`${name}.ln1`, x)), C);
    let out = cache.attend(layer, q, k, v, scale, watch);
    if (proj) out = this.linear(`${name}.sa.proj`, out);
    x = join(out);
    if (!ffwd) return x;
    out = this.linear(`${name}.ffwd.net.0`, this.norm(`${name}.ln2`, x));
    out = out.map(ACTIVATIONS[activation]);
    if (proj) out = this.linear(`${name}.ffwd.net.2`, out);
    return join(out);
  }

  head(x) {
    return this.linear("lm_head", this.norm("ln_f", x));
  }
}

class Bigram extends Model {
  forward(ids, cache, rows) {
    const logits = new Float32Array(rows * this.config.vocab_size);
    this.addEmbeddings(logits, "token_embedding_table", ids.slice(-rows));
    cache.length = ids.length;
    return logits;
  }
}

const MODELS = { gpt: GPT, lecture: LectureGPT, bigram: Bigram };

// --- tokens --------------------------------------------------------------------------------------

const WORDS = /[\p{L}\p{N}_]+|\s+|[^\p{L}\p{N}_\s]/gu;
const BPE_WORDS = /'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;

class Tokenizer {
  // tokens: the UTF-8 bytes of each, one character a byte; merges: [left, right, id] in order.
  constructor({ kind, tokens, merges }) {
    this.kind = kind;
    this.bytes = tokens.map(token => Uint8Array.from(token, byte => byte.charCodeAt(0)));
    this.ids = new Map(tokens.map((_, id) => [this.text([id]), id]));
    this.merges = new Map(
      merges.map(([left, right, id], rank) => [`${left} ${right}`, [rank, id]]));
  }

  text(ids) {
    const bytes = ids.flatMap(id => [...this.bytes[id]]);
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(bytes));
  }

  // The ids of a text, and the characters that the vocabulary lacks, which are left out.
  encode(text) {
    const ids = [], unknown = new Set();
    if (this.kind === "byte") return { ids: [...new TextEncoder().encode(text)], unknown };
    if (this.kind === "bpe") {
      return { ids: (text.match(BPE_WORDS) ?? []).flatMap(word => this.merged(word)), unknown };
    }
    const known = [...text].filter(c => this.ids.has(c) || !unknown.add(c)).join("");
    for (const word of (this.kind === "word" ? known.match(WORDS) ?? [] : known)) {
      for (const token of this.ids.has(word) ? [word] : word) ids.push(this.ids.get(token));
    }
    return { ids, unknown };
  }

  // Byte pair encoding: the earliest merge that applies, until none does.
  merged(word) {
    const ids = [...new TextEncoder().encode(word)];
    for (;;) {
      let best = [Infinity], at;
      for (let i = 0; i + 1 < ids.length; i++) {
        const merge = this.merges.get(`${ids[i]} ${ids[i + 1]}`);
        if (merge && merge[0] < best[0]) [best, at] = [merge, i];
      }
      if (at === undefined) return ids;
      ids.splice(at, 2, best[1]);
    }
  }
}

// --- generation ----------------------------------------------------------------------------------

// torch's random numbers on a CPU: a Mersenne Twister, of which 24 bits make a float.
class Generator {
  constructor(seed) {
    this.state = new Uint32Array(624);
    this.index = 624;
    this.state[0] = seed;
    for (let i = 1; i < 624; i++) {
      const before = this.state[i - 1];
      this.state[i] = Math.imul(1812433253, before ^ (before >>> 30)) + i;
    }
  }

  uniform() {
    const { state } = this;
    if (this.index === 624) {
      for (let i = 0; i < 624; i++) {
        const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
        state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      this.index = 0;
    }
    let y = state[this.index++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    y ^= y >>> 18;
    return (y & 0xffffff) / 2 ** 24;
  }
}

// The ids by falling logit; of equal ones the lower id first.
function order(logits) {
  return [...logits.keys()].sort((a, b) => logits[b] - logits[a]);
}

// The next token, by inversion of the cumulative distribution.
function sample(logits, { temperature, top_k }, uniform) {
  if (temperature === 0) return logits.reduce((best, x, id) => x > logits[best] ? id : best, 0);
  const weights = softmax(logits, temperature);
  if (top_k) for (const id of order(logits).slice(top_k)) weights[id] = 0;
  const threshold = uniform * weights.reduce((sum, weight) => sum + weight, 0);
  let sum = 0;
  return weights.findIndex(weight => (sum += weight) > threshold);
}

const LIKELIEST = 5; // alternatives of each token
const CHUNK = 32; // tokens of a given text that are scored at a time
const PAUSE = 30; // milliseconds between two looks at the messages

// What a token costs: its nats, and the likeliest tokens in its place, [id, text, probability].
function cost(logits, id) {
  const nats = Math.log(logits.reduce((sum, x) => sum + Math.exp(x - logits[id]), 0));
  if (Number.isNaN(nats)) throw Error("the model's logits are not finite: its training diverged");
  const likeliest = order(logits).slice(0, LIKELIEST), probabilities = softmax(logits);
  return { nats, likeliest: likeliest.map(i => [i, tokenizer.text([i]), probabilities[i]]) };
}

// Scores the tokens of `ids` from number `from` on, then generates. Yields for each token its id,
// its cost and `start`, the number of the first token of the window that predicts it.
//
// As in generation/steps.py, a full window restarts with its last three quarters and the new token.
function* steps({ ids, from, max_new_tokens, sampling, seed }) {
  const { block_size, vocab_size: V } = model.config, cache = new KVCache(model.config);
  const restartLength = Math.floor(block_size * 3 / 4) + 1, generator = new Generator(seed);
  let start;
  const restart = (end, length) => {
    start = Math.max(0, end - length);
    cache.length = 0;
  };
  ids = [...ids];
  restart(from, restartLength);
  if (from === 0) yield { id: ids[0], start, nats: null, likeliest: [] };
  for (let position = Math.max(from, 1); position < ids.length;) {
    if (position - start > block_size) restart(position, restartLength);
    const end = Math.min(ids.length, start + block_size + 1, position + CHUNK);
    const logits = model.forward(ids.slice(start, end - 1), cache, end - position);
    for (let row = 0; position < end; row++, position++) {
      const id = ids[position];
      yield { id, start, ...cost(logits.subarray(row * V, (row + 1) * V), id) };
    }
  }
  // the longest window, as `generate` begins with it
  if (start > Math.max(0, ids.length - block_size)) restart(ids.length, block_size);
  for (let i = 0; i < max_new_tokens; i++) {
    if (ids.length - start > block_size) restart(ids.length, restartLength);
    const logits = model.forward(ids.slice(start), cache, 1);
    const id = sample(logits, sampling, generator.uniform());
    yield { id, start, ...cost(logits, id) };
    ids.push(id);
  }
}

// Parts of the text that are whole tokens and whole characters: {text, ids, nats, costs (nats of
// each token), start, likeliest}; the last two are of the first token.
function* cells(tokens) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  let cell = null;
  for (const { id, nats, ...first } of tokens) {
    cell ??= { text: "", ids: [], nats: 0, costs: [], ...first };
    cell.ids.push(id);
    cell.costs.push(nats);
    cell.nats = cell.costs.includes(null) ? null : cell.nats + nats;
    cell.text = decoder.decode(tokenizer.bytes[id], { stream: true });
    yield cell.text ? cell : null; // null: within a character
    if (cell.text) cell = null;
  }
  if (cell) yield { ...cell, text: decoder.decode() };
}

// --- messages ------------------------------------------------------------------------------------

// The page numbers its jobs, and ignores what an earlier one still sends.
let model, tokenizer, currentJob;

async function run({ job, ...request }) {
  currentJob = job;
  let found = [], last = performance.now();
  for (const cell of cells(steps(request))) {
    if (cell) found.push(cell);
    if (performance.now() - last < PAUSE) continue;
    postMessage({ type: "cells", job, cells: found });
    found = [];
    await new Promise(resolve => setTimeout(resolve)); // lets a message arrive
    if (job !== currentJob) return;
    last = performance.now();
  }
  postMessage({ type: "cells", job, cells: found });
  postMessage({ type: "done", job });
}

const receive = {
  load({ description, weights }) {
    const { config, tensors } = description;
    model = new MODELS[config.name](config, readWeights(tensors, weights));
    tokenizer = new Tokenizer(description.tokenizer);
    postMessage({ type: "loaded" });
  },
  // Scores a text and continues it by max_new_tokens.
  prompt({ text, start, ...request }) {
    const { ids, unknown } = tokenizer.encode(text);
    postMessage({ type: "started", job: request.job, unknown: [...unknown] });
    return run({ ids: ids.length ? ids : start, from: 0, ...request });
  },
  run,
  stop() {
    currentJob = undefined;
  },
  // Attention and logits of the last of ids (T), a window, which predicts the token `target`.
  inspect({ ids, target }) {
    const watch = { attention: [], logits: [] };
    model.forward(ids, new KVCache(model.config), 1, watch);
    const layers = watch.logits.map(logits => cost(logits, target));
    postMessage({ type: "inspected", attention: watch.attention, layers });
  },
};

self.onmessage = async ({ data: { type, ...request } }) => {
  try {
    await receive[type](request);
  } catch (error) {
    postMessage({ type: "failed", message: error.message });
  }
};
