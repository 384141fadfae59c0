"""The page of `nanogpt serve` in Chromium: each of its parts, for everybody, against a real server.

Every test ends with a check that the page wrote no message to the console and asked no other address.
"""

import base64
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from conftest import tiny_run
from serving import serving
from waiting import HANGS

from nanogpt import TextModel, load_model
from nanogpt.inference.generate import generate
from nanogpt.scoring import score
from nanogpt.server.config import ServeConfig
from nanogpt.storage.locking import lock

axe = pytest.importorskip("axe_playwright_python.base", reason="axe-playwright-python is not installed")

TEXT = (
    "S\u00fc\u00df: from fairest creatures we desire increase, that thereby beauty's rose might never die.\n"
)
KEY = "a k\u00e9y \u65e5"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with kept checkpoints: bytes, so that a character is in several tokens."""
    settings: dict[str, Any] = {
        "n_layer": 2,
        "block_size": 48,
        "max_iters": 120,
        "eval_interval": 40,
        "log_interval": 10,
        "keep_checkpoints": 3,
        "learning_rate": 1e-2,
    }
    return tiny_run(tmp_path_factory.mktemp("run"), TEXT * 30, **settings)


@pytest.fixture(scope="module")
def model(out: Path) -> TextModel:
    return load_model(out, "cpu")


@pytest.fixture(scope="module")
def config(out: Path) -> ServeConfig:
    return ServeConfig(checkpoint=str(out), port=0, device="cpu", rows=4, grace=1.0)


@pytest.fixture(scope="module")
def url(config: ServeConfig) -> Iterator[str]:
    """The address of a server that all tests share."""
    with serving(config) as url:
        yield url


class Opened(NamedTuple):
    """The page in the browser."""

    page: Any
    messages: list[str]
    """What it wrote to the console."""

    def write(self, prompt: str, **settings: object) -> str:
        """Generate a text to its end. settings: by id, _ for -."""
        self.page.locator("#prompt").fill(prompt)
        self.page.locator("#settings").evaluate("(settings) => (settings.open = true)")
        for name, value in settings.items():
            self.page.locator(f"#{name.replace('_', '-')}").fill(str(value))
        self.page.locator("#settings").evaluate("(settings) => (settings.open = false)")
        self.page.locator("#generate").click()
        return self.text()

    def text(self, which: str = "text") -> str:
        """A text, once the model has ended it."""
        self.page.locator("#generate:enabled").wait_for()
        return self.page.locator(f"#{which}").text_content()

    def measure(self, text: str) -> None:
        """Let the model look at a text."""
        self.page.locator("#prompt").fill(text)
        self.page.locator("#measure").click()
        self.page.locator("#status:has-text('Measured')").wait_for()

    def pin(self, index: int) -> None:
        """Choose a piece of the text."""
        self.page.locator("#text span:not(.prompt)").nth(index).click()

    def open(self, tab: str) -> Any:
        """Open a tab. Returns what it shows."""
        self.page.get_by_role("tab", name=tab).click()
        return self.page.get_by_role("tabpanel", name=tab)

    def figures(self, within: str) -> dict[str, str]:
        """Numbers of a tab by name."""
        names = self.page.locator(f"{within} dt").evaluate_all(
            "(all) => all.map((one) => one.firstChild.data)"
        )
        return dict(zip(names, self.page.locator(f"{within} dd").all_inner_texts(), strict=True))


Open = Callable[..., Opened]


@pytest.fixture
def opened(browser: Any, url: str) -> Iterator[Open]:
    """Opens the page. options: of the browser's context."""
    contexts, asked, found = [], list[str](), list[Opened]()

    def start(at: str = url, *, ready: bool = True, tour: bool = False, **options: Any) -> Opened:
        context = browser.new_context(**options)
        if not tour:
            context.add_init_script("localStorage.setItem('nanogpt.tour', '1')")
        contexts.append(context)
        context.set_default_timeout(HANGS * 1000)
        page, messages = context.new_page(), list[str]()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(at)
        if ready:
            page.locator("#generate:enabled").wait_for()
        found.append(Opened(page, messages))
        return found[-1]

    yield start
    for context in contexts:
        context.close()
    assert [message for one in found for message in one.messages] == []
    assert not [
        address for address in asked if not address.startswith(("http://127.0.0.1:", "data:", "blob:"))
    ]


