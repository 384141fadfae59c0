"""Steps in C are those of PyTorch, for weights of all dtypes and odd sizes."""

import ctypes
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from test_kv_cache import SHAPES, make

from nanogpt.cli.sample import main
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.errors import UserError
from nanogpt.inference.config import SampleConfig
from nanogpt.inference.generate import generate
from nanogpt.model.gpt import ACTIVATIONS, GPT, Block, Context
from nanogpt.model.kv_cache import KVCache
from nanogpt.model.quantize import Int8Linear, prepare_for_sampling
from nanogpt.native import build, step
from nanogpt.native.build import BuildError
from nanogpt.native.step import NativeGPT, with_native_steps
from nanogpt.native.threads import TRIAL, Threads
from nanogpt.training.fit import fit

needs_compiler = pytest.mark.skipif(isinstance(step.library(), BuildError), reason=str(step.library()))

ODD = {"n_embd": 36, "n_head": 3, "mlp_width": 50, "block_size": 16, "n_layer": 2, "dropout": 0.0}
"""Sizes of which none is a multiple of four or eight, as far as they may be odd."""


def widened(model: GPT) -> GPT:
    """A model in float32 whose weights are those of another, however they are stored."""
    copy = GPT(model.config).eval()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, module in copy.named_modules():
            if isinstance(other := model.get_submodule(name), Int8Linear):
                module.weight = torch.nn.Parameter(other.dequantized())  # not copied: it may be tied
                if other.bias is not None:
                    module.bias.copy_(other.bias)
            elif isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(other.weight.float())
        for name, parameter in copy.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    return copy


@torch.no_grad()
def steps(model, text: torch.Tensor, *lengths: int) -> torch.Tensor:
    """The logits after each piece of a text (B, N), of so many tokens each, (B, pieces, V)."""
    cache, found = KVCache(model.config, len(text), text.shape[1]), []
    for piece in text.split(list(lengths), dim=1):
        cache_step = cache.step(range(len(text)), piece)
        found.append(model(piece, cache=cache_step)[0])
        cache.advance(cache_step, piece)
    return torch.cat(found, dim=1)


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_numbers_are_those_of_pytorch_with_these_weights(shape, kind, threads):
    model = make(
        GPTConfig(vocab_size=21, **SHAPES[shape] | ODD | {"n_kv_head": SHAPES[shape].get("n_kv_head") and 1})
    )
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    prepare_for_sampling(model, dtype, kind if kind == "int8" else "none")
    reference, text = widened(model), torch.randint(21, (2, 16), generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        native = with_native_steps(model)
        assert isinstance(native, NativeGPT)
        found = steps(native, text, 1, 1, 3, 6, 1, 4)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, steps(reference, text, 1, 1, 3, 6, 1, 4), rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_the_numbers_are_the_same_for_any_number_of_threads(shape, kind):
    model = make(GPTConfig(vocab_size=21, **SHAPES[shape] | ODD | {"n_kv_head": None}))
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    prepare_for_sampling(model, dtype, kind if kind == "int8" else "none")
    text = torch.randint(21, (2, 16), generator=torch.Generator().manual_seed(1))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(steps(with_native_steps(model), text, 1, 1, 3, 6, 1, 4))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(logits, found[0]) for logits in found)


@needs_compiler
def test_a_step_uses_as_many_threads_as_its_times_say(monkeypatch):
    used, noted = [], []

    class Slow(Threads):
        """Threads that always wait."""

        def note(self, seconds: float, long_waits: int) -> None:
            used.append(self.count)
            noted.append((seconds, long_waits))
            super().note(1.0 if self.count > 1 else 0.5, 10 if self.count > 1 else 0)

    monkeypatch.setattr(step, "Threads", Slow)
    looks = itertools.count()
    monkeypatch.setattr(step, "time", SimpleNamespace(perf_counter=lambda: float(next(looks))))
    model = make(GPTConfig(vocab_size=21, **ODD))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        native = with_native_steps(model)
        cache = KVCache(model.config, 1, 16)
        for token in torch.randint(21, (14,)):
            with torch.no_grad():
                cache_step = cache.step([0], token.reshape(1, 1))
                native(token.reshape(1, 1), cache=cache_step)
            cache.advance(cache_step, token.reshape(1, 1))
    finally:
        torch.set_num_threads(before)
    assert used == [2] * TRIAL + [1] * (14 - TRIAL)
    assert all(seconds == 1.0 and long_waits >= 0 for seconds, long_waits in noted)
    assert all(long_waits == 0 for _, long_waits in noted[TRIAL:])


