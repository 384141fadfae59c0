/* What the parts of the page share: elements, numbers as text, and the words that explain each number.

   Example:  Dom.element("p", "Hello", "hint"); Dom.percent(0.043); Dom.what("entropy")   */
"use strict";

const Dom = (() => {
  const find = (id) => document.getElementById(id);

  function element(name, content = "", className = "") {
    const made = document.createElement(name);
    made.append(...[content].flat());
    made.className = className;
    return made;
  }

  function button(content, onClick, className = "quiet") {
    const made = element("button", content, className);
    made.type = "button";
    made.addEventListener("click", onClick);
    return made;
  }

  /* A select or an input, of a range or another kind, with its label before it. */
  function field(label, control) {
    return element("label", [element("span", label), control]);
  }

  function select(options, value, onChange) {
    const made = element("select");
    made.append(...options.map(([value, label]) => new Option(label, value)));
    made.value = value;
    made.addEventListener("change", () => onChange(made.value));
    return made;
  }

  function range(value, { min, max, step = 1 }, onInput) {
    const made = element("input");
    Object.assign(made, { type: "range", min, max, step });
    made.value = value;
    made.addEventListener("input", () => onInput(Number(made.value)));
    return made;
  }

  /* An element of SVG. */
  function svg(name, attributes = {}, children = []) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function percent(probability) {
    const value = 100 * probability;
    if (value < 0.01) return "< 0.01\u00A0%";
    return `${value < 1 ? value.toFixed(2) : value < 10 ? value.toFixed(1) : value.toFixed(0)}\u00A0%`;
  }

  /* Whether the name of a token spells bytes that are no text by themselves. */
  const isBytes = (name) => /^(bytes:)?(\\x[0-9a-f]{2})+$/i.test(name);

  /* A text with its invisible characters named. */
  function visible(string) {
    const names = { " ": "space", "\n": "line break", "\r": "carriage return", "\t": "tab", "": "nothing" };
    return string in names ? element("em", names[string]) : element("code", marked(string));
  }

  /* A text in which spaces, line breaks, tabs and control characters are seen; bytes are spelled as \xc3. */
  const marked = (string) => (isBytes(string) ? string.replace("bytes:", "") : string).replace(/\n/g, "\u21B5").replace(/\t/g, "\u21E5")
    .replace(/^ | $/g, "\u00B7").replace(/[\0-\x1F\x7F]/g, (char) => `\\x${char.charCodeAt().toString(16).padStart(2, "0")}`);

  const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

  /* --- what is this? --- */

  const WORDS = {
    probability: ["probability", "How sure the model was, before this token was chosen, that it comes next. All tokens of the vocabulary together have 100 %."],
    surprise: ["surprise", "How unexpected a token was: minus the logarithm of its probability, in nats. 0: the model was sure of it. 0.7: as surprising as a coin that shows heads. 4.6: one chance in a hundred."],
    entropy: ["entropy", "How undecided the model was before the token: the surprise it expected, in nats. 0: only one token was possible. High: many were about as good."],
    rank: ["rank", "The place of this token among all, the likeliest first. 1: the model's own first choice."],
    loss: ["mean surprise", "The average of the surprise over the text: the loss, the number that the training makes small. A text like those that the model has learnt from has about the validation loss; a strange one has more."],
    perplexity: ["perplexity", "The mean surprise in another form: the model was, on average, as unsure as if it had to choose among this many tokens that are all equally likely."],
    token: ["a token", "A model reads and writes tokens, the pieces of its vocabulary: characters, bytes, or pieces of words. Each has a number, its id. Here each token has a frame of its own."],
    temperature: ["temperature", "Below 1 the likely tokens become likelier still, and the text safer; above 1 all become more alike, and the text wilder. At 0 the likeliest token is always taken."],
    "top-k": ["top-k", "Only the k likeliest tokens may be chosen; all others are cut off."],
    "top-p": ["top-p", "Only the likeliest tokens may be chosen, as many as are needed to reach this share of the probability; the tail is cut off."],
    seed: ["the seed", "The number from which the dice are made. The same seed with the same settings writes the same text again."],
    attention: ["attention", "At every token each head of each layer looks back at the text so far, and divides its attention among the tokens: all shares together are 100 %. Some heads look at the token before, some at the beginning of the word, some at nothing that has a name."],
    lens: ["the lens", "A model changes its mind layer by layer. The lens stops after each layer and asks the output what it would say already now. Early layers know little; the last one gives the prediction."],
    "train loss": ["the training loss", "The mean surprise at the texts that the model learns from, batch by batch, in nats per token."],
    "val loss": ["the validation loss", "The mean surprise at texts that are kept apart from the training. When it no longer falls while the training loss does, the model begins to learn by heart."],
    step: ["a step", "One update of all weights of the model, after it has seen a batch of texts."],
    checkpoint: ["a checkpoint", "The model as it was at one moment of the training, saved in a file. Choose an early one, and see how it wrote then."],
  };

  let shown; // the button whose explanation is open

  /* A button that explains a word. */
  function what(word) {
    const [name] = WORDS[word];
    const made = button([element("span", "?"), element("span", `What is ${name}?`, "unseen")], () => explain(made, word), "what");
    made.firstChild.setAttribute("aria-hidden", "true");
    return made;
  }

  function explain(from, word) {
    const box = find("what");
    const again = shown === from && box.matches(":popover-open");
    if (box.matches(":popover-open")) box.hidePopover();
    if (again) return;
    shown = from;
    const [name, text] = WORDS[word];
    box.replaceChildren(element("strong", name[0].toUpperCase() + name.slice(1)), element("p", text));
    box.showPopover();
    const { left, bottom, top } = from.getBoundingClientRect(), { offsetWidth: width, offsetHeight: height } = box;
    box.style.left = `${Math.max(8, Math.min(left - 16, innerWidth - width - 8))}px`;
    box.style.top = `${bottom + height + 16 > innerHeight ? Math.max(8, top - height - 8) : bottom + 8}px`;
    box.focus();
  }

  /* Puts a button behind each element that names a word in data-what. */
  function explainAll() {
    for (const one of document.querySelectorAll("[data-what]")) one.after(what(one.dataset.what));
    find("what").addEventListener("toggle", ({ newState }) => newState === "closed" && shown?.isConnected && find("what").contains(document.activeElement) && shown.focus());
  }

  /* A number with its name, and what it is. */
  function figure(word, name, value) {
    return element("div", [element("dt", [name, what(word)]), element("dd", value)]);
  }

  return { find, element, button, field, select, range, svg, percent, plural, isBytes, visible, marked, what, explainAll, figure };
})();
