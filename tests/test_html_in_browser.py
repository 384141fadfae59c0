"""Exports as a page, opened from disk in Chromium: its text, its keys, axe-core, and no network.

Every test ends with a check that the page wrote no message to the console and asked for no address.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from exported import LETTERS, PRESET_SHAPES, as_in_the_page, source

from nanogpt.export.registry import export
from nanogpt.inference.generate import generate
from nanogpt.model.quantize import quantize
from nanogpt.native.step import with_native_steps

axe = pytest.importorskip("axe_playwright_python.base", reason="axe-playwright-python is not installed")

PATIENCE_MS = 120_000
"""Far more than anything takes: no test fails because the machine is busy."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a model with random weights."""
    path = tmp_path_factory.mktemp("page") / "small.html"
    export(source(), "html", path)
    return path


class Opened(NamedTuple):
    """A page in the browser."""

    page: Any
    messages: list[str]
    """What it wrote to the console."""

    def text(self) -> str:
        """The prompt and what follows it."""
        return self.page.locator("#text").text_content()

    def write(self, prompt: str, **settings: object) -> str:
        """Generate a text to its end. settings: by label."""
        self.page.get_by_label("Prompt").fill(prompt)
        self.page.locator("#settings").evaluate("(settings) => (settings.open = true)")
        for label, value in settings.items():
            self.page.get_by_label(label).fill(str(value))
        self.page.get_by_role("button", name="Generate").click()
        self.page.locator("#generate:enabled").wait_for()
        return self.text()

    def alternatives(self) -> str:
        """What the panel of alternatives says; "": it is hidden."""
        panel = self.page.locator("#alternatives")
        return panel.inner_text() if panel.is_visible() else ""

    def tab_to(self, name: str) -> None:
        """Press Tab until the element of this id has the focus."""
        for _ in range(40):
            self.page.keyboard.press("Tab")
            if self.page.evaluate("() => document.activeElement.id") == name:
                return
        raise AssertionError(f"Tab does not reach {name}")


Open = Callable[..., Opened]


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Opens pages. options: of the browser's context."""
    contexts, asked, found = [], list[str](), list[Opened]()

    def start(path: Path, *, ready: bool = True, **options: Any) -> Opened:
        context = browser.new_context(**options)
        context.add_init_script("localStorage.setItem('nanogpt.tour', '1')")  # its tests are in test_page.py
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        page, messages = context.new_page(), list[str]()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        if ready:
            page.locator("#generate:enabled").wait_for()
        found.append(Opened(page, messages))
        return found[-1]

    yield start
    for context in contexts:
        context.close()
    assert [message for one in found for message in one.messages] == []
    assert not [url for url in asked if not url.startswith(("file:", "blob:"))]


# --- the text ---


@pytest.mark.parametrize("shape", PRESET_SHAPES)
def test_the_text_is_that_of_sampling_in_int8(shape: str, opened: Open, tmp_path: Path) -> None:
    exported = source(**PRESET_SHAPES[shape])
    model = as_in_the_page(exported)
    quantize(model, "int8")
    if with_native_steps(model) is model:  # no C compiler: PyTorch would round what goes into each product
        model = as_in_the_page(exported)
    prompt = torch.from_numpy(LETTERS.encode("It was").astype("int64"))
    steps = generate(model, prompt[None], num_tokens=150, temperature=0)
    export(exported, "html", tmp_path / "page.html")
    found = opened(tmp_path / "page.html").write("It was", Tokens=150, Temperature=0)
    assert found == "It was" + LETTERS.decode(map(int, steps))


def test_a_seed_repeats_a_text_and_the_status_names_the_seed_of_any(opened: Open, path: Path) -> None:
    at = opened(path)
    written = at.write("It was", Tokens=60)
    seed = (at.page.locator("#status").text_content() or "").split("seed ")[1]
    again = at.write("It was", Seed=seed)
    other = at.write("It was", Seed=int(seed) + 1)
    assert written == again != other
    assert len(written) == len("It was") + 60
    assert (at.page.locator("#status").text_content() or "").startswith("Done: 60 tokens, ")