@needs_compiler
def test_the_weights_may_change_in_place():
    model = make(GPTConfig(vocab_size=20, **ODD))
    native, text = NativeGPT(model), torch.tensor([[3, 1, 4]])
    before = steps(native, text, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(steps(native, text, 3), steps(model, text, 3), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(steps(native, text, 3), before)


@needs_compiler
def test_it_generates_with_them(monkeypatch):
    model, prompt = make(GPTConfig(vocab_size=20, **ODD)), torch.tensor([[3, 1, 4]])
    assert not step.is_changed(model.config)  # its trial computes steps, too
    computed, compute = [], NativeGPT.compute
    monkeypatch.setattr(NativeGPT, "compute", lambda *args: computed.append(1) or compute(*args))
    native = [int(token) for token in generate(model, prompt, num_tokens=40, temperature=0)]
    assert len(computed) == 40
    monkeypatch.setattr(step, "library", lambda: BuildError("off"))
    assert native == [int(token) for token in generate(model, prompt, num_tokens=40, temperature=0)]
    assert len(computed) == 40


@needs_compiler
def test_what_it_does_not_know_is_left_to_the_model():
    class Other(torch.nn.Linear):
        """A layer with something of its own."""

    def changed() -> GPT:
        return make(GPTConfig(vocab_size=20, **ODD))

    foreign, hooked, other_device = changed(), changed(), changed().to("meta")
    foreign.blocks[1].mlp.fc = Other(36, 50)
    hooked.blocks[0].attn.register_forward_hook(lambda *_: None)
    for model in (foreign, hooked, other_device, changed().train()):
        assert with_native_steps(model) is model
    assert isinstance(with_native_steps(changed()), NativeGPT)


@needs_compiler
@pytest.mark.parametrize("change", ["a block", "an activation", "a new activation"])
def test_a_changed_code_of_the_model_is_followed(monkeypatch, change):
    def parallel(self: Block, x: torch.Tensor, context: Context) -> torch.Tensor:
        return x + self.attn(self.norm_1(x), context) + self.mlp(self.norm_2(x))

    model = make(GPTConfig(vocab_size=20, **ODD))
    assert isinstance(with_native_steps(model), NativeGPT)
    with monkeypatch.context() as patch:
        if change == "a block":
            patch.setattr(Block, "forward", parallel)
        elif change == "an activation":
            patch.setitem(ACTIVATIONS, "gelu", ACTIVATIONS["gelu_tanh"])
        else:
            patch.delitem(step.ACTIVATIONS, "gelu")
        model = make(GPTConfig(vocab_size=20, **ODD))
        assert with_native_steps(model) is model
    model = make(GPTConfig(vocab_size=20, **ODD))
    assert isinstance(with_native_steps(model), NativeGPT)


@needs_compiler
def test_the_trial_of_the_code_neither_disturbs_a_training_nor_is_disturbed():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    step.agrees.cache_clear()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert not step.is_changed(GPTConfig(**ODD))
    assert torch.equal(torch.get_rng_state(), before)


@needs_compiler
def test_padding_and_many_tokens_are_left_to_the_model(monkeypatch):
    model = make(GPTConfig(vocab_size=20, **ODD))
    native = NativeGPT(model)
    monkeypatch.setattr(NativeGPT, "compute", None)
    native.max_tokens = 16
    text = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5]] * 2)  # 18 tokens
    torch.testing.assert_close(steps(native, text, 9), steps(model, text, 9), rtol=0, atol=0)
    cache = KVCache(model.config, 2, 16)
    with torch.no_grad():
        native(text[:, :3], cache=cache.step([0, 1], text[:, :3], [3, 2]))


@needs_compiler
@pytest.mark.parametrize("fast", [torch.float32, torch.bfloat16])
def test_large_products_are_left_to_pytorch_where_it_has_fast_ones(monkeypatch, fast):
    monkeypatch.setattr(step, "LARGE_BYTES", 0)
    monkeypatch.setattr(step, "matmul_rates", lambda device: dict.fromkeys(step.DTYPES, 1.0) | {fast: 2.0})
    models = [make(GPTConfig(vocab_size=20, **ODD)) for _ in range(2)]
    prepare_for_sampling(models[1], torch.bfloat16, "none")
    limits = [NativeGPT(model).max_tokens for model in models]
    assert limits == [step.MAX_TOKENS, step.FEW_TOKENS if fast == torch.bfloat16 else step.MAX_TOKENS]


@needs_compiler
@pytest.mark.parametrize("token", [20, -1, 2**40])
def test_what_is_no_token_is_refused(token):
    native = NativeGPT(make(GPTConfig(vocab_size=20, **ODD)))
    with pytest.raises(IndexError, match="not within 0 to 19"):
        steps(native, torch.tensor([[3, token, 1]]), 3)
    with pytest.raises(IndexError, match="not within 0 to 19"):
        steps(native, torch.tensor([[3] * 16 + [1]]), 16, 1)


def half(model: GPT) -> None:
    model.half()


def without_a_block(model: GPT) -> None:
    del model.blocks[1]


def without_a_norm(model: GPT) -> None:
    model.final_norm = torch.nn.Identity()


def without_an_mlp(model: GPT) -> None:
    model.blocks[0].mlp = torch.nn.Identity()


def with_another_activation(model: GPT) -> None:
    model.blocks[0].mlp.activation = torch.tanh


def with_another_norm(model: GPT) -> None:
    model.blocks[0].attn.q_norm = torch.nn.Tanh()


