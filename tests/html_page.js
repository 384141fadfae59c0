/* Runs a page that `nanogpt export --format html` wrote, in Node, with as much of a document as page.js asks for.

   Run:  node html_page.js FILE < {"code": "...", "values": {...}}
   The code is the body of an async function of page and values, and prints what it returns, as JSON. page has header,
   bytes(), and the objects of the scripts; page.start() begins as a browser does, and returns the elements by id. */
"use strict";
const fs = require("fs"), vm = require("vm");

const html = fs.readFileSync(process.argv[2], "utf8");
const { code, values } = JSON.parse(fs.readFileSync(0, "utf8"));
const scripts = [...html.matchAll(/<script([^>]*)>([^]*?)<\/script>/g)];
const content = (id) => scripts.find(([, attributes]) => attributes.includes(`id="${id}"`))[2];
const script = scripts.find(([, attributes]) => attributes === "")[2];
const elements = {};
let hasFocus = false;

class Element {
  constructor(tag) {
    Object.assign(this, { tag, children: [], listeners: {}, attributes: {}, value: "", hidden: false, className: "" });
    this.classList = {
      add: (name) => (this.className = [...this.names(), name].join(" ")),
      remove: (name) => (this.className = this.names().filter((other) => other !== name).join(" ")),
    };
  }
  names() { return this.className.split(" ").filter(Boolean); }
  get textContent() { return this.children.map((child) => child.textContent ?? child).join(""); }
  set textContent(text) { this.children = [String(text)]; }
  append(...added) { this.children.push(...added); }
  replaceChildren(...added) { this.children = added; }
  addEventListener(kind, listener) { (this.listeners[kind] ||= []).push(listener); }
  setAttribute(name, value) { this.attributes[name] = value; }
  removeAttribute(name) { delete this.attributes[name]; }
  scrollIntoView() {}
  reportValidity() { return true; }
  matches() { return hasFocus; }
  fire(kind, event = {}) {
    const whole = { target: this, preventDefault() {}, ...event };
    hasFocus = kind === "focus";
    for (const listener of this.listeners[kind] || []) listener(whole);
  }
}

for (const [, tag, attributes] of html.slice(0, html.indexOf("<script")).matchAll(/<(\w+)([^>]*)>/g)) {
  const id = /\bid="([^"]+)"/.exec(attributes);
  if (!id) continue;
  elements[id[1]] = Object.assign(new Element(tag), {
    value: /\bvalue="([^"]*)"/.exec(attributes)?.[1] ?? "", hidden: / hidden/.test(attributes),
    disabled: / disabled/.test(attributes),
  });
}
for (const id of ["model", "weights"]) elements[id] = Object.assign(new Element("script"), { children: [content(id)] });
const document = { getElementById: (id) => elements[id], createElement: (tag) => new Element(tag) };
for (const [id, element] of Object.entries(elements)) if (!element) throw new Error(id);

const start = script.lastIndexOf("\nstartPage(");
const world = vm.createContext({ document, atob, performance, MessageChannel, TextEncoder, TextDecoder, console, setTimeout });
const names = vm.runInContext(
  `${script.slice(0, start)}\n;({ NanoGPT, NanoGPTSampling, NanoGPTText })`, world);
const page = {
  ...names,
  header: JSON.parse(content("model")),
  tokenizer() { return names.NanoGPTText.tokenizer(this.header.tokenizer); },
  /* Takes from a generator what it yields, but for pauses and progress; `result` is what it returns. */
  all(work) {
    const found = [];
    for (let step = work.next(); ; step = work.next()) {
      if (step.done) return Object.assign(found, { result: step.value });
      if (step.value && step.value.read === undefined && step.value.loaded === undefined) found.push(step.value);
    }
  },
  model() {
    const bytes = this.all(names.NanoGPT.decodeBase64(content("weights"), this.header.bytes)).result;
    return names.NanoGPT.open(this.header, bytes);
  },
  async start() {
    vm.runInContext(script.slice(start), world);
    await this.until(() => !elements.generate.disabled || !elements.problem.hidden);
    return elements;
  },
  async until(condition) { while (!condition()) await new Promise((resolve) => setTimeout(resolve, 1)); },
};
const AsyncFunction = (async () => {}).constructor;
new AsyncFunction("page", "values", code)(page, values).then((answer) => fs.writeSync(1, JSON.stringify(answer ?? null)));
