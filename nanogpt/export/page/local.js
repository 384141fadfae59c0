/* The backend that has the model itself, in a worker, so that the page never waits for it: what page.js needs of any.

   Example:  startPage(NanoGPTLocal.backend(header, script, () => text));     in the page
             NanoGPTLocal.serve();                                            in the worker, which runs the same script
   Page to worker: { load: { header, text } }, { generate: settings }, { stop: true }.
   Worker to page: { events: [event] }, then { done: true } or { error: text }. One request at a time. */
"use strict";

const NanoGPTLocal = (() => {
  const SLICE_MS = 30; // work between two messages

  /* --- in the page --- */

  /* header: as in the file. script: the source of the worker. text: a function that returns the weights. */
  function backend(header, script, text) {
    let worker;

    function ask(request, tell, signal) {
      return new Promise((resolve, reject) => {
        worker.onmessage = ({ data: { events = [], done, error } }) => {
          events.forEach(tell);
          if (done) resolve();
          if (error !== undefined) reject(new Error(error));
        };
        worker.onerror = ({ message }) => reject(new Error(message));
        if (signal) signal.addEventListener("abort", () => worker.postMessage({ stop: true }));
        worker.postMessage(request);
      });
    }

    return {
      header,
      async load(tell) {
        worker = new Worker(URL.createObjectURL(new Blob([script], { type: "text/javascript" })));
        await ask({ load: { header, text: text() } }, tell);
      },
      generate: (settings, tell, signal) => ask({ generate: settings }, tell, signal),
    };
  }

  /* --- in the worker --- */

  function serve() {
    let model, tokenizer, stopped;

    async function load({ header, text }) {
      tokenizer = NanoGPTText.tokenizer(header.tokenizer);
      model = NanoGPT.open(header, await NanoGPTWeights.read(header, text, (loaded) => tell([{ loaded }])));
    }

    async function generate(settings) {
      const work = NanoGPT.generate(model, tokenizer, settings);
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
        await (data.load ? load(data.load) : generate(data.generate));
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