def with_another_forward(model: GPT) -> None:
    model.blocks[0].mlp.forward = torch.tanh


@pytest.mark.parametrize(
    "change",
    [
        half, without_a_block, without_a_norm, without_an_mlp, with_another_activation, with_another_norm,
        with_another_forward,
    ],
)  # fmt: skip
def test_a_model_that_was_changed_is_left_to_itself(change):
    model = make(GPTConfig(vocab_size=20, **ODD))
    change(model)
    assert with_native_steps(model) is model


@needs_compiler
def test_the_default_dtype_does_not_matter():
    model, text = make(GPTConfig(vocab_size=20, **ODD)), torch.tensor([[3, 1, 4]])
    expected = steps(NativeGPT(model), text, 1, 2)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = steps(NativeGPT(model), text, 1, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert found.equal(expected)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (torch.tensor([[3, 20]]), "token id 20: those of this model are 0 to 19"),
        ([torch.tensor([-1])], "token id -1"),
        (torch.tensor([[3.0]]), "numbers of torch.float32"),
        (torch.tensor([[True]]), "numbers of torch.bool"),
        (torch.tensor([3]), "not a tensor of token ids"),
        ([[3, 1]], "not a tensor of token ids"),
        ([], "there are no prompts"),
        (None, "prompts is a NoneType"),
    ],
)
def test_wrong_prompts_are_named(prompts, message):
    with pytest.raises(UserError, match=message):
        generate(make(GPTConfig(vocab_size=20, **ODD)), prompts, num_tokens=1)


@pytest.mark.parametrize("count", [-1, 3.5, "3"])
def test_a_wrong_number_of_tokens_is_named(count):
    with pytest.raises(UserError, match="is not a whole number from 0 on"):
        generate(make(GPTConfig(vocab_size=20, **ODD)), torch.tensor([[3]]), num_tokens=count)


def test_ids_of_other_integers_are_ids():
    model = make(GPTConfig(vocab_size=20, **ODD))
    texts = [
        torch.cat(list(generate(model, torch.tensor([[3, 1]], dtype=dtype), num_tokens=9, temperature=0)))
        for dtype in (torch.int64, torch.int32, torch.uint8)
    ]
    assert texts[0].equal(texts[1])
    assert texts[0].equal(texts[2])


@needs_compiler
def test_a_file_exchanged_while_a_program_runs_is_not_used(monkeypatch):
    class Older(step.CStep):
        """A struct of one field more or less."""

        _fields_: ClassVar = [("another", ctypes.c_int64)]

    monkeypatch.setattr(step, "STRUCTS", (step.CModel, step.CBlock, Older))
    found = step.library.__wrapped__()
    assert isinstance(found, BuildError)
    assert str(found) == "step.c has changed since this program began"


# Building


def test_without_a_compiler_there_is_none(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(BuildError, match="no C compiler"):
        build.load("step.c")


def compiler(path: Path, script: str) -> None:
    """A compiler that is a shell script."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'step.c:1: it is broken' >&2; exit 1", "it is broken"),
        ("exit 3", "exit code 3"),
        ("true", "wrote nothing"),
        ('while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"', "rubbish|invalid|header|too short"),
    ],
)
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(monkeypatch, tmp_path, script, message):
    compiler(tmp_path / "mycc", script)
    monkeypatch.setenv("CC", str(tmp_path / "mycc"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(BuildError, match=message):
        build.load("step.c")
    assert not list((tmp_path / "cache").rglob("*.so"))


@needs_compiler
def test_it_is_compiled_once_even_by_several_at_a_time(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = [sys.executable, "-c", "from nanogpt.native import build; build.load('step.c').decode_step"]
    running = [subprocess.Popen(command, env=os.environ) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    (library,) = tmp_path.rglob("*.so")
    assert [path.name for path in library.parent.iterdir()] == [library.name]
    library.write_bytes(b"damaged")
    assert build.load("step.c").decode_step  # compiled again
    monkeypatch.setattr(subprocess, "run", None)
    assert build.load("step.c").decode_step


@needs_compiler
def test_a_folder_that_cannot_be_written_is_a_reason(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="file"):
        build.load("step.c")


def test_sampling_says_in_a_line_that_there_is_no_compiler(
    config: TrainConfig, monkeypatch, tmp_path, capsys
) -> None:
    fit(config)
    sampling = SampleConfig(checkpoint=f"{config.out_dir}/ckpt.pt", num_tokens=30, seed=1, device="cpu")
    monkeypatch.setattr(step, "library", step.library.__wrapped__)
    capsys.readouterr()
    main(sampling)
    expected = capsys.readouterr().out
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv(step.SWITCH, raising=False)
    main(sampling)
    assert capsys.readouterr() == (
        expected,
        "Sampling takes several times as long as it could: there is no C compiler (cc) "
        "(docs/sampling.md, Speed)\n",
    )
    monkeypatch.setenv(step.SWITCH, "0")
    main(sampling)
    assert capsys.readouterr() == (expected, "")