def test_the_page_answers_while_the_model_writes_until_it_is_stopped(opened: Open, path: Path) -> None:
    at = opened(path)
    at.page.locator("summary").click()
    at.page.get_by_label("Tokens").fill("100000")
    at.page.get_by_role("button", name="Generate").click()
    at.page.locator("#text span").nth(30).hover()
    assert "had a probability of" in at.alternatives()
    assert at.page.get_by_role("button", name="Generate").is_disabled()
    at.page.get_by_role("button", name="Stop").click()
    at.page.locator("#generate:enabled").wait_for()
    assert (at.page.locator("#status").text_content() or "").startswith("Stopped after ")
    assert 30 < len(at.text()) < 100_000
    assert not at.page.locator("#progress").is_visible()


# --- the alternatives ---


def test_alternatives_are_shown_on_hover_on_tap_and_by_keys(opened: Open, path: Path) -> None:
    at = opened(path)
    at.write("It was", Tokens=60, Seed=1)
    pieces = at.page.locator("#text span:not(.prompt)")
    current = at.page.locator("#text .current")
    pieces.nth(3).hover()
    hovered = at.alternatives()
    rows = at.page.locator("#alternatives li")
    assert "had a probability of" in hovered
    assert rows.count() in (10, 11)
    assert at.page.locator("#alternatives .chosen").count() == 1
    shares = [float(text.strip("\u2713< \u00a0%")) for text in rows.locator(".percent").all_inner_texts()]
    bars = [bar.bounding_box()["width"] for bar in rows.locator(".bar").all()]
    tracks = [track.bounding_box()["width"] for track in rows.locator("span:has(.bar)").all()]
    for share, bar, track in zip(shares, bars, tracks, strict=True):
        assert bar == pytest.approx(max(2, share / 100 * track), abs=1.5)
    at.page.keyboard.press("Escape")
    assert at.alternatives() == ""
    pieces.nth(3).click()
    assert at.alternatives() == hovered
    at.page.get_by_role("button", name="Close the alternatives").click()
    assert at.alternatives() == ""
    at.page.get_by_role("button", name="Generate").focus()
    at.tab_to("text")
    for _ in range(3):
        at.page.keyboard.press("ArrowRight")
    assert at.alternatives() == hovered
    at.page.keyboard.press("Escape")
    at.page.keyboard.press("ArrowRight")
    places = []
    for key in ("End", "ArrowRight", "ArrowUp", "Home", "ArrowLeft", "ArrowDown"):
        at.page.keyboard.press(key)
        places.append(current.evaluate("(one) => [...one.parentElement.children].indexOf(one) - 1"))
    assert places == [59, 59, 49, 0, 0, 10]
    at.page.keyboard.press("Escape")
    assert (at.alternatives(), current.count()) == ("", 0)


def test_a_text_is_made_with_the_keyboard_alone(opened: Open, path: Path) -> None:
    at = opened(path)
    focused = "() => document.activeElement.id"
    at.page.keyboard.press("Tab")
    assert at.page.evaluate(focused) == "prompt"
    at.page.keyboard.type("It was")
    at.page.keyboard.press("Control+Enter")
    at.page.locator("#generate:enabled").wait_for()
    assert len(at.text()) == len("It was") + 300
    at.page.keyboard.press("Tab")
    at.page.keyboard.press("Enter")  # opens the settings
    at.tab_to("tokens")
    at.page.keyboard.press("Control+A")
    at.page.keyboard.type("100000")
    at.tab_to("generate")
    at.page.keyboard.press("Enter")
    at.page.locator("#text span").nth(30).wait_for()
    assert at.page.evaluate(focused) == "stop"
    at.page.keyboard.press("Enter")
    at.page.locator("#generate:enabled").wait_for()
    assert at.page.evaluate(focused) == "generate"


# --- insight ---


def test_the_model_in_the_page_explains_a_text_and_takes_another_way(opened: Open, path: Path) -> None:
    at = opened(path)
    assert not at.page.locator("#tab-training").is_visible()
    at.page.get_by_label("Prompt").fill("It was the best of times. " * 4)  # longer than the context
    at.page.get_by_role("button", name="Measure").click()
    at.page.locator("#surprise-body svg").wait_for()
    assert at.page.locator("#surprise-body dd").last.inner_text() == "104"
    pieces = at.page.locator("#text span")
    pieces.nth(3).click()
    at.page.get_by_role("tab", name="Attention").click()
    at.page.locator("#attention-body canvas").wait_for()
    assert at.page.locator("#attention-body .links li").count() == 4
    at.page.get_by_role("tab", name="Lens").click()
    assert at.page.locator("#lens-body tbody tr").nth(2).inner_text().startswith("layer 2")
    at.page.get_by_role("tab", name="Alternatives").click()
    at.page.locator("#distribution svg").wait_for()
    at.page.locator("#alternatives li:not(.chosen) button").first.click()
    at.page.locator("#tree li").nth(1).wait_for()
    at.page.locator("#generate:enabled").wait_for()
    assert at.text()[:3] == "It "
    assert at.text()[3] != "w"
    assert pieces.count() > 200


