/* A text on the page: its pieces, in colours; one of them is chosen, by pointing, tapping or with the arrow keys.

   Example:  const view = TextView.create(element, { onChoose }); view.show(text); view.add(piece); view.paint(levels)
   onChoose(view, piece, pinned) is called whenever another piece is chosen; null: none is. What is pinned, by a click or a
   key, stays chosen when the pointer goes elsewhere. */
"use strict";

const TextView = (() => {
  const LEVELS = [0.01, 0.05, 0.2, 0.5]; // probabilities that part the classes p0 to p4 of page.css

  const byProbability = ({ probability }) => (probability === undefined ? "" : `p${LEVELS.filter((least) => probability >= least).length}`);

  /* The probability of a piece: that of all its tokens. */
  const withProbability = ({ text, parts }) => {
    const known = parts.every((part) => part.probability !== undefined);
    return { text, parts, probability: known ? parts.reduce((all, one) => all * one.probability, 1) : undefined };
  };

  function create(root, { onChoose, onBranch }) {
    let text = null, spans = [], chosen = null, pinned = false, levels = byProbability, framed = false;

    const pieces = () => (text ? Tree.pieces(text) : []);
    const indexOf = (event) => spans.indexOf(event.target.closest?.("span"));

    /* Shows a text from its beginning. */
    function show(next) {
      text = next;
      spans = [];
      choose(null);
      root.replaceChildren();
      if (!text) return;
      if (!text.start && text.prompt) root.append(Dom.element("span", text.prompt, "prompt"));
      pieces().forEach(append);
      paint();
    }

    /* The prompt of the text has become pieces. */
    function split() {
      const before = chosen, wasPinned = pinned;
      show(text);
      if (before) choose(before, wasPinned);
    }

    function append(piece) {
      const span = Dom.element("span", framed ? framesOf(piece) : piece.text);
      spans.push(span);
      root.append(span);
    }

    /* Each token of a piece in a frame of its own, invisible ones too. */
    function framesOf({ text: content, parts }) {
      return parts.map((part, i) => {
        const frame = Dom.element("i", Dom.marked(parts.length > 1 || Dom.isBytes(part.text) ? part.text : content), "token");
        if (part.id !== undefined) frame.dataset.id = part.id;
        if (i === parts.length - 1 && content.endsWith("\n")) frame.append("\n");
        return frame;
      });
    }

    function add(piece) {
      append(piece);
      paintOne(piece, spans.length - 1);
    }

    function paintOne(piece, index) {
      spans[index].className = [levels(piece, index), text.start && text.pieces.length > 0 && index < text.start.length ? "given" : "",
        piece.text.includes("\n") ? "break" : "", piece === chosen ? "current" : "", piece === chosen && pinned ? "pinned" : ""].join(" ").trim();
    }

    function paint(by = levels) {
      levels = by;
      const all = pieces();
      for (let i = 0; i < spans.length; i++) if (all[i]) paintOne(all[i], i);
    }

    function choose(piece, pin = false) {
      const all = pieces(), before = all.indexOf(chosen);
      if (piece === chosen && pin === pinned) return;
      chosen = piece;
      pinned = pin && piece !== null;
      for (const index of [before, all.indexOf(piece)]) if (spans[index]) paintOne(all[index], index);
      onChoose(view, piece, pinned);
    }

    function move(event) {
      const all = pieces(), last = all.length - 1, current = all.indexOf(chosen);
      const places = {
        ArrowRight: current + 1, ArrowDown: current + 10, ArrowLeft: current - 1, ArrowUp: current - 10, Home: 0, End: last,
      };
      if (last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
      if (chosen && (event.key === "Enter" || /^[1-9]$/.test(event.key))) {
        event.preventDefault();
        onBranch(view, event.key === "Enter" ? null : Number(event.key) - 1);
      }
      if (!(event.key in places)) return;
      event.preventDefault();
      const place = Math.min(last, Math.max(0, places[event.key]));
      choose(all[place], true);
      spans[place].scrollIntoView({ block: "nearest" });
    }

    root.addEventListener("keydown", move);
    root.addEventListener("focus", () => pieces()[0] && !chosen && root.matches(":focus-visible") && choose(pieces()[0], true));
    root.addEventListener("click", (event) => choose(pieces()[indexOf(event)] || null, true));
    root.addEventListener("pointerover", (event) => {
      const piece = pieces()[indexOf(event)];
      if (piece && !pinned && event.pointerType === "mouse") choose(piece);
    });

    const view = {
      root, show, split, add, paint, choose,
      frame(on) {
        framed = on;
        root.classList.toggle("framed", on);
        if (text) split();
      },
      get text() { return text; },
      get chosen() { return chosen; },
      get pinned() { return pinned; },
    };
    return view;
  }

  return { create, byProbability, withProbability };
})();
