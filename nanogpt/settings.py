"""Base class of configs: validates field types and converts values to plain Python types.

Example: @dataclass(frozen=True)
         class MyConfig(Settings): ...
A value that equals a plain one is converted (np.int64(3) to 3, a Path to a str); any other is refused in a
message that names the field. Checkpoints need this: they hold the settings of their run and are read with
weights_only=True, which loads plain types only. A field's annotation says which type it takes: bool, int,
float, str, tuple[str, ...], a Literal, None, or a union of these.
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

MAX_INTEGER = 2**63
"""Limit of integers in magnitude: PyTorch's checkpoint reader takes hardly any larger ones."""

MAX_SHOWN = 60
"""Maximum number of characters of a wrong value that a message shows."""

FREE_TEXTS = ("prompt", "stop", "logit_bias")
"""Fields that may hold any character. Others may not hold NUL, since they can be file names."""

ESCAPES = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}
"""Escape sequence, as typed in a shell -> the character that it stands for."""

NO_MATCH = object()
"""The result of a conversion if the value equals no value of the type."""


@dataclass(frozen=True)
class Settings:
    """Base class of every config: each field holds a plain value of its annotated type."""

    def __post_init__(self) -> None:
        kinds = field_types(type(self))
        for item in fields(self):
            value = convert_field(item.name, getattr(self, item.name), kinds[item.name])
            object.__setattr__(self, item.name, value)


@functools.cache
def field_types(cls: type[Any]) -> dict[str, Any]:
    """The types of the fields of a class, by name."""
    return get_type_hints(cls)


def convert_field(name: str, value: Any, kind: Any) -> Any:
    """Convert a value to a plain one of the type `kind`. Raises: UserError naming the field."""
    scalar = unwrap_scalar(value)
    for member in union_members(kind):
        plain = convert(scalar, member)
        if plain is not NO_MATCH:
            check_range(name, plain)
            return plain
    choices = join_choices(expected_values(kind))
    if any(get_origin(member) is Literal for member in union_members(kind)):
        raise UserError(f"--{name} {show_value(value)} is unknown: use {choices}")
    raise UserError(f"--{name} {show_value(value)} is of type {type(value).__name__}: it must be {choices}")


def union_members(kind: Any) -> tuple[Any, ...]:
    """The members of a union type; any other type is its own only member."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def unwrap_scalar(value: Any) -> Any:
    """Unwrap a NumPy scalar, a zero-dimensional array or tensor, or a member of an Enum."""
    if isinstance(value, Enum):
        return value.value
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        return value.item()
    return value


def convert(value: Any, kind: Any) -> Any:
    """Convert a value to a type that is not a union; NO_MATCH if it equals no value of the type."""
    if get_origin(kind) is Literal:
        text = to_text(value)
        return text if text in get_args(kind) else NO_MATCH
    if get_origin(kind) is tuple:
        return to_texts(value)
    if kind is types.NoneType:
        return None if value is None else NO_MATCH
    return {bool: to_bool, int: to_int, float: to_float, str: to_text}[kind](value)


def to_bool(value: Any) -> Any:
    """Convert True, False, 1 or 0."""
    if isinstance(value, bool):
        return value
    return bool(value) if isinstance(value, Integral) and int(value) in (0, 1) else NO_MATCH


def to_int(value: Any) -> Any:
    """Convert a whole number. True and False are refused, since they are a mistake where a count belongs."""
    if isinstance(value, bool):
        return NO_MATCH
    if isinstance(value, Integral):
        return int(operator.index(value))
    if isinstance(value, Real) and math.isfinite(value):
        floor = math.floor(value)
        return floor if cast(int, value) == floor else NO_MATCH
    return NO_MATCH


def to_float(value: Any) -> Any:
    """Convert a number that a float holds exactly."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return NO_MATCH
    try:
        number = float(value)
    except OverflowError:
        return NO_MATCH
    return number if number == value or math.isnan(number) else NO_MATCH


def to_text(value: Any) -> Any:
    """Convert a string, or an object that stands for a path."""
    try:
        text = os.fsdecode(cast(Path, value)) if isinstance(value, os.PathLike) else value
    except Exception:  # whatever its own __fspath__ raises
        return NO_MATCH
    return str.__str__(text) if isinstance(text, str) else NO_MATCH


def to_texts(value: Any) -> Any:
    """Convert an iterable of strings to a tuple; a single string is refused, though it is iterable."""
    if isinstance(value, str | bytes | dict | set | frozenset) or not isinstance(value, Iterable):
        return NO_MATCH
    try:
        texts = tuple(to_text(unwrap_scalar(item)) for item in cast(Iterable[Any], value))
    except Exception:  # whatever iterating over it raises
        return NO_MATCH
    return NO_MATCH if NO_MATCH in texts else texts


def check_range(name: str, value: Any) -> None:
    """Raise UserError if a number is infinite, NaN or too large, or if a string holds a NUL."""
    if isinstance(value, float):
        require(
            math.isfinite(value), f"--{name} {value} is not a finite number: leave it out for the default"
        )
    elif isinstance(value, int):
        require(
            abs(value) < MAX_INTEGER, f"--{name} {show_value(value)} is too large: it must be below 2**63"
        )
    elif name not in FREE_TEXTS and value is not None:
        require(
            "\0" not in "".join(value), f"--{name} {show_value(value)} holds a NUL character: leave it out"
        )


def expected_values(kind: Any) -> list[str]:
    """The values that a field of type `kind` takes, in words, for a message."""
    names = {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        str: "a text",
        types.NoneType: "None",
    }
    words: list[str] = []
    for member in union_members(kind):
        if get_origin(member) is Literal:
            words += get_args(member)
        else:
            words.append(names.get(member, "a list of texts"))
    return words


def join_choices(words: list[str]) -> str:
    """Join choices for a message: a, b or c."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def show_value(value: Any) -> str:
    """Format a value for a message: on one line, shortened; a single word has no quotes, as in a command."""
    try:
        text = value if isinstance(value, str) and value.isidentifier() else repr(value)
    except Exception:  # an object whose repr fails, or an integer with too many digits
        text = f"(a very long {type(value).__name__})"
    text = " ".join(text.split())
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def unescape(text: str) -> str:
    """Replace the escape sequences in ESCAPES, as typed in a shell, with the characters they stand for."""
    result, i = "", 0
    while i < len(text):
        pair = text[i : i + 2]
        result += ESCAPES.get(pair, text[i])
        i += 2 if pair in ESCAPES else 1
    return result
