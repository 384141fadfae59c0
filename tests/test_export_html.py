"""Exports as a page: its JavaScript, run in Node, computes what PyTorch computes with the same 8 bits."""

import base64
import gzip
import hashlib
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import (
    EVERY_SHAPE,
    LETTERS,
    PRESET_SHAPES,
    TEXTS,
    TOKENIZERS,
    as_in_the_page,
    checkpoint,
    source,
    trained,
    word_probe,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nanogpt.config import GPTConfig
from nanogpt.errors import UserError
from nanogpt.export.html import as_text, packed, rounded
from nanogpt.export.registry import export
from nanogpt.export.source import TrainedModel
from nanogpt.inference.config import SamplingParams
from nanogpt.inference.generate import generate
from nanogpt.inference.inspection import inspect_tokens
from nanogpt.inference.processors import process
from nanogpt.inference.tokens import generate_tokens, with_logprobs
from nanogpt.model.ngram import NgramEmbedding
from nanogpt.model.quantize import Int8Linear, quantize
from nanogpt.page.assemble import PAGE
from nanogpt.tokenizer.base import CharTokenizer, Tokenizer
from nanogpt.tokenizer.bpe import BPETokenizer, byte_level_json

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="Node is not installed")


def page(exported: TrainedModel, folder: Path) -> Path:
    """The page of a model."""
    path = folder / "model.html"
    export(exported, "html", path, overwrite=path.exists())
    return path


