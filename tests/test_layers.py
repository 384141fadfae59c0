"""The house stands: no import goes up, none in a circle, and what needs no PyTorch has none."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "nanogpt"

HOUSE = (
    {"errors", "units", "settings", "terminal"},
    {"config", "storage", "machine", "page"},
    {"presets", "model", "text"},
    {"distributed", "tokenizer", "native"},
    {"data", "checkpoint", "inference"},
    {"evaluation", "sampler", "scoring", "export", "initialize", "server"},
    {"training"},
    {"info", "sweep"},
    {"train", "api", "cli"},
    {"__main__"},
)
"""Packages, and files that are in none, lowest floor first."""

NO_TORCH = ("errors", "units", "settings", "terminal", "config", "page", "presets", "text")
NO_TORCH_EITHER = (
    "storage.files",
    "storage.locking",
    "storage.pt_files",
    "machine.cores",
    "machine.malloc",
    "model.foreign_names",
    "tokenizer",
    "data.shards",
    "data.config",
    "inference.config",
    "export.config",
    "server.config",
    "cli.main",
    "cli.parse",
    "cli.config",
    "training.stopping",
)

PURE = ("model", "training.optimizer", "inference")
"""Mathematics: nothing here reads files or the environment, or prints."""


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every file by its name within the package, as model.gpt."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text("utf-8"))
        for path in PACKAGE.rglob("*.py")
        if path.stem != "__init__"
    }


def within(*packages: str) -> list[str]:
    """The files of packages."""
    return [name for name in modules() if any(name == p or name.startswith(f"{p}.") for p in packages)]


def imports(tree: ast.Module, *, late: bool = True) -> set[str]:
    """Dotted names of everything imported in a file; late: within functions too."""
    found: set[str] = set()
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return found


def ours(tree: ast.Module) -> set[str]:
    """Names of the files of ours that a file imports."""
    names = {name.removeprefix("nanogpt.") for name in imports(tree) if name.startswith("nanogpt.")}
    return names & set(modules())


def package(name: str) -> str:
    """Where a file is."""
    return name.partition(".")[0]


def floor(name: str) -> int:
    """How high a file stands."""
    return next(number for number, row in enumerate(HOUSE) if package(name) in row)


def test_every_package_has_a_floor():
    assert set().union(*HOUSE) == {package(name) for name in modules()}


def test_no_import_goes_up_or_sideways():
    wrong = [
        f"{name} imports {other}"
        for name, tree in modules().items()
        for other in ours(tree)
        if floor(other) > floor(name)
        or (floor(other) == floor(name) and "." in name and package(other) != package(name) and "." in other)
    ]
    assert not wrong


def test_no_circle():
    left = {name: ours(tree) for name, tree in modules().items()}
    while left:
        free = {name for name, needs in left.items() if not needs & set(left)}
        assert free, f"a circle among {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


@pytest.mark.parametrize("name", [*NO_TORCH, *NO_TORCH_EITHER])
def test_what_needs_no_torch_has_none(name: str):
    files = within(name)
    assert files
    assert not [file for file in files if any(i.split(".")[0] == "torch" for i in imports(modules()[file]))]


@pytest.mark.parametrize("name", PURE)
def test_mathematics_touches_no_files_output_or_environment(name: str):
    for file in within(name):
        tree = modules()[file]
        assert not {i.split(".")[0] for i in imports(tree)} & {
            "os",
            "pathlib",
            "io",
            "rich",
            "tyro",
            "logging",
        }
        calls = {
            node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & {"print", "open", "say", "warn"}, file


def test_tyro_is_in_cli_alone():
    users = [name for name, tree in modules().items() if any(i.startswith("tyro") for i in imports(tree))]
    assert users == ["cli.parse"]


def is_overload(node: ast.FunctionDef) -> bool:
    """Whether it is one of the types of a function that is defined and documented below it."""
    return any(isinstance(item, ast.Name) and item.id == "overload" for item in node.decorator_list)


def test_public_functions_are_annotated_and_documented():
    wrong: list[str] = []
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not is_overload(node):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
                if untyped or node.returns is None or not ast.get_docstring(node):
                    wrong.append(f"{name}.{node.name}")
    assert not wrong


def test_nothing_runs_at_import():
    """Importing the lowest layer and the command line pulls in neither torch nor tyro."""
    code = "import nanogpt.cli.main, nanogpt.presets, sys; print({'torch', 'tyro'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_package_has_its_names_without_importing_torch_for_nothing():
    code = (
        "import nanogpt, sys; assert 'torch' not in sys.modules;"
        " from nanogpt import GPT, GPTConfig, TrainConfig, fit, generate, load_model, prepare, score;"
        " print(sorted(nanogpt.__all__) == sorted(nanogpt.LAZY_IMPORTS), hasattr(nanogpt, 'nonsense'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"


def test_functions_fit_on_a_screen_and_files_in_a_sitting():
    """At most 60 lines, and 400."""
    long = [
        f"{name}.{node.name}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
    ]
    long += [path.name for path in PACKAGE.rglob("*.py") if len(path.read_text("utf-8").splitlines()) > 400]
    assert not long
