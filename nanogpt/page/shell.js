/* What holds the page together: tabs, the tree of texts, two texts side by side, the tour, the question for a key.

   Example:  const tabs = Tabs.create(panels, views); tabs.open("lens")   */
"use strict";

const Tabs = (() => {
  const narrow = () => matchMedia("(max-width: 59.99rem)").matches;

  function create(panels, views) {
    const panel = Dom.find("panel"), buttons = [...document.querySelectorAll("[role=tab]")];
    const nameOf = (button) => button.id.replace("tab-", "");
    let current = "alternatives", view = views[0];

    /* The tabs for which there is something: by name. */
    function offer(offered) {
      for (const button of buttons) button.hidden = nameOf(button) in offered && !offered[nameOf(button)];
    }

    function open(name, show = true) {
      const changed = name !== current;
      current = name;
      for (const button of buttons) {
        const selected = nameOf(button) === name;
        button.setAttribute("aria-selected", String(selected));
        button.tabIndex = selected ? 0 : -1;
        Dom.find(`panel-${nameOf(button)}`).hidden = !selected;
      }
      if (show) sheet(true);
      if (changed) views.forEach((one) => one.paint(TextView.byProbability));
      for (const list of document.querySelectorAll("[data-legend]")) list.hidden = (list.dataset.legend === "attention") !== (name === "attention");
      refresh();
    }

    /* On a small screen the tabs are at its lower edge, and what they show is above them while it is wanted. */
    function sheet(open) {
      panel.classList.toggle("open", open);
      for (const button of buttons) button.setAttribute("aria-expanded", String(open || !narrow()));
    }

    function refresh() {
      if (current !== "alternatives") panels[current].show(view, view.chosen);
      if (current !== "attention" || !view.text) views.forEach((one) => one.paint(TextView.byProbability));
    }

    function choose(of, piece, pinned) {
      if (piece) view = of;
      if (!view.text) view = views[0];
      panels.alternatives.show(of, piece, pinned);
      if (piece && current === "training") open("alternatives");
      else if (current !== "alternatives") panels[current].show(view, view.chosen);
      if (piece) sheet(true);
      else if (of === view) sheet(false);
      if (pinned && narrow()) of.root.querySelector(".current").scrollIntoView({ block: "nearest" }); // not below the sheet
    }

    for (const button of buttons) {
      button.addEventListener("click", () => {
        const again = nameOf(button) === current && panel.classList.contains("open");
        open(nameOf(button));
        if (again) sheet(false);
      });
      button.addEventListener("keydown", (event) => {
        const shown = buttons.filter((one) => !one.hidden), place = shown.indexOf(button);
        const next = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: shown.length - 1 }[event.key];
        if (next === undefined) return;
        event.preventDefault();
        const other = shown[(next + shown.length) % shown.length];
        open(nameOf(other));
        other.focus();
      });
    }
    return { offer, open, refresh, choose, view: () => view, current: () => current };
  }

  return { create };
})();