def run(path: Path, code: str, **values: Any) -> Any:
    """What JavaScript returns, that has a page (html_page.js) and these values."""
    assert NODE
    harness = Path(__file__).parent / "html_page.js"
    done = subprocess.run(
        [NODE, str(harness), str(path)],
        input=json.dumps({"code": code, "values": values}).encode(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


GREEDY = """
const settings = { numTokens: 150, temperature: 0 };
const found = page.all(page.NanoGPT.generateTokens(await page.model(), values.prompt, settings));
return found.map(({ id, probability, top }) => [id, Math.log(probability), top.map(({ id }) => id)]);
"""


@needs_node
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_greedy_tokens_are_those_of_the_same_weights_in_pytorch(shape: str, tmp_path: Path) -> None:
    """150 tokens, in three contexts and more, that follow a prompt longer than the context."""
    exported = source(**EVERY_SHAPE[shape])
    prompt = torch.arange(70) * 7 % exported.config.vocab_size
    steps = generate_tokens(
        as_in_the_page(exported), prompt[None], num_tokens=150, temperature=0, logprobs=10
    )
    expected = [token for (token,) in steps]
    found = run(page(exported, tmp_path), GREEDY, prompt=prompt.tolist())
    assert [number for number, _, _ in found] == [token.id for token in expected]
    logprobs = torch.tensor([logprob for _, logprob, _ in found])
    torch.testing.assert_close(
        logprobs, torch.tensor([token.logprob for token in expected]), rtol=0, atol=1e-4
    )
    assert [top for _, _, top in found[:20]] == [
        [number for number, _ in token.top] for token in expected[:20]
    ]


@needs_node
@pytest.mark.parametrize("shape", ["preset classic", "preset cpu"])
def test_without_webassembly_the_tokens_are_the_same(shape: str, tmp_path: Path) -> None:
    path = page(source(**PRESET_SHAPES[shape]), tmp_path)
    found, plain = (run(path, GREEDY, prompt=[3, 1, 2], plain=plain) for plain in (False, True))
    assert [number for number, _, _ in found] == [number for number, _, _ in plain]
    assert found != plain  # their sums are rounded differently: both ways were taken


@needs_node
@pytest.mark.parametrize("columns", [8, 42, 384])
@pytest.mark.parametrize("rows", [1, 67])
def test_products_are_those_of_float64(rows: int, columns: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-127, 128, (rows, columns), generator=generator)
    x, scale, bias, before = (torch.randn(size, generator=generator) for size in (columns, rows, rows, rows))
    code = """
    const { weight, x, scale, bias, before } = values, rows = weight.length, columns = x.length;
    const { bytes, multiply } = page.NanoGPTProducts.open(rows * columns, Math.max(rows, columns));
    const integers = new Int8Array(bytes.buffer, bytes.byteOffset, bytes.length);
    const layer = { weight: integers, scale, rows, columns };
    integers.set(weight.flat());
    const y = new Float32Array(rows), added = Float32Array.from(before);
    multiply(layer, Float32Array.from(x), y);
    multiply({ ...layer, bias }, Float32Array.from(x), added, true);
    return [Array.from(y), Array.from(added)];
    """
    arguments = {"weight": weight, "x": x, "scale": scale, "bias": bias, "before": before}
    expected = (weight.double() @ x.double()) * scale.double()
    for plain in (False, True):
        lists = {name: value.tolist() for name, value in arguments.items()}
        y, added = run(page(source(), tmp_path), code, **lists, plain=plain)
        for found, wanted in ((y, expected), (added, expected + bias + before)):
            torch.testing.assert_close(torch.tensor(found).double(), wanted, rtol=1e-5, atol=1e-3)


@needs_node
def test_a_damaged_file_is_recognized(tmp_path: Path) -> None:
    code = """
    const text = page.weights(), half = text.length >> 1, other = text[half] === "a" ? "b" : "a";
    const damaged = [
      "", text.slice(0, half), text.slice(0, half) + other + text.slice(half + 1), text.slice(9),
    ];
    const messages = damaged.map((text) => page.model(text).then(() => "", (error) => error.message));
    return Promise.all(messages);
    """
    for message in run(page(source(), tmp_path), code):
        assert message.startswith("The file is damaged, or a part of it is missing: ask for it again.")


@needs_node
def test_the_page_has_every_number_as_it_was_written(tmp_path: Path) -> None:
    exported = source(**PRESET_SHAPES["preset cpu"])
    code = """
    const m = await page.model(), range = (length) => Array.from({ length }).keys();
    const rows = ({ weight, scale, rows, columns }) =>
      [...range(rows)].map((r) => [...range(columns)].map((c) => weight[r * columns + c] * scale[r]));
    return {
      "token_embedding.weight": rows(m.tokens), "ngram_embedding.triples.weight": rows(m.triples),
      "blocks.0.mlp.fc.weight": rows(m.blocks[0].fc), "head.weight": rows(m.head),
      "final_norm.weight": Array.from(m.finalNorm.gain),
    };
    """
    for name, found in run(page(exported, tmp_path), code).items():
        assert torch.equal(torch.tensor(found), rounded(exported.weights[name])), name


@needs_node
@pytest.mark.parametrize("shape", ["preset classic", "preset cpu"])
def test_a_trained_model_writes_what_sampling_in_int8_writes(shape: str, tmp_path: Path) -> None:
    """The weights are the same integers. PyTorch rounds what goes into each product to bfloat16, too.

    So the same token is the likeliest wherever it is by more than that rounding.
    """
    text = "".join(f"{number} bottles of beer on the wall, take one down. " for number in range(40, 0, -1))
    tokenizer = CharTokenizer.train(text)
    exported = TrainedModel("beer", trained(text, **PRESET_SHAPES[shape] | {"block_size": 256}), tokenizer)
    model = as_in_the_page(exported)
    prompt = tokenizer.encode("40 bottles").astype("int64").tolist()
    steps = generate(model, torch.tensor([prompt]), num_tokens=150, temperature=0)
    expected = [int(token) for token in steps]
    assert [number for number, _, _ in run(page(exported, tmp_path), GREEDY, prompt=prompt)] == expected
    before = [linear.weight.detach() for linear in model.modules() if isinstance(linear, nn.Linear)]
    quantize(model, "int8")
    after = [layer.dequantized() for layer in model.modules() if isinstance(layer, Int8Linear)]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    with torch.no_grad():
        logits = model(torch.tensor([prompt + expected]))[0][0, len(prompt) - 1 : -1]  # (150, V)
    best, chosen = logits.max(dim=-1), torch.tensor(expected)
    behind = best.values - logits.gather(1, chosen[:, None])[:, 0]
    assert float(behind.max()) < 0.05
    assert int((best.indices == chosen).sum()) >= 145


@needs_node
@pytest.mark.parametrize("shape", PRESET_SHAPES)
def test_greedy_tokens_are_those_of_sampling_in_int8_in_c(shape: str, tmp_path: Path) -> None:
    if not (PAGE.parent / "native").is_dir():
        pytest.skip("this version samples in PyTorch alone")
    native = pytest.importorskip("nanogpt.native.step")
    exported = source(**PRESET_SHAPES[shape])
    model = as_in_the_page(exported)
    quantize(model, "int8")
    if native.with_native_steps(model) is model:
        pytest.skip("there is no C compiler")
    steps = generate(model, torch.tensor([[3, 1, 2]]), num_tokens=150, temperature=0)
    found = run(page(exported, tmp_path), GREEDY, prompt=[3, 1, 2])
    assert [number for number, _, _ in found] == [int(token) for token in steps]


@needs_node
@pytest.mark.parametrize("pairs", ["exact", "hashed"])
@pytest.mark.parametrize("vocab_size", [65, 50_257, 1_000_000])
def test_rows_of_ngrams_are_those_of_64_bits(pairs: str, vocab_size: int, tmp_path: Path) -> None:
    rows = 32_749
    config = GPTConfig(vocab_size=vocab_size, n_embd=1, n_head=1, ngram_vocab=rows, ngram_pairs=pairs)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab_size, (300, 3), generator=generator)
    ids[:100, 0], ids[:50, 1], ids[100:150] = -1, -1, vocab_size - 1
    tables = NgramEmbedding(config)
    numbers = torch.arange(rows)[:, None].float()
    expected: list[list[int]] = []
    for table, other in ((tables.pairs, tables.triples), (tables.triples, tables.pairs)):
        table.weight.data, other.weight.data = numbers[: len(table.weight)], torch.zeros_like(other.weight)
        expected.append(tables(ids[:, 2:], ids[:, :2]).flatten().long().tolist())
    code = "return values.ids.map((ids) => page.NanoGPT.ngramRows(values, ids))"
    found = run(
        page(source(), tmp_path),
        code,
        ids=ids.tolist(),
        config={"vocab_size": vocab_size, "ngram_pairs": pairs},
        pairs={"rows": tables.pairs.num_embeddings},
        triples={"rows": rows},
    )
    assert [list(column) for column in zip(*found, strict=True)] == expected


# --- sampling ---


@needs_node
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"temperature": 1e-40},
        {"top_k": 5},
        {"top_p": 0.6},
        {"top_p": 0.99, "top_k": 1000},
        {"temperature": 2.0, "top_k": 30, "top_p": 0.9},
    ],
    ids=str,
)
def test_sampling_chooses_among_the_same_tokens_with_the_same_weights(params: Any, tmp_path: Path) -> None:
    logits = torch.randn(7, 200, generator=torch.Generator().manual_seed(2)) * 3
    expected = process(logits, SamplingParams(**params)).softmax(dim=-1)
    code = """
    const { temperature = 1, top_k: topK = null, top_p: topP = null } = values.params;
    return values.logits.map((row) => {
      const logits = Float32Array.from(row), settings = { temperature, topK, topP };
      const { ids, weights } = page.NanoGPTSampling.candidates(logits, settings);
      const total = weights.reduce((a, b) => a + b, 0), all = row.map(() => 0);
      ids.forEach((id, i) => (all[id] = weights[i] / total));
      return all;
    });
    """
    found = torch.tensor(run(page(source(), tmp_path), code, params=params, logits=logits.tolist())).float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(found > 0, expected > 0)


