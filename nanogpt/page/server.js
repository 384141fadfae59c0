/* The backend that asks `nanogpt serve`, over HTTP. page.js says what a backend is.

   Example:  startPage(NanoGPTServer.backend())
   The paths are those of docs/server.md. An API key is asked for when the server wants one, and kept for as long as the
   tab is open. */
"use strict";

const NanoGPTServer = (() => {
  const KEY = "nanogpt.key", TOP = 10, RETRY_MS = 2000;
  const SILENT = "The server does not answer: is `nanogpt serve` still running?";

  /* What a browser may refuse to keep. */
  const kept = {
    get: () => { try { return sessionStorage.getItem(KEY); } catch { return null; } },
    set: (key) => { try { sessionStorage.setItem(KEY, key); } catch { /* asked for again after a reload */ } },
  };

  function backend() {
    let key = kept.get(), askForKey, asking = null, context = Infinity;

    /* Another key than the one that was refused. All requests that wait for one share the question. */
    function newKey(refused) {
      if (key !== refused) return key;
      asking ??= askForKey(refused ? "This key is wrong. Give the right one." : "").then((given) => kept.set((key = given))).finally(() => (asking = null));
      return asking;
    }

    /* The answer to a request. Throws an Error, for people, with its status and the field that is wrong; null: none is. */
    async function ask(path, body, signal) {
      for (;;) {
        const used = key, headers = key ? { Authorization: `Bearer ${asBytes(key)}` } : {};
        let response;
        try {
          response = await fetch(path, body ? { method: "POST", headers, signal, body: JSON.stringify(body) } : { headers, signal });
        } catch (error) {
          if (signal?.aborted) throw error;
          throw failure(SILENT);
        }
        if (response.ok) return response;
        if (response.status === 401) {
          await newKey(used);
          continue;
        }
        const { error } = await response.json().catch(() => ({}));
        throw failure(error?.message || `The server answers with ${response.status}.`, { status: response.status, param: error?.param });
      }
    }

    const asBytes = (text) => String.fromCharCode(...new TextEncoder().encode(text)); // as a header has it
    const failure = (message, { status = null, param = null } = {}) => Object.assign(new Error(message), { status, param });

    /* The data of server-sent events, with the names of the events. */
    async function* events(response) {
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = "", part = await reader.read(); !part.done; part = await reader.read()) {
        const blocks = (rest + part.value).split("\n\n");
        rest = blocks.pop();
        for (const block of blocks) {
          const lines = block.split("\n"), field = (name) => lines.find((line) => line.startsWith(`${name}: `))?.slice(name.length + 2);
          if (field("data") !== undefined) yield { event: field("event"), data: field("data") };
        }
      }
    }

    /* The request for a text. A prompt longer than the context is cut, as the model does it. */
    async function request({ prompt, ids, first, numTokens, temperature, topK, topP, seed, model }) {
      let given = prompt === "" ? null : prompt;
      if (ids) given = [...ids, ...(first == null ? [] : [first])].slice(-context);
      else if (given && new TextEncoder().encode(given).length > context) given = (await tokens(given)).slice(-context);
      return {
        prompt: given, max_tokens: numTokens, temperature, top_k: topK ?? 0, top_p: topP ?? 1, seed, logprobs: TOP,
        stream: true, return_token_ids: true, ...(model && { model }),
      };
    }

    const tokens = async (text) => (await (await ask("/tokenize", { prompt: text })).json()).tokens;

    /* A text as it is made, in the events of a backend. settings.firstPart: the token that `first` is. */
    async function generate(settings, tell, signal) {
      const wish = await request(settings), { first, firstPart } = settings;
      let pending = [];
      function add(part, text) {
        pending.push(part);
        if (text === "") return tell({ tokens: 1 });
        tell({ text, tokens: 1, probability: pending.reduce((all, one) => all * one.probability, 1), parts: pending });
        pending = [];
      }
      try {
        const response = await ask("/v1/completions", { ...wish, max_tokens: wish.max_tokens - (first == null ? 0 : 1) }, signal);
        tell({ read: 0 });
        if (first != null) {
          tell({ prompt: settings.ids });
          add(firstPart, firstPart.text.startsWith("bytes:") ? "" : firstPart.text);
        }
        for await (const { data } of events(response)) {
          if (data === "[DONE]") return;
          const { choices, error } = JSON.parse(data);
          if (error) throw failure(error.message, error);
          const [choice] = choices;
          if (choice?.prompt_token_ids && first == null) tell({ prompt: settings.ids || choice.prompt_token_ids });
          if (choice) partsOf(choice).forEach(([part, text]) => add(part, text));
          if (choice?.finish_reason === "stop") tell({ ended: true });
        }
        throw new TypeError("the stream has no end");
      } catch (error) {
        if (!signal.aborted) throw error instanceof TypeError ? failure(SILENT) : error; // a connection that breaks is a TypeError
      }
    }

    /* As the backend in the page answers: see `inspect` of engine.js. */
    async function inspect({ ids, attention = null, lens = false, next = false, model }, tell, signal) {
      const wish = { tokens: ids, ...(model && { model }), attention, lens, top: TOP, distribution: next };
      const answer = await (await ask("/inspect", wish, signal)).json();
      return { tokens: answer.tokens.map(scored), attention: answer.attention, lens: lensOf(answer.lens), next: nextOf(answer.next) };
    }

    const next = async ({ ids, model }, signal) => (await inspect({ ids: ids.slice(-context), next: true, model }, () => {}, signal)).next;

    /* The served model. `nanogpt serve --run` may have none yet: then it is waited for. */
    async function served(tell) {
      for (;;) {
        const found = (await (await ask("/v1/models")).json()).data.find((model) => model.max_model_len);
        if (found) return found;
        tell({ waiting: "The training has saved no checkpoint yet: this page waits for the first" });
        await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
      }
    }

    async function load(tell, needKey) {
      askForKey = needKey;
      const model = await served(tell);
      context = model.max_model_len;
      const run = await optional(ask("/run"));
      const shape = await optional(ask("/inspect", { text: "\n", top: 1 }).catch(() => ask("/inspect", { tokens: [0], top: 1 })));
      return {
        name: model.id, about: describe(run, shape, context), context, run,
        layers: shape?.layers, heads: shape?.heads, inspects: shape !== null,
      };
    }

    /* What a training that goes on reports, until it ends or the signal says so. tell: { row }, { checkpoint }, { restart }
       when earlier rows no longer count, or { end }. */
    async function follow(tell, signal) {
      const response = await ask("/run/events", null, signal);
      if (response.status === 204) return; // no training runs
      for await (const { event, data } of events(response)) tell({ [event]: JSON.parse(data) });
    }

    return {
      header: { name: "NanoGPT", about: "" },
      load, generate, inspect, next, follow, trainingPanel: TrainingPanel.create,
      run: async () => (await ask("/run")).json(),
      tokenize: tokens,
    };
  }

  /* An answer in JSON; null if there is no such path, or nothing there. */
  async function optional(response) {
    try {
      return await (await response).json();
    } catch (error) {
      if (error.status === 404) return null;
      throw error;
    }
  }

  function describe(run, shape, context) {
    const last = run?.rows.findLast((row) => row.val_loss !== undefined);
    const made = shape ? `${Dom.plural(shape.layers, "layer")} of ${Dom.plural(shape.heads, "attention head")}, ` : "";
    const trained = run?.running ? " It is being trained." : last ? ` Trained for ${Dom.plural(last.step, "update")}, to a validation loss of ${last.val_loss.toFixed(3)}.` : "";
    return `Your model: ${made}a context of ${Dom.plural(context, "token")}.${trained}`;
  }

  const likely = ({ id, text, logprob }) => ({ id, text, probability: Math.exp(logprob) });
  const lensOf = (lens) => lens && lens.map((layer) => layer.map((guesses) => guesses.map(likely)));
  const nextOf = ({ entropy, top, logprobs }) => ({ entropy, top: top.map(likely), logits: logprobs });
  const scored = ({ id, token, text, logprob, entropy, rank, top }) => ({
    id, entropy, rank, adds: text, text: token, top: top.map(likely), probability: logprob == null ? undefined : Math.exp(logprob),
  });

  /* The tokens of a chunk, each with its text. Offsets count characters, not JavaScript's halves of some. */
  function partsOf({ text, logprobs, token_ids: ids }) {
    const chars = Array.from(text), offsets = logprobs.text_offset, from = offsets[0];
    return ids.map((id, i) => {
      const name = logprobs.tokens[i], likeliest = Object.entries(logprobs.top_logprobs[i] || {}).slice(0, TOP);
      const part = {
        id, text: name, probability: Math.exp(logprobs.token_logprobs[i]),
        top: likeliest.map(([text, logprob]) => ({ text, probability: Math.exp(logprob) })),
      };
      return [part, chars.slice(offsets[i] - from, i + 1 < ids.length ? offsets[i + 1] - from : undefined).join("")];
    });
  }

  return { backend };
})();
