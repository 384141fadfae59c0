/* Sampling in plain JavaScript: one token from the logits of all, as nanogpt/inference/processors.py says.

   Example:  const id = NanoGPTSampling.choose(logits, { temperature: 0.8, topK: 40 }, randomNumbers(1));
   A seed makes a text repeatable here; PyTorch draws other numbers from the same seed. */
"use strict";

const NanoGPTSampling = (() => {
  const ALTERNATIVES = 10;

  /* Random numbers in [0, 1) that a seed decides (sfc32, Chris Doty-Humphrey). */
  function randomNumbers(seed) {
    let a = seed >>> 0, b = Math.floor(seed / 2 ** 32) >>> 0, c = 0x9E3779B9, count = 1;
    const next = () => {
      const t = (((a + b) | 0) + count) | 0;
      count = (count + 1) | 0;
      a = b ^ (b >>> 9);
      b = (c + (c << 3)) | 0;
      c = ((c << 21) | (c >>> 11)) + t | 0;
      return t >>> 0;
    };
    for (let i = 0; i < 16; i++) next();
    return () => ((next() >>> 5) * 2 ** 26 + (next() >>> 6)) / 2 ** 53;
  }

  function argmax(logits) {
    let best = 0;
    for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
    return best;
  }

  /* The ids that sampling chooses among, with their weights: temperature, top-k, top-p, in this order. */
  function candidates(logits, { temperature = 1, topK = null, topP = null }) {
    const highest = logits[argmax(logits)], divisor = Math.max(temperature, 2 ** -126);
    let ids = Array.from(logits.keys());
    if (topK !== null && topK < ids.length) {
      const least = Float32Array.from(logits).sort()[ids.length - topK];
      const above = ids.filter((id) => logits[id] > least);
      ids = above.concat(ids.filter((id) => logits[id] === least).slice(0, topK - above.length));
    }
    let weights = ids.map((id) => Math.exp((logits[id] - highest) / divisor));
    if (topP !== null) {
      const total = weights.reduce((sum, weight) => sum + weight, 0);
      const order = ids.map((_, i) => i).sort((i, j) => logits[ids[j]] - logits[ids[i]] || ids[i] - ids[j]);
      let likelier = 0;
      const kept = order.filter((i) => {
        const keep = likelier < topP;
        likelier += weights[i] / total;
        return keep;
      });
      [ids, weights] = [kept.map((i) => ids[i]), kept.map((i) => weights[i])];
    }
    return { ids, weights };
  }

  /* The next token. settings: temperature (0: the likeliest, the first of equals), topK, topP. */
  function choose(logits, settings, random) {
    if (settings.temperature === 0) return argmax(logits);
    const { ids, weights } = candidates(logits, settings);
    let left = random() * weights.reduce((sum, weight) => sum + weight, 0), last = 0;
    for (let i = 0; i < ids.length; i++) {
      if (weights[i] === 0) continue;
      last = i;
      if ((left -= weights[i]) < 0) break;
    }
    return ids[last];
  }

  /* The model's own probabilities, before sampling changes them: of a token, and of the likeliest ones. With the
     token's rank, from 1, and the entropy of them all, in nats. */
  function score(logits, token, count = ALTERNATIVES) {
    const highest = logits[argmax(logits)], top = [];
    let total = 0, weighted = 0, rank = 1;
    for (let id = 0; id < logits.length; id++) {
      const above = logits[id] - highest, weight = Math.exp(above);
      total += weight;
      if (weight > 0) weighted += weight * above;
      if (logits[id] > logits[token] || (logits[id] === logits[token] && id < token)) rank++;
      if (top.length === count && logits[id] <= logits[top[count - 1]]) continue;
      let place = top.length;
      while (place > 0 && logits[top[place - 1]] < logits[id]) place--;
      top.splice(place, 0, id);
      top.length = Math.min(top.length, count);
    }
    const probability = (id) => Math.exp(logits[id] - highest) / total;
    return {
      id: token, probability: probability(token), rank, entropy: Math.log(total) - weighted / total,
      top: top.map((id) => ({ id, probability: probability(id) })),
    };
  }

  return { randomNumbers, candidates, choose, score };
})();