@needs_node
def test_draws_are_as_frequent_as_their_weights_and_a_seed_repeats_them(tmp_path: Path) -> None:
    logits = [0.0, 1.0, -1.0, float(-40), 2.0]
    code = """
    const draws = (seed) => {
      const random = page.NanoGPTSampling.randomNumbers(seed);
      return Array.from({ length: 20000 },
        () => page.NanoGPTSampling.choose(Float32Array.from(values.logits), { temperature: 1 }, random));
    };
    return values.seeds.map(draws);
    """
    seeds = [0, 1, 1, 2**32 + 1, 2**53 - 1]
    draws = torch.tensor(run(page(source(), tmp_path), code, logits=logits, seeds=seeds))
    assert torch.equal(draws[1], draws[2])
    assert len({tuple(row.tolist()) for row in draws}) == 4
    expected = torch.tensor(logits).softmax(dim=-1)
    spread = (expected * (1 - expected) / draws.shape[1]).sqrt()
    for row in draws:
        frequency = torch.bincount(row, minlength=5) / len(row)
        assert bool(((frequency - expected).abs() <= 5 * spread + 1e-9).all())


@needs_node
def test_probabilities_are_the_models_own(tmp_path: Path) -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(3))
    logits[0, 7] = logits[0, 3]  # equal ones keep their order
    [expected] = with_logprobs(logits, torch.tensor([11]), 10)
    code = "return page.NanoGPTSampling.score(Float32Array.from(values.logits), 11)"
    found = run(page(source(), tmp_path), code, logits=logits[0].tolist())
    assert expected.logprob is not None
    values = [found["probability"], *(other["probability"] for other in found["top"])]
    theirs = torch.tensor([expected.logprob, *(logprob for _, logprob in expected.top)]).exp()
    torch.testing.assert_close(torch.tensor(values), theirs)
    assert [other["id"] for other in found["top"]] == [number for number, _ in expected.top]