# --- mistakes ---


def test_an_unknown_character_is_explained_and_the_text_before_stays(opened: Open, path: Path) -> None:
    at = opened(path)
    before = at.write("It was", Tokens=20)
    assert at.write("\u0416") == before
    alert, prompt = at.page.get_by_role("alert"), at.page.get_by_label("Prompt")
    assert alert.inner_text().startswith('The model has never seen "\u0416" (U+0416)')
    assert prompt.get_attribute("aria-invalid") == "true"
    at.write("It was")
    assert not alert.is_visible()
    assert prompt.get_attribute("aria-invalid") is None


def test_a_setting_that_is_wrong_opens_the_settings(opened: Open, path: Path) -> None:
    at = opened(path)
    at.write("It was", Tokens=20, **{"Top-p": 7})
    assert at.text() == ""
    at.page.locator("summary").click()
    assert not at.page.get_by_label("Top-p").is_visible()
    at.page.get_by_role("button", name="Generate").click()
    assert at.page.get_by_label("Top-p").is_visible()
    assert at.page.evaluate("() => document.activeElement.id") == "top-p"


@pytest.mark.parametrize("share", [0.9, 0.5], ids=["nearly whole", "half"])
def test_a_file_of_which_a_part_is_missing_says_so(
    share: float, opened: Open, path: Path, tmp_path: Path
) -> None:
    content = path.read_bytes()
    weights = content.index(b'id="weights"')
    (tmp_path / "part.html").write_bytes(content[: weights + int(share * (len(content) - weights))])
    at = opened(tmp_path / "part.html", ready=False)
    alert = at.page.get_by_role("alert")
    alert.wait_for()
    assert alert.inner_text().startswith("The model cannot be loaded. The file is damaged")
    assert at.page.get_by_role("button", name="Generate").is_disabled()


# --- everybody ---


@pytest.mark.parametrize("width", [360, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation_and_nothing_is_cut_off(
    scheme: str, width: int, opened: Open, path: Path
) -> None:
    at = opened(path, color_scheme=scheme, viewport={"width": width, "height": 800})
    script = Path(axe.__file__).with_name("axe.min.js").read_text("utf-8")

    at.page.evaluate(f"() => {{ {script} }}")

    def check() -> None:
        found = at.page.evaluate("() => axe.run()")
        assert [(one["id"], one["nodes"][0]["html"]) for one in found["violations"]] == []
        assert found["passes"]
        assert at.page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0

    check()
    at.write("It was\n" * 3, Tokens=40, Seed=1)
    at.page.locator("#text span").nth(5).hover()
    check()
    at.page.set_viewport_size({"width": min(width, 320), "height": 600})
    at.write("\u0416")
    check()


@pytest.mark.parametrize("wish", ["reduce", "no-preference"])
def test_nothing_moves_for_those_who_wish_it_so(wish: str, opened: Open, path: Path) -> None:
    at = opened(path, reduced_motion=wish)
    at.page.locator("summary").click()
    at.page.get_by_label("Tokens").fill("100000")
    at.page.get_by_role("button", name="Generate").click()
    at.page.locator("#text span").nth(30).wait_for()
    moving = at.page.evaluate("() => document.getAnimations().length")
    at.page.get_by_role("button", name="Stop").click()
    assert moving == (wish == "no-preference")


# --- the network ---


def test_neither_page_nor_worker_can_send_anything(opened: Open, path: Path) -> None:
    at = opened(path)
    code = "() => fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => error.message)"
    assert at.page.evaluate(code) == "Failed to fetch"
    [worker] = at.page.workers
    assert worker.evaluate(code) == "Failed to fetch"
    assert len([message for message in at.messages if "Content Security Policy" in message]) >= 2
    at.messages.clear()
