"""Tokens a second of exported pages in headless Chromium, as a person sees them: with the text that appears.

Run:    nanogpt export --checkpoint out --format html --output my_gpt.html
        python bench/page.py my_gpt.html           some seconds for each page; --tokens 2 tries the script
A page is opened from disk until its model is ready, then writes greedy texts after an empty prompt. The first
ones warm up the browser's compiler; the median of the rest is printed, with WebAssembly and without. A text
longer than the context includes reading its last half again.
"""

import argparse
import re
import shutil
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import common
from rich.console import Console
from rich.table import Table

WARM_UP = 2

PERMISSION = b" 'wasm-unsafe-eval'"
"""What allows a page to use WebAssembly. Without it the page computes in JavaScript."""


@contextmanager
def chromium() -> Generator[Any]:
    """A headless Chromium."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        sys.exit("error: Playwright is not installed: pip install nanogpt[bench]")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        sys.exit("error: Chromium is not installed: this measurement needs it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


def opened(browser: Any, path: Path) -> Any:
    """A page from disk, once its model is ready. It is set to write greedily."""
    page = browser.new_page()
    page.goto(path.resolve().as_uri())
    page.locator("#generate:enabled").wait_for(timeout=0)
    page.locator("summary").click()
    page.get_by_label("Temperature").fill("0")
    return page


def rate_of(page: Any, prompt: str, tokens: int) -> int:
    """Let a page write a text. Returns the tokens a second that it names."""
    page.get_by_label("Tokens").fill(str(tokens))
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Generate").click()
    page.locator("#generate:enabled").wait_for(timeout=0)
    found = re.search(r"([\d,]+) a second", page.locator("#status").inner_text())
    if found is None:
        sys.exit(f"error: the page wrote no text: {page.locator('#problem').inner_text()}")
    return int(found[1].replace(",", ""))


def measure(browser: Any, path: Path, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds until a page is ready, and tokens a second of each round."""
    start = time.perf_counter()
    page = opened(browser, path)
    ready = time.perf_counter() - start
    rates = [rate_of(page, "", tokens) for _ in range(WARM_UP + rounds)][WARM_UP:]
    page.close()
    return {"ready_s": ready, "tokens_per_s": median(rates), "rates": rates}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    table = Table("page", "MB", "ready, s", "tokens/s", "without WebAssembly")
    results = list[dict[str, Any]]()
    with TemporaryDirectory() as folder, chromium() as browser:
        for path in options.pages:
            plain = Path(folder) / path.name
            plain.write_bytes(path.read_bytes().replace(PERMISSION, b"", 1))
            found, slow = (measure(browser, one, options.tokens, options.rounds) for one in (path, plain))
            size = path.stat().st_size / 1e6
            rates = (f"{one['tokens_per_s']:,.0f}" for one in (found, slow))
            table.add_row(path.name, f"{size:.1f}", f"{found['ready_s']:.2f}", *rates)
            results.append({"page": path.name, "megabytes": size, **found, "without_webassembly": slow})
        version = browser.version
    Console().print(table)
    print(f"Chromium {version}, greedy, {options.tokens} tokens")
    common.write_json("page", results)


if __name__ == "__main__":
    main()
