/* The tabs that look at the whole text: how surprised the model is by it, where its heads look, what its layers say.

   Example:  const panel = SurprisePanel.create(app); panel.show(view, piece)
   Each asks for what it shows with app.look(view, wish), which answers { tokens, offset, attention, lens } with the tokens
   of the text that the model sees at once; offset: how many came before them. */
"use strict";

/* Shows what a function makes of a text that the model has looked at; `empty` until there is one. */
function insightPanel(app, box, empty, wish, render) {
  let turn = 0;
  return async function show(view, piece) {
    const mine = ++turn;
    if (!view.text || app.isRunning()) return box.replaceChildren(Dom.element("p", view.text ? "The model is writing." : empty, "hint"));
    const slow = setTimeout(() => mine === turn && !box.children.length && box.replaceChildren(Dom.element("p", "The model reads the text.", "hint")), 200);
    try {
      const found = await app.look(view, wish());
      if (mine === turn && found) render(found, view, piece);
    } catch (error) {
      if (mine === turn) box.replaceChildren(Dom.element("p", error.message, "problem"));
    } finally {
      clearTimeout(slow);
    }
  };
}

/* The place of a piece among the tokens that were looked at; -1: it is not there. */
function placeOf(view, piece, { offset, tokens }) {
  if (!piece) return -1;
  const place = Tree.idsBefore(view.text, piece).length - offset;
  return place < tokens.length ? place : -1;
}

const SurprisePanel = (() => {
  const { element, svg } = Dom, MOST = 5, BARS = 120;

  function create(app) {
    const box = Dom.find("surprise-body");
    const show = insightPanel(app, box, "Write or paste any text at the left, and press Measure: how surprised is your model by it?",
      () => ({}), render);

    function render({ tokens, offset }, view, piece) {
      const scored = tokens.filter(({ probability }) => probability !== undefined);
      if (scored.length === 0) return box.replaceChildren(element("p", "Surprise begins with the second token: write a little more.", "hint"));
      const surprise = scored.map(({ probability }) => -Math.log(probability));
      const loss = mean(surprise), entropy = mean(scored.map((token) => token.entropy)), size = Math.ceil(scored.length / BARS);
      const figures = element("dl", "", "figures");
      figures.append(
        Dom.figure("loss", "Mean surprise", `${loss.toFixed(2)} nats`), Dom.figure("perplexity", "Perplexity", Math.exp(loss).toFixed(1)),
        Dom.figure("entropy", "Mean entropy", `${entropy.toFixed(2)} nats`), Dom.figure("token", "Tokens", `${tokens.length}`));
      box.replaceChildren(
        element("p", view.text.pieces.length > 0 ? "A low temperature, top-k or top-p makes the model\u2019s own text less surprising than it expects." : verdict(loss, entropy)), figures, chart(scored, surprise, placeOf(view, piece, { offset, tokens }) - (tokens.length - scored.length), size),
        element("p", [element("span", "", "key bar-key"), " surprise  ", element("span", "", "key line-key"), " entropy, the surprise it expected", size > 1 ? `; each bar is ${size} tokens` : ""], "hint"),
        element("h3", "Most surprising"), most(view, offset, tokens));
    }

    function most(view, offset, tokens) {
      const pieces = Tree.pieces(view.text), start = view.text.start ? 0 : view.text.ids.length, list = element("ol", "", "links");
      const where = [];
      let place = start - offset;
      for (const piece of pieces) for (const part of piece.parts) where[place++] = [piece, part];
      const worst = tokens.map((token, i) => [token.probability ?? 1, i]).sort(([a], [b]) => a - b).filter(([, i]) => i > 0 && where[i]).slice(0, MOST);
      for (const [probability, i] of worst) {
        const before = tokens.slice(Math.max(0, i - 20), i).map(({ adds }) => adds).join("").replace(/\s+/g, " ").slice(-20);
        const text = [element("span", `\u2026${before}`, "before"), Dom.visible(tokens[i].text), element("span", Dom.percent(probability), "percent")];
        list.append(element("li", Dom.button(text, () => app.choose(view, where[i][0]), "choice")));
      }
      return list;
    }

    return { show, levels: null };
  }

  function verdict(loss, entropy) {
    if (loss < entropy - 0.25) return "The model found this text easier than it expected: it knows it, or texts much like it.";
    if (loss > entropy + 0.5) return "The model is surprised: this text is unlike those that it has learnt from.";
    return "The model found this text about as surprising as it expected.";
  }

  /* Surprise as bars and entropy as a line. Each bar is a token, or the mean of `size` of them in a long text. */
  function chart(tokens, surprise, current, size) {
    const W = 320, H = 110, count = Math.ceil(tokens.length / size), width = W / count;
    const means = (values) => Array.from({ length: count }, (_, i) => mean(values.slice(i * size, (i + 1) * size)));
    const bars = means(surprise), line = means(tokens.map(({ entropy }) => entropy)), most = Math.max(2, ...bars, ...line);
    const y = (value) => H - (value / most) * (H - 4);
    const label = `Surprise of each of ${tokens.length} tokens, up to ${Math.max(...surprise).toFixed(1)} nats, and the entropy before it.`;
    return svg("svg", { viewBox: `0 0 ${W} ${H}`, class: "bars", role: "img", "aria-label": label, preserveAspectRatio: "none" }, [
      ...bars.map((value, i) => svg("rect", {
        x: i * width, y: y(value), width: width * 0.8, height: H - y(value), class: i === Math.floor(current / size) ? "here" : "after",
      })),
      svg("polyline", { points: line.map((value, i) => `${(i + 0.4) * width},${y(value)}`).join(" "), class: "line" }),
    ]);
  }

  const mean = (values) => values.reduce((all, one) => all + one, 0) / values.length;

  return { create };
})();

