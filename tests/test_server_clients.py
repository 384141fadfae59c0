"""Programs that speak OpenAI's API, against a real server: lm-eval, schemathesis, llm."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import tiny_run
from waiting import HANGS

from nanogpt import TextModel, generate, load_model
from nanogpt.scoring import score

LINES = [f"{name} {verb} the {thing}.\n" for name in ("Ann", "Bob", "Eve") for verb in ("saw", "ate")
         for thing in ("fish", "tree", "moon")]  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, which knows its few lines."""
    settings = {"block_size": 48, "batch_size": 16, "max_iters": 100}
    return tiny_run(tmp_path_factory.mktemp("run"), "".join(LINES) * 40, **settings)


@pytest.fixture(scope="module")
def model(out: Path) -> TextModel:
    return load_model(out, "cpu")


@pytest.fixture(scope="module")
def url(out: Path) -> Iterator[str]:
    """The address of `nanogpt serve`."""
    flags = ("--checkpoint", str(out), "--port", "0", "--device", "cpu", "--max_tokens", "200")
    process = subprocess.Popen(
        [sys.executable, "-m", "nanogpt", "serve", *flags],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    yield lines[1].split()[2]
    process.terminate()
    process.communicate(timeout=HANGS)


def program(name: str) -> str:
    """The path of a program that a package has installed."""
    return str(Path(sysconfig.get_path("scripts")) / name)


def run(words: list[str], folder: Path, **variables: str) -> str:
    """What a program prints."""
    done = subprocess.run(
        words,
        cwd=folder,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


TASKS = {
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}{{gold}}"
metric_list: [{metric: bits_per_byte}]
""",
    "choice": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{[gold, other]}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "generate": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{gold}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, temperature: 0}
metric_list: [{metric: exact_match}]
""",
}


def test_lm_eval_measures_what_eval_measures(url: str, model: TextModel, tmp_path: Path):
    pytest.importorskip("lm_eval")
    documents = [{"context": line[:7], "gold": line[7:].rstrip(), "other": " qqq"} for line in LINES[::5]]
    (tmp_path / "data.json").write_text(json.dumps(documents))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    data = f"{{data_files: {{test: {tmp_path / 'data.json'}}}}}"
    common = f"dataset_path: json\ndataset_kwargs: {data}\ntest_split: test"
    for name, text in TASKS.items():
        (tasks / f"{name}.yaml").write_text(f"task: {name}\n{common}{text}")
    arguments = f"model=out,base_url={url}/v1/completions,max_length=48"
    words = ["run", "--model", "local-completions", "--model_args", arguments, "--tasks", ",".join(TASKS)]
    words += ["--include_path", str(tasks), "--output_path", str(tmp_path / "results"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    run([program("lm_eval"), *words], tmp_path, **offline)

    def samples(task: str) -> list[dict]:
        (path,) = (tmp_path / "results").rglob(f"samples_{task}_*.jsonl")
        found = map(json.loads, path.read_text().splitlines())
        return sorted(found, key=lambda sample: sample["doc_id"])

    encode = model.tokenizer.encode
    end = np.array([model.tokenizer.end_of_text])
    for sample, document in zip(samples("rolling"), documents, strict=True):
        ids = np.concatenate((end, encode(document["context"] + document["gold"])))
        assert float(sample["filtered_resps"][0]) == pytest.approx(-score(model.model, ids).sum(), abs=1e-4)
    for sample, document in zip(samples("choice"), documents, strict=True):
        expected = [
            -score(model.model, encode(document["context"] + choice))[-len(choice) :].sum()
            for choice in (document["gold"], " qqq")
        ]
        assert [float(value) for value, _ in sample["filtered_resps"]] == pytest.approx(expected, abs=1e-4)
        assert sample["acc"] == (expected[0] > expected[1])
    for sample, document in zip(samples("generate"), documents, strict=True):
        expected = generate(model, document["context"], num_tokens=12, temperature=0, stop=["."])
        assert sample["resps"][0][0] == expected


def test_schemathesis_finds_no_failure(url: str, tmp_path: Path):
    """A valid request may still be refused: an empty prompt, an id that is not of the vocabulary."""
    pytest.importorskip("schemathesis")
    words = ["run", f"{url}/openapi.json", "--max-examples", "15", "--seed", "1", "--no-color"]
    words += ["--exclude-checks", "positive_data_acceptance"]
    assert "passed" in run([program("schemathesis"), *words], tmp_path)
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_llm_completes_and_streams(url: str, model: TextModel, tmp_path: Path):
    pytest.importorskip("llm")
    entry = f"- model_id: nano\n  model_name: out\n  api_base: {url}/v1\n  completion: true\n"
    (tmp_path / "extra-openai-models.yaml").write_text(entry)
    expected = generate(model, "Ann saw", num_tokens=20, temperature=0)
    options = ["-m", "nano", "Ann saw", "-o", "temperature", "0", "-o", "max_tokens", "20", "--key", "none"]
    for streaming in ([], ["--no-stream"]):
        text = run([program("llm"), *options, *streaming], tmp_path, LLM_USER_PATH=str(tmp_path))
        assert text.rstrip() == expected.rstrip()
