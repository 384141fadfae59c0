/* Runs the model of a page that `nanogpt export --format html` wrote, in Node.

   Run:  node html_page.js FILE < {"code": "...", "values": {...}}
   The code is the body of an async function of page and values, and prints what it returns, as JSON. page has the
   objects of the scripts, header, model(), tokenizer() and all(). With values.plain there is no WebAssembly. */
"use strict";
const fs = require("fs"), vm = require("vm");

const html = fs.readFileSync(process.argv[2], "utf8");
const { code, values } = JSON.parse(fs.readFileSync(0, "utf8"));
const scripts = [...html.matchAll(/<script([^>]*)>([^]*?)<\/script>/g)];
const content = (id) => scripts.find(([, attributes]) => attributes.includes(`id="${id}"`))[2];
const script = scripts.find(([, attributes]) => attributes === "")[2];

const world = vm.createContext({ TextEncoder, TextDecoder, ReadableStream, DecompressionStream });
if (values.plain) vm.runInContext("delete globalThis.WebAssembly", world);
const names = vm.runInContext(
  `${script.slice(0, script.lastIndexOf("\nif (globalThis.document)"))}
  ;({ NanoGPT, NanoGPTProducts, NanoGPTSampling, NanoGPTText, NanoGPTWeights })`, world);
const page = {
  ...names,
  header: JSON.parse(content("model")),
  tokenizer() { return names.NanoGPTText.tokenizer(this.header.tokenizer); },
  async model(text = content("weights")) {
    return names.NanoGPT.open(this.header, await names.NanoGPTWeights.read(this.header, text));
  },
  weights: () => content("weights"),
  /* What a generator yields, but for the progress of reading a prompt. */
  all(work) { return [...work].filter((event) => event.read === undefined); },
};
const AsyncFunction = (async () => {}).constructor;
new AsyncFunction("page", "values", code)(page, values).then((answer) => fs.writeSync(1, JSON.stringify(answer ?? null)));
