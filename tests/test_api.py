"""NanoGPT from Python: the same texts and numbers as those of the commands; and quiet is quiet."""

import contextlib
import io
import threading
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nanogpt
from nanogpt import TextModel, TrainConfig, UserError, fit, generate, load_model, prepare, scoring
from nanogpt.api import SETTINGS, Completion
from nanogpt.api import score as score_text
from nanogpt.checkpoint.format import load_checkpoint, save_checkpoint
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.cli import main as cli
from nanogpt.cli.parse import parse
from nanogpt.cli.sample import SEPARATOR
from nanogpt.data.dataset import load_dataset
from nanogpt.inference.config import SampleConfig, SamplingParams
from nanogpt.model.gpt import GPT
from nanogpt.terminal import console
from nanogpt.tokenizer.base import ByteTokenizer

TEXT = "Süß, 日本 and 🙂: from fairest creatures we desire increase.\n" * 30
PROMPT = "from fairest"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: bytes, so that characters of the text are in several tokens."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "my.txt").write_text(TEXT, "utf-8")
    prepare(folder / "my.txt", folder / "data", tokenizer="byte", quiet=True)
    tiny = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "max_iters": 3}
    config = TrainConfig(
        **tiny, data_dir=str(folder / "data"), out_dir=str(folder / "out"), device="cpu", dtype="bfloat16"
    )
    fit(config, quiet=True)
    return folder / "out"


@pytest.fixture(scope="module")
def model(run: Path) -> TextModel:
    """Its model."""
    return load_model(run, "cpu")


