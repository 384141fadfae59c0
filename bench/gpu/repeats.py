"""What a short text is good for when time is not the limit: epochs, tables, batch, width, dropout.

Run:    python bench/gpu/repeats.py --text input.txt                about three minutes on an H200
        python bench/gpu/repeats.py --runs "no tables, 14 epochs"   one of them
Variants of preset best on Tiny Shakespeare, in an order of interest, each trained to its end. Its results are
behind MAX_REPEATS, TABLE_REPEATS and FLOPS_PER_CHARACTER of training/autosize.py. Writes gpu-repeats.jsonl
row by row. Needs torch, numpy, rich, psutil and filelock.
"""

import contextlib
import io
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

# This folder first: bench/race.py is another race.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from race import data_folder, race
from rows import Results, attempt, parser_of, place_of

from nanogpt import presets
from nanogpt.config import TrainConfig

WIDE: dict[str, Any] = {"n_layer": 6, "n_embd": 384, "n_head": 6}

VARIANTS: dict[str, dict[str, Any]] = {
    "as it is: 7 epochs, 22,000 rows, 16 x 256": {},
    "no tables, 14 epochs": {"ngram_vocab": 0, "max_iters": 3430},
    "14 epochs, dropout 0.3": {"max_iters": 3430, "dropout": 0.3},
    "no tables, 21 epochs, dropout 0.3": {"ngram_vocab": 0, "max_iters": 5145, "dropout": 0.3},
    "6 layers of 384, dropout 0.3": WIDE | {"dropout": 0.3},
    "6 layers of 384, no tables, 14 epochs, dropout 0.3": WIDE
    | {"dropout": 0.3, "ngram_vocab": 0, "max_iters": 3430},
    "32 x 256": {"batch_size": 32, "max_iters": 857},
    "8 x 256": {"batch_size": 8, "max_iters": 3430},
    "65,536 rows": {"ngram_vocab": 65_536},
    "4,096 rows": {"ngram_vocab": 4_096},
    "weight decay 0.2": {"weight_decay": 0.2},
    "no tables, 14 epochs, 32 x 256": {"ngram_vocab": 0, "batch_size": 32, "max_iters": 1715},
}
"""Name -> settings that differ from preset best."""


def quiet_race(config: TrainConfig, target: float) -> dict[str, Any]:
    """A training whose lines nobody reads."""
    with contextlib.redirect_stdout(io.StringIO()):
        return race(config, target)


def main() -> None:
    """Run and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--runs", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--max_iters", type=int, help="fewer updates, to try the script")
    parser.add_argument("--text", type=Path, help="Tiny Shakespeare (data/input.txt)")
    parser.add_argument("--data_dir", type=Path, help="a prepared folder, in place of a text")
    parser.set_defaults(target=1.4697)
    options = parser.parse_args()
    place = place_of(options)
    with tempfile.TemporaryDirectory() as scratch, Results("gpu-repeats", options) as results:
        data = data_folder(options, Path(scratch))
        for seed in options.seeds:
            for name in options.runs:
                config = replace(
                    presets.get("best"), **VARIANTS[name], data_dir=str(data), device=str(place), seed=seed
                )
                config = replace(config, max_iters=options.max_iters or config.max_iters)
                config = replace(config, eval_interval=max(1, config.max_iters // 2))
                row = {"variant": name, "seed": seed}
                results.add(row | attempt(partial(quiet_race, config, options.target)))


if __name__ == "__main__":
    main()
