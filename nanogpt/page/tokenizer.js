/* Text <-> token ids in plain JavaScript: characters, bytes and byte-level BPE, as nanogpt/tokenizer has them.

   Example:  const tokenizer = NanoGPTText.tokenizer(header.tokenizer); tokenizer.encode("It was")

   Every tokenizer has
     encode(text)   ids. Throws an Error, for people, that names characters without an id.
     decoder()      a function from one id after another to the text that each adds; "" within a character
     name(id)       a token by itself, for people: bytes that are no character as \xE4
     end            the id that ends a document, or null */
"use strict";

const NanoGPTText = (() => {
  const utf8 = (text) => new TextEncoder().encode(text);

  /* Rules for words. \s of the originals has no U+FEFF, unlike JavaScript's. \u017f is an s, whatever the case. */
  const WORDS = {
    "gpt-2": new RegExp(
      "'(?:s|t|re|ve|m|ll|d)| ?\\p{L}+| ?\\p{N}+| ?[^\\p{White_Space}\\p{L}\\p{N}]+" +
        "|\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+",
      "gu",
    ),
    qwen2: new RegExp(
      "'(?:[sS\u017f]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}" +
        "| ?[^\\p{White_Space}\\p{L}\\p{N}]+[\\r\\n]*|\\p{White_Space}*[\\r\\n]+" +
        "|\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+",
      "gu",
    ),
  };

  function describe(point) {
    return `"${String.fromCodePoint(point)}" (U+${point.toString(16).toUpperCase().padStart(4, "0")})`;
  }

  /* points: the code point of each id. */
  function characters({ points, end }) {
    const ids = new Map(points.map((point, id) => [point, id]));
    const text = (id) => (id === end ? "<|endoftext|>" : String.fromCodePoint(points[id]));
    return {
      end,
      encode(text) {
        const found = Array.from(text, (char) => char.codePointAt(0));
        const unknown = [...new Set(found.filter((point) => !ids.has(point)))];
        if (unknown.length > 0) {
          const names = unknown.slice(0, 5).map(describe).join(", ") + (unknown.length > 5 ? ", ..." : "");
          throw new Error(
            `The model has never seen ${names}: its vocabulary has ${points.length} characters. Leave ` +
              `${unknown.length > 1 ? "them" : "it"} out of the prompt.`,
          );
        }
        return found.map((point) => ids.get(point));
      },
      decoder: () => text,
      name: text,
    };
  }

  /* What tokenizers of bytes share. bytesOf: the bytes of an id. */
  function ofBytes(encode, bytesOf, end) {
    return {
      end,
      encode,
      decoder() {
        const stream = new TextDecoder("utf-8", { ignoreBOM: true });
        return (id) => stream.decode(bytesOf(id), { stream: true });
      },
      name(id) {
        try {
          return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytesOf(id));
        } catch {
          return Array.from(bytesOf(id), (byte) => `\\x${byte.toString(16).toUpperCase().padStart(2, "0")}`).join("");
        }
      },
    };
  }

  function bytes({ end }) {
    return ofBytes((text) => Array.from(utf8(text)), (id) => (id === end ? utf8("<|endoftext|>") : Uint8Array.of(id)), end);
  }

  /* tokens: the bytes of each id, each as the character of its number. single: the id of each byte, or -1.
     merges: left, right and merged id, one merge after the other. words: the rule; normalizer: NFC or null; added: the
     texts that are a token each -> id. */
  function pairs({ tokens, single, merges, words, normalizer, added, end }) {
    const rank = new Map(), merged = [], size = tokens.length;
    for (let i = 0; i < merges.length; i += 3) {
      rank.set(merges[i] * size + merges[i + 1], i / 3);
      merged.push(merges[i + 2]);
    }
    const bytesOf = (id) => Uint8Array.from(tokens[id], (char) => char.charCodeAt(0));

    /* As long as some pairs have a rank, merge the pair of the lowest rank, wherever it is. */
    function encodeWord(word) {
      let ids = Array.from(utf8(word), (byte) => single[byte]).filter((id) => id >= 0);
      for (;;) {
        const ranks = ids.slice(1).map((id, i) => rank.get(ids[i] * size + id) ?? Infinity);
        const best = ranks.reduce((least, one) => Math.min(least, one), Infinity);
        if (best === Infinity) return ids;
        const next = [];
        for (let i = 0; i < ids.length; i++) {
          const found = ranks[i] === best;
          next.push(found ? merged[best] : ids[i]);
          if (found) i++;
        }
        ids = next;
      }
    }

    function encodeText(text) {
      const normal = normalizer ? text.normalize(normalizer) : text;
      return (normal.match(WORDS[words]) || []).flatMap(encodeWord);
    }

    const names = Object.keys(added).sort((a, b) => b.length - a.length).map((name) => name.replace(/\W/g, "\\$&"));
    const isAdded = names.length > 0 && new RegExp(`(${names.join("|")})`); // in parentheses, so that split keeps them
    const encode = (text) =>
      (isAdded ? text.split(isAdded) : [text]).flatMap((part, i) => (i % 2 ? added[part] : encodeText(part)));
    return ofBytes(encode, bytesOf, end);
  }

  const KINDS = { char: characters, byte: bytes, bpe: pairs };

  /* header: what nanogpt/export/html.py writes of a tokenizer. */
  function tokenizer(header) {
    const made = KINDS[header.kind](header);

    /* An empty prompt is a line feed, or the end of the text before, as for `nanogpt sample`. */
    function encodePrompt(text) {
      if (text !== "") return made.encode(text);
      try {
        return made.encode("\n");
      } catch {
        return [made.end || 0];
      }
    }
    return { ...made, encodePrompt };
  }

  return { tokenizer };
})();
