/* The page of a model: prompt and settings, the text as it is made, and what the model would have written instead.

   Example:  startPage(backend)
   It knows no model, only a backend (local.js, or a server):
     header                            { name, about }: texts
     load(tell)                        a promise of a model that is ready; tell({ loaded }) from 0 to 1
     generate(settings, tell, signal)  a promise of the end of the text, or of its stop once the AbortSignal says so.
         settings: { prompt, numTokens, temperature, topK, topP, seed }; topK and topP may be null, which is off
         tell({ read }) from 0 to 1 while the prompt is read, then tell({ tokens, text, probability, parts }) for each
         piece of text, of one or several tokens, of which `tokens` are new; or tell({ tokens }) for a part of a piece.
         parts: [{ text, probability, top: [{ text, probability }] }], for each token, the likeliest first
   An Error that it rejects with is shown as it is. */
"use strict";

function startPage(backend) {
  const find = (id) => document.getElementById(id);
  const form = find("form"), prompt = find("prompt"), generate = find("generate"), stop = find("stop");
  const status = find("status"), problem = find("problem"), progress = find("progress");
  const text = find("text"), details = find("details");
  const LEVELS = [0.01, 0.05, 0.2, 0.5]; // probabilities that part the classes p0 to p4 of page.css

  let pieces = []; // of the text: { element, text, parts }
  let current = -1; // the piece of which the alternatives are shown
  let running = null; // what stops the text that is being written

  function element(name, content = "", className = "") {
    const made = document.createElement(name);
    made.append(content);
    made.className = className;
    return made;
  }

  function percent(probability) {
    const value = 100 * probability;
    if (value < 0.01) return "< 0.01\u00A0%";
    return `${value < 1 ? value.toFixed(2) : value < 10 ? value.toFixed(1) : value.toFixed(0)}\u00A0%`;
  }

  /* A text with its invisible characters named. */
  function visible(string) {
    const names = { " ": "space", "\n": "line break", "\r": "carriage return", "\t": "tab", "": "nothing" };
    return string in names ? element("em", names[string]) : element("code", string.replace(/\n/g, "\u21B5"));
  }

  /* How much of a long work is done; nothing is shown when all is. */
  function showProgress(share) {
    progress.hidden = share >= 1;
    progress.value = share;
  }

  /* A message about what went wrong; "": nothing. */
  function explain(message) {
    problem.textContent = message;
    problem.hidden = message === "";
  }

  /* --- the alternatives --- */

  /* Shows what a piece could have been; -1: none. */
  function choose(index) {
    if (pieces[current]) pieces[current].element.classList.remove("current");
    current = index;
    const piece = pieces[current];
    details.hidden = !piece;
    if (!piece) return;
    piece.element.classList.add("current");
    find("alternatives").replaceChildren(...piece.parts.flatMap(explanation));
  }

  function explanation({ text: chosen, probability, top }) {
    const line = element("p"), list = element("ol");
    line.append(visible(chosen), ` had a probability of ${percent(probability)}. The likeliest:`);
    list.append(...top.map((other) => alternative(other, other.text === chosen)));
    if (!top.some((other) => other.text === chosen)) list.append(alternative({ text: chosen, probability }, true));
    return [line, list];
  }

  function alternative({ text: content, probability }, isChosen) {
    const item = element("li", visible(content), isChosen ? "chosen" : ""), track = element("span"), bar = element("div", "", "bar");
    bar.style.width = `${100 * probability}%`;
    track.append(bar);
    item.append(track, element("span", (isChosen ? "\u2713 " : "") + percent(probability), "percent"));
    return item;
  }

  /* The index of the piece that an event is about; -1: none. */
  function indexOf(event) {
    return pieces.findIndex((piece) => piece.element === event.target);
  }

  function move(event) {
    const last = pieces.length - 1;
    const places = {
      ArrowRight: current + 1, ArrowDown: current + 10, ArrowLeft: current - 1, ArrowUp: current - 10, Home: 0, End: last,
    };
    if (last < 0 || event.ctrlKey || event.metaKey || event.altKey || !(event.key in places)) return;
    event.preventDefault();
    choose(Math.min(last, Math.max(0, places[event.key])));
    pieces[current].element.scrollIntoView({ block: "nearest" });
  }

  text.addEventListener("keydown", move);
  text.addEventListener("focus", () => pieces[0] && current < 0 && text.matches(":focus-visible") && choose(0));
  text.addEventListener("click", (event) => choose(indexOf(event)));
  text.addEventListener("pointerover", (event) => indexOf(event) >= 0 && choose(indexOf(event)));
  find("close").addEventListener("click", () => choose(-1));
  document.addEventListener("keydown", (event) => event.key === "Escape" && choose(-1));

  /* --- the text --- */

  function begin(content) {
    choose(-1);
    pieces = [];
    text.replaceChildren(element("span", content, "prompt"));
    find("output").scrollIntoView({ block: "nearest" });
  }

  function add({ text: content, probability, parts }) {
    const level = LEVELS.filter((least) => probability >= least).length;
    const made = element("span", content, `p${level}${content.includes("\n") ? " break" : ""}`);
    pieces.push({ element: made, text: content, parts });
    text.append(made);
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
    };
  }

  /* The settings in a few words, which stand there while their fields do not. */
  function summarize() {
    const { numTokens, temperature, topK, topP } = settings(), seed = number("seed");
    const parts = [`${numTokens} tokens`, `temperature ${temperature}`];
    if (topK !== null) parts.push(`top-k ${topK}`);
    if (topP !== null) parts.push(`top-p ${topP}`);
    if (seed !== null) parts.push(`seed ${seed}`);
    find("chosen-settings").textContent = parts.join(", ");
  }

  function setRunning(controller) {
    const focused = document.activeElement;
    running = controller;
    generate.disabled = running !== null;
    stop.disabled = !running;
    text.setAttribute("aria-busy", String(running !== null));
    if (focused === generate || focused === stop) (running ? stop : generate).focus(); // not lost with the button
  }

  function isValid() {
    if (!form.checkValidity()) find("settings").open = true;
    return form.reportValidity();
  }

  async function start() {
    if (generate.disabled || !isValid()) return;
    const chosen = settings(), began = performance.now(), controller = new AbortController();
    const { signal } = controller;
    let tokens = 0, events = 0;
    setRunning(controller);
    explain("");
    status.textContent = "Reading the prompt";
    try {
      await backend.generate(chosen, tell, signal);
      const seconds = (performance.now() - began) / 1000;
      const written = `${tokens} ${tokens === 1 ? "token" : "tokens"}, ${Math.round(tokens / seconds).toLocaleString("en")} a second, seed ${chosen.seed}`;
      status.textContent = `${signal.aborted ? "Stopped after" : "Done:"} ${written}`;
    } catch (error) {
      prompt.setAttribute("aria-invalid", "true");
      explain(error.message);
      status.textContent = "";
    } finally {
      setRunning(null);
      showProgress(1);
    }

    function tell(event) {
      if (events++ === 0) begin(chosen.prompt);
      if (tokens === 0 && event.tokens) status.textContent = "Writing";
      tokens += event.tokens || 0;
      showProgress(tokens === 0 ? event.read : tokens / chosen.numTokens);
      if (event.text) add(event);
    }
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    start();
  });
  form.addEventListener("input", () => {
    summarize();
    prompt.removeAttribute("aria-invalid");
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) start();
  });
  stop.addEventListener("click", () => running.abort());

  find("name").textContent = backend.header.name;
  find("about").textContent = backend.header.about;
  summarize();
  backend
    .load(({ loaded }) => {
      status.textContent = "Unpacking the model";
      showProgress(loaded);
    })
    .then(() => {
      status.textContent = "Ready";
      generate.disabled = false;
    })
    .catch((error) => {
      status.textContent = "";
      explain(`The model cannot be loaded. ${error.message}`);
    })
    .finally(() => showProgress(1));
}
