"""Any text has a loss: that of a plain loop, the one that training printed, in any tokenizer's tokens."""

import io
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tokenizers
import torch
from conftest import TINY, prepared
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt import scoring
from nanogpt.checkpoint.format import load_checkpoint, load_model, save_checkpoint
from nanogpt.cli import evaluate
from nanogpt.cli import main as cli
from nanogpt.cli.config import EvaluateConfig
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.data.dataset import load_dataset
from nanogpt.errors import UserError
from nanogpt.model.gpt import GPT
from nanogpt.scoring import Score, bootstrap, common_segments, compare, encode_documents, interval_of, score
from nanogpt.text.documents import Chunk
from nanogpt.text.encoding import NOT_TEXT
from nanogpt.tokenizer.base import ByteTokenizer, CharTokenizer, Tokenizer
from nanogpt.tokenizer.bpe import train_bpe
from nanogpt.training.fit import fit

KINDS = ("char", "byte", "bpe")
LINE = "From fairest creatures we desire increase, Ä\n"
TEXT = "".join(f"{number} {LINE}" for number in range(150))
VOCAB = 11

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each kind of tokenizer a data folder and a trained model, data-KIND and out-KIND."""
    folder = tmp_path_factory.mktemp("shelf")
    for kind in KINDS:
        prepared(folder / f"data-{kind}", TEXT, tokenizer=kind, vocab_size=280)
        config = TrainConfig(
            **TINY, data_dir=str(folder / f"data-{kind}"), out_dir=str(folder / f"out-{kind}")
        )
        fit(replace(config, ema_decay=0.9))
    return folder


@pytest.fixture
def run(shelf: Path, tmp_path: Path, monkeypatch, capsys) -> Run:
    """Run `nanogpt eval` in a copy of the shelf: exit code, standard output, standard error."""
    monkeypatch.chdir(shutil.copytree(shelf, tmp_path / "shelf"))

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.run_command("eval", [*arguments, "--device", "cpu"], "nanogpt eval")
        return code, *capsys.readouterr()

    return run


def result(run: Run, *arguments: str) -> dict:
    """The JSON object that the command prints."""
    code, out, _ = run(*arguments, "--json")
    assert code == 0
    return json.loads(out)


def failure(run: Run, *arguments: str) -> str:
    """The one line with which the command ends."""
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    *others, last, end = err.split("\n")
    assert end == ""
    assert last.startswith("error: ")
    assert all(line.startswith("Evaluating ") for line in others)
    return last


# --- the loss of each token ---


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(1)
    return GPT(GPTConfig(vocab_size=VOCAB, n_layer=2, n_head=2, n_embd=16, block_size=8, dropout=0.5))


def plain_losses(model: GPT, ids: np.ndarray, context: int, stride: int) -> list[float]:
    """Token by token: the first window whose end is not before it predicts it."""
    losses = []
    model.eval()
    for i in range(1, len(ids)):
        start = max(0, math.ceil((i - context) / stride)) * stride
        assert min(i, context - stride) <= i - start <= context
        with torch.no_grad():
            logits, _ = model(torch.from_numpy(ids[None, start:i].astype(np.int64)))
        losses.append(-logits[0, -1].log_softmax(-1)[ids[i]].item())
    return losses


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    ids=st.lists(st.integers(0, VOCAB - 1), max_size=40),
    context=st.integers(1, 8),
    share=st.floats(0, 1),
    batch_size=st.none() | st.integers(1, 5),
)
def test_the_losses_are_those_of_a_plain_loop(model: GPT, ids, context, share, batch_size) -> None:
    stride = max(1, round(share * context))
    tokens = np.array(ids, np.uint8)
    model.train()
    counts: list[int] = []
    losses = score(model, tokens, context, stride, batch_size=batch_size, advance=counts.append)
    assert model.training
    np.testing.assert_allclose(losses, plain_losses(model, tokens, context, stride), rtol=1e-5, atol=1e-5)
    assert sum(counts) == len(losses) == max(0, len(ids) - 1)
    if len(losses):
        scored = Score(losses, np.ones(len(ids), np.int64), context, stride)
        positions = scored.positions
        np.testing.assert_array_equal(
            positions,
            [i - max(0, math.ceil((i - context) / stride)) * stride for i in range(1, len(ids))],
        )
        by_position = [
            losses[positions == p].mean() if (positions == p).any() else math.nan
            for p in range(1, context + 1)
        ]
        np.testing.assert_allclose(scored.loss_by_position(), by_position)
        for (first, last), loss in scored.loss_by_octave().items():
            inside = (positions >= first) & (positions <= last)
            assert loss == pytest.approx(losses[inside].mean())


def test_logits_are_computed_in_parts(model: GPT, monkeypatch) -> None:
    ids = np.arange(40) % VOCAB
    whole = score(model, ids)
    monkeypatch.setattr(type(scoring.kind_of(torch.device("cpu"))), "logits_per_chunk", 3 * VOCAB)
    np.testing.assert_allclose(score(model, ids), whole, rtol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"context": 9}, "--context 9 is not between 1 and the model's block_size 8"),
        ({"context": 0}, "--context 0"),
        ({"stride": 9}, "--stride 9 is not between 1 and the context of 8 tokens"),
        ({"context": 4, "stride": 5}, "--stride 5 is not between 1 and the context of 4 tokens"),
        ({"stride": 0}, "--stride 0"),
    ],
)
def test_windows_that_would_miss_tokens_are_refused(model: GPT, sizes, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        score(model, np.arange(5), **sizes)


# --- bits a byte ---


def three_tokenizers() -> list[Tokenizer]:
    return [CharTokenizer.train(TEXT), ByteTokenizer(), train_bpe(TEXT.encode(), 280)]


@pytest.mark.parametrize("tokenizer", three_tokenizers(), ids=KINDS)
def test_bits_a_byte_are_what_they_are_defined_to_be(tokenizer: Tokenizer) -> None:
    """Of a model to which every token is as likely as any other."""
    uniform = GPT(
        GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=8, zero_init=True, tied=False)
    )
    text = "ÄÄ From fairest creatures"
    encoded = encode_documents(tokenizer, [Chunk(text.encode(), True)])
    ends = int(tokenizer.end_of_text is not None)
    assert tokenizer.decode(encoded.ids[: len(encoded.ids) - ends].tolist()) == text
    assert encoded.sizes.sum() == len(text.encode())
    scored = Score(score(uniform, encoded.ids), encoded.sizes, 256, 256)
    first = len(tokenizer.tokens[int(encoded.ids[0])])
    assert scored.bytes == len(text.encode()) - first
    assert scored.loss == pytest.approx(math.log(tokenizer.vocab_size))
    assert scored.perplexity == pytest.approx(tokenizer.vocab_size)
    bits = (len(encoded.ids) - 1) * math.log2(tokenizer.vocab_size)
    assert scored.bits_per_byte == pytest.approx(bits / (len(text.encode()) - first))


@pytest.mark.parametrize("tokenizer", [*three_tokenizers(), CharTokenizer.train(TEXT, end_of_text=True)])
def test_the_documents_of_a_split_come_back(tokenizer: Tokenizer) -> None:
    chunks = [Chunk("Ä From".encode(), True), Chunk(b"fairest", True), Chunk(b" we", False)]
    encoded = encode_documents(tokenizer, chunks)
    back = scoring.decode_documents(tokenizer, encoded)
    if tokenizer.end_of_text is None:
        chunks = [Chunk(b"".join(chunk.raw for chunk in chunks), False)]
    assert back == chunks


# --- two models ---


class Tokens(NamedTuple):
    """Where the tokens of a text end, and a loss for each."""

    ends: list[int]
    losses: list[float]

    def score(self) -> Score:
        return Score(np.array(self.losses[1:]), np.diff([0, *self.ends]), 8, 8)


@st.composite
def texts(draw) -> tuple[Tokens, Tokens]:
    """The same text in the tokens of two models; some tokens have no bytes."""
    length = draw(st.integers(1, 60))
    sides = []
    for _ in range(2):
        ends = sorted(draw(st.lists(st.integers(0, length), max_size=70)))
        sides.append(Tokens([*ends, length], [draw(st.floats(0, 9)) for _ in range(len(ends) + 1)]))
    return sides[0], sides[1]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(texts())
def test_segments_end_where_tokens_of_both_end(sides) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "SEGMENT_BYTES", 5)
        *nats, sizes = common_segments(*(side.score() for side in sides))
    common = sorted(set(sides[0].ends) & set(sides[1].ends))
    common = [end for end in common if all(end >= side.ends[0] for side in sides)]
    starts = range(common[0], common[-1], 5)
    cuts = sorted({common[-1], *(next(end for end in common if end >= start) for start in starts)})
    assert sizes.tolist() == np.diff(cuts).tolist()
    for side, found in zip(sides, nats, strict=True):
        wanted = [
            math.fsum(loss for end, loss in zip(*side, strict=True) if low < end <= high)
            for low, high in pairwise(cuts)
        ]
        np.testing.assert_allclose(found, wanted, atol=1e-9)


def test_the_bootstrap_is_that_of_a_plain_loop(monkeypatch) -> None:
    source = np.random.default_rng(5)
    values, sizes = source.normal(size=30), source.integers(1, 900, 30)
    monkeypatch.setattr(scoring, "INDICES_PER_BLOCK", 100)
    ratios = bootstrap(values, sizes, seed=3, resamples=50)
    random = np.random.default_rng(3)
    for ratio in ratios:
        drawn = random.integers(30, size=30).tolist()
        assert ratio == pytest.approx(sum(values[i] for i in drawn) / sum(sizes[i] for i in drawn))


def pair(difference: np.ndarray) -> tuple[Score, Score]:
    """Two models of bytes, whose losses differ by this, in bits."""
    sizes = np.ones(len(difference) + 1, np.int64)
    losses = np.full(len(difference), 5.0)
    return Score(losses + math.log(2) * difference, sizes, 8, 8), Score(losses, sizes, 8, 8)


def test_a_difference_is_told_where_there_is_one() -> None:
    noise = np.random.default_rng(1).normal(size=20_000)
    better = compare(*pair(noise + 0.1))
    assert better.is_told
    assert better.low < better.mean < better.high
    assert better.mean == pytest.approx(0.1 + noise.mean())
    # the interval of a mean of 20,000 independent numbers of variance 1
    assert better.high - better.low == pytest.approx(2 * 1.96 / math.sqrt(20_000), rel=0.2)
    assert evaluate.verdict(better).startswith("B is better by 0.")
    worse = compare(*pair(noise - 0.1))
    assert worse.high < 0
    assert evaluate.verdict(worse).startswith("A is better by 0.")
    assert not compare(*pair(noise - noise.mean())).is_told


def test_the_interval_of_one_model_is_that_of_the_mean() -> None:
    noise = np.random.default_rng(1).normal(size=20_000)
    one, _ = pair(noise)
    low, high, segments = interval_of(one)
    assert segments == 40
    assert low < one.bits_per_byte < high
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(20_000), rel=0.3)
    assert np.isnan(interval_of(pair(np.ones(700))[0])[:2]).all()


def test_too_few_segments_tell_nothing() -> None:
    told = compare(*pair(np.ones(700)))
    assert told.mean == pytest.approx(1)
    assert not told.is_told
    assert evaluate.verdict(told) == (
        "No difference can be told: the text has 2 segments to compare, too few for an interval"
    )


def test_long_texts_have_longer_segments(monkeypatch) -> None:
    monkeypatch.setattr(scoring, "MAX_SEGMENTS", 7)
    *_, sizes = common_segments(*pair(np.zeros(10_000)))
    assert len(sizes) == 7


# --- the command ---


@pytest.mark.parametrize("kind", KINDS)
def test_the_validation_loss_is_the_one_that_training_printed(run: Run, kind: str) -> None:
    rows = [json.loads(line) for line in Path(f"out-{kind}/metrics.jsonl").read_text().splitlines()]
    best = min((row for row in rows if "val_loss" in row), key=lambda row: row["val_loss"])
    found = result(run, "--checkpoint", f"out-{kind}", "--data_dir", f"data-{kind}", "--split", "val")
    assert found["loss"] == pytest.approx(best["val_loss"], rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(best["val_bits_per_byte"], rel=1e-6)
    assert found["tokens"] == len(load_dataset(Path(f"data-{kind}")).val) - 1
    _, out, err = run("--checkpoint", f"out-{kind}/ckpt.pt", "--data_dir", f"data-{kind}")
    assert f"Loss: {best['val_loss']:.4f} nats a token" in out
    assert err == ""
    train = result(run, "--checkpoint", f"out-{kind}", "--data_dir", f"data-{kind}", "--split", "train")
    assert train["tokens"] == len(load_dataset(Path(f"data-{kind}")).train) - 1
    assert train["bytes"] + found["bytes"] <= len(TEXT.encode()) - 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_has_the_loss_of_its_tokens(run: Run, kind: str) -> None:
    text = TEXT[1000:1500]
    Path("text.txt").write_bytes(text.replace("\n", "\r\n").encode("utf-16"))
    found = result(run, "--checkpoint", f"out-{kind}", "--input_file", "text.txt", "--stride", "5")
    model, tokenizer = load_model(f"out-{kind}/ckpt.pt", "cpu")
    ids = tokenizer.encode(text).tolist()
    ids += [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    losses = score(model, np.array(ids), stride=5)
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-6)
    assert found["tokens"] == len(ids) - 1
    assert found["bytes"] == len(text.encode()) - len(tokenizer.tokens[ids[0]])
    assert (found["context"], found["stride"]) == (16, 5)
    assert len(found["loss_by_position"]) == 16


def test_another_tokenizers_split_is_evaluated_by_its_text(run: Run) -> None:
    """The byte model on the split of the BPE is the byte model on its own, which has the same text."""
    own = result(run, "--checkpoint", "out-byte", "--data_dir", "data-byte")
    other = result(run, "--checkpoint", "out-byte", "--data_dir", "data-bpe")
    assert {**own, "checkpoint": ""} == {**other, "checkpoint": ""}


def test_a_tokenizer_that_changes_the_text(run: Run, tmp_path: Path) -> None:
    """All bytes of the text count, but of its split no other model can have the text."""
    words = ["[UNK]", "from", "fairest", "creatures", "we", "desire", "increase", ","]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.normalizer = tokenizers.normalizers.BertNormalizer()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.save("tokenizer.json")
    data = prepared(tmp_path / "words", TEXT, tokenizer="tokenizer.json")
    fit(TrainConfig(**TINY, data_dir=str(tmp_path / "words"), out_dir="out-words"))
    split = ("--data_dir", str(tmp_path / "words"))
    found = result(run, "--checkpoint", "out-words", *split)
    assert (found["tokens"], found["bytes"]) == (len(data.val) - 1, data.val_bytes)
    both = ("--checkpoint", "out-words", "--against", "out-byte")
    assert "has tokens of a tokenizer.json, which may change the text" in failure(run, *both, *split)
    Path("lines.jsonl").write_text("".join(json.dumps(LINE) + "\n" for _ in range(200)))
    difference = result(run, *both, "--input_file", "lines.jsonl")["difference"]
    assert difference["segments"] == math.ceil(199 * len(LINE.encode()) / 512)


def test_several_files_and_standard_input_are_one_text(run: Run, monkeypatch) -> None:
    Path("one.txt").write_text(TEXT[:700], "utf-8")
    Path("two.jsonl").write_text(json.dumps({"body": TEXT[700:900]}) + "\n" + json.dumps({"body": "Ä"}))
    texts = [TEXT[:700], TEXT[700:900], "Ä", TEXT[900:1000]]
    stdin = io.TextIOWrapper(io.BytesIO(TEXT[900:1000].encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    files = ["--input_file", "-", "one.txt", "two.jsonl", "--text_field", "body"]
    found = result(run, "--checkpoint", "out-byte", *files)
    ids = np.concatenate([np.frombuffer(text.encode() + b"\xff", np.uint8) for text in texts])
    model, _ = load_model("out-byte/ckpt.pt", "cpu")
    assert found["loss"] == pytest.approx(score(model, ids).mean(), rel=1e-6)


def test_two_checkpoints_are_compared_in_bits_a_byte(run: Run) -> None:
    Path("text.txt").write_text(TEXT, "utf-8")
    both = ("--checkpoint", "out-char", "--against", "out-bpe", "--input_file", "text.txt")
    found = result(run, *both)
    assert found["against"]["checkpoint"] == str(Path("out-bpe", "ckpt.pt"))
    difference = found["difference"]
    expected = found["bits_per_byte"] - found["against"]["bits_per_byte"]
    assert difference["bits_per_byte"] == pytest.approx(expected, abs=0.01)
    assert difference["low"] < difference["bits_per_byte"] < difference["high"]
    assert difference["better"] == ("against" if difference["low"] > 0 else "checkpoint")
    assert result(run, *both) == found
    _, out, err = run(*both)
    half = (difference["high"] - difference["low"]) / 2
    assert f"is better by {abs(difference['bits_per_byte']):.4f} +- {half:.4f} bits a byte" in out
    assert out.index(f"A: {Path('out-char', 'ckpt.pt')}") < out.index(f"B: {Path('out-bpe', 'ckpt.pt')}")
    assert err == "".join(f"Evaluating {Path(f'out-{kind}', 'ckpt.pt')}\n" for kind in ("char", "bpe"))


def test_a_checkpoint_does_not_differ_from_itself(run: Run) -> None:
    same = ("--checkpoint", "out-bpe", "--against", "out-bpe/ckpt.pt", "--data_dir", "data-char")
    Path("text.txt").write_text(TEXT, "utf-8")
    found = result(run, *same[:4], "--input_file", "text.txt")
    assert found["difference"] | {"segments": 0} == {
        "bits_per_byte": 0, "low": 0, "high": 0, "segments": 0, "better": None,
    }  # fmt: skip
    _, out, _ = run(*same)
    assert "\nNo difference can be told: " in out
    assert result(run, *same)["difference"]["low"] is None


def test_unknown_characters_are_counted_and_named(run: Run) -> None:
    Path("text.txt").write_text("From é fairest 中 creatures é é", "utf-8")
    Path("known.txt").write_text("From  fairest  creatures  ", "utf-8")
    line = failure(run, "--checkpoint", "out-char", "--input_file", "text.txt")
    assert line == (
        "error: --input_file text.txt has 4 characters that the model has never seen: "
        "3 x 'é' (U+00E9), 1 x '中' (U+4E2D): give --unknown skip to leave them out"
    )
    skip = ("--input_file", "text.txt", "--unknown", "skip")
    found = result(run, "--checkpoint", "out-char", *skip)
    assert found.pop("left_out") == {"é": 3, "中": 1}
    known = result(run, "--checkpoint", "out-char", "--input_file", "known.txt")
    assert known.pop("left_out") == {}
    assert found == known
    _, _, err = run("--checkpoint", "out-char", *skip)
    assert err.endswith("Left out of --input_file text.txt: 4 characters that the model has never seen: "
                        "3 x 'é' (U+00E9), 1 x '中' (U+4E2D)\n")  # fmt: skip
    both = result(run, "--checkpoint", "out-byte", "--against", "out-char", *skip)
    alone = result(run, "--checkpoint", "out-byte", "--input_file", "known.txt")
    assert both["loss"] == alone["loss"]  # of the text that both can read
    assert result(run, "--checkpoint", "out-byte", *skip)["left_out"] == {}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "--input_file text.txt is empty: give a file with text in it"),
        (b" \n\n", "--input_file text.txt is empty: give a file with text in it"),
        (b"F", "--input_file text.txt is too short (1 token): there is nothing to predict"),
        (
            bytes(range(256)),
            f"--input_file text.txt {NOT_TEXT}",
        ),
        (None, "--input_file text.txt does not exist: check the path"),
    ],
    ids=["empty", "blank", "one token", "binary", "missing"],
)
def test_a_file_without_a_text_is_named(run: Run, raw: bytes | None, message: str) -> None:
    if raw is not None:
        Path("text.txt").write_bytes(raw)
    assert failure(run, "--checkpoint", "out-char/ckpt.pt", "--input_file", "text.txt") == f"error: {message}"


def test_a_text_shorter_than_the_context_is_enough(run: Run) -> None:
    Path("text.txt").write_text("Fr", "utf-8")
    found = result(run, "--checkpoint", "out-char", "--input_file", "text.txt")
    assert (found["tokens"], found["bytes"]) == (1, 1)
    assert [loss is None for loss in found["loss_by_position"]] == [False, *[True] * 15]


def test_a_damaged_checkpoint_is_named(run: Run) -> None:
    path = Path("out-char/ckpt.pt")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    for flags in (("--checkpoint", str(path)), ("--checkpoint", "out-byte", "--against", str(path))):
        assert f"checkpoint {path} is damaged" in failure(run, *flags, "--data_dir", "data-byte")
    assert "nowhere does not exist" in failure(run, "--checkpoint", "nowhere")
    assert "--against . is a folder without" in failure(run, "--checkpoint", "out-byte", "--against", ".")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "17"], "--context 17 is not between 1 and the model's block_size 16"),
        (["--context", "8", "--stride", "9"], "--stride 9 is not between 1 and the context of 8 tokens"),
        (["--context", "0"], "--context 0 is too small: it must be at least 1"),
        (["--split", "test"], "--split"),
        (["--split", "val", "--input_file", "a"], "--input_file and --split val are two texts"),
        (["--input_file", "-", "-"], "- is given twice"),
        (["--picture", "loss.svg"], "--picture loss.svg is no name of a PNG file: end it in .png"),
        (["--picture", "taken.png"], "--picture taken.png exists already: give another name"),
    ],
)
def test_nonsense_is_one_line(run: Run, arguments: list[str], message: str) -> None:
    Path("taken.png").write_bytes(b"mine")
    assert message in failure(run, "--checkpoint", "out-char", *arguments)
    assert Path("taken.png").read_bytes() == b"mine"


def test_a_picture_is_drawn_where_told(run: Run) -> None:
    flags = ("--checkpoint", "out-char", "--data_dir", "data-char", "--stride", "6")
    for name, more in {"one.png": (), "two/two.png": ("--against", "out-bpe", "--json")}.items():
        code, out, err = run(*flags, *more, "--picture", name)
        assert code == 0
        assert Path(name).read_bytes().startswith(b"\x89PNG")
        assert f"Picture: {Path(name)}\n" in (err if more else out)
        assert not more or json.loads(out)


def test_a_model_without_a_finite_loss_has_none_in_json(run: Run) -> None:
    path = Path("out-char/ckpt.pt")
    saved = load_checkpoint(path)
    weights = {name: torch.full_like(weight, math.nan) for name, weight in saved.weights.items()}
    save_checkpoint(path, replace(saved, model=weights, average={}))
    found = result(run, "--checkpoint", str(path), "--data_dir", "data-char")
    assert found["loss"] is found["perplexity"] is found["bits_per_byte"] is None
    _, out, _ = run("--checkpoint", str(path), "--against", str(path), "--data_dir", "data-char")
    assert "Loss: nan nats a token" in out
    assert re.search(r"No difference can be told: \+?nan|too few", out)


def test_the_command_without_flags_is_that_of_a_training_without_flags() -> None:
    config = EvaluateConfig()
    assert (config.checkpoint, config.data_dir) == (f"{TrainConfig.out_dir}/ckpt.pt", TrainConfig.data_dir)