def command(run: Path, *flags: str) -> str:
    """What the `sample` command prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert (
            cli.run_command("sample", ["--checkpoint", str(run / "ckpt.pt"), "--device", "cpu", *flags], "")
            == 0
        )
    return printed.getvalue()


# --- load_model ---


def test_a_loaded_model_is_two_and_one(run: Path, model: TextModel):
    gpt, tokenizer = model
    assert isinstance(gpt, GPT)
    assert (gpt, tokenizer) == (model.model, model.tokenizer)
    assert repr(model).startswith("TextModel(1 layer of width 16, context of 16 tokens, ")
    assert model.trained_in == "bfloat16"


def test_a_run_folder_is_its_best_checkpoint_else_its_newest(run: Path, tmp_path: Path):
    saved = load_checkpoint(run / "ckpt.pt")
    for name, factor in (("last.pt", 2.0), ("ckpt.pt", 3.0)):
        weights = {key: weight * factor for key, weight in saved.model.items()}
        save_checkpoint(tmp_path / name, replace(saved, model=weights))
        found = load_model(tmp_path, "cpu").model.state_dict()
        torch.testing.assert_close(
            found, load_model(tmp_path / name, "cpu").model.state_dict(), rtol=0, atol=0
        )
        torch.testing.assert_close(found["final_norm.weight"], weights["final_norm.weight"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"is a folder without a checkpoint .* give a run's --out_dir"):
        load_model(tmp_path / "empty")


# --- generate ---


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 0.5, "top_k": 5},
        {"stop": ["e", "ab"]},
        {"dtype": "float32"},
        {"quantize": "int8"},
        {"repetition_penalty": 1.3, "logit_bias": ("e=-5", "id:3=1")},
    ],
    ids=lambda given: " ".join(given) or "plain",
)
def test_the_same_seed_is_the_same_text_as_that_of_the_command(run: Path, model: TextModel, given: dict):
    flags = [
        f"--{name}={item}"
        for name, value in given.items()
        for item in (value if isinstance(value, list | tuple) else [value])
    ]
    printed = command(run, "--prompt", PROMPT, "--num_tokens=40", "--seed=7", "--num_samples=3", *flags)
    texts = generate(model, PROMPT, num_tokens=40, seed=7, num_samples=3, **given)
    assert printed == SEPARATOR.join(f"{PROMPT}{text}\n" for text in texts)
    assert generate(model, PROMPT, num_tokens=40, seed=8, **given) == texts[1]


def test_a_batch_is_what_each_prompt_is_alone(model: TextModel, monkeypatch):
    prompts = [PROMPT, "S", "日本 and", "from fairest creatures we desire"]
    texts = generate(model, prompts, num_tokens=30, seed=3)
    assert texts == [generate(model, prompt, num_tokens=30, seed=3 + i) for i, prompt in enumerate(prompts)]
    monkeypatch.setattr("nanogpt.inference.prompts.MAX_ROWS", 3)
    assert generate(model, tuple(prompts), num_tokens=30, seed=3) == texts
    assert generate(model, [], seed=3) == []


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    num_tokens=st.integers(0, 40),
    stop=st.sampled_from([(), ("a",), "\ufffd", ["es", "🙂"]]),
)
def test_chunks_joined_are_the_text_and_so_are_tokens(model: TextModel, seed: int, num_tokens: int, stop):
    given_to_all = {"num_tokens": num_tokens, "seed": seed, "stop": stop, "top_k": 60}
    text = generate(model, "日", **given_to_all)
    chunks = list(generate(model, "日", stream=True, **given_to_all))
    assert "".join(chunks) == text
    assert all(chunks)
    made = generate(model, "日", logprobs=2, **given_to_all)
    assert isinstance(made, Completion)
    assert (made.text, str(made), made.seed, made.prompt) == (text, text, seed, "日")
    assert "".join(token.text for token in made.tokens) == text
    assert all(len(token.top) == 2 and token.logprob <= token.top[0].logprob for token in made.tokens)
    assert made.finish_reason in ("length", "stop", "end_of_text")
    assert (len(made.tokens) == num_tokens) >= (made.finish_reason == "length")
    assert (made.finish_reason == "stop") <= bool(stop)


def test_logprobs_are_those_of_the_command(run: Path, model: TextModel):
    lines = command(run, "--prompt", PROMPT, "--num_tokens=9", "--seed=7", "--logprobs=3").splitlines()
    made = generate(model, PROMPT, num_tokens=9, seed=7, logprobs=3, num_samples=2)
    assert [made[0].seed, made[1].seed] == [7, 8]
    for line, token in zip(lines, made[0].tokens, strict=True):
        assert f'"token": {token.id}, "logprob": {round(token.logprob, 6)}' in line


def test_a_reader_of_chunks_is_in_no_context(model: TextModel):
    for _ in generate(model, PROMPT, num_tokens=3, seed=1, stream=True):
        assert not torch.is_autocast_enabled("cpu")
        assert torch.is_grad_enabled()


def test_generating_changes_nothing_in_the_model(model: TextModel):
    before = {
        name: (weight.dtype, weight.stride(), weight.clone())
        for name, weight in model.model.state_dict().items()
    }
    for dtype, quantize in (("float32", "none"), ("bfloat16", "none"), ("auto", "int8")):
        generate(model, PROMPT, num_tokens=2, dtype=dtype, quantize=quantize)
    for name, weight in model.model.state_dict().items():
        assert (weight.dtype, weight.stride()) == before[name][:2]
        assert torch.equal(weight, before[name][2])


def test_changed_weights_change_the_text(run: Path):
    loaded = load_model(run, "cpu")
    before = generate(loaded, PROMPT, num_tokens=20, seed=1)
    with torch.no_grad():
        for weight in loaded.model.parameters():
            weight.normal_(generator=torch.Generator().manual_seed(1))
    assert generate(loaded, PROMPT, num_tokens=20, seed=1) != before


def test_token_ids_are_continued_as_before(model: TextModel):
    ids = torch.tensor([model.tokenizer.encode(PROMPT).tolist()])
    steps = list(
        generate(model.model, ids, num_tokens=5, generator=torch.Generator().manual_seed(1), top_k=3)
    )
    assert [tuple(step.shape) for step in steps] == [(1,)] * 5
    made = generate(model, PROMPT, num_tokens=5, seed=1, top_k=3, dtype="float32", logprobs=0)
    assert [int(step) for step in steps] == [token.id for token in made.tokens]


def test_every_sampling_setting_of_the_command_is_a_keyword():
    others = {"checkpoint", "prompt", "prompt_file", "prompts_file", "interactive", "device"}
    assert {field.name for field in fields(SampleConfig)} - others == set(SETTINGS)


def test_params_can_be_given_whole(model: TextModel):
    params = SamplingParams(temperature=0.3, top_k=4)
    text = generate(model, PROMPT, params, num_tokens=9, seed=2)
    assert text == generate(model, PROMPT, num_tokens=9, seed=2, temperature=0.3, top_k=4)


@pytest.mark.parametrize(
    ("prompt", "given", "message"),
    [
        (PROMPT, {"temprature": 1}, "temprature is no setting: use temperature, top_k"),
        (PROMPT, {"temperature": -1}, "--temperature -1.0 is not 0 or a positive number: try 0.8"),
        (PROMPT, {"stop": ""}, "would stop at once"),
        (PROMPT, {"num_samples": 0}, "--num_samples 0"),
        (PROMPT, {"context_overlap": 17}, "--context_overlap 17 is more than the context, 16"),
        (
            [PROMPT],
            {"num_samples": 2},
            r"num_samples is for one prompt: repeat it in a list, \[prompt\] \* 3",
        ),
        ([PROMPT], {"stream": True}, "stream=True is for one text"),
        (PROMPT, {"stream": True, "logprobs": 1}, "stream=True is for one text"),
        ([PROMPT, 3], {}, "a prompt is a int: give a text"),
        ("", {}, "prompt: this tokenizer makes no token of ''"),
    ],
)
def test_a_mistake_is_one_line_at_the_call(model: TextModel, prompt, given, message):
    with pytest.raises(UserError, match=message) as raised:
        generate(model, prompt, **given)
    assert "\n" not in str(raised.value)


def test_a_half_of_a_loaded_model_is_refused(model: TextModel):
    with pytest.raises(UserError, match=r"for a text, give all that load_model returns: model = load_model"):
        generate(model.model, PROMPT, num_tokens=3)
    for half in (model.tokenizer, model.model):
        with pytest.raises(UserError, match="give what load_model returns"):
            score_text(half, PROMPT)
    with pytest.raises(UserError, match="model is a str: give what load_model returns"):
        generate("out", PROMPT)


# --- score ---


def test_a_score_has_the_losses_and_the_texts(model: TextModel):
    text = "日本 and 🙂: from"
    scored = score_text(model, text, 8, 2, dtype="float32")
    expected = scoring.score(model.model, model.tokenizer.encode(text), 8, 2)
    np.testing.assert_array_equal(scored.losses, expected)
    assert scored.first + "".join(piece for piece, _ in scored) == text
    assert [loss for _, loss in scored] == expected.tolist()
    assert scored.bytes == len(text.encode()) - 1
    assert repr(scored).startswith(f"TextScore({len(expected)} tokens, {scored.loss:.4f} nats a token")
    page = score_text(model, "<b>&")._repr_html_()
    assert "&lt;" in page
    assert "<b>" not in page


def test_a_score_is_that_of_the_command(config: TrainConfig, tmp_path: Path, capsys):
    fit(replace(config, max_iters=2), quiet=True)  # characters of one text: no token ends a document
    (tmp_path / "own.txt").write_text("creatures we desire", "utf-8")
    flags = ["--checkpoint", config.out_dir, "--input_file", str(tmp_path / "own.txt"), "--device", "cpu"]
    assert cli.run_command("eval", flags, "") == 0
    loss = score_text(load_model(config.out_dir, "cpu"), "creatures we desire").loss
    assert f"Loss: {loss:.4f} nats a token" in capsys.readouterr().out


def test_a_text_that_ends_within_a_character(model: TextModel):
    class Cut(ByteTokenizer):
        """Leaves out the last byte."""

        def encode(self, text: str):
            return super().encode(text)[:-1]

    scored = score_text(TextModel(model.model, Cut()), "a 🙂")
    assert scored.first + "".join(scored.tokens) == "a \ufffd"
    assert len(scored.tokens) == len(scored.losses)


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_of_fewer_than_two_tokens_has_no_losses(model: TextModel, text: str):
    with pytest.raises(UserError, match=r"text has . tokens?: give two at least"):
        score_text(model, text)


# --- prepare, fit ---


def test_prepare_takes_one_file_or_several_and_the_flags(tmp_path: Path):
    names = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for name in names:
        name.write_text(TEXT, "utf-8")
    prepare(names, tmp_path / "two", train_split=0.5, quiet=True)
    dataset = load_dataset(tmp_path / "two")
    assert 0.4 < len(dataset.train) / (len(dataset.train) + len(dataset.val)) < 0.6
    prepare(str(names[0]), tmp_path / "one", quiet=True)
    with pytest.raises(UserError, match="splitt is no setting: use train_split, split"):
        prepare(names, tmp_path / "no", splitt=1)
    with pytest.raises(UserError, match="--input_file"):
        prepare(3, tmp_path / "no")
    with pytest.raises(UserError, match="holds another data set"):
        prepare(names, tmp_path / "one", quiet=True)
    assert not (tmp_path / "no").exists()


def test_resuming_needs_not_name_what_minutes_has_chosen(tmp_path: Path, data_dir: Path, capsys):
    config = TrainConfig(
        data_dir=str(data_dir), out_dir=str(tmp_path / "out"), minutes=0.03, dropout=0.1, device="cpu"
    )
    first = fit(config)
    chosen = RunFolder(tmp_path / "out").saved_config()
    capsys.readouterr()
    second = fit(replace(config, resume=True))
    assert second.step >= first.step
    assert " is now " not in capsys.readouterr().out
    assert RunFolder(tmp_path / "out").saved_config().n_embd == chosen.n_embd != TrainConfig.n_embd
    flags = ["--resume", "--out_dir", str(tmp_path / "out"), "--dropout", str(TrainConfig.dropout)]
    fit(parse(TrainConfig, flags, "train"))  # a default that is named is one that is meant
    assert f"--dropout is now {TrainConfig.dropout} (was 0.1)" in capsys.readouterr().out
    with pytest.raises(UserError, match="--n_layer 7 contradicts the checkpoint"):
        fit(replace(config, resume=True, n_layer=7))


# --- quiet ---


@pytest.fixture
def shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal, where a bar is shown at once."""
    monkeypatch.setattr(console, "BAR_AFTER_SECONDS", -1.0)
    terminal = console.terminal()
    monkeypatch.setattr(type(terminal), "is_terminal", True)


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_quiet_prints_nothing(tmp_path: Path, shows, capfd, tokenizer: str):
    (tmp_path / "my.txt").write_text(TEXT, "utf-8")
    data, out = tmp_path / "data", tmp_path / "out"
    prepare(tmp_path / "my.txt", data, tokenizer=tokenizer, vocab_size=270, quiet=True)
    small = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "batch_size": 2, "max_iters": 3}
    fit(TrainConfig(**small, data_dir=str(data), out_dir=str(out), device="cpu"), quiet=True)
    model = load_model(out, "cpu")
    generate(model, [PROMPT, "日本"], num_tokens=5, quiet=True)
    list(generate(model, PROMPT, num_tokens=5, quiet=True, stream=True))
    score_text(model, PROMPT, quiet=True)
    with pytest.raises(UserError):
        prepare(tmp_path / "my.txt", data, tokenizer="byte", quiet=True)
    assert tuple(capfd.readouterr()) == ("", "")
    assert not console.is_silent()
    generate(model, PROMPT, num_tokens=5)
    assert "Tokens" in capfd.readouterr().out


