/* The tab of alternatives: what the model would have written instead, and what the sampling settings make of it.

   Example:  const panel = AlternativesPanel.create(app); panel.show(view, piece)
   A click on an alternative, or Enter, begins a new text with it there: app.branch. */
"use strict";

const AlternativesPanel = (() => {
  const SHOWN = 32, PAUSE_MS = 150; // bars of the figure; time that the pointer rests before the model is asked
  const { element, svg, percent, visible } = Dom;

  function create(app) {
    const details = Dom.find("details"), box = Dom.find("alternatives"), figure = Dom.find("distribution"), empty = Dom.find("no-choice");
    let view = null, piece = null, distribution = null, timer, asking;

    function show(newView, newPiece, pinned) {
      [view, piece, distribution] = [newView, newPiece, null];
      clearTimeout(timer);
      asking?.abort();
      details.hidden = !piece;
      empty.hidden = Boolean(piece);
      figure.replaceChildren();
      if (!piece) return box.replaceChildren();
      box.replaceChildren(...piece.parts.flatMap(explanation));
      if (app.info.inspects !== false) timer = setTimeout(ask, pinned ? 0 : PAUSE_MS);
    }

    /* The whole distribution that the first token of the piece was chosen from. */
    async function ask() {
      const about = piece, { signal } = (asking = new AbortController());
      const ids = Tree.contextOf(view.text, piece, app.info.context);
      if (ids.length === 0 || app.isRunning()) return;
      try {
        const found = await app.backend.next({ ids, model: view.text.settings?.model }, signal);
        if (!found || about !== piece) return;
        distribution = found;
        complete(piece.parts[0]);
        drawFigure();
      } catch (error) {
        if (!signal.aborted) app.explain(error.message);
      }
    }

    /* What a stream of tokens does not say of one. */
    function complete(part) {
      if (part.entropy != null || part.id === undefined) return;
      const { entropy, logits } = distribution, above = logits.filter((logit) => logit > logits[part.id]);
      Object.assign(part, { entropy, rank: above.length + 1 });
      box.querySelector("dl")?.replaceWith(numbers(part));
    }

    /* --- the list --- */

    function explanation(part, index) {
      const { text: chosen, probability, top } = part;
      if (probability === undefined) return [element("p", [visible(chosen), " is the first token: nothing was expected before it."])];
      const line = element("p", [visible(chosen), ` had a probability of ${percent(probability)}`, Dom.what("probability"), ". The likeliest:"]);
      const list = element("ol"), isIn = top.some((other) => isSame(other, part));
      const rows = isIn ? top : [...top, { ...part, top: undefined }];
      list.append(...rows.map((other, place) => alternative(part, index, other, place)));
      return [line, list, numbers(part)];
    }

    function alternative(part, index, other, place) {
      const isChosen = isSame(other, part), track = element("span"), bar = element("div", "", "bar");
      bar.style.width = `${100 * other.probability}%`;
      track.append(bar);
      const share = element("span", (isChosen ? "\u2713 " : "") + percent(other.probability), "percent");
      const choice = Dom.button([visible(other.text), track, share], () => app.branch(view, piece, index, other), "choice");
      choice.title = isChosen ? "Continue from here once more" : `Continue with this instead${place < 9 ? ` (key ${place + 1} in the text)` : ""}`;
      return element("li", choice, isChosen ? "chosen" : "");
    }

    function numbers({ id, probability, entropy, rank }) {
      const list = element("dl", "", "figures");
      list.append(Dom.figure("surprise", "Surprise", `${(-Math.log(probability)).toFixed(2)} nats`));
      if (entropy != null) list.append(Dom.figure("entropy", "Entropy", `${entropy.toFixed(2)} nats`));
      if (rank != null) list.append(Dom.figure("rank", "Rank", `${rank}`));
      if (id != null) list.append(Dom.figure("token", "Token id", `${id}`));
      return list;
    }

    /* The list is walked with the arrow keys too. */
    box.addEventListener("keydown", (event) => {
      const choices = [...box.querySelectorAll(".choice")], place = choices.indexOf(document.activeElement);
      const next = { ArrowDown: place + 1, ArrowUp: place - 1 }[event.key];
      if (next === undefined || place < 0) return;
      event.preventDefault();
      choices[Math.max(0, Math.min(choices.length - 1, next))].focus();
    });

    function focusFirst() {
      box.querySelector(".choice")?.focus();
    }

    /* --- the distribution, as it is cut --- */

    const DIALS = [
      ["temperature", "Temperature", { min: 0, max: 2, step: 0.05 }, 1, 1],
      ["top-k", "Top-k", { min: 1, max: 65 }, null, null],
      ["top-p", "Top-p", { min: 0.05, max: 1, step: 0.01 }, 1, 1],
    ];

    function drawFigure() {
      const picture = element("div"), sentence = element("p", "", "hint"), dials = element("div", "", "dials");
      for (const [id, label, limits, off] of DIALS) dials.append(dial(id, label, limits, off, update));
      figure.replaceChildren(element("h3", "What your settings make of it"), picture, sentence, dials);
      update();

      function update() {
        const { bars, kept, size, share } = cut(distribution.logits, app.settings());
        picture.replaceChildren(drawBars(bars));
        const [{ temperature }, all] = [app.settings(), kept === size];
        sentence.textContent = temperature === 0
          ? "Temperature 0: the likeliest token is taken, whatever else was possible."
          : all ? `No token is cut off: each of the ${size.toLocaleString("en")} can be chosen.`
            : `${kept} of ${size.toLocaleString("en")} tokens can be chosen. The model gave them ${percent(share)}; the rest is cut off.`;
      }
    }

    /* A slider for a setting of the form. */
    function dial(id, label, limits, off, update) {
      const input = Dom.find(id), most = id === "top-k" ? Math.min(100, distribution.logits.length) : limits.max;
      const value = () => (input.value === "" ? (id === "top-k" ? most : off) : Number(input.value));
      const shown = element("output");
      const say = () => (shown.textContent = input.value === "" ? "off" : input.value);
      const slider = Dom.range(value(), { ...limits, max: most }, (chosen) => {
        input.value = id !== "temperature" && chosen === most ? "" : chosen;
        input.dispatchEvent(new Event("input", { bubbles: true }));
        say();
        update();
      });
      say();
      return element("div", [Dom.field(label, slider), shown, Dom.what(id)], "dial");
    }

    return { show, focusFirst, levels: null };
  }

  const isSame = (a, b) => (a.id === undefined || b.id === undefined ? a.text === b.text : a.id === b.id);

  /* What sampling chooses among. bars: of the likeliest, each with the model's probability and that of being chosen. */
  function cut(logits, settings) {
    const order = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a] || a - b);
    const highest = logits[order[0]], total = logits.reduce((sum, logit) => sum + Math.exp(logit - highest), 0);
    const probability = (id) => Math.exp(logits[id] - highest) / total;
    const { ids, weights } = settings.temperature === 0 ? { ids: [order[0]], weights: [1] } : NanoGPTSampling.candidates(logits, settings);
    const sum = weights.reduce((all, one) => all + one, 0), chance = new Map(ids.map((id, i) => [id, weights[i] / sum]));
    return {
      bars: order.slice(0, SHOWN).map((id) => ({ before: probability(id), after: chance.get(id) })),
      kept: ids.length, size: logits.length, share: ids.reduce((all, id) => all + probability(id), 0),
    };
  }

  /* The model's probabilities as outlines, those of the sampling filled, what is cut off dashed. */
  function drawBars(bars) {
    const W = 320, H = 96, width = W / bars.length, most = Math.max(...bars.map(({ before, after = 0 }) => Math.max(before, after)));
    const high = (share) => Math.max(share > 0 ? 1 : 0, (share / most) * (H - 4));
    const box = (share, i, kind) =>
      svg("rect", { x: i * width + 1, y: H - high(share), width: width - 2, height: high(share), class: kind });
    const parts = bars.flatMap(({ before, after }, i) =>
      after === undefined ? [box(before, i, "cut")] : [box(after, i, "after"), box(before, i, "before")]);
    const label = `The ${bars.length} likeliest tokens, from left to right: outlines are the model's probabilities, filled bars those after your settings; dashed ones are cut off.`;
    return svg("svg", { viewBox: `0 0 ${W} ${H}`, class: "bars", role: "img", "aria-label": label, preserveAspectRatio: "none" },
      [...parts, svg("line", { x1: 0, x2: W, y1: H, y2: H, class: "axis" })]);
  }

  return { create, cut };
})();
