"""Sampling needs the checkpoint alone, stops where told, and names what it cannot do."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from conftest import prepared

from nanogpt.cli.sample import main, print_text, read_prompt
from nanogpt.config import TrainConfig
from nanogpt.data.config import PrepareConfig
from nanogpt.data.prepare import main as prepare
from nanogpt.errors import UserError
from nanogpt.inference.config import SampleConfig
from nanogpt.machine import precision
from nanogpt.model.kv_cache import KVCache
from nanogpt.settings import unescape
from nanogpt.training.fit import fit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def sampling(config: TrainConfig, capsys) -> SampleConfig:
    """A trained checkpoint, its data folder deleted."""
    fit(config)
    shutil.rmtree(config.data_dir)
    capsys.readouterr()
    return SampleConfig(checkpoint=str(Path(config.out_dir) / "ckpt.pt"), num_tokens=40, seed=1, device="cpu")


def test_prints_the_prompt_and_as_many_tokens_as_asked(sampling: SampleConfig, capsys) -> None:
    assert main(replace(sampling, prompt="From")) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("From")
    assert len(printed) == len("From") + 40 + len("\n")


def test_a_seed_repeats_and_samples_differ(sampling: SampleConfig, capsys) -> None:
    main(replace(sampling, num_samples=2))
    first = capsys.readouterr().out
    main(replace(sampling, num_samples=2))
    assert capsys.readouterr().out == first
    one, other = re.split(r"\n-{40}\n", first)
    assert one != other


@pytest.fixture
def dtypes_of_products(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """The dtypes of the vectors that come out of linear layers from here on."""
    seen: set[torch.dtype] = set()
    linear = torch.nn.functional.linear

    def watched(*arguments: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        result = linear(*arguments, **named)
        seen.add(result.dtype)
        return result

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    return seen


@pytest.mark.usefixtures("pytorch_steps")
@pytest.mark.parametrize("trained_in", ["float32", "bfloat16"])
@pytest.mark.parametrize("fast", [torch.float32, torch.bfloat16])
def test_sampling_computes_as_the_training_did_where_that_is_fast(
    config: TrainConfig, monkeypatch, dtypes_of_products, trained_in, fast
) -> None:
    fit(replace(config, dtype=trained_in))
    monkeypatch.setattr(precision, "matmul_rates", lambda device: dict.fromkeys(DTYPES, 1.0) | {fast: 2.0})
    dtypes_of_products.clear()
    sampling = SampleConfig(checkpoint=str(Path(config.out_dir) / "ckpt.pt"), num_tokens=3, device="cpu")
    main(sampling)
    assert dtypes_of_products == {fast if trained_in == "bfloat16" else torch.float32}
    dtypes_of_products.clear()
    main(replace(sampling, dtype="bfloat16"))
    assert dtypes_of_products == {torch.bfloat16}


def test_temperature_zero_is_the_same_for_every_seed(sampling: SampleConfig, capsys) -> None:
    printed = set()
    for seed in (1, 2, None):
        main(replace(sampling, temperature=0.0, seed=seed))
        printed.add(capsys.readouterr().out)
    assert len(printed) == 1


def test_unknown_prompt_character_is_named_with_its_position(sampling: SampleConfig) -> None:
    with pytest.raises(UserError, match=r"--prompt: character 'é' \(U\+00E9\) at position 3"):
        main(replace(sampling, prompt="caté"))


def test_stop_ends_the_text_before_it(sampling: SampleConfig, capsys) -> None:
    main(replace(sampling, temperature=0.0, num_tokens=200))
    whole = capsys.readouterr().out
    stop = whole[60:64]
    main(replace(sampling, temperature=0.0, num_tokens=200, stop=(stop,)))
    assert capsys.readouterr().out == whole[: whole.index(stop, 1)] + "\n"


def test_before_the_first_evaluation_last_pt_is_suggested(sampling: SampleConfig) -> None:
    best = Path(sampling.checkpoint)
    best.unlink()
    with pytest.raises(UserError, match=r"give --checkpoint .*last\.pt"):
        main(sampling)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_k": 0}, "--top_k 0"),
        ({"top_p": 0.0}, "--top_p 0.0"),
        ({"top_p": 1.5}, "--top_p 1.5"),
        ({"num_tokens": -1}, "--num_tokens -1"),
        ({"num_samples": 0}, "--num_samples 0"),
        (
            {"num_tokens": 10**10},
            "--num_tokens 10000000000 is too large: it must be at most 1,000,000,000",
        ),
        ({"num_samples": 10**23}, "--num_samples 1" + "0" * 23 + " is too large"),
        ({"top_k": 10**23}, "--top_k 1"),
        ({"prompt": "a", "prompt_file": "b"}, "--prompt and --prompt_file b are two prompts"),
        ({"prompt": ""}, "--prompt"),
        ({"stop": ("",)}, "--stop"),
    ],
)
def test_nonsense_is_refused(values, message) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        SampleConfig(**values)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [(r"\n", "\n"), (r"a\tb", "a\tb"), (r"\\n", r"\n"), (r"\x", r"\x"), ("\\", "\\"), (r"\\\n", "\\\n")],
)
def test_unescape(typed: str, meant: str) -> None:
    assert unescape(typed) == meant


def test_unknown_prompt_characters_are_skipped_when_told(sampling: SampleConfig, capsys) -> None:
    main(replace(sampling, prompt="From", temperature=0.0))
    without = capsys.readouterr().out
    main(replace(sampling, prompt="éFro中m", temperature=0.0, unknown="skip"))
    assert capsys.readouterr().out.removeprefix("éFro中m") == without.removeprefix("From")
    with pytest.raises(UserError, match="seen none of its characters"):
        main(replace(sampling, prompt="é中", unknown="skip"))


def test_several_unknown_prompt_characters_are_named_with_what_to_do(sampling: SampleConfig) -> None:
    with pytest.raises(UserError, match=r"'é' \(U\+00E9\), '中' \(U\+4E2D\) .*--unknown skip") as raised:
        main(replace(sampling, prompt="Fromé中é"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_a_sample_ends_where_the_document_does(config: TrainConfig, tmp_path: Path, capsys, kind) -> None:
    """A model of one short document, over and over, knows where it ends."""
    (tmp_path / "short.jsonl").write_text('"Ä tiny end."\n' * 150)
    folder = str(tmp_path / kind)
    prepare(
        PrepareConfig(
            input_file=(str(tmp_path / "short.jsonl"),), data_dir=folder, tokenizer=kind, vocab_size=260
        )
    )
    fit(replace(config, data_dir=folder, max_iters=300, eval_interval=300, dropout=0.0))
    checkpoint = str(Path(config.out_dir) / "ckpt.pt")
    capsys.readouterr()
    main(SampleConfig(checkpoint=checkpoint, prompt="Ä", temperature=0.0, num_tokens=100, device="cpu"))
    assert capsys.readouterr().out == "Ä tiny end.\n"


def test_training_and_sampling_with_somebody_elses_tokenizer(
    config: TrainConfig, tmp_path: Path, capsys
) -> None:
    """Also from the default prompt, a line feed, of which this tokenizer makes no token at all."""
    vocabulary = {token: i for i, token in enumerate(["[UNK]", "from", "fair", "##est", "we", "rose", ","])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("From fairest creatures we desire increase, rose\n" * 60)
    folder = str(tmp_path / "foreign")
    tokenizer = str(tmp_path / "tokenizer.json")
    prepare(PrepareConfig(input_file=(str(tmp_path / "text.txt"),), data_dir=folder, tokenizer=tokenizer))
    fit(replace(config, data_dir=folder))
    checkpoint = str(Path(config.out_dir) / "ckpt.pt")
    capsys.readouterr()
    main(SampleConfig(checkpoint=checkpoint, prompt="from", num_tokens=8, seed=1, device="cpu"))
    assert "fair" in capsys.readouterr().out
    try:
        main(SampleConfig(checkpoint=checkpoint, num_tokens=8, seed=1, device="cpu"))
    except UserError as error:
        assert "--prompt" in str(error)  # noqa: PT017 - a text is right too


def test_text_appears_token_by_token(sampling: SampleConfig) -> None:
    """The first characters can be read while the rest is being made; then the reader leaves."""
    command = [sys.executable, "-m", "nanogpt", "sample", "--checkpoint", sampling.checkpoint]
    command += ["--num_tokens", "1000000", "--prompt", "From", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stderr
    assert process.stdout.read(20).startswith("From")
    assert process.poll() is None
    process.stdout.close()
    assert process.wait(30) == 0
    assert process.stderr.read() == ""
    process.stderr.close()


# --- a prompt from a file ---


@pytest.mark.parametrize(
    ("raw", "prompt"),
    [
        (b"From", "From"),
        (b"From\n", "From"),
        (b"From\r\n", "From"),
        (b"From\n\n", "From\n"),
        (b"\n", "\n"),
        (rb"From\n", r"From\n"),
        (b"\xef\xbb\xbfFrom\n", "From"),
        ("From ä".encode("utf-16"), "From ä"),
        ("Größe und Maß, Übermut, Straße".encode("latin-1"), "Größe und Maß, Übermut, Straße"),
    ],
)
@pytest.mark.parametrize("name", ["prompt.txt", "-"])
def test_a_prompt_from_a_file_or_standard_input_is_taken_as_it_is(
    tmp_path: Path, monkeypatch, raw: bytes, prompt: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.txt").write_bytes(raw)
    with open("prompt.txt", encoding="ascii") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert read_prompt(name) == prompt


def test_a_prompt_from_a_pipe(sampling: SampleConfig, tmp_path: Path, capsys) -> None:
    """As `<(command)` gives it."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_text, args=("From\n",))
    writer.start()
    assert main(replace(sampling, prompt_file=str(fifo), num_tokens=5)) == 0
    writer.join()
    printed = capsys.readouterr().out
    assert printed.startswith("From")
    assert len(printed) == len("From") + 5 + len("\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.txt", "--prompt_file nowhere.txt cannot be read: No such file or directory"),
        (".", "--prompt_file . cannot be read: Is a directory"),
        ("empty.txt", "--prompt_file empty.txt is empty: give at least one character"),
        ("binary.bin", "--prompt_file binary.bin is not a text file"),
        ("/dev/zero", "--prompt_file /dev/zero is larger than 16 MiB"),
        ("unknown.txt", "--prompt_file: character 'é' "),
    ],
)
def test_a_file_that_is_no_prompt_is_named(
    sampling: SampleConfig, tmp_path: Path, monkeypatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("binary.bin").write_bytes(bytes(range(256)))
    Path("unknown.txt").write_text("café", "utf-8")
    with pytest.raises(UserError, match=re.escape(message)):
        main(replace(sampling, prompt_file=name))


# --- a checkpoint by its folder ---


def test_a_folder_stands_for_its_best_checkpoint_or_else_its_newest(sampling: SampleConfig, capsys) -> None:
    best = Path(sampling.checkpoint)
    for path in (best, best.with_name("last.pt")):
        main(replace(sampling, checkpoint=str(path)))
        expected = capsys.readouterr().out
        main(replace(sampling, checkpoint=str(best.parent)))
        out, err = capsys.readouterr()
        assert (out, err) == (expected, f"Sampling from {path}\n")
        path.unlink()
    with pytest.raises(UserError, match=r"is a folder without a checkpoint .* give a run's --out_dir"):
        main(replace(sampling, checkpoint=str(best.parent)))


@pytest.mark.parametrize("path", ["/", ".", "..", ""])
def test_a_folder_without_a_name_is_a_folder(path: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    with pytest.raises(UserError, match="is a folder without a checkpoint"):
        main(SampleConfig(checkpoint=path))


# --- what can go wrong meanwhile ---


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried ...")])
@pytest.mark.parametrize("place", ["cli.sample.build_model", "inference.prompts.generate_rows"])
def test_too_little_memory_is_one_line(sampling: SampleConfig, monkeypatch, error, place: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"nanogpt.{place}", fail)
    with pytest.raises(UserError, match="out of memory: give --device cpu"):
        main(sampling)


def test_another_error_is_no_lack_of_memory(sampling: SampleConfig, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("nanogpt.inference.prompts.generate_rows", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(sampling)


def test_no_terminal_obeys_what_a_model_writes(monkeypatch, capsys) -> None:
    print_text("\x1b[31mred\n")
    assert capsys.readouterr().out == "\x1b[31mred\n"  # a file takes the product as it is
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_text("\x1b[31mred\x07\n\tä\r\n")
    assert capsys.readouterr().out == "\\x1b[31mred\\x07\n\tä\r\n"


# --- many texts, tokens ---


def test_the_text_of_a_seed_is_the_one_it_has_alone(sampling: SampleConfig, capsys) -> None:
    def texts(**settings: object) -> list[str]:
        main(replace(sampling, prompt="From", temperature=2.0, **settings))
        return re.split(r"\n-{40}\n", capsys.readouterr().out)

    stop = texts()[0][20:22]
    alone = [texts(seed=1 + number, stop=(stop,))[0] for number in range(5)]
    assert texts(num_samples=5, stop=(stop,)) == alone
    assert len(set(map(len, alone))) > 1


def test_more_texts_than_a_batch_has_rows(sampling: SampleConfig, capsys, monkeypatch) -> None:
    main(replace(sampling, num_samples=5, num_tokens=9))
    expected = capsys.readouterr().out
    monkeypatch.setattr("nanogpt.inference.prompts.MAX_ROWS", 2)
    main(replace(sampling, num_samples=5, num_tokens=9))
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("first", [0, 2])
def test_with_too_little_memory_texts_are_made_one_after_the_other(
    sampling: SampleConfig, capsys, monkeypatch, first: int
) -> None:
    main(replace(sampling, num_samples=3))
    expected = capsys.readouterr().out
    step = KVCache.step

    def small(self: KVCache, rows: Sequence[int], idx: torch.Tensor, *rest: Any) -> object:
        if len(idx) > 1 and self.lengths[0] >= first:
            raise RuntimeError("CUDA out of memory. Tried ...")
        return step(self, rows, idx, *rest)

    monkeypatch.setattr(KVCache, "step", small)
    main(replace(sampling, num_samples=3))
    out, err = capsys.readouterr()
    assert out == expected
    assert err == "Too little memory for all texts at once: they are made one after the other\n"


@pytest.mark.parametrize("count", [0, 2])
def test_log_probabilities_as_json_lines(sampling: SampleConfig, capsys, count: int) -> None:
    main(replace(sampling, prompt="From", num_samples=2))
    texts = re.split(r"\n\n-{40}\n", capsys.readouterr().out.removesuffix("\n"))
    main(replace(sampling, prompt="From", num_samples=2, logprobs=count))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["sample"] for line in lines] == [0] * 40 + [1] * 40
    for number, text in enumerate(texts):
        assert "From" + "".join(line["text"] for line in lines if line["sample"] == number) == text
    for line in lines:
        assert set(line) == {"sample", "text", "token", "logprob", "top"}
        assert line["logprob"] <= 0
        assert len(line["top"]) == count
        for text, token, logprob in line["top"]:
            assert (text == line["text"]) == (token == line["token"])
            assert logprob >= line["logprob"] or token != line["top"][0][1]


def test_a_bias_by_text_or_id(sampling: SampleConfig, capsys) -> None:
    main(replace(sampling, prompt="From", logit_bias=("f=1000",), num_tokens=5))
    assert capsys.readouterr().out == "Fromfffff\n"
    main(replace(sampling, prompt="From", logit_bias=(r"\n=1000",), num_tokens=3))
    assert capsys.readouterr().out == "From\n\n\n\n"
    with pytest.raises(UserError, match="--logit_bias 'fr' is 2 tokens"):
        main(replace(sampling, logit_bias=("fr=1",)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"logprobs": -1}, "--logprobs -1"),
        ({"prompts_file": "x", "prompt": "a"}, "--prompts_file and --prompt exclude each other"),
        ({"prompts_file": "x", "interactive": True}, "--prompts_file and --interactive exclude"),
        ({"interactive": True, "num_samples": 2}, "--interactive and --num_samples exclude"),
        ({"interactive": True, "logprobs": 2}, "--interactive and --logprobs exclude"),
    ],
)
def test_flags_that_exclude_each_other(values, message) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        SampleConfig(**values)


def test_guesses_learned_from_the_training_change_no_text(config: TrainConfig, tmp_path, capsys) -> None:
    fit(config)
    sampling = SampleConfig(
        checkpoint=str(Path(config.out_dir) / "ckpt.pt"), num_tokens=40, seed=1, device="cpu"
    )
    capsys.readouterr()
    main(sampling)
    expected = capsys.readouterr().out
    main(replace(sampling, speculate=3))
    assert capsys.readouterr() == (expected, f"Guesses are learned from {config.data_dir}\n")
    prepared(Path(config.data_dir), "another text " * 100, overwrite=True)
    capsys.readouterr()
    main(replace(sampling, speculate=3))  # of no use, and not used
    assert capsys.readouterr() == (expected, "")
    shutil.rmtree(config.data_dir)
    main(replace(sampling, speculate=3))
    assert capsys.readouterr() == (expected, "")
