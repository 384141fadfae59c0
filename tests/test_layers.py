"""The house stands: every file imports from its own layer or below, and never in a circle."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "nanogpt"

LAYERS = (
    {
        "errors",
        "settings",
        "config",
        "cores",
        "presets",
        "files",
        "locking",
        "streams",
        "console",
        "tokenizer",
        "bpe",
        "vocabulary",
        "encoding",
        "documents",
        "records",
        "json_records",
        "tables",
        "compressed",
        "archives",
        "corpus",
        "shakespeare",
    },
    {"loss", "sharding", "model", "optim", "generate", "device", "arithmetic"},
    {
        "shards",
        "parts",
        "data",
        "data_folder",
        "seals",
        "swap",
        "token_map",
        "tokenizer_choice",
        "survey",
        "token_files",
        "prepare",
        "data_info",
        "validation",
        "checkpoint",
        "metrics",
        "plot",
        "report",
        "stopping",
        "run_folder",
        "parallel",
        "world",
        "memory",
        "micro_batch",
        "plan",
        "run",
        "set_up",
        "saving",
        "step",
        "train",
        "sample",
        "summary",
        "show_presets",
    },
    {"cli"},
    {"__main__"},
)
"""Lowest first."""

NO_TORCH, NO_EDGE_LIBRARIES = LAYERS[0], LAYERS[1]


@functools.cache
def modules() -> dict[str, ast.Module]:
    return {
        path.stem: ast.parse(path.read_text("utf-8"))
        for path in PACKAGE.glob("*.py")
        if path.stem != "__init__"
    }


def imports(tree: ast.Module) -> set[str]:
    """Dotted names of everything imported anywhere in a file."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return found


def ours(tree: ast.Module) -> set[str]:
    """Names of the package's own modules that a file imports."""
    parts = [name.split(".") for name in imports(tree)]
    return {part[1] for part in parts if part[0] == "nanogpt" and len(part) > 1} & set(modules())


def layer_of(module: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if module in layer)


def test_every_module_has_a_layer():
    assert set().union(*LAYERS) == set(modules())


def test_no_import_goes_up():
    wrong = [
        f"{name} (layer {layer_of(name)}) imports {other} (layer {layer_of(other)})"
        for name, tree in modules().items()
        for other in ours(tree)
        if layer_of(other) > layer_of(name)
    ]
    assert not wrong


def test_no_circle():
    left = {name: ours(tree) for name, tree in modules().items()}
    while left:
        free = {name for name, needs in left.items() if not needs & set(left)}
        assert free, f"a circle among {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


def test_the_lowest_layer_has_no_torch():
    wrong = [name for name in NO_TORCH if any(i.split(".")[0] == "torch" for i in imports(modules()[name]))]
    assert not wrong


def test_the_model_layer_touches_no_files_output_or_environment():
    for name in NO_EDGE_LIBRARIES:
        tree = modules()[name]
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
        assert not calls & {"print", "open", "say", "warn"}, name


def test_tyro_is_in_cli_alone():
    users = [name for name, tree in modules().items() if any(i.startswith("tyro") for i in imports(tree))]
    assert users == ["cli"]


def test_public_functions_are_annotated_and_documented():
    wrong: list[str] = []
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
                if untyped or node.returns is None or not ast.get_docstring(node):
                    wrong.append(f"{name}.{node.name}")
    assert not wrong


def test_nothing_runs_at_import():
    """Importing the lowest layer and the command line pulls in neither torch nor tyro."""
    code = "import nanogpt.cli, nanogpt.presets, sys; print({'torch', 'tyro'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