# --- inspection ---


@needs_node
@pytest.mark.parametrize("shape", ["preset classic", "preset cpu", "qwen3"])
def test_an_inspection_is_that_of_pytorch(shape: str, tmp_path: Path) -> None:
    exported = source(TOKENIZERS["byte"], **EVERY_SHAPE[shape])
    ids = torch.tensor(list("S\u00fc\u00df, S\u00fc\u00df".encode()))
    model = as_in_the_page(exported)
    expected = inspect_tokens(model, TOKENIZERS["byte"], ids, attention=(1, 2), lens=True)
    code = """
    const work = page.NanoGPT.inspect(await page.model(), page.tokenizer(), values);
    return page.all(work)[0].found;
    """
    values = {"ids": ids.tolist(), "attention": {"layer": 1, "head": 2}, "lens": True}
    found = run(page(exported, tmp_path), code, **values)
    first, *tokens = found["tokens"]
    assert (first["adds"], first["top"]) == ("S", [])
    for token, wanted in zip(tokens, expected.tokens[1:], strict=True):
        assert (token["id"], token["adds"], token["rank"]) == (wanted.id, wanted.text, wanted.rank)
        assert math.log(token["probability"]) == pytest.approx(wanted.logprob, abs=1e-3)
        assert token["entropy"] == pytest.approx(wanted.entropy, abs=1e-3)
        assert [one["id"] for one in token["top"]] == [one.id for one in wanted.top]
    assert expected.attention is not None
    assert expected.lens is not None
    for place, shares in enumerate(found["attention"]):
        torch.testing.assert_close(
            torch.tensor(shares, dtype=torch.float32),
            expected.attention[place, : place + 1],
            rtol=0,
            atol=1e-4,
        )
    for layer, wanted_layer in zip(found["lens"], expected.lens, strict=True):
        for guesses, wanted_guesses in zip(layer, wanted_layer, strict=True):
            values = [math.log(one["probability"]) for one in guesses]
            assert values == pytest.approx([one.logprob for one in wanted_guesses[:3]], abs=1e-3)


