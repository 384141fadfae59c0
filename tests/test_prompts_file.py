"""Prompts in JSON Lines: each answer is that of the prompt alone, in their order; bad lines are named."""

import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanogpt.cli import prompts_file
from nanogpt.cli.sample import main
from nanogpt.config import TrainConfig
from nanogpt.errors import UserError
from nanogpt.inference.config import SampleConfig
from nanogpt.model.kv_cache import KVCache
from nanogpt.training.fit import fit


@pytest.fixture
def sampling(config: TrainConfig, tmp_path: Path, monkeypatch, capsys) -> SampleConfig:
    """A trained checkpoint, and prompts.jsonl in the current folder."""
    fit(config)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    return SampleConfig(
        checkpoint=str(Path(config.out_dir) / "ckpt.pt"),
        prompts_file="prompts.jsonl",
        num_tokens=12,
        seed=1,
        device="cpu",
    )


def write(*records: object) -> None:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    Path("prompts.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")


def answers(config: SampleConfig, capsys) -> list[dict[str, Any]]:
    main(config)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def alone(config: SampleConfig, prompt: str, capsys, **settings: Any) -> str:
    main(replace(config, prompts_file=None, prompt=prompt, **settings))
    return capsys.readouterr().out.removeprefix(prompt).removesuffix("\n")


def test_each_answer_is_that_of_the_prompt_alone(sampling: SampleConfig, capsys) -> None:
    records: list[dict[str, Any]] = [
        {"prompt": "From"},
        {"prompt": "That", "id": "second", "temperature": 2.0},
        {"prompt": "beauty's rose", "num_tokens": 30},
        {"prompt": "d", "id": 7, "temperature": 2, "seed": 99},
        {"prompt": "might", "top_k": 3, "logit_bias": {"e": 2, "id:3": -1.0}, "repetition_penalty": 1.2},
        {"prompt": "never", "num_tokens": 0},
    ]
    write(*records[:3], "", *records[3:])
    made = answers(sampling, capsys)
    assert [answer["id"] for answer in made] == [1, "second", 3, 7, 6, 7]
    assert [answer["seed"] for answer in made] == [1, 2, 3, 99, 5, 6]
    for record, answer in zip(records, made, strict=True):
        assert list(answer) == ["id", "prompt", "text", "finish_reason", "seed"]
        own = {key: value for key, value in record.items() if key not in ("prompt", "id")}
        own["seed"] = answer["seed"]
        assert answer["prompt"] == record["prompt"]
        assert answer["text"] == alone(sampling, record["prompt"], capsys, **own)
        assert answer["finish_reason"] == "length"


def test_prompts_whose_settings_agree_share_batches(sampling: SampleConfig, capsys, monkeypatch) -> None:
    sizes: list[int] = []
    step = KVCache.step

    def counted(self: KVCache, rows: Sequence[int], *rest: Any) -> object:
        sizes.append(len(rows))
        return step(self, rows, *rest)

    write(*({"prompt": "From", "temperature": 1 + number % 2} for number in range(8)))
    expected = answers(sampling, capsys)
    monkeypatch.setattr(KVCache, "step", counted)
    monkeypatch.setattr(prompts_file, "MAX_ROWS", 3)
    assert answers(sampling, capsys) == expected
    assert sizes == [3] * 24 + [1] * 24  # four of each temperature: three and one
    assert len({answer["text"] for answer in expected}) > 1


