/* The page of a model: prompt and settings, the texts, and the tabs that explain them.

   Example:  startPage(backend)
   It knows no model, only a backend (local.js has the model in the page, server.js asks `nanogpt serve`):
     header                            { name, about }: texts
     load(tell, needKey)               a promise of { name?, about?, context, layers, heads, inspects?, run? } once the model is
         ready; tell({ loaded }) from 0 to 1, or tell({ waiting }), a text; needKey(message): a promise of an API key, from the person
     generate(settings, tell, signal)  a promise of the end of the text, or of its stop once the AbortSignal says so.
         settings: { prompt, numTokens, temperature, topK, topP, seed, model, ids, first }; topK and topP may be null, which is
         off; ids: of the tokens to continue instead of the prompt; first: id of the first new token
         tell({ read, prompt }) from 0 to 1 while the prompt is read, once with the ids of the prompt, then
         tell({ tokens, text, probability, parts }) for each piece of text, of one or several tokens, of which `tokens` are
         new; or tell({ tokens }) for a part of a piece; tell({ ended: true }) where the model ends the text
         parts: [{ id, text, probability, top: [{ text, probability }] }], for each token, the likeliest first; entropy and
         rank too where they are known
     inspect(wish, tell, signal)       what the model expected at each token of a text; see engine.js
     next(wish, signal)                what may come after some tokens; see engine.js
     tokenize(text)                    a promise of the ids of its tokens
     run(), follow(tell, signal)       only with a training: what GET /run answers, and what is new in it
     trainingPanel(app)                and the tab that shows it
   An Error that it rejects with is shown as it is. */
"use strict";