const AttentionPanel = (() => {
  const { element } = Dom, LEVELS = [0.02, 0.06, 0.15, 0.35]; // shares that part the classes a0 to a4

  function create(app) {
    const box = Dom.find("attention-body"), controls = Dom.find("attention-controls");
    let layer = 0, head = 0, shares = null;

    const show = insightPanel(app, box, "Write something, or press Measure, and choose a token: here you see where the model looks.",
      () => ({ attention: { layer, head } }), render);

    function dial(label, count, set) {
      const shown = element("output", `1 of ${count}`);
      const slider = Dom.range(1, { min: 1, max: count }, (chosen) => {
        shown.textContent = `${chosen} of ${count}`;
        set(chosen - 1);
        app.refresh();
      });
      return element("div", [Dom.field(label, slider), shown], "dial");
    }

    function build() {
      controls.replaceChildren(
        dial("Layer", app.info.layers, (chosen) => (layer = chosen)), dial("Head", app.info.heads, (chosen) => (head = chosen)));
    }

    function render(found, view, piece) {
      const { tokens, offset, attention } = found, place = placeOf(view, piece, found), row = place < 0 ? tokens.length - 1 : place;
      shares = new Map();
      let at = (view.text.start ? 0 : view.text.ids.length) - offset;
      for (const one of Tree.pieces(view.text)) {
        shares.set(one, one.parts.reduce((all, _, i) => all + (attention[row][at + i] || 0), 0));
        at += one.parts.length;
      }
      view.paint(levels);
      const seen = attention[row].map((share, i) => [share, i]).sort(([a], [b]) => b - a).slice(0, 5), list = element("ol", "", "links");
      for (const [share, i] of seen)
        list.append(element("li", [element("span", [Dom.visible(tokens[i].text), element("span", i === row ? " itself" : ` ${row - i} back`, "before")]), element("span", Dom.percent(share), "percent")]));
      box.replaceChildren(
        element("p", ["While it reads ", Dom.visible(tokens[row].text), ", this head looks at", Dom.what("attention")]), list,
        matrix(attention, row, (chosen) => app.choose(view, pieceAt(view, chosen + offset))),
        element("p", "Each line is a token that looks, each column a token that is looked at. A stronger color is more.", "hint"));
    }

    const levels = (piece) => {
      const share = shares?.get(piece) || 0;
      return `a${LEVELS.filter((least) => share >= least).length}`;
    };

    return { show, build, levels };
  }

  function pieceAt(view, place) {
    let at = view.text.start ? 0 : view.text.ids.length;
    return Tree.pieces(view.text).find(({ parts }) => (at += parts.length) > place) || null;
  }

  /* The attention of every token as a picture. */
  function matrix(attention, row, onChoose) {
    const size = attention.length, canvas = element("canvas", "", "matrix"), context = canvas.getContext("2d");
    const ink = getComputedStyle(document.body).getPropertyValue("--accent").match(/\w\w/g).map((digits) => parseInt(digits, 16));
    const picture = new ImageData(size, size);
    canvas.width = canvas.height = size;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `The attention of ${size} tokens to those before them. The list above has the largest shares of the chosen one.`);
    attention.forEach((shares, y) => shares.forEach((share, x) => {
      if (x > y) return;
      picture.data.set([...ink, 255 * (0.04 + 0.96 * Math.sqrt(share))], 4 * (y * size + x));
    }));
    for (let x = row + 1; x < size; x++) picture.data.set([...ink, 40], 4 * (row * size + x));
    context.putImageData(picture, 0, 0);
    canvas.addEventListener("click", ({ offsetY }) => onChoose(Math.floor((offsetY / canvas.clientHeight) * size)));
    return canvas;
  }

  return { create };
})();