# --- the file ---


def test_the_page_is_one_file_that_runs_no_code_but_its_own(url: str) -> None:
    answer = httpx.get(url)
    [script], [style] = (
        re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL) for tag in ("script", "style")
    )
    digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (script, style)]
    allowed = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert allowed == {
        "default-src": "'none'",
        "script-src": f"'sha256-{digests[0]}'",
        "style-src": f"'sha256-{digests[1]}'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert len(script) + len(style) < 120_000
    assert not re.search(r'\b(src|on\w+|style)="', answer.text.replace(script, "").replace(style, ""))


# --- writing ---


def test_a_text_is_that_of_sampling_and_characters_of_several_tokens_are_whole(
    opened: Open, model: TextModel
) -> None:
    at = opened()
    prompt = torch.from_numpy(model.tokenizer.encode("S").astype("int64"))
    steps = generate(model.model, prompt[None], num_tokens=60, temperature=0)
    expected = "S" + model.tokenizer.decode([int(step) for step in steps])
    assert at.write("S", tokens=60, temperature=0) == expected
    assert "\u00fc" in expected
    assert at.page.locator("#text span", has_text="\u00fc").count() >= 1
    at.page.locator("#count", has_text="1 token").wait_for()


def test_a_click_on_an_alternative_begins_a_branch_and_keys_do_too(opened: Open) -> None:
    at = opened()
    first = at.write("from ", tokens=30, seed=1)
    at.pin(10)
    rows = at.page.locator("#alternatives li:not(.chosen)")
    other = rows.first.locator("code, em").inner_text()
    rows.first.locator("button").click()
    at.page.locator("#tree li").nth(1).wait_for()
    second = at.text()
    assert second[:15] == first[:15]
    assert second[15] == {"space": " ", "line break": "\n"}.get(other, other) != first[15]
    at.page.locator("#text").focus()
    at.page.keyboard.press("Home")
    at.page.keyboard.press("Enter")  # to the alternatives
    at.page.keyboard.press("ArrowDown")
    assert at.page.evaluate("() => document.activeElement.className") == "choice"
    at.page.keyboard.press("Enter")
    at.page.locator("#tree li").nth(2).wait_for()
    assert at.text()[:5] == "from "
    at.page.locator("#text").focus()
    at.page.keyboard.press("End")
    at.page.keyboard.press("2")
    at.page.locator("#tree li").nth(3).wait_for()
    assert at.page.locator("#tree li").evaluate_all(
        "(all) => all.map((one) => Number(one.style.getPropertyValue('--depth')))"
    ) == [0, 1, 1, 2]
    at.text()
    at.page.get_by_role("button", name="Continue").click()
    at.page.locator("#tree li").nth(4).wait_for()
    assert len(at.text()) > len(first)


def test_the_tree_is_walked_named_and_saved(opened: Open, tmp_path: Path) -> None:
    at = opened()
    first = at.write("from ", tokens=20, seed=1)
    at.pin(4)
    at.page.locator("#alternatives li:not(.chosen) button").first.click()
    at.page.locator("#tree li").nth(1).wait_for()
    second = at.text()
    at.page.locator("#tree .choice").nth(1).focus()
    at.page.keyboard.press("ArrowLeft")
    assert at.page.locator("#text").text_content() == first
    at.page.keyboard.press("ArrowDown")
    assert at.page.locator("#text").text_content() == second
    at.page.get_by_role("button", name="Rename Text 2").click()
    at.page.keyboard.type("the other <b>way</b>")
    at.page.keyboard.press("Enter")
    assert at.page.locator("#tree strong").all_inner_texts() == ["Text 1", "the other <b>way</b>"]
    saved = {}
    for name in ("Save this one", "Save all as JSON"):
        with at.page.expect_download() as download:
            at.page.get_by_role("button", name=name).click()
        download.value.save_as(tmp_path / download.value.suggested_filename)
        saved[name] = (tmp_path / download.value.suggested_filename).read_text("utf-8")
    assert saved["Save this one"] == second
    [root] = json.loads(saved["Save all as JSON"])["texts"]
    [branch] = root["branches"]
    assert (root["text"], branch["text"], branch["name"], branch["at"]) == (
        first,
        second,
        "the other <b>way</b>",
        4,
    )
    assert root["settings"]["seed"] == 1
    assert len(branch["tokens"]) >= 20
    at.page.get_by_role("button", name="Remove Text 1").press("Enter")
    assert at.page.locator("#tree strong").all_inner_texts() == ["the other <b>way</b>"]
    assert at.page.evaluate("() => document.activeElement.dataset.row") == "0"
    at.page.get_by_role("button", name="Remove the other").press("Enter")
    assert at.page.evaluate("() => document.activeElement.id") == "generate"


def test_the_distribution_is_drawn_as_the_settings_cut_it(opened: Open) -> None:
    at = opened()
    at.write("from ", tokens=10, seed=1)
    at.pin(3)
    sentence, bars = at.page.locator("#distribution .hint"), at.page.locator("#distribution .after")
    sentence.wait_for()
    assert sentence.inner_text().startswith("No token is cut off: each of the 256")
    at.page.get_by_label("Top-k").last.fill("3")  # the slider
    assert sentence.inner_text().startswith("3 of 256 tokens can be chosen.")
    assert (bars.count(), at.page.locator("#top-k").input_value()) == (3, "3")
    at.page.get_by_label("Temperature").last.fill("0")
    assert sentence.inner_text().startswith("Temperature 0")
    assert bars.count() == 1


def test_two_texts_with_other_settings_stand_side_by_side(opened: Open) -> None:
    at = opened()
    at.page.locator("summary").click()
    at.page.locator("#compare").check()
    at.page.locator("#temperature-b").fill("0")
    at.page.locator("#model-b").select_option(label="step 0")
    at.write("from ", tokens=20, temperature=0)
    texts = [at.text(), at.text("text-b")]
    assert [text[:5] for text in texts] == ["from ", "from "]
    assert texts[0] != texts[1]
    assert at.page.locator("#caption-b").inner_text() == "step 0, temperature 0"
    at.page.locator("#text-b span:not(.prompt)").nth(2).click()
    assert at.page.locator("#text-b .current").count() == 1
    at.page.locator("#settings").evaluate("(settings) => (settings.open = true)")
    at.page.locator("#compare").uncheck()
    at.write("from ")
    assert not at.page.locator("#text-b").is_visible()


def test_what_cannot_be_seen_is_spelled(opened: Open) -> None:
    at = opened()
    shown = at.page.evaluate(
        r"() => ['bytes:\\xfc', '\\xE4', ' a\n', '\t', '\x07', 'bytes:'].map(Dom.marked)"
    )
    assert shown == ["\\xfc", "\\xE4", "\u00b7a\u21b5", "\u21e5", "\\x07", "bytes:"]
    framed = at.page.evaluate(
        r"""() => {
            const view = TextView.create(document.createElement("div"), { onChoose() {}, onBranch() {} });
            view.show({ prompt: "", pieces: [{ text: "\ufffd", parts: [{ id: 1, text: "bytes:\\xfc" }] }] });
            view.frame(true);
            return view.root.textContent;
        }"""
    )
    assert framed == "\\xfc"


def test_tokens_are_made_visible(opened: Open) -> None:
    at = opened()
    at.measure("S\u00fc\u00df\n")
    at.page.get_by_role("button", name="Show tokens").click()
    frames = at.page.locator("#text .token")
    assert [text.strip() for text in frames.all_text_contents()] == [
        "S",
        "\\xc3",
        "\\xbc",
        "\\xc3",
        "\\x9f",
        "\u21b5",
    ]
    assert [frame.get_attribute("data-id") for frame in frames.all()] == [
        str(byte) for byte in "S\u00fc\u00df\n".encode()
    ]


# --- insight ---


@pytest.mark.parametrize("text", ["from fairest zebras", TEXT * 2], ids=["short", "longer than the context"])
def test_surprise_is_that_of_scoring(text: str, opened: Open, model: TextModel) -> None:
    at = opened()
    at.measure(text)
    panel = at.page.get_by_role("tabpanel", name="Surprise")
    panel.locator("svg").wait_for()
    figures = at.figures("#surprise-body")
    mean = float(figures["Mean surprise"].removesuffix(" nats"))
    ids = model.tokenizer.encode(text)
    assert int(figures["Tokens"]) == len(ids)
    assert float(figures["Perplexity"]) == pytest.approx(math.exp(mean), rel=0.02)
    assert mean == pytest.approx(float(score(model.model, ids).mean()), abs=0.0051)  # as `nanogpt eval`
    worst = panel.locator(".links button").first
    worst.click()
    assert at.page.locator("#text .current").count() == 1


def test_a_character_at_the_end_of_a_window_stays_whole(opened: Open) -> None:
    text = "from " * 9 + "ab\u00fcb\U0001f642" * 13  # bytes 47 and 48 are of one character, as others later
    at = opened()
    at.measure(text)
    assert at.page.locator("#text").text_content() == text


def test_attention_and_lens_are_those_of_the_server(opened: Open, url: str) -> None:
    at = opened()
    text = "from fairest creatures"
    at.measure(text)
    at.pin(6)
    wish = {"text": text, "attention": {"layer": 1, "head": 1}, "lens": True}
    found = httpx.post(f"{url}/inspect", json=wish, timeout=HANGS).json()
    panel = at.open("Attention")
    for label in ("Layer", "Head"):
        panel.get_by_label(label).fill("2")
    shares = sorted(found["attention"][6], reverse=True)
    panel.locator(".links .percent", has_text=f"{100 * shares[0]:.0f}").first.wait_for()
    assert panel.locator("canvas").get_attribute("aria-label").startswith("The attention of 22 tokens")
    loud = found["attention"][6].index(shares[0])
    assert re.search(r"a[1-4]", at.page.locator("#text span").nth(loud).get_attribute("class") or "")
    panel.locator("canvas").click(position={"x": 5, "y": 5})
    assert "current" in (at.page.locator("#text span").first.get_attribute("class") or "")
    at.pin(6)
    at.open("Lens").locator("tbody tr").nth(2).wait_for()
    for row, layer in zip(at.page.locator("#lens-body tbody tr").all(), found["lens"], strict=True):
        names = row.locator("td code, td em").all_inner_texts()
        assert [{"space": " ", "line break": "\n"}.get(name, name) for name in names] == [
            guess["text"] for guess in layer[5]
        ]
    assert re.search("first guess is|already say", at.page.locator("#lens-body .verdict").inner_text())


# --- the training ---


def test_the_training_is_shown_and_its_checkpoints_write(opened: Open) -> None:
    at = opened()
    at.page.locator("#prompt").fill("from ")
    panel = at.open("Training")
    assert at.figures("#training-body")["Step"] == "120"
    assert (
        panel.locator("svg").get_attribute("aria-label").startswith("Losses of the training up to step 120")
    )
    slider, sample = panel.get_by_label("Checkpoint"), panel.locator(".sample:not([aria-busy])")
    texts = []
    for place in (0, 2):
        slider.fill(str(place))
        sample.locator(".prompt").wait_for()
        texts.append(sample.text_content())
    assert texts[0][:5] == texts[1][:5] == "from "
    assert texts[0] != texts[1]
    slider.fill("0")
    assert sample.text_content() == texts[0]
    panel.get_by_role("button", name="Use this model").click()
    assert at.page.locator("#models select").input_value() == "out@0"
    at.write("from ", tokens=160, seed=1)
    assert at.text() == texts[0]


def test_the_page_follows_a_training_while_it_runs(
    opened: Open, out: Path, config: ServeConfig, tmp_path: Path
) -> None:
    folder = shutil.copytree(out, tmp_path / "out")
    with serving(replace(config, checkpoint=str(folder))) as url, lock(folder, "busy"):
        at = opened(url)
        panel = at.open("Training")
        panel.get_by_text("The training is running").wait_for()
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": 130, "train_loss": 0.5, "lr": 0.1, "elapsed_s": 1.0}) + "\n")
        panel.locator("dd", has_text="130").wait_for()
        assert panel.locator("dd", has_text="0.500").count() == 1
        at.page.close()


def test_a_training_that_is_resumed_is_followed_once_its_tab_is_opened(
    opened: Open, out: Path, config: ServeConfig, tmp_path: Path
) -> None:
    folder = shutil.copytree(out, tmp_path / "out")
    with serving(replace(config, checkpoint=str(folder))) as url:
        at = opened(url)
        with lock(folder, "busy"):
            panel = at.open("Training")
            panel.get_by_text("The training is running").wait_for()
            at.page.reload()
            at.page.locator("#generate:enabled").wait_for()
            assert at.page.locator("#about").inner_text().endswith("tokens. It is being trained.")
            at.open("Training")
        panel.get_by_text("The training is running").wait_for(state="hidden")
        at.page.close()


# --- the first visit, explanations, the key ---


def test_the_tour_has_three_steps_and_comes_once(opened: Open) -> None:
    at = opened(tour=True)
    tour = at.page.get_by_role("region", name="Tour")
    for title in ("Write", "See", "Understand"):
        assert tour.get_by_role("heading").inner_text() == title
        tour.get_by_role("button").first.click()
    assert not tour.is_visible()
    at.page.reload()
    at.page.locator("#generate:enabled").wait_for()
    assert not tour.is_visible()
    at.page.get_by_role("button", name="Take the tour").click()
    at.page.keyboard.press("Escape")
    assert not tour.is_visible()
    assert at.page.evaluate("() => document.activeElement.id") == "prompt"


def test_each_number_says_what_it_is(opened: Open) -> None:
    at = opened()
    at.write("from ", tokens=10, seed=1)
    at.pin(3)
    box = at.page.locator("#what")
    for tab in ("Alternatives", "Surprise", "Attention", "Lens", "Training"):
        panel = at.open(tab)
        panel.locator(".what").first.wait_for()
        for dt in panel.locator("dt").all():
            assert dt.locator(".what").count() == 1
        for button in panel.locator(".what").all():
            button.focus()
            at.page.keyboard.press("Enter")
            assert len(box.inner_text()) > 60
            at.page.keyboard.press("Escape")
            assert not box.is_visible()
            assert button.evaluate("(one) => one === document.activeElement")


def test_the_key_is_asked_for_once(opened: Open, config: ServeConfig) -> None:
    with serving(replace(config, api_key=KEY)) as url:
        at = opened(url, ready=False)
        for key in ("wrong", KEY):
            at.page.locator("#key").fill(key)
            at.page.get_by_role("button", name="Continue", exact=True).click()
            if key == "wrong":
                at.page.get_by_text("This key is wrong").wait_for()
        at.page.locator("#generate:enabled").wait_for()
        at.page.reload()
        at.page.locator("#generate:enabled").wait_for()
        assert len(at.write("from ", tokens=5)) == 10
        at.page.close()
        at.messages[:] = [message for message in at.messages if "401" not in message]


def test_whoever_has_no_key_is_told_how_to_give_one(opened: Open, config: ServeConfig) -> None:
    with serving(replace(config, api_key=KEY)) as url:
        at = opened(url, ready=False)
        dialog = at.page.locator("#key-dialog")
        dialog.wait_for()
        at.page.keyboard.press("Escape")
        dialog.wait_for(state="hidden")
        alert = at.page.get_by_role("alert")
        assert alert.inner_text() == (
            "The model cannot be loaded. This server asks for a key: load the page again to give it."
        )
        at.page.close()
        at.messages[:] = [message for message in at.messages if "401" not in message]


def test_a_stream_that_breaks_off_is_told_and_the_end_of_a_text_too(opened: Open) -> None:
    at = opened()
    chunk = {"index": 0, "text": "a", "token_ids": [97], "prompt_token_ids": [98], "finish_reason": "stop"}
    chunk["logprobs"] = {
        "tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}], "text_offset": [0],
    }  # fmt: skip
    stream = f"data: {json.dumps({'choices': [chunk]})}\n\n"
    answers = [stream, stream + "data: [DONE]\n\n"]
    at.page.route(
        "**/v1/completions",
        lambda route: route.fulfill(body=answers.pop(0), content_type="text/event-stream"),
    )
    assert at.write("b") == "ba"
    assert at.page.get_by_role("alert").inner_text().startswith("The server does not answer")
    assert at.page.locator("#prompt").get_attribute("aria-invalid") is None
    at.write("b")
    assert not at.page.get_by_role("alert").is_visible()
    assert at.page.locator("#status").inner_text().endswith("The model ended the text here.")


def test_mistakes_are_told_in_one_line(opened: Open, config: ServeConfig) -> None:
    with serving(config) as url:
        at = opened(url)
        before = at.write("from ", tokens=5)
        assert at.write("from ", tokens=100_000) == before
        alert = at.page.get_by_role("alert")
        assert alert.inner_text().startswith("max_tokens 100000 is more than this server's limit, 4096")
        at.page.locator("#tokens").evaluate("(one) => (one.value = 5)")
    at.page.locator("#generate").click()
    at.page.get_by_text("The server does not answer").wait_for()
    at.page.close()
    at.messages[:] = [message for message in at.messages if "Failed to load resource" not in message]


# --- everybody ---


@pytest.mark.parametrize(("scheme", "width"), [("light", 1440), ("dark", 360)])
def test_axe_finds_no_violation_in_any_state(scheme: str, width: int, opened: Open) -> None:
    at = opened(tour=True, color_scheme=scheme, viewport={"width": width, "height": 800})
    script = Path(axe.__file__).with_name("axe.min.js").read_text("utf-8")
    at.page.evaluate(f"() => {{ {script} }}")

    def check() -> None:
        found = at.page.evaluate("() => axe.run(document, { resultTypes: ['violations'] })")
        assert [(one["id"], one["nodes"][0]["html"]) for one in found["violations"]] == []
        assert at.page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0

    check()
    at.page.get_by_role("button", name="Skip the tour").click()
    at.write("from " * 9, tokens=12, seed=1)
    at.pin(5)
    at.page.locator("#distribution svg").wait_for()
    check()
    for tab, shown in (("Surprise", "svg"), ("Attention", "canvas"), ("Lens", "table"), ("Training", "svg")):
        at.open(tab).locator(shown).first.wait_for()
        check()
    at.page.locator("#training-body .what").first.click()
    check()
    at.page.keyboard.press("Escape")
    at.page.get_by_role("button", name="Show tokens").click()
    at.page.locator("summary").click()
    at.page.locator("#compare").check()
    at.write("from ")
    at.page.locator("#settings").evaluate("(settings) => (settings.open = true)")
    check()
