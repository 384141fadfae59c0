/* The texts of a session, as a tree: each begins with a part of another one, and goes on by itself.

   Example:  const tree = Tree.create(); const text = tree.add({ prompt: "It was", pieces: [], parent: null, at: 0 });
   A text: { name, parent (or null), at, prompt, ids, begun, start, pieces, settings }
     ids      of the prompt's tokens
     begun    the number of tokens that it continued
     start    the pieces of the prompt, once the model has looked at them; else null
     pieces   [{ text, parts: [{ id, text, probability, entropy, rank, top }] }]: what follows the prompt, and, if there is a
              parent, `at` pieces of the parent first */
"use strict";

const Tree = (() => {
  const KEPT = 200; // texts; the oldest go

  function create() {
    const texts = [];
    let count = 0;

    function add(text) {
      const made = { parent: null, at: 0, ids: [], start: null, pieces: [], ...text, name: text.name || `Text ${++count}` };
      texts.push(made);
      if (texts.length > KEPT) remove(texts[0]);
      return made;
    }

    /* What came from it hangs on its parent then. */
    function remove(text) {
      for (const child of childrenOf(text)) Object.assign(child, { parent: text.parent, at: Math.min(text.at, child.at) });
      texts.splice(texts.indexOf(text), 1);
    }

    const childrenOf = (parent) => texts.filter((text) => text.parent === parent);

    /* Every text with its depth, a parent before its children. */
    function inOrder(parent = null, depth = 0) {
      return childrenOf(parent).flatMap((text) => [{ text, depth }, ...inOrder(text, depth + 1)]);
    }

    return { texts, add, remove, childrenOf, inOrder };
  }

  /* All pieces that are known, those of the prompt first. */
  const pieces = (text) => (text.start ? [...text.start, ...text.pieces] : text.pieces);

  const content = (text) => text.prompt + text.pieces.map((piece) => piece.text).join("");

  /* The ids of the tokens before a piece; of all without one. */
  function idsBefore(text, piece) {
    const known = pieces(text), end = piece ? known.indexOf(piece) : known.length;
    const first = text.start ? [] : text.ids;
    return [...first, ...known.slice(0, end).flatMap(({ parts }) => parts.map(({ id }) => id))];
  }

  /* The text that a piece was written for: this one, or one that it comes from. */
  function writerOf(text, index) {
    return text.parent && index < text.at ? writerOf(text.parent, index) : text;
  }

  /* The ids of the tokens that the model saw when it chose a piece: a context of `size` that was full was followed by one
     that began with its last half, as in nanogpt/inference/generate.py. */
  function contextOf(text, piece, size) {
    const ids = idsBefore(text, piece), half = Math.max(1, Math.floor(size / 2)), index = text.pieces.indexOf(piece);
    const seen = ids.length - Math.max(0, (writerOf(text, index).begun ?? 0) - size);
    const used = seen <= size || index < 0 ? Math.min(seen, size) : half + ((seen - size - 1) % (size - half + 1));
    return ids.slice(ids.length - used);
  }

  /* A tree for other programs. */
  function toJSON(tree, model) {
    const describe = (text) => ({
      name: text.name, prompt: text.prompt, text: content(text), settings: text.settings,
      tokens: text.pieces.flatMap(({ parts }) => parts.map(({ id, text, probability }) => ({ id, text, logprob: Math.log(probability) }))),
      branches: tree.childrenOf(text).map((child) => ({ at: child.at, ...describe(child) })),
    });
    return JSON.stringify({ format: "nanogpt-texts", version: 1, model, texts: tree.childrenOf(null).map(describe) }, null, 1);
  }

  function download(name, type, content) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([content], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  }

  return { create, pieces, content, idsBefore, writerOf, contextOf, toJSON, download };
})();
