"""Settings of plain types: what equals a plain value becomes one, all else is refused by the field's name.

Use:    @dataclass(frozen=True)
        class MyConfig(Settings): ...
A checkpoint holds its settings, and is read with weights_only=True, which knows plain types alone: a NumPy
number or a Path among them would make a file that cannot be loaded again. A field's annotation says what it
takes: bool, int, float, str, tuple[str, ...], a Literal, None, or a union of these.
"""

import functools
import math
import operator
import os
import types
from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import Enum
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from nanogpt.errors import UserError, require

LARGEST = 2**63
"""Whole numbers are below this, in size: no count here needs more, and PyTorch's reader takes little more."""

LONGEST = 60
"""Characters of a wrong value that are shown."""

FREE_TEXTS = ("prompt", "stop")
"""Fields that may hold any character. The others go to the file system, which takes no NUL."""

NO = object()
"""What has no plain form."""


@dataclass(frozen=True)
class Settings:
    """Base of every config: its fields hold plain values of the annotated types, and nothing else."""

    def __post_init__(self) -> None:
        kinds = annotations(type(self))
        for item in fields(self):
            value = plain_field(item.name, getattr(self, item.name), kinds[item.name])
            object.__setattr__(self, item.name, value)


@functools.cache
def annotations(cls: type[Any]) -> dict[str, Any]:
    """The types of the fields of a class."""
    return get_type_hints(cls)


def plain_field(name: str, value: Any, kind: Any) -> Any:
    """The plain value that `value` equals, of the type `kind`. Errors: UserError naming the field."""
    scalar = unwrapped(value)
    for one in alternatives(kind):
        plain = as_plain(scalar, one)
        if plain is not NO:
            check_range(name, plain)
            return plain
    if any(get_origin(one) is Literal for one in alternatives(kind)):
        raise UserError(f"--{name} {shown(value)} is unknown: use {listed(expected(kind))}")
    raise UserError(
        f"--{name} {shown(value)} is of type {type(value).__name__}: it must be {listed(expected(kind))}"
    )


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union; a type alone is its only one."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def unwrapped(value: Any) -> Any:
    """A NumPy scalar, an array or tensor of no dimensions, or a member of an Enum as what it holds."""
    if isinstance(value, Enum):
        return value.value
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        return value.item()
    return value


def as_plain(value: Any, kind: Any) -> Any:
    """`value` as a plain value of one type, NO if it equals none."""
    if get_origin(kind) is Literal:
        text = as_text(value)
        return text if text in get_args(kind) else NO
    if get_origin(kind) is tuple:
        return as_texts(value)
    if kind is types.NoneType:
        return None if value is None else NO
    return {bool: as_bool, int: as_int, float: as_float, str: as_text}[kind](value)


def as_bool(value: Any) -> Any:
    """True or False, or the number 1 or 0."""
    if isinstance(value, bool):
        return value
    return bool(value) if isinstance(value, Integral) and int(value) in (0, 1) else NO


def as_int(value: Any) -> Any:
    """A whole number. True and False are none: where a count belongs, they are a slip."""
    if isinstance(value, bool):
        return NO
    if isinstance(value, Integral):
        return int(operator.index(value))
    if isinstance(value, Real) and math.isfinite(value):
        whole = math.floor(value)
        return whole if cast(int, value) == whole else NO
    return NO


def as_float(value: Any) -> Any:
    """A number, if a float holds it exactly."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return NO
    try:
        number = float(value)
    except OverflowError:
        return NO
    return number if number == value or math.isnan(number) else NO


def as_text(value: Any) -> Any:
    """A text, or the path that an object stands for."""
    try:
        text = os.fsdecode(cast(Path, value)) if isinstance(value, os.PathLike) else value
    except Exception:  # whatever its own __fspath__ raises
        return NO
    return str.__str__(text) if isinstance(text, str) else NO


def as_texts(value: Any) -> Any:
    """A tuple of texts. A single text is none: Python would take it for a list of its letters."""
    if isinstance(value, str | bytes | dict | set | frozenset) or not isinstance(value, Iterable):
        return NO
    try:
        texts = tuple(as_text(unwrapped(item)) for item in cast(Iterable[Any], value))
    except Exception:  # whatever iterating over it raises
        return NO
    return NO if NO in texts else texts


def check_range(name: str, value: Any) -> None:
    """Errors: UserError if a number is infinite, none, or beyond any use, or if a text holds a NUL."""
    if isinstance(value, float):
        require(
            math.isfinite(value), f"--{name} {value} is not a finite number: leave it out for the default"
        )
    elif isinstance(value, int):
        require(abs(value) < LARGEST, f"--{name} {shown(value)} is too large: it must be below 2**63")
    elif name not in FREE_TEXTS and value is not None:
        require("\0" not in "".join(value), f"--{name} {shown(value)} holds a NUL character: leave it out")


def expected(kind: Any) -> list[str]:
    """The values that a field takes, in words."""
    names = {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        str: "a text",
        types.NoneType: "None",
    }
    words: list[str] = []
    for one in alternatives(kind):
        if get_origin(one) is Literal:
            words += get_args(one)
        else:
            words.append(names.get(one, "a list of texts"))
    return words


def listed(words: list[str]) -> str:
    """Words in a row: a, b or c."""
    return " or ".join([*filter(None, [", ".join(words[:-1])]), words[-1]])


def shown(value: Any) -> str:
    """A value in a line, shortened; a word as it is, so that it reads as it would be typed."""
    try:
        text = value if isinstance(value, str) and value.isidentifier() else repr(value)
    except Exception:  # of an object that cannot even be shown, or a number of too many digits
        text = f"(a very long {type(value).__name__})"
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