def test_the_time_to_choose_settings_is_quiet_too(tmp_path: Path, data_dir: Path, capfd):
    capfd.readouterr()
    fit(
        TrainConfig(data_dir=str(data_dir), out_dir=str(tmp_path / "out"), minutes=0.02, device="cpu"),
        quiet=True,
    )
    assert tuple(capfd.readouterr()) == ("", "")


def test_silence_ends_with_its_block_and_is_of_its_thread(capsys):
    def speak() -> None:
        console.say("from another thread")

    with contextlib.suppress(KeyError), console.silence():
        with console.silence(False):
            console.say("still silent")
        thread = threading.Thread(target=speak)
        thread.start()
        thread.join()
        console.warn("silent")
        raise KeyError
    console.say("aloud")
    assert tuple(capsys.readouterr()) == ("from another thread\naloud\n", "")


def test_a_late_bar_waits_for_another_to_end(shows, capsys):
    with console.progress_bar("First") as first:
        first.add_task("", total=1, detail="")
        with console.late_progress_bar("Second", 3) as advance:
            advance(1)
    assert "Second" not in capsys.readouterr().out


def test_a_signal_in_silence_says_nothing(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(console, "write_signal_safe", said.append)
    with console.silence():
        console.warn_in_signal_handler("one")
    console.warn_in_signal_handler("two")
    assert said == ["two"]


def test_ipython_shows_a_mistake_in_one_line():
    assert UserError("n is 0: try 1")._render_traceback_() == ["error: n is 0: try 1"]


def test_a_notebook_is_a_kernel_of_ipython(monkeypatch):
    for shell, answer in ((None, False), (SimpleNamespace(), False), (SimpleNamespace(kernel=1), True)):
        monkeypatch.setitem(
            console.sys.modules, "IPython", SimpleNamespace(get_ipython=lambda shell=shell: shell)
        )
        assert console.in_notebook() == answer
    monkeypatch.delitem(console.sys.modules, "IPython")
    assert not console.in_notebook()


def test_the_package_names_what_it_has():
    assert {name for name in nanogpt.__all__ if getattr(nanogpt, name).__name__ != name} == set()
