// Text of exported ONNX folders in transformers.js, offline: JSON in, JSON out.
//
// Run:    npm i --ignore-scripts @huggingface/transformers@4.3.1      in a folder of its own, FOLDER
//         node tests/transformers_js.mjs FOLDER < request
// Request: {"model": path, "prompts": [text], "count": new tokens, "texts": [to encode]}. Answer: greedy texts of all
// prompts in one batch, the ids of each text, and its text again.

import { readFileSync } from "node:fs";
import { basename, dirname } from "node:path";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(pathToFileURL(`${process.argv[2]}/`));
const { AutoTokenizer, env, pipeline } = await import(pathToFileURL(require.resolve("@huggingface/transformers")));
const { model, prompts, count, texts } = JSON.parse(readFileSync(0, "utf8"));
Object.assign(env, { allowRemoteModels: false, localModelPath: dirname(model) });

const generator = await pipeline("text-generation", basename(model));
const settings = { max_new_tokens: count, do_sample: false };
const written = [];
for (const prompt of prompts) written.push((await generator(prompt, settings))[0].generated_text);
const tokenizer = await AutoTokenizer.from_pretrained(basename(model));
const ids = texts.map((text) => tokenizer.encode(text));
const decoded = ids.map((tokens) => (tokens.length ? tokenizer.decode(tokens) : ""));
console.log(JSON.stringify({ written, ids, decoded }));