def test_stop_strings_and_the_end_of_a_text_are_the_reasons(sampling: SampleConfig, capsys) -> None:
    text = alone(sampling, "From", capsys)
    stop = text[5:7]
    write({"prompt": "From", "stop": stop}, {"prompt": "From", "seed": 1, "stop": ["\0", stop]})
    for answer in answers(sampling, capsys):
        assert (answer["text"], answer["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_what_flags_say_holds_for_lines_that_do_not(sampling: SampleConfig, capsys) -> None:
    write({"prompt": "From"}, {"prompt": "From", "temperature": 1.0, "seed": 5})
    greedy, hot = answers(replace(sampling, temperature=0.0), capsys)
    assert greedy["text"] == alone(sampling, "From", capsys, temperature=0.0)
    assert hot["text"] == alone(sampling, "From", capsys, seed=5)


def test_without_a_seed_the_answer_names_one_that_repeats_it(sampling: SampleConfig, capsys) -> None:
    write({"prompt": "From"}, {"prompt": "From", "seed": None})
    for answer in answers(replace(sampling, seed=None), capsys):
        assert answer["text"] == alone(sampling, "From", capsys, seed=answer["seed"])


def test_standard_input(sampling: SampleConfig, capsys, monkeypatch) -> None:
    raw = io.BytesIO(b'{"prompt": "From"}')
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw))
    (answer,) = answers(replace(sampling, prompts_file="-"), capsys)
    assert answer["prompt"] == "From"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: this is not JSON (Expecting property name"),
        ("[" * 100_000, "line 2: this is not JSON ("),
        ("[1]", 'line 2: this is not an object: write {"prompt": "ROMEO:"}'),
        ("{}", 'line 2: "prompt" is missing or not a text'),
        ('{"prompt": ""}', 'line 2: "prompt" is missing or not a text'),
        ('{"prompt": 3}', 'line 2: "prompt" is missing or not a text'),
        ('{"prompt": "a", "id": [1]}', 'line 2: "id" [1] is neither a text nor a whole number'),
        (
            '{"prompt": "a", "tempreature": 1}',
            "line 2: 'tempreature' is unknown: use prompt, id, temperature, ",
        ),
        ('{"prompt": "a", "device": "cpu"}', "line 2: 'device' is unknown"),
        ('{"prompt": "a", "temperature": -1}', "line 2: --temperature -1.0 is not 0"),
        ('{"prompt": "a", "temperature": NaN}', "line 2: --temperature nan"),
        ('{"prompt": "a", "top_k": "many"}', "line 2: --top_k many is of type str"),
        ('{"prompt": "a", "num_tokens": null}', "line 2: --num_tokens None is of type NoneType"),
        ('{"prompt": "a", "seed": -1}', "line 2: --seed -1"),
        ('{"prompt": "a", "stop": [""]}', 'line 2: --stop ""'),
        ('{"prompt": "a", "logit_bias": {"ab": 1}}', "line 2: --logit_bias 'ab' is 2 tokens"),
        ('{"prompt": "caf\\u00e9"}', "line 2: \"prompt\": character 'é' (U+00E9) at position 3"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_made(
    sampling: SampleConfig, capsys, line: str, message: str
) -> None:
    write({"prompt": "From"}, line, {"prompt": "From"})
    with pytest.raises(UserError, match=re.escape(f"--prompts_file prompts.jsonl, {message}")) as raised:
        main(sampling)
    assert "more bad" not in str(raised.value)
    assert capsys.readouterr().out == ""


def test_more_bad_lines_are_counted(sampling: SampleConfig) -> None:
    write("{", {"prompt": "From"}, "[]", "x")
    with pytest.raises(UserError, match=r"line 1: .* \(and 2 more bad lines\)$"):
        main(sampling)


def test_a_file_without_prompts(sampling: SampleConfig) -> None:
    write("", "  ")
    with pytest.raises(UserError, match=r"prompts\.jsonl has no prompts: give lines such as"):
        main(sampling)
    with pytest.raises(UserError, match=r"--prompts_file nowhere\.jsonl cannot be read: No such file"):
        main(replace(sampling, prompts_file="nowhere.jsonl"))


def test_a_progress_bar_on_standard_error_leaves_the_output_clean(
    sampling: SampleConfig, capsys, monkeypatch
) -> None:
    write(*({"prompt": "From", "top_k": 1 + number} for number in range(3)))
    expected = answers(sampling, capsys)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes standard error for a terminal
    main(sampling)
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == expected
    assert "Prompts" in err
    assert "3/3" in err