/* The tree of texts below the text. */
const Texts = (() => {
  const { element, button } = Dom;

  function create(app, view, showText) {
    const list = Dom.find("tree"), section = Dom.find("texts"), bar = Dom.find("text-bar");

    function render() {
      const rows = app.tree.inOrder();
      section.hidden = rows.length === 0;
      bar.hidden = rows.length === 0;
      Dom.find("on").disabled = app.isRunning();
      const focused = list.contains(document.activeElement) ? document.activeElement.dataset.row : null;
      list.replaceChildren(...rows.map(({ text, depth }, i) => row(text, depth, i)));
      if (focused != null) list.querySelector(`[data-row="${focused}"]`)?.focus();
    }

    function row(text, depth, i) {
      const show = button([element("strong", text.name), preview(text)], () => showText(text), "choice");
      if (text === view.text) show.setAttribute("aria-current", "true");
      show.dataset.row = i;
      show.addEventListener("keydown", walk);
      const rename = button("\u270E", () => naming(text, item), "icon"), remove = button("\u00D7", () => drop(text), "icon");
      rename.setAttribute("aria-label", `Rename ${text.name}`);
      remove.setAttribute("aria-label", `Remove ${text.name}`);
      remove.disabled = app.isRunning();
      const item = element("li", [show, rename, remove]);
      item.style.setProperty("--depth", Math.min(depth, 8));
      if (depth > 0) show.prepend(element("span", `branch of ${text.parent.name}: `, "unseen"));
      return item;
    }

    /* Where it leaves its parent, and how it goes on. */
    function preview(text) {
      const parts = (from, to) => text.pieces.slice(from, to).map((piece) => piece.text).join("").replace(/\s+/g, " ");
      const own = parts(text.at, text.at + 80), before = text.parent ? parts(Math.max(0, text.at - 16), text.at) : "";
      return element("span", [before && `\u2026${before}`, element("b", own || text.prompt.replace(/\s+/g, " "))], "preview");
    }

    /* Up and down goes through the texts, left to the one that a text branches from. */
    function walk(event) {
      const rows = app.tree.inOrder().map(({ text }) => text), place = Number(event.target.dataset.row);
      const next = { ArrowDown: place + 1, ArrowUp: place - 1, ArrowLeft: rows.indexOf(rows[place].parent) }[event.key];
      if (next === undefined || !rows[next]) return;
      event.preventDefault();
      showText(rows[next]);
      list.querySelector(`[data-row="${next}"]`).focus();
    }

    function naming(text, item) {
      const input = element("input");
      input.value = text.name;
      input.maxLength = 60;
      input.setAttribute("aria-label", "Name of the text");
      let over = false;
      const done = (keep) => {
        if (over) return;
        over = true;
        if (keep && input.value.trim()) text.name = input.value.trim();
        render();
        list.querySelectorAll("li")[app.tree.inOrder().findIndex((row) => row.text === text)]?.querySelector(".icon").focus();
      };
      input.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== "Escape") return;
        event.preventDefault();
        done(event.key === "Enter");
      });
      input.addEventListener("blur", () => done(true));
      item.replaceChildren(input);
      input.select();
    }

    function drop(text) {
      const rows = app.tree.inOrder().map((row) => row.text), place = rows.indexOf(text);
      app.tree.remove(text);
      if (view.text === text) showText(text.parent || rows[place + 1] || rows[place - 1] || null);
      render();
      (list.querySelector(`[data-row="${Math.min(place, rows.length - 2)}"]`) || Dom.find("generate")).focus(); // not lost with the button
    }

    const fileName = () => document.title.replace(/[^\w.-]+/g, "_") || "model";
    Dom.find("save-text").addEventListener("click", () => view.text && Tree.download(`${fileName()}.txt`, "text/plain", Tree.content(view.text)));
    Dom.find("save-json").addEventListener("click", () => Tree.download(`${fileName()}.json`, "application/json", Tree.toJSON(app.tree, document.title)));
    return { render };
  }

  return { create };
})();

/* The choice of a checkpoint, and a second text with other settings beside the first. */
const Compare = (() => {
  function create(app, views) {
    const box = Dom.find("compare"), fields = Dom.find("second"), texts = document.querySelector(".texts"), models = Dom.find("models");
    let choices = [], first = null;

    const options = () => [["", "served"], ...choices.map(({ step, model }) => [model, `step ${step.toLocaleString("en")}`])];

    function setModels(checkpoints) {
      choices = checkpoints;
      const value = model();
      models.hidden = choices.length === 0;
      if (models.hidden) return;
      first = Dom.select(options(), value, () => first.dispatchEvent(new Event("input", { bubbles: true })));
      models.replaceChildren(Dom.field("Checkpoint", first), Dom.element("p", "Which moment of the training writes.", "hint"));
      if (box.checked) build();
    }

    const model = () => first?.value ?? "";

    function useModel(chosen) {
      first.value = chosen;
      first.dispatchEvent(new Event("input", { bubbles: true }));
      Dom.find("settings").open = true;
      first.focus();
    }

    /* The fields of the second text; they exist only while they are wanted. */
    function build() {
      const input = (id, label) => {
        const made = Dom.find(id).cloneNode();
        made.id = `${id}-b`;
        made.removeAttribute("aria-describedby");
        made.value = Dom.find(id).value;
        return Dom.element("div", [Dom.field(label, made)]);
      };
      const made = [input("temperature", "Temperature"), input("top-k", "Top-k"), input("top-p", "Top-p")];
      if (choices.length > 0) {
        const control = Dom.select(options(), model(), () => {});
        control.id = "model-b";
        made.unshift(Dom.element("div", [Dom.field("Checkpoint", control)]));
      }
      fields.replaceChildren(Dom.element("legend", "Second text"), ...made);
    }

    box.addEventListener("change", () => {
      fields.hidden = !box.checked;
      if (box.checked) build();
      else fields.replaceChildren();
    });

    /* The settings of the second text, in a list; [] if there is none. */
    function second(settings) {
      if (!box.checked) return [];
      const value = (id) => (Dom.find(id).value.trim() === "" ? null : Number(Dom.find(id).value));
      return [{ ...settings, temperature: value("temperature-b"), topK: value("top-k-b"), topP: value("top-p-b"), model: Dom.find("model-b")?.value ?? settings.model }];
    }

    /* Whether the second text is shown beside the first. */
    function show(both) {
      const two = both || (app.isRunning() && box.checked && views[1].text && !texts.classList.contains("one"));
      texts.classList.toggle("two", Boolean(two));
      views[1].root.parentElement.hidden = !two;
      Dom.find("caption").hidden = !two;
      Dom.find("caption").textContent = describe(views[0].text);
      Dom.find("caption-b").textContent = describe(views[1].text);
      if (!two && views[1].text) views[1].show(null);
    }

    function describe(text) {
      if (!text?.settings) return "";
      const { temperature, topK, topP, model } = text.settings;
      const choice = choices.find((one) => one.model === model);
      return [choice && `step ${choice.step.toLocaleString("en")}`, `temperature ${temperature}`, topK !== null && `top-k ${topK}`, topP !== null && `top-p ${topP}`]
        .filter(Boolean).join(", ");
    }

    return { setModels, model, useModel, second, show };
  }

  return { create };
})();

