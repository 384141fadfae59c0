/* A GPT in plain JavaScript: the decode step with a KV cache, and the generation of text. It touches no page, so that
   it runs in a browser, a worker or Node alike. weights.js reads the weights, products.js multiplies with them,
   sampling.js chooses tokens, tokenizer.js makes text of them, and nanogpt/export/html.py writes what `open` takes.

   Example:  const model = NanoGPT.open(header, weights), tokenizer = NanoGPTText.tokenizer(header.tokenizer);
             for (const event of NanoGPT.generate(model, tokenizer, { prompt: "It was", numTokens: 100 })) ...

   A step is what nanogpt/model/gpt.py computes: weights are integers of 8 bits with a scale for each row, as in
   nanogpt/model/quantize.py, all other numbers are float32, sums float64 or eight of float32 (products.js). What takes
   more than a step is a generator that yields after each: whoever runs it decides when others have their turn.

   Shapes: C n_embd, V vocab_size, H heads, K heads of keys and values, D width of a head, S block_size */
"use strict";

const NanoGPT = (() => {
  /* A model with an empty cache. header: as in the file; weights: what NanoGPTWeights.read returns. */
  function open(header, { tensors, multiply }) {
    const config = header.config;
    const C = config.n_embd, H = config.n_head, K = config.n_kv_head || H;
    const D = config.head_dim || C / H, S = config.block_size;
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
      rotation: config.positions === "rope" ? rotationTable(config.rope_base, S, D) : null,
      length: 0, ids: [], // how many tokens are in the cache; which
      x: new Float32Array(C), normed: new Float32Array(C), attended: new Float32Array(H * D),
      qkv: new Float32Array((H + 2 * K) * D), hidden: new Float32Array(hidden),
      scores: new Float32Array(S), logits: new Float32Array(config.vocab_size),
    };
  }

  /* Cosines, then sines of RoPE: (S, D / 2) each, with the roundings of float32 that PyTorch makes. */
  function rotationTable(base, S, D) {
    const half = D / 2, table = new Float32Array(2 * S * half);
    for (let i = 0; i < half; i++) {
      const frequency = Math.fround(base ** Math.fround((-2 * i) / D));
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
      const [pair, triple] = ngramRows(m, [m.ids[m.length - 2] ?? -1, m.ids[m.length - 1] ?? -1, token]); // -1: before the text
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

  /* Keys and values of the token into the cache; then each head gathers from the tokens up to this one. Returns how
     much the watched head takes from each of them. */
  function attention(m, block, watched) {
    let shares = null;
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
      const total = attend(m, block, head * D, Math.floor(head / (H / K)) * S * D);
      if (head === watched) shares = Array.from(m.scores.subarray(0, length + 1), (score) => score / total);
    }
    return shares;
  }

  function normalizeHead(norm, x, at, D) {
    const head = x.subarray(at, at + D);
    normalize(norm, head, head, 0, D);
  }

  /* What the query at qkv[q] gathers. from: where its keys and values begin. Returns the sum of m.scores. */
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
    return total;
  }

  /* What the numbers in m.x say about the next token, as m.logits. */
  function predict(m) {
    normalize(m.finalNorm, m.x, m.normed, 0, m.C);
    m.multiply(m.head, m.normed, m.logits);
    const cap = m.config.logit_cap;
    if (cap) for (let i = 0; i < m.logits.length; i++) m.logits[i] = cap * Math.tanh(m.logits[i] / cap);
  }

  /* Adds a token to the cache. model.logits are those after it, if they are wanted. watch: what to report of the way
     there: { layer, head }, counted from 0, whose attention it returns; onLayer, called with m.x complete after the
     embeddings and after each block. */
  function step(m, token, wanted = true, { layer = -1, head = -1, onLayer = () => {} } = {}) {
    const activation = ACTIVATIONS[m.config.mlp], gated = m.hidden.length > m.inner;
    let shares = null;
    embed(m, token);
    onLayer();
    for (const [i, block] of m.blocks.entries()) {
      normalize(block.norm1, m.x, m.normed, 0, m.C);
      m.multiply(block.qkv, m.normed, m.qkv);
      shares = attention(m, block, i === layer ? head : -1) || shares;
      m.multiply(block.attnProj, m.attended, m.x, true);
      normalize(block.norm2, m.x, m.normed, 0, m.C);
      m.multiply(block.fc, m.normed, m.hidden);
      for (let i = 0; i < m.inner; i++) m.hidden[i] = activation(m.hidden[i]) * (gated ? m.hidden[m.inner + i] : 1);
      m.multiply(block.mlpProj, m.hidden, m.x, true);
      onLayer();
    }
    m.ids[m.length++] = token;
    if (wanted) predict(m);
    return shares;
  }

  /* Makes the cache hold these tokens, S at most. What it has of them is kept, but for the last: its logits are wanted. */
  function* prefill(m, tokens) {
    let kept = 0;
    while (kept < Math.min(m.length, tokens.length - 1) && m.ids[kept] === tokens[kept]) kept++;
    m.length = kept;
    for (let i = kept; i < tokens.length; i++) {
      step(m, tokens[i], i === tokens.length - 1);
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
      const forced = count === 0 ? settings.first ?? null : null;
      all.push(forced ?? NanoGPTSampling.choose(m.logits, settings, random));
      yield NanoGPTSampling.score(m.logits, all[all.length - 1]);
    }
  }

  /* The same with text: each event with `text` is a character, or more, of one or several tokens, with the probability
     of them all. settings: prompt, a text, or ids, which go before it; first, the id of the first new token, or null;
     numTokens, temperature, topK, topP (null: off), seed. The text ends at the token that ends a document. The first event
     has the ids of the prompt. Throws an Error, for people, if the prompt cannot be encoded. */
  function* generate(m, tokenizer, settings) {
    const decode = tokenizer.decoder(), ids = settings.ids || tokenizer.encodePrompt(settings.prompt);
    let tokens = [];
    for (const id of settings.ids || []) decode(id); // a character may have begun
    yield { read: 0, prompt: ids };
    for (const event of generateTokens(m, ids, settings)) {
      if (event.id === undefined) {
        yield event;
        continue;
      }
      if (event.id === tokenizer.end) return yield { tokens: 1, ended: true };
      tokens.push(named(tokenizer, event));
      const text = decode(event.id);
      if (text === "") yield { tokens: 1 };
      else {
        yield { text, tokens: 1, probability: tokens.reduce((all, one) => all * one.probability, 1), parts: tokens };
        tokens = [];
      }
    }
  }

  /* A token that was scored, with the names of all ids. */
  function named(tokenizer, { top, ...token }) {
    const withName = (one) => ({ ...one, text: tokenizer.name(one.id) });
    return { ...withName(token), top: top.map(withName) };
  }

  /* --- inspection --- */

  /* What the model expected at each token of a text. wish: ids, S at most; attention, null or { layer, head }; lens,
     whether each layer's guesses are wanted. Yields { read }, then { found }:
       tokens     for each token what `generate` says, and `adds`, the text that it adds; the first has no probability
       attention  for each token how much it takes from each up to itself, or null
       lens       for the embeddings and each block, for each token, the three likeliest next ones; or null
     next       what may come after them, as `next` says it */
  function* inspect(m, tokenizer, { ids, attention: head, lens: wanted }) {
    const decode = tokenizer.decoder();
    const tokens = [], attention = [], lens = Array.from({ length: m.blocks.length + 1 }, () => []);
    const top = () => (predict(m), named(tokenizer, NanoGPTSampling.score(m.logits, 0, 3)).top);
    m.length = 0;
    for (const id of ids) {
      const scored = tokens.length ? NanoGPTSampling.score(m.logits, id) : { id, top: [] };
      tokens.push({ ...named(tokenizer, scored), adds: decode(id) });
      let layer = 0;
      attention.push(step(m, id, true, { ...head, onLayer: wanted ? () => lens[layer++].push(top()) : undefined }));
      yield { read: tokens.length / ids.length };
    }
    yield { found: { tokens, attention: head ? attention : null, lens: wanted ? lens : null, next: expected(m, tokenizer) } };
  }

  /* What comes after some tokens: yields { read }, then { found }: { entropy, top, logits } */
  function* next(m, tokenizer, { ids }) {
    yield* prefill(m, ids.slice(-m.S));
    yield { found: expected(m, tokenizer) };
  }

  function expected(m, tokenizer) {
    const { entropy, top } = named(tokenizer, NanoGPTSampling.score(m.logits, 0));
    return { entropy, top, logits: m.logits.slice() };
  }

  return { open, step, prefill, ngramRows, generateTokens, generate, inspect, next };
})();
