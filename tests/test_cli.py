"""The command line: every command of the description works as written; mistakes end in one line."""

import gc
import os
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nanogpt
from nanogpt.cli import main as cli
from nanogpt.cli.parse import parse as parse_arguments
from nanogpt.config import TrainConfig
from nanogpt.data.config import PrepareConfig
from nanogpt.data.dataset import load_dataset
from nanogpt.errors import UserError
from nanogpt.inference.config import SampleConfig
from nanogpt.terminal import console
from nanogpt.text import tiny_shakespeare

ROOT = Path(__file__).parent.parent

SMALL = shlex.split(
    "--block_size 16 --n_layer 1 --n_head 2 --n_embd 16 --batch_size 4 --max_iters 4 --eval_interval 2 "
    "--warmup_iters 1"
)
"""Makes any training a matter of a second."""


def run(command: str, *more: str) -> int:
    """Run a command line of the form `python NAME.py FLAGS`, in this process."""
    python, script, *arguments = shlex.split(command)
    assert python == "python"
    return cli.run_command(script.removesuffix(".py"), [*arguments, *more], prog=f"python {script}")


@pytest.fixture
def project(tmp_path: Path, monkeypatch, text: str) -> Path:
    """An empty folder as the working directory, with a stand-in for the download."""
    raw = (text * 3).encode()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiny_shakespeare, "download", lambda url: raw)
    monkeypatch.setattr(tiny_shakespeare, "SHAKESPEARE_SHA256", tiny_shakespeare.sha256(raw))
    (tmp_path / "my_corpus.txt").write_text(text, encoding="utf-8")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_every_command_of_the_description(project: Path, capsys) -> None:
    """In the order in which a reader would type them, in one folder."""
    assert run("python data.py") == 0
    assert {path.name for path in (project / "data").iterdir() if not path.name.startswith(".")} == {
        "input.txt",
        "train.pt",
        "val.pt",
        "vocab.pt",
    }
    assert run("python data.py --input_file my_corpus.txt --data_dir my_data") == 0
    assert run("python data.py --input_file my_corpus.txt --data_dir split --train_split 0.8") == 0
    assert run("python train.py", *SMALL) == 0
    assert (project / "out/ckpt.pt").exists()
    for command in (
        "python train.py --device cpu",
        "python train.py --data_dir my_data",
        "python train.py --no_flash_attn",
        "python train.py --tensorboard",
        "python train.py --learning_rate 1 --min_lr 0.2 --warmup_iters 2",
    ):
        assert run(command, *SMALL) == 0, command
    assert list((project / "out/previous/5/runs").glob("events*"))  # the run before the last one
    assert run("python train.py --resume", "--max_iters", "6") == 0
    for command in (
        "python sample.py --num_tokens 5",
        "python sample.py --checkpoint out/ckpt.pt --prompt '\\n' --num_tokens 500 --temperature 1.0 "
        "--top_k 40",
        "python sample.py --top_k 40 --temperature 0.8",
        "python sample.py --top_p 0.9 --temperature 0.8",
    ):
        capsys.readouterr()
        assert run(command) == 0, command
        assert capsys.readouterr().out
    assert run("python model.py") == 0
    assert "10,770,816" in capsys.readouterr().out


def test_the_scripts_in_the_root_folder_are_the_commands(project: Path) -> None:
    """As processes: the real files, in a folder of their own."""
    for name in ("data", "train", "sample", "model"):
        shutil.copy(ROOT / f"{name}.py", project)
        assert len((ROOT / f"{name}.py").read_text().splitlines()) <= 15

    def python(*arguments: str) -> str:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "my_data/train.pt" in python("data.py", "--input_file", "my_corpus.txt", "--data_dir", "my_data")
    assert "Finished: 4 steps" in python("train.py", "--data_dir", "my_data", *SMALL)
    assert python("sample.py", "--num_tokens", "20", "--prompt", "From").startswith("From")
    assert "parameters" in python("model.py", "--preset", "cpu")
    assert "vocabulary 50257" in python("model.py", "--preset", "gpt2")
    code = "import model, nanogpt.model.gpt as o; print(model.GPT is o.GPT, model.GPTConfig is o.GPTConfig)"
    assert python("-c", code) == "True True\n"


