/* The page of a model: prompt and settings, the text as it is made, and what the model would have written instead.

   It knows no model, only a backend (`local` in engine.js, or a server):
     header     { name, about }
     load(tell)                            a promise; tell({ loaded }) from 0 to 1
     generate(settings, tell, isStopped)   a promise; tell({ read }), tell({ tokens, text, probability, parts }) */
"use strict";

function startPage(backend) {
  const find = (id) => document.getElementById(id);
  const text = find("text"), details = find("details"), status = find("status"), problem = find("problem");
  const generate = find("generate"), progress = find("progress"), stop = find("stop"), prompt = find("prompt");
  const LEVELS = [0.01, 0.05, 0.2, 0.5]; // probabilities that part the classes p0 to p4 of page.css

  let pieces = []; // of the text: { element, text, probability, parts }
  let current = -1; // the piece that the keyboard or a tap has chosen
  let stopped = false, running = false;

  function element(name, content, className) {
    const made = document.createElement(name);
    if (content !== undefined) made.textContent = content;
    if (className) made.className = className;
    return made;
  }

  function percent(probability) {
    const value = 100 * probability;
    if (value > 0 && value < 0.01) return "below 0.01 %";
    return `${value < 1 ? value.toFixed(2) : value < 10 ? value.toFixed(1) : value.toFixed(0)} %`;
  }

  /* A text with its invisible characters named. */
  function visible(string) {
    const names = { " ": "space", "\n": "line break", "\r": "carriage return", "\t": "tab", "": "nothing" };
    return names[string] || string.replace(/\n/g, "\u21B5");
  }

  /* How much of a long work is done; nothing is shown of none, or all. */
  function showProgress(share) {
    progress.hidden = !(share < 1);
    progress.value = share || 0;
  }

  function explain(error) {
    problem.textContent = error ? error.message : "";
    problem.hidden = !error;
  }

  /* --- the alternatives --- */

  /* Shows what a piece could have been; none for -1. */
  function show(index) {
    const piece = pieces[index];
    details.hidden = !piece;
    if (!piece) return;
    details.replaceChildren(
      ...piece.parts.flatMap((part) => {
        const line = element("p");
        line.append(element("code", visible(part.text)), ` had a probability of ${percent(part.probability)}. The likeliest:`);
        const list = element("ol");
        list.append(...part.top.map((other) => alternative(other, other.text === part.text)));
        return [line, list];
      }),
    );
  }

  function alternative({ text: content, probability }, chosen) {
    const item = element("li", undefined, chosen ? "chosen" : ""), meter = element("meter");
    meter.min = 0;
    meter.max = 1;
    meter.value = probability;
    meter.setAttribute("aria-hidden", "true");
    item.append(element("code", visible(content)), ` ${percent(probability)}${chosen ? ", chosen" : ""} `, meter);
    return item;
  }

  function choose(index) {
    if (pieces[current]) pieces[current].element.classList.remove("current");
    current = index;
    if (pieces[current]) {
      pieces[current].element.classList.add("current");
      pieces[current].element.scrollIntoView({ block: "nearest" });
    }
    show(current);
  }

  /* The index of the piece that an event is about; -1: none. */
  function indexOf(event) {
    return pieces.findIndex((piece) => piece.element === event.target);
  }

  function move(event) {
    const last = pieces.length - 1;
    const steps = { ArrowRight: current + 1, ArrowDown: current + 10, ArrowLeft: current - 1, ArrowUp: current - 10 };
    const places = { Home: 0, End: last, Escape: -1 };
    if (last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in places) choose(places[event.key]);
    else if (event.key in steps) choose(Math.min(last, Math.max(0, steps[event.key])));
    else return;
    event.preventDefault();
  }

  text.addEventListener("keydown", move);
  text.addEventListener("focus", () => pieces[0] && current < 0 && text.matches(":focus-visible") && choose(0));
  text.addEventListener("click", (event) => choose(indexOf(event)));
  text.addEventListener("pointerover", (event) => indexOf(event) >= 0 && show(indexOf(event)));
  text.addEventListener("pointerleave", () => show(current));

  /* --- the text --- */

  function begin(content) {
    pieces = [];
    choose(-1);
    text.replaceChildren(element("span", content, "prompt"));
  }

  function add({ text: content, probability, parts }) {
    const level = LEVELS.filter((least) => probability >= least).length;
    const made = element("span", content, `p${level}${content.includes("\n") ? " break" : ""}`);
    pieces.push({ element: made, text: content, probability, parts });
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

  function setRunning(value) {
    running = value;
    generate.disabled = running;
    stop.disabled = !running;
    text.setAttribute("aria-busy", String(running));
  }

  async function start() {
    if (running || generate.disabled || !find("form").reportValidity()) return;
    const chosen = settings(), began = performance.now();
    let tokens = 0;
    explain(null);
    begin(chosen.prompt);
    stopped = false;
    setRunning(true);
    status.textContent = "Writing";
    try {
      await backend.generate(chosen, tell, () => stopped);
      const seconds = (performance.now() - began) / 1000;
      const speed = seconds > 0 ? `, ${Math.round(tokens / seconds)} a second` : "";
      status.textContent = `${stopped ? "Stopped after" : "Done:"} ${tokens} ${tokens === 1 ? "token" : "tokens"}${speed}, seed ${chosen.seed}`;
    } catch (error) {
      explain(error);
      status.textContent = "";
    } finally {
      setRunning(false);
      showProgress();
    }

    function tell(event) {
      showProgress(event.read);
      tokens += event.tokens || 0;
      if (event.text) add(event);
    }
  }

  find("form").addEventListener("submit", (event) => {
    event.preventDefault();
    start();
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) start();
  });
  stop.addEventListener("click", () => (stopped = true));

  find("name").textContent = backend.header.name;
  find("about").textContent = backend.header.about;
  backend
    .load(({ loaded }) => showProgress(loaded))
    .then(() => {
      showProgress();
      status.textContent = "Ready";
      generate.disabled = false;
    })
    .catch((error) => {
      showProgress();
      status.textContent = "";
      explain(new Error(`The model cannot be loaded: ${error.message}`));
    });
}
