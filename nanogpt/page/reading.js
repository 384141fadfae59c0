/* What the model expected along whole texts, asked once for each text and wish.

   Example:  const reading = Reading.create(backend, () => 256); const { tokens } = await reading.look(view, {})
   A wish is {}, for each token alone, or { attention: { layer, head } } or { lens: true }, as `inspect` of engine.js has it. */
"use strict";

const Reading = (() => {
  function create(backend, contextSize) {
    /* Tokens that add to a text, as pieces of it. */
    function piecesOf(tokens) {
      const pieces = [];
      let parts = [];
      for (const { adds, ...part } of tokens) {
        parts.push(part);
        if (adds === "") continue;
        pieces.push(TextView.withProbability({ text: adds, parts }));
        parts = [];
      }
      return pieces;
    }

    /* What the model expected at every token. What is longer than its context is read in the windows of `score`
       (nanogpt/scoring.py): one context after the other, the first token of each predicted by the one before. */
    async function read(ids, wish, signal, tell = () => {}) {
      const tokens = [], size = contextSize();
      let next = null; // what the window before says of the token after it
      for (let from = 0; from < ids.length && !signal?.aborted; from += size) {
        const window = { ...wish, ids: ids.slice(from, from + size), next: from + size < ids.length };
        const found = await backend.inspect(window, ({ read }) => tell((from + read * window.ids.length) / ids.length), signal);
        if (!found) break;
        if (next) Object.assign(found.tokens[0], predicted(next, found.tokens[0].id));
        tokens.push(...found.tokens);
        ({ next } = found);
        tell(tokens.length / ids.length);
      }
      return { tokens: joinBytes(tokens) };
    }

    /* What was expected of a token, from the distribution that it was chosen from. */
    function predicted({ entropy, top, logits }, id) {
      const { probability, rank } = NanoGPTSampling.score(logits, id);
      return { probability, rank, entropy, top };
    }

    /* The same tokens. A window may end within a character: bytes become text together, whichever window they are in. */
    function joinBytes(tokens) {
      const stream = new TextDecoder("utf-8", { ignoreBOM: true }), isBytes = (token) => token && Dom.isBytes(token.text);
      for (const [i, token] of tokens.entries()) {
        if (!isBytes(token)) continue;
        const bytes = token.text.match(/(?<=\\x)../g).map((digits) => parseInt(digits, 16));
        token.adds = stream.decode(Uint8Array.from(bytes), { stream: isBytes(tokens[i + 1]) });
      }
      return tokens;
    }

    /* What the model expected all along a text; with attention or lens, in a window of its context that has the chosen piece.
       Asked once for each wish. See insight.js. */
    async function look(view, wish) {
      const text = view.text, ids = Tree.idsBefore(text, null), size = contextSize(), { model } = text.settings || {};
      const whole = Object.keys(wish).length === 0;
      const last = view.chosen ? Tree.idsBefore(text, view.chosen).length : ids.length - 1; // the token that must be in it
      const end = whole ? ids.length : Math.min(ids.length, Math.max(size, Math.ceil((last + 1) / (size / 2)) * Math.floor(size / 2)));
      const offset = whole ? 0 : Math.max(0, end - size), key = JSON.stringify({ ...wish, ...(whole ? {} : { end }) });
      if (text.seen !== ids.length) Object.assign(text, { seen: ids.length, looks: new Map() });
      if (ids.length === 0) return null;
      if (!text.looks.has(key)) {
        const asked = whole ? read(ids, { model }) : backend.inspect({ ids: ids.slice(offset, end), ...wish, model }, () => {});
        text.looks.set(key, asked.then((found) => ({ ...found, offset })));
        asked.catch(() => text.looks.delete(key));
      }
      const found = await text.looks.get(key);
      if (whole && !text.learnt) learn(view, text, found);
      return found;
    }

    /* Whether two probabilities are those of one reading: another window makes others. */
    const isNear = (a, b) => a !== undefined && Math.abs(a - b) <= 0.02 * b + 1e-5;

    /* The prompt becomes pieces, and every token knows more. */
    function learn(view, text, { tokens }) {
      text.learnt = true;
      let place = text.start ? 0 : text.ids.length;
      for (const { parts } of Tree.pieces(text))
        for (const part of parts) {
          const { entropy, rank, top, probability } = tokens[place++];
          if (isNear(probability, part.probability)) Object.assign(part, { entropy, rank, top });
        }
      const start = text.start ? null : piecesOf(tokens.slice(0, text.ids.length));
      if (!start || start.map((piece) => piece.text).join("") !== text.prompt) return;
      text.start = start;
      if (view.text === text) view.split();
    }

    /* Notes what was read of a new text, all of it. */
    function remember(text, tokens) {
      Object.assign(text, { learnt: true, seen: tokens.length, looks: new Map([["{}", { tokens, offset: 0 }]]) });
    }

    return { read, look, piecesOf, remember };
  }

  return { create };
})();