/* Three steps that say what the page is for. They come by themselves once. */
const Tour = (() => {
  const SEEN = "nanogpt.tour";
  const STEPS = [
    ["form", "Write", "This is your own model. Give it the beginning of a text and press Generate: it continues, one token after the other."],
    ["output", "See", "The colours and underlines say how sure it was. Click a token to see what else it might have written, and click one of those: the text goes on from there, another way."],
    ["panel", "Understand", "Surprise measures any text that you paste. Attention and Lens look inside, layer by layer.{training} A ? explains each number."],
  ];

  const seen = () => { try { return localStorage.getItem(SEEN) !== null; } catch { return false; } };
  const remember = () => { try { localStorage.setItem(SEEN, "1"); } catch { /* it comes again on the next visit */ } };

  let training = ""; // what is said of the training, where there is its tab

  function begin(hasTraining) {
    if (hasTraining) training = " Training shows how it learnt.";
    Dom.find("tour-again").addEventListener("click", () => show(0, true));
    if (!seen()) show(0, false);
  }

  function show(step, focus) {
    const box = Dom.find("tour"), [id, title, text] = STEPS[step], last = step === STEPS.length - 1;
    const end = () => {
      remember();
      light(null);
      const inside = box.contains(document.activeElement);
      box.hidden = true;
      if (inside) Dom.find("prompt").focus();
    };
    const next = Dom.button(last ? "Begin" : "Next", () => (last ? end() : show(step + 1, true)), "");
    const buttons = Dom.element("div", [next, Dom.button("Skip the tour", end)], "buttons");
    if (step > 0) buttons.append(Dom.button("Back", () => show(step - 1, true)));
    if (last) buttons.children[1].remove();
    box.replaceChildren(Dom.element("p", `${step + 1} of ${STEPS.length}`, "hint"), Dom.element("h2", title), Dom.element("p", text.replace("{training}", training)), buttons);
    box.hidden = false;
    box.onkeydown = (event) => event.key === "Escape" && (event.preventDefault(), end());
    light(id);
    if (focus) next.focus();
  }

  /* A ring around the part that a step is about. */
  function light(id) {
    for (const [part] of STEPS) Dom.find(part).classList.toggle("lit", part === id);
  }

  return { begin };
})();

const KeyDialog = (() => {
  /* The key that a person gives. Throws an Error, for people, if they close the dialog. */
  function ask(message) {
    const dialog = Dom.find("key-dialog"), input = Dom.find("key");
    Dom.find("key-problem").textContent = message;
    Dom.find("key-problem").hidden = message === "";
    input.value = "";
    dialog.showModal();
    return new Promise((resolve, reject) => {
      Dom.find("key-form").onsubmit = (event) => {
        event.preventDefault();
        resolve(input.value);
        dialog.close();
      };
      dialog.onclose = () => reject(new Error("This server asks for a key: load the page again to give it."));
    });
  }

  return { ask };
})();