HEAVY = {"torch", "numpy", "matplotlib", "requests", "rich", "typeguard", "asyncio", "unittest"}
"""Packages that take longer to import than a help text to print."""


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], *([name, "--help"] for name in cli.COMMANDS)]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "nanogpt", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.match("nanogpt [0-9]" if arguments == ["--version"] else "usage:", done.stdout)
    imported = re.findall(r"\| +(\w+)$", done.stderr, re.MULTILINE)
    assert not HEAVY & set(imported)


@pytest.mark.parametrize("more", [[], ["--tokenizer=byte", "--shard_tokens=700"]])
def test_a_text_is_prepared_without_pytorch(project: Path, more: list[str]) -> None:
    code = "import nanogpt.cli.main as m, sys; m.run_command('data', sys.argv[1:], ''); print(*sys.modules)"
    command = [sys.executable, "-c", code, "--input_file=my_corpus.txt", "--data_dir=folder", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not {"torch", "requests", "pyarrow"} & set(done.stdout.splitlines()[-1].split())
    assert load_dataset(project / "folder", verify_bytes=None).sealed


def test_training_imports_nothing_that_it_does_not_use(config: TrainConfig) -> None:
    """torch._dynamo compiles, torch.distributed.checkpoint saves shards: each takes a second to import."""
    arguments = [
        f"--{name}={value}" for name, value in (("data_dir", config.data_dir), ("out_dir", config.out_dir))
    ]
    code = "import nanogpt.cli.main as m, sys; m.run_command('train', sys.argv[1:], ''); print(*sys.modules)"
    command = [sys.executable, "-c", code, *arguments, *SMALL, "--optimizer=muon", "--compile=off"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    unused = {
        "torch._dynamo",
        "sympy",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "tensorboard",
    }
    unused |= {
        "requests",
        "tokenizers",
        "gigatoken",
        "pyarrow",
        "matplotlib.pyplot",
        "torch.utils.tensorboard",
    }
    assert "Finished: 4 steps" in done.stdout
    assert not unused & set(done.stdout.splitlines()[-1].split())


def test_what_was_imported_is_hidden_from_the_garbage_collector(monkeypatch) -> None:
    before = gc.get_freeze_count()
    with cli.uncollected_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
    gc.unfreeze()


def test_usage_lists_the_commands(capsys, monkeypatch) -> None:
    monkeypatch.setattr(cli, "prepare_process", lambda: None)  # which is for good
    monkeypatch.setattr(sys, "argv", ["nanogpt"])
    cli.main()
    printed = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", printed, re.MULTILINE) for name in cli.COMMANDS)
    monkeypatch.setattr(sys, "argv", ["nanogpt", "trian"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2


MISTAKES = {
    "python train.py": "vocab.pt is missing: prepare it with: python data.py",
    "python train.py --n_lyer 3": "--n_lyer",
    "python train.py --n_layer x": "'x'",
    "python train.py --n_layer 0": "--n_layer 0 is too small",
    "python train.py --n_embd 100": "--n_embd 100 is not a multiple of --n_head 6: try --n_embd 102",
    "python train.py --dropout 1": "--dropout 1.0 is outside [0, 1)",
    "python train.py --dtype int8": "int8",
    "python train.py --preset huge": "--preset huge does not exist: choose one of speedrun, classic, cpu",
    "python train.py --resume": "no checkpoint to resume in out",
    "python train.py --gradient_accumulation_steps 65": "more than --batch_size 64",
    "python train.py --log_to nonsense": "--log_to nonsense is unknown: use jsonl, tensorboard",
    "python train.py --max_seconds 0": "--max_seconds 0.0 is not positive",
    "python train.py --learning_rate inf": "--learning_rate inf is not a finite number",
    "python train.py --weight_decay nan": "--weight_decay nan is not a finite number",
    "python train.py --ema_decay 1": "--ema_decay 1.0 is outside [0, 1): try 0.99",
    "python data.py --input_file nowhere.txt": "nowhere.txt does not exist",
    "python data.py --input_file empty": "--input_file empty is a folder without files",
    "python data.py --input_file *.csv": "--input_file *.csv does not exist",
    "python data.py --input_file - --val_file -": "- is given twice",
    "python data.py --input_file my_corpus.txt --val_file no.txt --split documents": "give one of them",
    "python data.py --input_file my_corpus.txt --tokenizer words": "--tokenizer words is unknown: use char",
    "python data.py --input_file my_corpus.txt --tokenizer no.json": "--tokenizer no.json cannot be read",
    "python data.py --input_file my_corpus.txt --tokenizer bpe --vocab_size 257": "257 is too small",
    "python data.py --input_file my_corpus.txt --tokenizer bpe --vocab_size 9999": "9999 is too large",
    "python data.py --input_file my_corpus.txt --split words": "words",
    "python data.py --input_file": "--input_file",
    "python data.py --input_file my_corpus.txt --train_split 1": "--train_split 1.0 is outside (0, 1)",
    "python sample.py": "out/ckpt.pt does not exist",
    "python sample.py --temperature=-1": "--temperature -1.0",
    "python sample.py --checkpoint my_corpus.txt": "is not a NanoGPT checkpoint",
    "python data.py --input_file my_corpus.txt --data_dir my_corpus.txt": "my_corpus.txt",
    "python train.py --seed 18446744073709551616": "is too large",
    "python model.py --n_head 5": "--n_embd 384 is not a multiple of --n_head 5",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(project: Path, capsys, command: str) -> None:
    assert run(command) == 2
    out, err = capsys.readouterr()
    assert out == "" or "--tokenizer bpe" in command  # which says first that it is learning
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert MISTAKES[command] in err


def test_a_missing_package_is_one_line_and_exit_code_2(project: Path, monkeypatch, capsys) -> None:
    assert run("python data.py --input_file my_corpus.txt") == 0
    monkeypatch.setitem(sys.modules, "wandb", None)
    capsys.readouterr()
    assert run("python train.py --log_to wandb", *SMALL) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --log_to wandb needs")
    assert line.endswith(": pip install nanogpt[wandb]")
    assert not (project / "out/metrics.jsonl").exists()


def test_a_closed_pipe_does_not_end_a_training(project: Path) -> None:
    """`| head -1`: the training goes on to its end, talking to nobody."""
    run("python data.py --input_file my_corpus.txt")
    command = [
        sys.executable,
        "-m",
        "nanogpt",
        "train",
        *SMALL,
        "--max_iters",
        "400",
        "--log_interval",
        "1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stderr
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    assert '"step": 400' in Path("out/metrics.jsonl").read_text()


def test_output_that_cannot_show_a_character_does_not_end_the_program(project: Path) -> None:
    Path("my.txt").write_text("Мороз и солнце; день чудесный!\n" * 40, encoding="utf-8")
    run("python data.py --input_file my.txt --data_dir my")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for arguments in (["train", "--data_dir", "my", *SMALL], ["sample", "--num_tokens", "20"]):
        command = [sys.executable, "-m", "nanogpt", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr


def test_hints_name_the_command_as_it_was_called(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/nanogpt", "train"])
    assert console.command("sample") == ["nanogpt", "sample"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/nanogpt/__main__.py", "train"])
    assert console.command("sample") == ["python", "-m", "nanogpt", "sample"]
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert console.command("sample") == ["python", "sample.py"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a\nb", r"a\nb"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("\u202etxt.exe", r"\u202etxt.exe"),
        ("x" * 10_000, "xxx"),
        ("x y " * 10_000, "x y"),
        ("\udcff", r"\udcff"),
    ],
)
@pytest.mark.parametrize("flag", ["--data_dir", "--preset", "--n_layer"])
def test_a_hostile_value_is_one_short_line(project: Path, capsys, flag: str, value: str, shown: str) -> None:
    assert run("python train.py", f"{flag}={value}") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err[:-1].isprintable()
    assert len(err) < 1200
    assert shown in err


@given(st.text())
def test_a_message_is_one_line_that_no_terminal_obeys(text: str) -> None:
    line = console.one_line(text)
    assert len(line.splitlines()) <= 1
    assert not any(unicodedata.category(char) in ("Cc", "Cs") for char in line.replace("\t", ""))
    assert len(line) < 1.1 * console.MAX_LINE
    if text.isprintable() and len(text) < console.MAX_WORD:
        assert line == text


@pytest.mark.parametrize(
    "error",
    [ImportError("libcudart.so.12: cannot open\nand more", name="torch"), OSError("libtorch.so: bad")],
)
def test_a_library_that_cannot_be_loaded_is_one_line(project: Path, monkeypatch, capsys, error) -> None:
    def fail(_: str) -> None:
        raise error

    monkeypatch.setattr(cli.importlib, "import_module", fail)
    assert run("python data.py") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert str(error).partition("\n")[0] in err
    assert err.count("\n") == 1


def test_an_old_python_is_one_line() -> None:
    code = "import sys; sys.version_info = (3, 8, 1); import nanogpt"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "error: NanoGPT needs Python 3.10 or newer, and this is 3.8\n",
    )


def test_the_package_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nanogpt", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"nanogpt {nanogpt.__version__}\n"


def test_a_bug_keeps_its_traceback(project: Path, monkeypatch) -> None:
    monkeypatch.setattr("nanogpt.data.prepare.main", lambda config: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run("python data.py")


def test_a_missing_library_says_how_to_install_it(project: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert run("python data.py") == 2
    assert capsys.readouterr().err == "error: tyro is not installed: pip install -c constraints.txt -e .\n"


VARIABLES = (
    "GOMP_SPINCOUNT",
    "OMP_NUM_THREADS",
    "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL",
    *sorted(cli.ALLOCATOR_VARIABLES),
)


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable is set that the command line sets; what it sets is undone."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("nanogpt.data.prepare.main", lambda config: 0)
    monkeypatch.setattr(cli.sys, "platform", "linux")
    return monkeypatch


def test_pytorch_finds_an_environment_for_this_machine(project: Path, unset) -> None:
    unset.setattr("nanogpt.machine.cores.usable_cores", lambda: 5)
    unset.setattr(cli, "torch_version", lambda: "2.11.0+cu128")
    assert run("python data.py") == 0
    assert {name: os.environ[name] for name in VARIABLES if name in os.environ} == {
        "GOMP_SPINCOUNT": "1000",
        "OMP_NUM_THREADS": "5",
        "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }


def test_threads_stay_awake_from_one_token_to_the_next(project: Path, unset) -> None:
    unset.setattr("nanogpt.cli.sample.main", lambda config: 0)
    assert run("python sample.py") == 0
    assert os.environ["GOMP_SPINCOUNT"] == "10000"


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_of_the_users_is_left_alone(project: Path, unset, name: str) -> None:
    unset.setenv(name, "7")
    assert run("python data.py") == 0
    assert os.environ[name] == "7"
    assert len([name for name in cli.ALLOCATOR_VARIABLES if name in os.environ]) == 1


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.8.0+cu126", {"PYTORCH_CUDA_ALLOC_CONF"}),
        ("2.13.0", {"PYTORCH_ALLOC_CONF"}),
        ("2.13.0+rocm7.0", set()),
    ],
)
def test_the_allocator_is_told_by_the_name_that_this_pytorch_knows(unset, version: str, expected) -> None:
    unset.setattr(cli, "torch_version", lambda: version)
    cli.set_environment(1000)
    assert os.environ.keys() & cli.ALLOCATOR_VARIABLES == expected


def test_other_systems_count_their_threads_themselves(unset) -> None:
    unset.setattr(cli.sys, "platform", "darwin")
    cli.set_environment(1000)
    assert [name for name in VARIABLES if name in os.environ] == ["GOMP_SPINCOUNT"]


def parse(cls: type, line: str):
    return parse_arguments(cls, shlex.split(line), "test")


def test_spellings_of_flags() -> None:
    assert parse(SampleConfig, "--top_k 40") == parse(SampleConfig, "--top-k=40") == SampleConfig(top_k=40)
    assert parse(TrainConfig, "--learning_rate 1").learning_rate == 1.0
    assert parse(TrainConfig, "--no_flash_attn") == parse(TrainConfig, "--no-flash-attn")
    assert not parse(TrainConfig, "--no_flash_attn").flash_attn
    assert parse(TrainConfig, "--compile").compile == parse(TrainConfig, "--compile on").compile == "on"
    assert parse(TrainConfig, "--compile --resume").compile == "on"
    assert parse(TrainConfig, "--no_compile").compile == "off"
    assert (
        parse(TrainConfig, "--cuda_graph --seed 1").cuda_graph
        == parse(TrainConfig, "--cuda-graph").cuda_graph
        == "on"
    )
    assert parse(TrainConfig, "--no_cuda_graph").cuda_graph == "off"
    assert parse(SampleConfig, "--stop A --stop B").stop == ("A", "B")
    with pytest.raises(UserError):
        parse(TrainConfig, "--max_iter 5")


@pytest.mark.parametrize(
    ("line", "files"),
    [
        ("--input_file a b --data_dir x", ("a", "b")),
        ("--input_file a --data_dir x --input_file b", ("a", "b")),
        ("--input-file a b --input_file=c --data_dir x", ("a", "b", "c")),
        ("--data_dir x --input_file -", ("-",)),
        ("--data_dir=x --input_file a - b", ("a", "-", "b")),
        ("--data_dir x", ()),
    ],
)
def test_flags_with_several_values(line: str, files: tuple[str, ...]) -> None:
    config = parse(PrepareConfig, line)
    assert (config.input_file, config.data_dir) == (files, "x")


def test_validation_files_are_several_too() -> None:
    config = parse(PrepareConfig, "--input_file a b --val_file c d --strict")
    assert (config.input_file, config.val_file, config.strict) == (("a", "b"), ("c", "d"), True)


def test_defaults_then_preset_then_flags() -> None:
    config = parse(TrainConfig, "--n_head 8 --preset cpu")
    assert (config.preset, config.n_embd, config.n_head) == ("cpu", 192, 8)
    assert config.grad_clip == TrainConfig().grad_clip


def test_resume_starts_from_the_saved_settings(project: Path) -> None:
    run("python data.py")
    run("python train.py --out_dir a --seed 3", *SMALL)
    Path("a").rename("b")
    config = parse(TrainConfig, "--resume --out_dir b --max_iters 9")
    assert (config.resume, config.out_dir, config.seed, config.n_embd, config.max_iters) == (
        True,
        "b",
        3,
        16,
        9,
    )


def test_resume_refuses_a_contradicting_flag_in_one_line(project: Path, capsys) -> None:
    run("python data.py")
    run("python train.py", *SMALL)
    capsys.readouterr()
    assert run("python train.py --resume --n_layer 2") == 2
    assert capsys.readouterr().err.startswith(
        "error: --n_layer 2 contradicts the checkpoint, which has n_layer 1"
    )
    assert run("python train.py --resume", *SMALL) == 0  # the same flags again are no contradiction


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("", ("jsonl",)),
        ("--log_to tensorboard wandb --seed 1", ("tensorboard", "wandb")),
        ("--log-to=wandb", ("wandb",)),
    ],
)
def test_lists_replace_their_default(line: str, names: tuple[str, ...]) -> None:
    assert parse(TrainConfig, line).log_to == names