@needs_node
@pytest.mark.parametrize("shape", ["preset classic", "preset cpu"])
def test_what_the_cache_holds_is_not_computed_again_and_changes_nothing(shape: str, tmp_path: Path) -> None:
    code = """
    const model = await page.model(), { NanoGPT } = page;
    const end = (model, ids) => [...NanoGPT.next(model, page.tokenizer(), { ids })];
    end(model, values.before);
    const again = end(model, values.ids), fresh = end(await page.model(), values.ids);
    return [again, fresh].map((events) => [events.length, Array.from(events.at(-1).found.logits)]);
    """
    path = page(source(**EVERY_SHAPE[shape]), tmp_path)
    again, fresh = run(path, code, before=[3, 1, 2, 5, 6], ids=[3, 1, 2, 7])
    assert (again[0], fresh[0]) == (2, 5)  # one token and the answer; four and the answer
    assert again[1] == fresh[1]


# --- tokenizers ---


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page for each tokenizer that fits."""
    names = [name for name in TOKENIZERS if name != "tokenizer.json"]
    return {name: page(source(TOKENIZERS[name]), tmp_path_factory.mktemp("page")) for name in names}


@needs_node
@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "tokenizer.json"])
@settings(deadline=None, derandomize=True, max_examples=6)
@given(texts=st.lists(TEXTS, min_size=20, max_size=80), data=st.data())
def test_texts_are_encoded_and_decoded_as_here(
    name: str, texts: list[str], data: st.DataObject, pages
) -> None:
    tokenizer = TOKENIZERS[name]
    if isinstance(tokenizer, CharTokenizer):
        texts = ["".join(char for char in text if not tokenizer.unknown_characters(char)) for text in texts]
    ids = data.draw(st.lists(st.lists(st.integers(0, tokenizer.vocab_size - 1)), max_size=20))
    code = """
    const tokenizer = page.tokenizer();
    const stream = (ids) => { const decode = tokenizer.decoder(); return ids.map((id) => decode(id)); };
    return [values.texts.map((text) => tokenizer.encode(text)), values.ids.map(stream), tokenizer.end];
    """
    encoded, decoded, end = run(pages[name], code, texts=texts, ids=ids)
    assert encoded == [tokenizer.encode(text).tolist() for text in texts]
    for found, expected in zip(decoded, map(tokenizer.stream, ids), strict=True):
        parts = list(expected)
        assert found == parts[: len(found)]
    assert end == tokenizer.end_of_text


@needs_node
@pytest.mark.parametrize("kind", ["bpe", "qwen3"])
def test_words_are_split_as_here(kind: str, tmp_path: Path) -> None:
    tokenizer, texts = word_probe(kind)
    code = "return values.texts.map((text) => page.tokenizer().encode(text))"
    expected = [tokenizer.encode(text).tolist() for text in texts]
    assert run(page(source(tokenizer), tmp_path), code, texts=texts) == expected


@needs_node
def test_the_prompt_begins_a_text_as_for_sample(tmp_path: Path) -> None:
    code = """
    const tokenizer = page.tokenizer();
    return values.texts.map((text) => {
      try { return tokenizer.encodePrompt(text); } catch (error) { return error.message; }
    });
    """
    texts = ["", "abc", "ab\u00ff\u00ffc!\u0416"]
    known = CharTokenizer.train("\nabc", end_of_text=True)
    empty, encoded, message = run(page(source(known), tmp_path), code, texts=texts)
    assert (empty, encoded) == ([0], [1, 2, 3])
    assert message == (
        'The model has never seen "\u00ff" (U+00FF), "!" (U+0021), "\u0416" (U+0416): its vocabulary has '
        "4 characters. Leave them out of the prompt."
    )
    no_line_feed = CharTokenizer.train("abc", end_of_text=True)
    assert run(page(source(no_line_feed), tmp_path), code, texts=[""]) == [[3]]
    assert run(page(source(CharTokenizer.train("abc")), tmp_path), code, texts=[""]) == [[0]]


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (TOKENIZERS["tokenizer.json"], "a tokenizer.json other than byte-level BPE"),
        (
            BPETokenizer(
                json.dumps(
                    json.loads(byte_level_json([(b"a", b"b")]))
                    | {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}}
                )
            ),
            "a tokenizer.json that splits words unlike GPT-2 and Qwen2",
        ),
    ],
    ids=["foreign", "words"],
)
def test_tokenizers_that_the_page_does_not_know_are_refused(
    tokenizer: Tokenizer, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=f"--format html cannot carry {reason}: use --format hf, onnx or safetensors"
    ):
        page(source(tokenizer), tmp_path)
    assert not [*tmp_path.iterdir()]


@needs_node
def test_a_vocabulary_as_large_as_gpt2s_works(tmp_path: Path) -> None:
    merges = [(bytes([left]), bytes([right])) for left in range(196) for right in range(256)]
    tokenizer = BPETokenizer(byte_level_json(merges[: 50_257 - 257]))
    assert tokenizer.vocab_size == 50_257
    exported = source(tokenizer, n_layer=1, n_embd=8, n_head=2, block_size=8, ngram_vocab=1000)
    prompt = tokenizer.encode("It was").tolist()
    steps = generate(as_in_the_page(exported), torch.tensor([prompt]), num_tokens=10, temperature=0)
    code = """
    const settings = { prompt: "It was", numTokens: 10, temperature: 0 };
    const found = page.all(page.NanoGPT.generate(await page.model(), page.tokenizer(), settings));
    return found.map(({ text }) => text ?? "").join("");
    """
    assert tokenizer.decode(map(int, steps)).startswith(run(page(exported, tmp_path), code))


@needs_node
def test_a_piece_of_several_tokens_shows_them_all_and_a_text_ends_at_its_end(tmp_path: Path) -> None:
    """A model that writes the two bytes of a character, then the end of the text."""
    saved = checkpoint(TOKENIZERS["byte"], n_layer=1, tied=False, positions="rope")
    for name, weight in saved.model.items():
        if name.startswith("blocks") or name.endswith("bias"):
            weight.zero_()
    table, head = saved.model["token_embedding.weight"], saved.model["head.weight"]
    head.zero_()
    for token, following in ((ord("a"), 0xC3), (0xC3, 0xA9), (0xA9, 255)):
        head[following] = table[token]
    code = """
    const settings = { prompt: "a", numTokens: 9, temperature: 0 };
    return page.all(page.NanoGPT.generate(await page.model(), page.tokenizer(), settings));
    """
    waiting, piece, end = run(page(TrainedModel("small", saved, TOKENIZERS["byte"]), tmp_path), code)
    assert (waiting, end) == ({"tokens": 1}, {"tokens": 1, "ended": True})
    assert (piece["text"], piece["tokens"]) == ("\u00e9", 1)
    assert [part["text"] for part in piece["parts"]] == ["\\xC3", "\\xA9"]
    first, second = (part["probability"] for part in piece["parts"])
    assert piece["probability"] == pytest.approx(first * second)


# --- the file ---


class Elements(HTMLParser):
    """The elements of a page with their attributes and their text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.is_open = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))
        self.is_open = True

    def handle_endtag(self, tag: str) -> None:
        self.is_open = False

    def handle_data(self, data: str) -> None:
        if self.is_open:
            self.found[-1][2].append(data)

    def of(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        """Attributes and text of each element of a kind."""
        return [(attributes, "".join(text)) for name, attributes, text in self.found if name == tag]


def unpacked(text: str) -> bytes:
    """The bytes of a text of 7 bits a character."""
    codes = [ord(char) if char.isascii() else ord(char) & 0x3F for char in text]
    bits = "".join(f"{code:07b}" for code in codes)
    return gzip.decompress(bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits) - 7, 8)))


