"""Tokens a second of exported pages, in Node: the JavaScript engine of Chrome, without a browser.

Run:    nanogpt export --checkpoint out --format html --output my_gpt.html
        python bench/html.py my_gpt.html           some seconds for each page; --tokens 2 tries the script
Greedy tokens after a line feed, up to the end of the context. The first texts warm up the engine's compiler;
the median of the rest is printed, with the time in which the page decodes its weights. tests/html_page.js
runs the page's own scripts.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import common
from rich.console import Console
from rich.table import Table

HARNESS = common.FOLDER.parent / "tests" / "html_page.js"

CODE = """
const begin = performance.now(), model = page.model(), loaded = performance.now() - begin, rates = [];
const prompt = page.tokenizer().encodePrompt("");
const numTokens = Math.min(values.tokens, model.S - prompt.length);
for (let round = 0; round < values.rounds + 2; round++) {
  const begin = performance.now();
  page.all(page.NanoGPT.generateTokens(model, prompt, { numTokens, temperature: 0 }));
  rates.push((1000 * numTokens) / (performance.now() - begin));
}
return { loaded, rates: rates.slice(2), numTokens, engine: process.version };
"""


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    node = shutil.which("node")
    if node is None:
        sys.exit("error: Node is not installed: this measurement needs it")
    table = Table("page", "MB", "weights decoded, ms", "tokens", "tokens/s")
    results = list[dict[str, object]]()
    for page in options.pages:
        request = {"code": CODE, "values": {"tokens": options.tokens, "rounds": options.rounds}}
        done = subprocess.run(
            [node, str(HARNESS), str(page)],
            input=json.dumps(request).encode(),
            stdout=subprocess.PIPE,
            check=True,
        )
        found = json.loads(done.stdout)
        rate, size = median(found["rates"]), page.stat().st_size / 1e6
        table.add_row(
            page.name, f"{size:.1f}", f"{found['loaded']:.0f}", str(found["numTokens"]), f"{rate:,.0f}"
        )
        results.append({"page": page.name, "megabytes": size, "tokens_per_s": rate, **found})
    Console().print(table)
    common.write_json("html", results)


if __name__ == "__main__":
    main()
