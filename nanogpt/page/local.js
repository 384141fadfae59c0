/* The backend that has the model itself, in a worker, so that the page never waits for it. page.js says what a backend is.

   Example:  startPage(NanoGPTLocal.backend(header, script, () => text));     in the page
             NanoGPTLocal.serve();                                            in the worker, which runs the same script
   Page to worker: { load: { header, text } }, { work: name, given }, { stop: true }.
   Worker to page: { events: [event] }, then { done: true } or { error: text }. One request at a time: others wait. */
"use strict";

const NanoGPTLocal = (() => {
  const SLICE_MS = 30; // work between two messages

  /* --- in the page --- */

  /* header: as in the file. script: the source of the worker. text: a function that returns the weights. */
  function backend(header, script, text) {
    let worker, before = Promise.resolve();

    function ask(request, tell, signal) {
      const stop = () => worker.postMessage({ stop: true });
      const answer = before.then(() => new Promise((resolve, reject) => {
        if (signal?.aborted) return resolve();
        worker.onmessage = ({ data: { events = [], done, error } }) => {
          events.forEach(tell);
          if (done) resolve();
          if (error !== undefined) reject(new Error(error));
        };
        worker.onerror = ({ message }) => reject(new Error(message));
        signal?.addEventListener("abort", stop);
        worker.postMessage(request);
      })).finally(() => signal?.removeEventListener("abort", stop));
      before = answer.catch(() => {});
      return answer;
    }

    /* What a generator finds; null if it was stopped. */
    async function find(work, given, tell, signal) {
      let found = null;
      await ask({ work, given }, (event) => (event.found ? (found = event.found) : tell(event)), signal);
      return found;
    }

    const { config } = header;
    let tokenizer; // the page's own, once it counts tokens
    return {
      header,
      async load(tell) {
        worker = new Worker(URL.createObjectURL(new Blob([script], { type: "text/javascript" })));
        await ask({ load: { header, text: text() } }, tell);
        return { context: config.block_size, layers: config.n_layer, heads: config.n_head, vocabulary: config.vocab_size };
      },
      generate: (settings, tell, signal) => ask({ work: "generate", given: settings }, tell, signal),
      inspect: (wish, tell, signal) => find("inspect", wish, tell, signal),
      next: (wish, signal) => find("next", wish, () => {}, signal),
      tokenize: async (written) => (tokenizer ??= NanoGPTText.tokenizer(header.tokenizer)).encode(written),
    };
  }

  /* --- in the worker --- */

  function serve() {
    let model, tokenizer, stopped;

    async function load({ header, text }) {
      tokenizer = NanoGPTText.tokenizer(header.tokenizer);
      model = NanoGPT.open(header, await NanoGPTWeights.read(header, text, (loaded) => tell([{ loaded }])));
    }

    async function run(name, given) {
      const work = NanoGPT[name](model, tokenizer, given);
      for (let finished = false; !finished && !stopped; await turn()) {
        const events = [], end = performance.now() + SLICE_MS;
        while (!finished && performance.now() < end) {
          const { value, done } = work.next();
          if (value) events.push(value);
          finished = done;
        }
        tell(events);
      }
    }

    const tell = (events) => postMessage({ events });

    onmessage = async ({ data }) => {
      if (data.stop) return (stopped = true);
      stopped = false;
      try {
        await (data.load ? load(data.load) : run(data.work, data.given));
        postMessage({ done: true });
      } catch ({ message }) {
        postMessage({ error: message });
      }
    };
  }

  /* Lets a message come in. */
  function turn() {
    return new Promise((resolve) => {
      const { port1, port2 } = new MessageChannel();
      port1.onmessage = () => (port1.close(), resolve());
      port2.postMessage(null);
    });
  }

  return { backend, serve };
})();