@given(data=st.binary(max_size=300))
@settings(deadline=None, derandomize=True)
def test_any_bytes_become_a_text_that_html_leaves_as_it_is(data: bytes) -> None:
    text = as_text(data)
    assert unpacked(text) == data
    assert not {"\0", "\r", "<"} & {*text}


def test_whatever_the_model_writes_stays_within_its_element(tmp_path: Path) -> None:
    texts = (b"</script>", b"<!--<script>", b"{{weights}}", b"&amp;", b"\\u003c")
    merges = [(text[:end], text[end : end + 1]) for text in texts for end in range(1, len(text))]
    tokenizer = BPETokenizer(byte_level_json(merges))
    assert {*texts} <= {*tokenizer.tokens}
    exported = replace(source(tokenizer), name="</title><script>alert(2)</script>{{script}}")
    elements = Elements(page(exported, tmp_path).read_text("utf-8"))
    scripts = elements.of("script")
    assert [attributes.get("id") for attributes, _ in scripts] == [None, "model", "weights"]
    header = json.loads(scripts[1][1])
    assert header["name"] == exported.name
    assert [token.encode("latin-1") for token in header["tokenizer"]["tokens"]] == tokenizer.tokens
    assert unpacked(scripts[2][1]) == packed(exported, lambda count: None)
    assert elements.of("title")[0][1] == exported.name


