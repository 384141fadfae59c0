/* The tab of the training: its curve, live while it runs, and the checkpoints that were kept, which write again.

   Example:  const panel = TrainingPanel.create(app); panel.begin(run)
   run: { name, settings, rows, running, checkpoints: [{ step, val_loss, model }] }, as GET /run answers. */
"use strict";

const TrainingPanel = (() => {
  const { element, svg } = Dom, W = 320, H = 150, TOKENS = 160, PAUSE_MS = 150, RETRY_MS = 3000;

  function create(app) {
    const box = Dom.find("training-body"), samples = new Map();
    let run, place, slider, text, label, curve, numbers, timer, writing, following = false;

    function begin(found) {
      run = found;
      place = run.checkpoints.length;
      curve = element("div");
      numbers = element("dl", "", "figures");
      const kept = element("div", "", "kept");
      box.replaceChildren(element("p", "", "live"), numbers, curve,
        element("p", [element("span", "", "key line-key"), " validation  ", element("span", "", "key faint-key"), " training loss, in nats per token"], "hint"), kept);
      buildSlider(kept);
      draw();
      if (run.running) live();
    }

    /* --- the live view --- */

    async function live() {
      if (following) return;
      following = true;
      while (run.running) {
        try {
          await app.backend.follow(hear, new AbortController().signal);
        } catch { /* the server was restarted: a little later it may be there again */ }
        await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
        await update().catch(() => {});
      }
      following = false;
    }

    /* The tab is opened: a training that had ended may go on. */
    function show() {
      if (!run.running) update().then(() => live()).catch(() => {});
    }

    function hear({ row, checkpoint, restart, end }) {
      if (restart) {
        run.rows = [];
        samples.clear();
      }
      if (row) run.rows.push(row);
      if (end) run.running = false;
      if (checkpoint || restart) update().catch(() => {}); // the run may have dropped others
      draw();
    }

    /* The run as it is now. The slider stays at its checkpoint, if that is still there. */
    async function update() {
      const chosen = run.checkpoints[place]?.model, before = run.checkpoints.length;
      Object.assign(run, await app.backend.run());
      const found = run.checkpoints.findIndex(({ model }) => model === chosen);
      place = found < 0 ? run.checkpoints.length : found;
      if ((before === 0) !== (run.checkpoints.length === 0)) buildSlider(box.querySelector(".kept"));
      else if (before > 0) Object.assign(slider, { max: run.checkpoints.length }).value = place;
      app.modelsChanged(run.checkpoints);
      draw();
    }

    /* --- the curve --- */

    const of = (name) => run.rows.filter((row) => row[name] != null);

    function draw() {
      const train = of("train_loss"), val = of("val_loss"), last = train.at(-1) || val.at(-1);
      const badge = box.querySelector(".live");
      badge.textContent = run.running ? "The training is running: this page follows it." : "";
      badge.hidden = !run.running;
      const shown = [Dom.figure("train loss", "Training loss", train.at(-1)?.train_loss.toFixed(3) ?? "\u2013"),
        Dom.figure("val loss", "Validation loss", val.at(-1)?.val_loss.toFixed(3) ?? "\u2013")];
      if (last) shown.push(Dom.figure("step", "Step", last.step.toLocaleString("en")));
      if (!numbers.contains(document.activeElement)) numbers.replaceChildren(...shown);
      curve.replaceChildren(train.length + val.length ? drawCurve(train, val, run.checkpoints, run.checkpoints[place]?.step) : element("p", "No step is logged yet.", "hint"));
    }

    /* --- the checkpoints --- */

    function buildSlider(kept) {
      const count = run.checkpoints.length;
      if (count === 0)
        return kept.replaceChildren(element("p", ["This run kept no checkpoints. With ", element("code", "train.py --keep_checkpoints 10"), " you can see it learn to write, here."], "hint"));
      label = element("output");
      slider = Dom.range(place, { min: 0, max: count }, (chosen) => move(chosen));
      slider.setAttribute("aria-valuetext", nameOf(place));
      text = element("div", "", "sample");
      kept.replaceChildren(
        element("h3", "See it learn to write"),
        element("div", [Dom.field("Checkpoint", slider), label, Dom.what("checkpoint")], "dial"), text,
        Dom.button("Use this model for everything", () => app.useModel(run.checkpoints[place]?.model ?? ""), "quiet small"));
      label.textContent = nameOf(place);
      text.replaceChildren(element("span", "Move the slider: each checkpoint continues your prompt, with the same seed.", "hint"));
    }

    function nameOf(place) {
      const checkpoint = run.checkpoints[place];
      return checkpoint ? `step ${checkpoint.step.toLocaleString("en")}` : "served";
    }

    function move(chosen) {
      place = chosen;
      label.textContent = nameOf(place);
      slider.setAttribute("aria-valuetext", nameOf(place));
      draw();
      text.setAttribute("aria-busy", "true");
      clearTimeout(timer);
      writing?.abort();
      timer = setTimeout(write, PAUSE_MS);
    }

    /* What the checkpoint writes, with a seed that is the same for all. */
    async function write() {
      const { prompt, temperature, topK, topP } = app.settings(), model = run.checkpoints[place]?.model ?? "";
      const settings = { prompt, temperature, topK, topP, numTokens: TOKENS, seed: 1, model }, key = JSON.stringify(settings);
      const mine = text, { signal } = (writing = new AbortController());
      const shown = () => mine.replaceChildren(element("span", prompt, "prompt"), ...samples.get(key).map((piece) => element("span", piece.text, TextView.byProbability(piece))));
      try {
        if (!samples.has(key)) {
          const pieces = [];
          await app.backend.generate(settings, (event) => event.text && pieces.push(event), signal);
          if (signal.aborted) return;
          samples.set(key, pieces);
        }
        shown();
        if (model === "") samples.delete(key); // another one may be served by the next time
      } catch (error) {
        if (!signal.aborted) mine.replaceChildren(element("span", error.message, "problem"));
      } finally {
        if (!signal.aborted) mine.removeAttribute("aria-busy");
      }
    }

    return { begin, show, levels: null };
  }

  /* Losses against steps: lines, a dot for each kept checkpoint, a mark at the chosen one. */
  function drawCurve(train, val, checkpoints, marked) {
    const losses = [...train.map((row) => row.train_loss), ...val.map((row) => row.val_loss)];
    const low = Math.min(...losses), high = Math.max(...losses, low + 0.1), end = Math.max(1, ...[...train, ...val].map(({ step }) => step));
    const x = (step) => 38 + (step / end) * (W - 46), y = (loss) => 6 + ((high - loss) / (high - low)) * (H - 28);
    const points = (rows, name) => rows.map((row) => `${x(row.step).toFixed(1)},${y(row[name]).toFixed(1)}`).join(" ");
    const say = (content, attributes) => svg("text", attributes, [content]);
    const rows = [high, (high + low) / 2, low].flatMap((loss) => [
      svg("line", { x1: 38, x2: W - 8, y1: y(loss), y2: y(loss), class: "grid" }),
      say(loss.toFixed(2), { x: 28, y: y(loss) + 3, "text-anchor": "end" })]);
    const dots = checkpoints.map(({ step, val_loss: loss }) =>
      svg("circle", { cx: x(step), cy: y(loss ?? lossAt(train, step) ?? high), r: step === marked ? 5 : 2.5, class: step === marked ? "here" : "dot" }));
    const mark = marked === undefined ? [] : [svg("line", { x1: x(marked), x2: x(marked), y1: 4, y2: H - 20, class: "mark" })];
    const last = val.at(-1), label = `Losses of the training up to step ${end}${last ? `; the last validation loss is ${last.val_loss.toFixed(3)}` : ""}.`;
    return svg("svg", { viewBox: `0 0 ${W} ${H}`, class: "curve", role: "img", "aria-label": label }, [
      ...rows, say("0", { x: 38, y: H - 6 }), say(`step ${end.toLocaleString("en")}`, { x: W - 8, y: H - 6, "text-anchor": "end" }), ...mark,
      svg("polyline", { points: points(train, "train_loss"), class: "faint" }), svg("polyline", { points: points(val, "val_loss"), class: "line" }), ...dots]);
  }

  /* The training loss that was logged nearest to a step. */
  function lossAt(train, step) {
    return train.toSorted((a, b) => Math.abs(a.step - step) - Math.abs(b.step - step))[0]?.train_loss;
  }

  return { create };
})();