const LensPanel = (() => {
  const { element } = Dom;

  function create(app) {
    const box = Dom.find("lens-body");
    const show = insightPanel(app, box, "Write something, or press Measure, and choose a token: here you see how the model made up its mind.",
      () => ({ lens: true }), render);

    function render(found, view, piece) {
      const { tokens, lens } = found, place = placeOf(view, piece, found), from = place < 0 ? tokens.length - 1 : place - 1;
      if (from < 0) return box.replaceChildren(element("p", "Nothing comes before the first token: choose a later one.", "hint"));
      const actual = from + 1 < tokens.length ? tokens[from + 1].text : null, final = lens[lens.length - 1][from][0].text;
      const sure = lens.findLastIndex((layer) => layer[from][0].text !== final) + 1;
      const before = tokens.slice(Math.max(0, from - 20), from + 1).map(({ adds }) => adds).join("");
      const table = element("table"), head = element("tr");
      head.append(...["After", "1st guess", "2nd", "3rd"].map((name) => Object.assign(element("th", name), { scope: "col" })));
      table.append(element("caption", "The guesses of each layer", "unseen"), element("thead", head), element("tbody", lens.map((layer, i) => line(layer[from], i, final, actual))));
      box.replaceChildren(
        element("p", ["After ", element("code", `\u2026${Dom.marked(before)}`), " each layer would say", Dom.what("lens")]), table,
        element("p", [sure === 0 ? "The embeddings alone already say " : `From layer ${sure} on the first guess is `, Dom.visible(final), actual === null ? "." : actual === final ? ", which came." : ", but there came "],
          "verdict"));
      if (actual !== null && actual !== final) box.lastChild.append(Dom.visible(actual), ".");
    }

    function line(guesses, layer, final, actual) {
      const row = element("tr"), name = Object.assign(element("th", layer === 0 ? "embeddings" : `layer ${layer}`), { scope: "row" });
      row.append(name, ...guesses.map(({ text, probability }) => {
        const cell = element("td", [Dom.visible(text), element("small", Dom.percent(probability))]);
        cell.className = [text === final ? "final" : "", text === actual ? "actual" : ""].join(" ").trim();
        return cell;
      }));
      return row;
    }

    return { show, levels: null };
  }

  return { create };
})();