function startPage(backend) {
  const { find, element } = Dom;
  const form = find("form"), prompt = find("prompt"), generate = find("generate"), measure = find("measure"), stop = find("stop");
  const status = find("status"), problem = find("problem"), progress = find("progress"), output = find("output");

  const tree = Tree.create();
  let info = {}; // what the backend said when it was ready
  let running = null; // what stops the texts that are being written
  let ended = Promise.resolve(); // when they have

  const reading = Reading.create(backend, () => info.context);
  const app = {
    backend, tree, explain, settings, branch, look: reading.look,
    get info() { return info; },
    isRunning: () => running !== null,
    refresh: () => tabs.refresh(),
    choose(view, piece) {
      view.choose(piece, true);
      piece && view.root.querySelector(".current")?.scrollIntoView({ block: "nearest" });
    },
    modelsChanged: (checkpoints) => compare.setModels(checkpoints),
    useModel: (model) => compare.useModel(model),
  };
  const panels = {
    alternatives: AlternativesPanel.create(app), surprise: SurprisePanel.create(app), attention: AttentionPanel.create(app),
    lens: LensPanel.create(app), training: backend.trainingPanel?.(app),
  };
  const views = ["text", "text-b"].map((id) => TextView.create(find(id), { onChoose, onBranch }));
  const tabs = Tabs.create(panels, views), compare = Compare.create(app, views), texts = Texts.create(app, views[0], showText);

  /* A message about what went wrong; "": nothing. */
  function explain(message) {
    problem.textContent = message;
    problem.hidden = message === "";
  }

  /* The message of an error; `param` names the field that the server found wrong, if it is an error of the server's. */
  function explainError({ message, param = "prompt" }) {
    if (param === "prompt") prompt.setAttribute("aria-invalid", "true");
    explain(message);
    status.textContent = "";
  }

  /* How much of a long work is done; nothing is shown when all is. */
  function showProgress(share) {
    progress.hidden = share >= 1;
    progress.value = share;
  }

  /* --- choosing --- */

  function onChoose(view, piece, pinned) {
    for (const other of views) if (other !== view && piece) other.choose(null);
    tabs.choose(view, piece, pinned);
  }

  /* Enter, or the key of an alternative, in the text. */
  function onBranch(view, place) {
    const [part] = view.chosen.parts, other = place === null ? null : part.top[place];
    if (other) return branch(view, view.chosen, 0, other);
    tabs.open("alternatives");
    panels.alternatives.focusFirst();
  }

  function showText(text) {
    views[0].show(text);
    texts.render();
    tabs.refresh();
  }

  /* --- the form --- */

  const number = (id) => (find(id).value.trim() === "" ? null : Number(find(id).value));

  function settings() {
    return {
      prompt: prompt.value,
      numTokens: number("tokens"),
      temperature: number("temperature"),
      topK: number("top-k"),
      topP: number("top-p"),
      seed: number("seed") ?? Math.floor(Math.random() * 2 ** 32),
      model: compare.model(),
    };
  }

  /* The settings in a few words, which stand there while their fields do not. */
  function summarize() {
    const { numTokens, temperature, topK, topP, model } = settings(), seed = number("seed");
    const parts = [`${numTokens} tokens`, `temperature ${temperature}`];
    if (topK !== null) parts.push(`top-k ${topK}`);
    if (topP !== null) parts.push(`top-p ${topP}`);
    if (seed !== null) parts.push(`seed ${seed}`);
    if (model) parts.push(model);
    find("chosen-settings").textContent = parts.join(", ");
  }

  let counting;

  /* How many tokens the prompt has, a moment after it was changed. */
  function count() {
    clearTimeout(counting);
    counting = setTimeout(async () => {
      const text = prompt.value;
      const ids = text === "" ? null : await backend.tokenize(text).catch(() => null);
      if (text === prompt.value) find("count").textContent = ids === null ? "" : Dom.plural(ids.length, "token");
    }, 300);
  }

  function setRunning(controller) {
    const focused = document.activeElement;
    running = controller;
    generate.disabled = measure.disabled = running !== null;
    stop.hidden = stop.disabled = !running;
    if (focused === generate || focused === measure || focused === stop) (running ? stop : generate).focus(); // not lost with the button
    texts.render();
  }

  function isValid() {
    if (!form.checkValidity()) find("settings").open = true;
    return form.reportValidity();
  }

  /* --- writing --- */

  function start() {
    if (generate.disabled || !isValid()) return;
    const chosen = settings();
    write([chosen, ...compare.second(chosen)].map((given, i) => ({ view: views[i], settings: given, text: { prompt: given.prompt } })));
  }

  /* Writes on with another token in the place of a piece's part `index`. */
  async function branch(view, piece, index, other) {
    const text = view.text, lead = piece.parts.slice(0, index); // the tokens of its character before it
    const before = [...Tree.idsBefore(text, piece), ...lead.map(({ id }) => id)];
    if (!isValid()) return;
    running?.abort();
    await ended;
    try {
      const known = await withId(other, index === 0 ? Tree.contextOf(text, piece, info.context) : before, text.settings?.model);
      const given = text.start ? text.start.indexOf(piece) : -1, at = given < 0 ? text.pieces.indexOf(piece) : 0;
      const beginning = given < 0 ? { prompt: text.prompt, ids: text.ids, start: text.start }
        : { prompt: text.start.slice(0, given).map(({ text }) => text).join(""), ids: before, start: text.start.slice(0, given) };
      const { top, entropy } = piece.parts[index], firstPart = { ...known, top, entropy };
      const job = { parent: given < 0 ? Tree.writerOf(text, at) : text, at, ...beginning, pieces: given < 0 ? text.pieces.slice(0, at) : [] };
      const chosen = { ...settings(), model: text.settings?.model ?? compare.model() };
      await write([{ view, text: job, settings: { ...chosen, prompt: job.prompt, ids: before, first: known.id, firstPart }, lead }]);
    } catch (error) {
      explain(error.message);
    }
  }

  /* An alternative with its id, which a stream of OpenAI's does not tell. ids: of the tokens that the model saw before it. */
  async function withId(other, ids, model) {
    if (other.id !== undefined) return other;
    const found = (await backend.next({ ids, model })).top.find(({ text }) => text === other.text);
    if (!found) throw new Error("This token is no longer among the likeliest: choose it again.");
    return found;
  }

  /* Writes on at the end of a text. */
  function writeOn(text) {
    if (!isValid()) return;
    const chosen = { ...settings(), model: text.settings?.model ?? compare.model() }, ids = Tree.idsBefore(text, null);
    const { prompt: given, ids: of, start: pieces } = text;
    write([{ view: views[0], settings: { ...chosen, prompt: given, ids }, text: { parent: text, at: text.pieces.length, prompt: given, ids: of, start: pieces, pieces: [...text.pieces] } }]);
  }

  /* Writes texts, each in its view, from the beginning that is given. */
  function write(jobs) {
    ended = work(jobs);
    return ended;
  }

  async function work(jobs) {
    const began = performance.now(), controller = new AbortController(), { signal } = controller;
    const wanted = jobs.reduce((all, { settings }) => all + settings.numTokens, 0);
    let tokens = 0, ended = false;
    setRunning(controller);
    explain("");
    status.textContent = "Reading the prompt";
    try {
      await Promise.all(jobs.map((job) => writeOne(job, signal, told)));
      const seconds = (performance.now() - began) / 1000, { seed } = jobs[0].settings;
      const written = `${Dom.plural(tokens, "token")}, ${Math.round(tokens / seconds).toLocaleString("en")} a second, seed ${seed}`;
      const end = ended && jobs.length === 1 ? ". The model ended the text here." : "";
      status.textContent = `${signal.aborted ? "Stopped after" : "Done:"} ${written}${end}`;
    } catch (error) {
      controller.abort();
      explainError(error);
    } finally {
      for (const { view } of jobs) view.root.setAttribute("aria-busy", "false");
      setRunning(null);
      showProgress(1);
      tabs.refresh();
    }

    function told(event) {
      if (tokens === 0 && event.tokens) status.textContent = "Writing";
      tokens += event.tokens || 0;
      ended ||= Boolean(event.ended);
      showProgress(tokens === 0 ? event.read ?? 0 : tokens / wanted);
    }
  }

  async function writeOne({ view, text: beginning, settings: chosen, lead = [] }, signal, told) {
    const { firstPart, ...shown } = chosen;
    let text = null, first = lead;
    await backend.generate(chosen, (event) => {
      if (!text) begin();
      if (event.prompt) {
        if (text.ids.length === 0) text.ids = event.prompt;
        text.begun = event.prompt.length;
      }
      told(event);
      if (!event.text) return;
      const piece = { text: event.text, probability: event.probability, parts: [...first, ...event.parts] };
      first = [];
      text.pieces.push(piece);
      view.add(piece);
    }, signal);

    /* The text appears once the backend has accepted the request. */
    function begin() {
      text = tree.add({ ...beginning, settings: shown });
      view.show(text);
      compare.show(view === views[1]);
      view.root.setAttribute("aria-busy", "true");
      texts.render();
      output.scrollIntoView({ block: "nearest" });
    }
  }

  /* --- measuring --- */

  /* Looks at the prompt as it is, without writing. */
  async function measureIt() {
    if (measure.disabled) return;
    if (prompt.value === "") {
      explain("There is no text yet: write or paste one.");
      return prompt.focus();
    }
    const controller = new AbortController(), text = prompt.value, model = compare.model();
    setRunning(controller);
    explain("");
    status.textContent = "Reading the text";
    try {
      const ids = await backend.tokenize(text), { tokens } = await reading.read(ids, { model }, controller.signal, showProgress);
      if (controller.signal.aborted) return (status.textContent = "Stopped");
      const made = tree.add({ prompt: text, ids, start: reading.piecesOf(tokens), settings: { model } });
      reading.remember(made, tokens);
      views[0].show(made);
      compare.show(false);
      status.textContent = `Measured ${Dom.plural(ids.length, "token")}`;
      if (!["attention", "lens"].includes(tabs.current())) tabs.open("surprise");
    } catch (error) {
      explainError(error);
    } finally {
      setRunning(null);
      showProgress(1);
      tabs.refresh();
    }
  }

  /* --- events --- */

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    start();
  });
  form.addEventListener("input", () => {
    summarize();
    prompt.removeAttribute("aria-invalid");
  });
  prompt.addEventListener("input", count);
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) (event.shiftKey ? measureIt : start)();
  });
  measure.addEventListener("click", measureIt);
  stop.addEventListener("click", () => running.abort());
  find("on").addEventListener("click", () => views[0].text && !running && writeOn(views[0].text));
  find("frames").addEventListener("click", ({ currentTarget: toggle }) => {
    const on = toggle.getAttribute("aria-pressed") !== "true";
    toggle.setAttribute("aria-pressed", String(on));
    views.forEach((view) => view.frame(on));
    if (on) for (const view of views) if (view.text && !running) reading.look(view, {}).catch(({ message }) => explain(message));
  });
  find("close").addEventListener("click", () => choose(null));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open], :popover-open")) return;
    const inside = find("panel").contains(document.activeElement), view = tabs.view();
    if (inside && view.chosen) return view.root.focus();
    choose(null);
  });

  const choose = (piece) => views.forEach((view) => view.choose(piece));

  function introduce({ name = backend.header.name, about = backend.header.about }) {
    find("name").textContent = name;
    find("about").textContent = about;
    if (name) document.title = name;
  }

  introduce({});
  Dom.explainAll();
  summarize();
  Tour.begin(Boolean(backend.trainingPanel));
  backend
    .load(({ loaded, waiting }) => {
      status.textContent = waiting ?? "Unpacking the model";
      if (loaded !== undefined) showProgress(loaded);
    }, KeyDialog.ask)
    .then((found) => {
      info = found;
      introduce(info);
      tabs.offer({ surprise: info.inspects !== false, attention: info.inspects !== false && info.layers, lens: info.inspects !== false, training: Boolean(info.run) });
      if (info.layers) panels.attention.build();
      if (info.run) panels.training.begin(info.run);
      compare.setModels(info.run?.checkpoints || []);
      status.textContent = "Ready";
      generate.disabled = false;
      measure.disabled = info.inspects === false;
    })
    .catch((error) => {
      status.textContent = "";
      explain(`The model cannot be loaded. ${error.message}`);
    })
    .finally(() => showProgress(1));
}