def test_the_page_fetches_nothing_and_runs_no_code_but_its_own(tmp_path: Path) -> None:
    elements = Elements(page(source(), tmp_path).read_text("utf-8"))
    [policy] = [
        attributes["content"] or ""
        for attributes, _ in elements.of("meta")
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    allowed = dict(part.split(" ", 1) for part in policy.split("; "))
    digests = [
        base64.b64encode(hashlib.sha256(elements.of(tag)[0][1].encode()).digest()).decode()
        for tag in ("script", "style")
    ]
    assert allowed == {
        "default-src": "'none'",
        "script-src": f"'sha256-{digests[0]}' 'wasm-unsafe-eval'",
        "style-src": f"'sha256-{digests[1]}'",
        "worker-src": "blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    for tag, attributes, _ in elements.found:
        assert not {"src", "href", "style", "action"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    assert len(elements.of("style")) == 1
    for path in PAGE.glob("*.js"):
        assert not re.search(r"<!--|</?script", path.read_text("utf-8"))  # they would end the element
    foreign = r"https?:(?!//www\.w3\.org/2000/svg)|url\(|@import|\beval\b|new Function|innerHTML"
    for path in PAGE.glob("*.*"):
        assert path.suffix == ".py" or not re.search(foreign, path.read_text("utf-8")), path


def test_everything_that_a_person_uses_has_a_name(tmp_path: Path) -> None:
    elements = Elements(page(source(), tmp_path).read_text("utf-8"))
    labels = {attributes["for"] for attributes, _ in elements.of("label")}
    ids = [attributes["id"] for _, attributes, _ in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes, text in elements.found:
        if tag in ("input", "textarea"):
            assert attributes["id"] in labels
        if tag == "button":
            assert "".join(text).strip()
        for name in ("aria-labelledby", "aria-describedby"):
            assert {*(attributes.get(name) or "").split()} <= {*ids}


def test_a_page_is_little_more_than_its_weights(tmp_path: Path) -> None:
    exported = source(n_embd=256, n_head=8)
    size = page(exported, tmp_path).stat().st_size
    assert size < 1.15 * exported.num_weights + 130_000


@pytest.mark.parametrize(
    ("progress", "said"),
    [
        ({}, "Validation loss 2.5000 nats per token, before the weights were rounded to 8 bits."),
        (
            {"evaluated_at": 8},
            "2.5000 nats per token (the lowest of its run; these weights are later ones), before",
        ),
        ({"best_val_loss": float("inf")}, "It was not evaluated."),
    ],
    ids=["best", "later", "never"],
)
def test_a_line_says_what_the_checkpoint_says(progress: dict[str, Any], said: str, tmp_path: Path) -> None:
    saved = checkpoint(data_dir="/home/somebody/letters")
    saved.progress.update(progress)
    exported = TrainedModel("small", saved, LETTERS)
    path = page(exported, tmp_path)
    header = json.loads(Elements(path.read_text("utf-8")).of("script")[1][1])
    assert header["about"].startswith(
        f"A language model of {exported.num_weights:,} parameters, trained for 12 updates on characters. "
    )
    assert said in header["about"]
    assert b"somebody" not in path.read_bytes()
