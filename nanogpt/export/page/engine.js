/* A GPT in plain JavaScript: the decode step with a KV cache, and the generation of text. It touches no page, so that
   it runs in a browser, a worker or Node alike. weights.js reads the weights, products.js multiplies with them,
   sampling.js chooses tokens, tokenizer.js makes text of them, and nanogpt/export/html.py writes what `open` takes.

   Example:  const model = NanoGPT.open(header, weights), tokenizer = NanoGPTText.tokenizer(header.tokenizer);
             for (const event of NanoGPT.generate(model, tokenizer, { prompt: "It was", numTokens: 100 })) ...

   A step is what nanogpt/model/gpt.py computes: weights are integers of 8 bits with a scale for each row, as in
   nanogpt/model/quantize.py, all other numbers are float32, sums float64 or eight of float32 (products.js). What takes
   more than a step is a generator that yields after each: whoever runs it decides when others have their turn.

   Shapes: C n_embd, V vocab_size, H heads, K heads of keys and values, D = C / H, S block_size */
"use strict";

const NanoGPT = (() => {
  /* A model with an empty cache. header: as in the file; weights: what NanoGPTWeights.read returns. */
  function open(header, { tensors, multiply }) {
    const config = header.config;
    const C = config.n_embd, H = config.n_head, K = config.n_kv_head || H, D = C / H, S = config.block_size;
    const norm = (name) => tensors[`${name}.weight`] &&
      { gain: tensors[`${name}.weight`], bias: tensors[`${name}.bias`], centered: config.norm === "layernorm" };
    const linear = (name) => ({ ...tensors[`${name}.weight`], bias: tensors[`${name}.bias`] });
    const blocks = Array.from({ length: config.n_layer }, (_, layer) => {
      const name = `blocks.${layer}`;
      return {
        norm1: norm(`${name}.norm_1`), norm2: norm(`${name}.norm_2`),
        qNorm: norm(`${name}.attn.q_norm`), kNorm: norm(`${name}.attn.k_norm`),
        qkv: linear(`${name}.attn.qkv`), attnProj: linear(`${name}.attn.proj`),
        fc: linear(`${name}.mlp.fc`), mlpProj: linear(`${name}.mlp.proj`),
        keys: new Float32Array(K * S * D), values: new Float32Array(K * S * D),
      };
    });
    const hidden = blocks[0].fc.rows, inner = blocks[0].mlpProj.columns;
    return {
      config, multiply, C, H, K, D, S, blocks, inner, finalNorm: norm("final_norm"),
      tokens: tensors["token_embedding.weight"], positions: tensors["position_embedding.weight"],
      pairs: tensors["ngram_embedding.pairs.weight"], triples: tensors["ngram_embedding.triples.weight"],
      head: config.tied ? tensors["token_embedding.weight"] : linear("head"),
      rotation: config.positions === "rope" ? rotationTable(S, D) : null,
      length: 0, last: [-1, -1], // tokens in the cache, and the last two of them; -1: before the text
      x: new Float32Array(C), normed: new Float32Array(C), attended: new Float32Array(C),
      qkv: new Float32Array((H + 2 * K) * D), hidden: new Float32Array(hidden),
      scores: new Float32Array(S), logits: new Float32Array(config.vocab_size),
    };
  }

  /* Cosines, then sines of RoPE: (S, D / 2) each, with the roundings of float32 that PyTorch makes. */
  function rotationTable(S, D) {
    const half = D / 2, table = new Float32Array(2 * S * half);
    for (let i = 0; i < half; i++) {
      const frequency = Math.fround(10000 ** Math.fround((-2 * i) / D));
      for (let position = 0; position < S; position++) {
        const angle = Math.fround(position * frequency);
        table[position * half + i] = Math.cos(angle);
        table[(S + position) * half + i] = Math.sin(angle);
      }
    }
    return table;
  }

  /* --- a step --- */

  /* Normalizes `width` numbers of x from `at` on into y, which may be x. */
  function normalize({ gain, bias, centered }, x, y, at, width) {
    let mean = 0, square = 0;
    if (centered) for (let i = 0; i < width; i++) mean += x[at + i] / width;
    for (let i = 0; i < width; i++) square += (x[at + i] - mean) ** 2;
    const scale = 1 / Math.sqrt(square / width + (centered ? 1e-5 : 1e-6));
    for (let i = 0; i < width; i++) y[at + i] = (x[at + i] - mean) * scale * gain[i] + (bias ? bias[i] : 0);
  }

  /* erf(x) to 2e-7 (Abramowitz & Stegun, 7.1.26). */
  function erf(x) {
    const t = 1 / (1 + 0.3275911 * Math.abs(x));
    const y = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
    return Math.sign(x) * (1 - y * Math.exp(-x * x));
  }

  const ACTIVATIONS = {
    gelu: (x) => 0.5 * x * (1 + erf(x * Math.SQRT1_2)),
    gelu_tanh: (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
    relu2: (x) => (x > 0 ? x * x : 0),
    swiglu: (x) => x / (1 + Math.exp(-x)), // its gate, the first half
  };

  function addRow({ weight, scale, columns }, row, x) {
    for (let i = 0, at = row * columns; i < columns; i++) x[i] += weight[at + i] * scale[row];
  }

  /* Hashes as in nanogpt/model/ngram.py, in integers of 64 bits that wrap around. */
  const hashed = (key) => BigInt.asIntN(64, key * 0x9E3779B97F4A7C1n) >> 24n;
  const rowOf = (key, { rows }) => Number(((key % BigInt(rows)) + BigInt(rows)) % BigInt(rows));

  /* The rows of the n-gram tables for a token and the two before it, oldest first. */
  function ngramRows({ config, pairs, triples }, ids) {
    const [oldest, last, current] = ids.map((id) => BigInt(id + 1)), V = BigInt(config.vocab_size);
    if (config.ngram_pairs === "exact") {
      const pair = last * V + current - 1n, fits = pairs.rows === config.vocab_size * (config.vocab_size + 1);
      return [rowOf(fits ? pair : hashed(pair), pairs), rowOf(hashed(oldest * (V + 1n) * V + pair), triples)];
    }
    const pair = 48271n * last + 69621n * current;
    return [rowOf(pair, pairs), rowOf(39373n * oldest + 40692n * pair, triples)];
  }

  function embed(m, token) {
    m.x.fill(0);
    addRow(m.tokens, token, m.x);
    if (m.positions) addRow(m.positions, m.length, m.x);
    if (m.pairs) {
      const [pair, triple] = ngramRows(m, [...m.last, token]);
      addRow(m.pairs, pair, m.x);
      addRow(m.triples, triple, m.x);
    }
  }

  function rotate({ rotation, D, S }, x, at, position) {
    const half = D / 2;
    for (let i = 0; i < half; i++) {
      const cosine = rotation[position * half + i], sine = rotation[(S + position) * half + i];
      const a = x[at + i], b = x[at + half + i];
      x[at + i] = a * cosine - b * sine;
      x[at + half + i] = b * cosine + a * sine;
    }
  }

  /* Keys and values of the token into the cache; then each head gathers from the tokens up to this one. */
  function attention(m, block) {
    const { H, K, D, S, qkv, length } = m;
    for (let head = 0; head < K; head++) {
      const k = (H + head) * D, v = k + K * D, at = (head * S + length) * D;
      if (block.kNorm) normalizeHead(block.kNorm, qkv, k, D);
      if (m.rotation) rotate(m, qkv, k, length);
      block.keys.set(qkv.subarray(k, k + D), at);
      block.values.set(qkv.subarray(v, v + D), at);
    }
    for (let head = 0; head < H; head++) {
      if (block.qNorm) normalizeHead(block.qNorm, qkv, head * D, D);
      if (m.rotation) rotate(m, qkv, head * D, length);
      attend(m, block, head * D, Math.floor(head / (H / K)) * S * D);
    }
  }

  function normalizeHead(norm, x, at, D) {
    const head = x.subarray(at, at + D);
    normalize(norm, head, head, 0, D);
  }

  /* What the query at qkv[q] gathers. from: where its keys and values begin. */
  function attend({ qkv, D, length, scores, attended }, { keys, values }, q, from) {
    let highest = -Infinity, total = 0;
    for (let s = 0; s <= length; s++) {
      let sum = 0;
      for (let i = 0, at = from + s * D; i < D; i++) sum += qkv[q + i] * keys[at + i];
      scores[s] = sum / Math.sqrt(D);
      highest = Math.max(highest, scores[s]);
    }
    for (let s = 0; s <= length; s++) total += scores[s] = Math.exp(scores[s] - highest);
    attended.fill(0, q, q + D);
    for (let s = 0; s <= length; s++)
      for (let i = 0, at = from + s * D, share = scores[s] / total; i < D; i++) attended[q + i] += share * values[at + i];
  }

  /* Adds a token to the cache. model.logits are those after it, if they are wanted. */
  function step(m, token, wanted = true) {
    const activation = ACTIVATIONS[m.config.mlp], gated = m.hidden.length > m.inner;
    embed(m, token);
    for (const block of m.blocks) {
      normalize(block.norm1, m.x, m.normed, 0, m.C);
      m.multiply(block.qkv, m.normed, m.qkv);
      attention(m, block);
      m.multiply(block.attnProj, m.attended, m.x, true);
      normalize(block.norm2, m.x, m.normed, 0, m.C);
      m.multiply(block.fc, m.normed, m.hidden);
      for (let i = 0; i < m.inner; i++) m.hidden[i] = activation(m.hidden[i]) * (gated ? m.hidden[m.inner + i] : 1);
      m.multiply(block.mlpProj, m.hidden, m.x, true);
    }
    m.length++;
    m.last = [m.last[1], token];
    if (!wanted) return;
    normalize(m.finalNorm, m.x, m.normed, 0, m.C);
    m.multiply(m.head, m.normed, m.logits);
    const cap = m.config.logit_cap;
    if (cap) for (let i = 0; i < m.logits.length; i++) m.logits[i] = cap * Math.tanh(m.logits[i] / cap);
  }

  /* Empties the cache and adds tokens, S at most. */
  function* prefill(m, tokens) {
    m.length = 0;
    m.last = [-1, -1];
    for (const [i, token] of tokens.entries()) {
      step(m, token, i === tokens.length - 1);
      yield { read: (i + 1) / tokens.length };
    }
  }

  /* --- generation --- */

  /* Continues a prompt as nanogpt/inference/generate.py does: a full context is followed by one that begins with the
     last half of it. Yields { read } after each token of the prompt that it reads, then each token with what `score` says. */
  function* generateTokens(m, prompt, settings) {
    const random = NanoGPTSampling.randomNumbers(settings.seed || 0), all = prompt.slice(-m.S);
    for (let count = 0; count < settings.numTokens; count++) {
      if (count === 0) yield* prefill(m, all);
      else if (m.length < m.S) step(m, all[all.length - 1]);
      else yield* prefill(m, all.slice(-Math.max(1, Math.floor(m.S / 2))));
      all.push(NanoGPTSampling.choose(m.logits, settings, random));
      yield NanoGPTSampling.score(m.logits, all[all.length - 1]);
    }
  }

  /* The same with text: each event with `text` is a character, or more, of one or several tokens, with the probability
     of them all. settings: prompt, numTokens, temperature, topK, topP (null: off), seed. The text ends at the token
     that ends a document. Throws an Error, for people, if the prompt cannot be encoded. */
  function* generate(m, tokenizer, settings) {
    const decode = tokenizer.decoder();
    let tokens = [];
    for (const event of generateTokens(m, tokenizer.encodePrompt(settings.prompt), settings)) {
      if (event.id === undefined) {
        yield event;
        continue;
      }
      if (event.id === tokenizer.end) return;
      const named = ({ id, probability }) => ({ text: tokenizer.name(id), probability });
      tokens.push({ ...named(event), top: event.top.map(named) });
      const text = decode(event.id);
      if (text === "") yield { tokens: 1 };
      else {
        yield { text, tokens: 1, probability: tokens.reduce((all, one) => all * one.probability, 1), parts: tokens };
        tokens = [];
      }
    }
  }

  return { open, step, prefill, ngramRows, generateTokens, generate };
})();
