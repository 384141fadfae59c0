"""Argument parsing: turn the arguments of a command into its config.

Example: config = parse(TrainConfig, ["--preset", "cpu", "--max_iters", "100"], prog="nanogpt train")
Each field of the config is a flag. Only this file uses tyro, which makes the parser. Two spellings that tyro
does not know are expanded first: bare switches (--compile) and lists (--input_file a b).
Order: defaults < --preset < the shape of --init_from < flags; with --resume: the run's own settings < flags.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, cast

from nanogpt.config import TrainConfig
from nanogpt.errors import UserError
from nanogpt.settings import union_members

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry

TYRO_ERROR_CODE = 2
"""Exit code of tyro for arguments that it refuses."""

LIST_FLAGS = (
    *("--input_file", "--input-file", "--val_file", "--val-file", "--log_to", "--log-to"),
    *("--speakers", "--diff", "--vary"),
)
"""Flags that take a list of values."""

POSITIONAL = ("path",)
"""Fields that are given without a flag."""

SWITCHES = {
    f"--{no}{spelling}": (f"--{name}", value)
    for name in ("compile", "cuda_graph")
    for spelling in (name, name.replace("_", "-"))
    for no, value in (("", "on"), ("no_", "off"), ("no-", "off"))
}
"""Bare switch -> the flag and the value that it stands for."""


@dataclass(frozen=True)
class BaseFlags:
    """Flags that decide the defaults of all others; they are parsed first."""

    preset: str | None = None
    init_from: str | None = None
    resume: bool = False
    out_dir: str = TrainConfig.out_dir


def parse(cls: type[Any], arguments: Sequence[str], prog: str) -> Any:
    """Parse the arguments into a config of class `cls`. `--help` prints and exits.

    Raises: UserError, in one line, if an argument is wrong.
    """
    import tyro

    arguments = expand_lists(expand_switches(arguments))
    default = replace_lists(default_config(cls, parse_base_flags(cls, arguments)), arguments)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            config = tyro.cli(
                cls,
                args=arguments,
                prog=prog,
                default=default,
                use_underscores=True,
                config=(tyro.conf.UseAppendAction,),
                registry=plain_types_registry(cls, default),
            )
    except SystemExit as stop:
        if stop.code != TYRO_ERROR_CODE:  # --help, or a signal
            raise
        raise UserError(f"{error_in_one_line(printed.getvalue())}; see {prog} --help") from None
    if isinstance(config, TrainConfig) and config.minutes:
        names = {field.name for field in fields(TrainConfig)}
        return replace(config, fixed=(*config.fixed, *sorted(given_flags(arguments) & names)))
    return config


def given_flags(arguments: Sequence[str]) -> set[str]:
    """Names of the flags among the arguments, with underscores and without the "no" that switches one off."""
    given = {argument.partition("=")[0].lstrip("-").replace("-", "_") for argument in arguments}
    return given | {name.removeprefix("no_") for name in given}


class Texts(tuple[str, ...]):
    """A list of texts, as a class of its own (see plain_types_registry)."""

    __slots__ = ()

    def __str__(self) -> str:
        """The texts, as help shows them."""
        return " ".join(self)


def plain_types_registry(cls: type[Any], default: Any) -> "ConstructorRegistry":
    """The fields of `cls` for tyro, with types whose default values tyro checks by itself.

    For any other type it imports typeguard, and with it asyncio, which takes as long as tyro itself. So
    `int | None` becomes Union[int, None], and tuple[str, ...] a class.
    """
    from tyro.conf import Positional
    from tyro.constructors import (
        ConstructorRegistry,
        PrimitiveTypeInfo,
        StructConstructorSpec,
        StructTypeInfo,
    )

    find = cast(Any, ConstructorRegistry).get_primitive_spec
    usual = ConstructorRegistry.get_struct_spec(StructTypeInfo.make(cls, default, in_union_context=False))
    assert isinstance(usual, StructConstructorSpec)
    plain = [
        replace(field, type=Texts, default=Texts(field.default))
        if field.type == tuple[str, ...]
        else replace(field, type=Positional[field.type])
        if field.name in POSITIONAL
        else replace(field, type=Union[union_members(field.type)])  # noqa: UP007 - X | Y is another type
        for field in usual.fields
    ]

    def fields_of(info: StructTypeInfo) -> StructConstructorSpec | None:
        """The fields, if it is `cls` that is asked for."""
        return replace(usual, fields=tuple(plain)) if info.type is cls else None

    def list_of_texts(info: PrimitiveTypeInfo) -> Any:
        """How a list of texts is parsed."""
        return find(PrimitiveTypeInfo.make(tuple[str, ...], info.markers)) if info.type is Texts else None

    registry = ConstructorRegistry()
    registry.struct_rule(fields_of)
    registry.primitive_rule(list_of_texts)
    return registry


def parse_base_flags(cls: type[Any], arguments: Sequence[str]) -> BaseFlags:
    """Parse the base flags, if `cls` has any. The full parse reports mistakes in them."""
    import tyro

    if not {field.name for field in fields(cls)} & {"preset", "resume"}:
        return BaseFlags()
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        return tyro.cli(
            BaseFlags,
            args=arguments,
            return_unknown_args=True,
            add_help=False,
            registry=plain_types_registry(BaseFlags, BaseFlags()),
        )[0]
    return BaseFlags()


def default_config(cls: type[Any], base: BaseFlags) -> Any:
    """The config of default values: those of the resumed run, of --init_from, of the preset, or of `cls`."""
    if base.resume:
        from nanogpt.checkpoint.run_dir import RunFolder

        saved = RunFolder(Path(base.out_dir)).saved_config()
        return replace(saved, out_dir=base.out_dir) if saved else cls()
    values = preset_values(cls, base.preset) if base.preset else {}
    if base.init_from is not None and "init_from" in {field.name for field in fields(cls)}:
        from nanogpt.initialize.registry import open_source

        values |= open_source(base.init_from).settings
    return cls(**values)


def preset_values(cls: type[Any], name: str) -> dict[str, Any]:
    """What a preset says about the fields of `cls`: its values that are no defaults."""
    from nanogpt import presets

    preset, default = presets.get(name), TrainConfig()
    names = {field.name for field in fields(cls)}
    common = names & {field.name for field in fields(preset)}
    values = {
        name: getattr(preset, name) for name in common if getattr(preset, name) != getattr(default, name)
    }
    if "vocab_size" in names:
        values["vocab_size"] = presets.PRESETS[name].vocab_size
    return values


def expand_switches(arguments: Sequence[str]) -> list[str]:
    """Expand bare switches: --compile to --compile on, --no_compile to --compile off."""
    expanded: list[str] = []
    for argument, following in zip_longest(arguments, arguments[1:]):
        bare = argument in SWITCHES and following not in ("auto", "on", "off")
        expanded += SWITCHES[argument] if bare else [argument]
    return expanded


def expand_lists(arguments: Sequence[str]) -> list[str]:
    """Expand lists: --input_file a b to --input_file=a --input_file=b (with =, a lone - is a value too)."""
    expanded: list[str] = []
    flag = ""
    for argument, following in zip_longest(arguments, arguments[1:]):
        if argument in LIST_FLAGS and following is not None and is_value(following):
            flag = argument
        elif flag and is_value(argument):
            expanded.append(f"{flag}={argument}")
        else:
            expanded.append(argument)
            flag = ""
    return expanded


def replace_lists(default: Any, arguments: Sequence[str]) -> Any:
    """Empty the default of each given list flag: its values replace the default, which tyro would extend."""
    given = given_flags(arguments)
    lists = [
        field.name
        for field in fields(default)
        if field.name in given and isinstance(getattr(default, field.name), tuple)
    ]
    return replace(default, **dict.fromkeys(lists, ()))


def is_value(argument: str) -> bool:
    """Whether an argument is a value, not a flag. A lone - is a value: standard input."""
    return argument == "-" or not argument.startswith("-")


def error_in_one_line(box: str) -> str:
    """Convert tyro's framed error message to one line, without its frame and its hint at --help."""
    words: list[str] = []
    for line in box.splitlines():
        text = line.strip("│| ").strip()
        if text.startswith("For full helptext"):
            break
        is_frame = text.startswith(("╭─", "╰─", "+-"))  # +- on a terminal that shows only ASCII
        if set(text) - set("─-") and not is_frame:
            words.append(text)
    return " ".join(words).rstrip(".") or "the arguments cannot be understood"
