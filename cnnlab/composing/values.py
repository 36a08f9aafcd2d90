"""Values against annotations: whether one has the annotated type and range, what was expected in words, and what to
type instead. Loads no torch."""

from __future__ import annotations

import inspect
import math
import re
import shlex
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from os import PathLike
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Union

from cnnlab.composing.kinds import LISTS, alternatives, hints_of
from cnnlab.errors import closest, short
from cnnlab.schema import DurationText, IsDuration, Range


def check_value(value: Any, hint: Any, where: str) -> list[str]:
    """The problem of a value that does not have the annotated type and range, with what to type instead."""
    reason = mismatch(value, hint)
    return [f"`{where}={show(value)}`: {reason}{_how_to_type(where, value, hint)}"] if reason else []


# ---- values and annotations ----


def converted(target: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the annotations of `target` have them: enum members, and tuples for lists."""
    hints = hints_of(target.__init__ if inspect.isclass(target) else target)
    return {key: _converted(value, hints[key]) if key in hints else value for key, value in values.items()}


def _converted(value: Any, hint: Any) -> Any:
    for option in alternatives(hint):
        if isinstance(option, type) and issubclass(option, Enum) and not isinstance(value, Enum):
            if value in [member.value for member in option]:
                return option(value)
        elif isinstance(value, list) and (option is tuple or typing.get_origin(option) is tuple):
            return tuple(value)
    return value


def mismatch(value: Any, hint: Any) -> str | None:
    """`'expected ..., received ...'` where `value` lacks the annotated type or range, else `None`."""
    if _fits(value, hint):
        return None
    return f"expected {describe(hint)}, received {show(value)}"


_SCALARS = (bool, int, float, str)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        ranges = [mark for mark in arguments[1:] if isinstance(mark, Range)]
        texts = [mark for mark in arguments[1:] if isinstance(mark, IsDuration)]
        return (
            _fits(value, arguments[0])
            and all(r.allows(value) for r in ranges if _is_number(value))
            and all(mark.allows(value) for mark in texts if isinstance(value, str))
        )
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in _typeable(arguments))
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if origin in LISTS:
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
    if origin is tuple:
        return isinstance(value, list | tuple) and _fits_tuple(value, arguments)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(_fits(item, arguments[1]) for item in value.values())
    if hint is None or hint is type(None):
        return value is None
    if hint in _PLAIN:
        return _PLAIN[hint](value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return value in [option.value for option in hint]
    return not isinstance(value, _SCALARS) or _takes_scalar(value, hint)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_float(value: Any) -> bool:
    """Finite: a NaN or an infinity among the settings is a mistake that would show up epochs later."""
    return _is_number(value) and (math.isfinite(value) if isinstance(value, float) else _is_integer(value))


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


_PLAIN: dict[Any, Callable[[Any], bool]] = {
    bool: lambda value: isinstance(value, bool),
    int: _is_integer,
    float: _is_float,
    str: lambda value: isinstance(value, str),
    list: _is_list,
    tuple: _is_list,
    dict: lambda value: isinstance(value, Mapping),
}


def _takes_scalar(value: Any, hint: Any) -> bool:
    """Whether a class that YAML does not have takes this text, number or flag.

    A tensor, a module or a callable does not; paths, abstract numbers, type variables and `Any` do.
    """
    if hint in (Path, PurePath, PathLike) or typing.get_origin(hint) is PathLike:
        return isinstance(value, str)
    if not isinstance(hint, type) or hint is object:
        return typing.get_origin(hint) is not Callable
    with suppress(TypeError):  # a protocol that is not checked at run time
        return isinstance(value, hint)
    return True


def _fits_tuple(value: Sequence[Any], arguments: tuple[Any, ...]) -> bool:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return all(_fits(item, arguments[0]) for item in value)
    return len(value) == len(arguments) and all(map(_fits, value, arguments))


# ---- words for them ----

_A_PART = "a part with a `_target_`"
_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    type(None): "null",
    dict: "a mapping",
    list: "a list",
    tuple: "a list",
    Path: "a path",
}


def describe(hint: Any) -> str:
    """An annotation in words: `Annotated[float, Range(0, 1)]` is `a number >= 0 and <= 1`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        ranges = [str(mark) for mark in arguments[1:] if isinstance(mark, Range | IsDuration)]
        return " ".join([describe(arguments[0]), *ranges])
    if origin in (Union, types.UnionType):
        return _describe_union(arguments)
    if origin is Literal:
        return one_of(arguments)
    if origin in (*LISTS, tuple):
        inner = [describe(argument) for argument in arguments if argument is not Ellipsis]
        return f"a list [{', '.join(inner)}{', ...' if Ellipsis in arguments or origin is not tuple else ''}]"
    if origin in (dict, Mapping):
        return f"a mapping of names to {describe(arguments[1])}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return one_of([option.value for option in hint])
    if hint in _WORDS:
        return _WORDS[hint]
    return f"{_A_PART} ({getattr(hint, '__name__', hint)})"


def _describe_union(arguments: Sequence[Any]) -> str:
    words = list(dict.fromkeys(describe(argument) for argument in _typeable(arguments)))
    return (", or " if any(sign in word for word in words for sign in "<>,") else " or ").join(words)


def _typeable(arguments: Sequence[Any]) -> list[Any]:
    """The members of a union that can be typed: of `float | Tensor`, the number. All, where there is none."""
    found = [argument for argument in arguments if not describe(argument).startswith(_A_PART)]
    return found if any(argument is not type(None) for argument in found) else list(arguments)


def one_of(options: Iterable[Any]) -> str:
    shown = [show(option) if not isinstance(option, str) else option for option in options]
    return shown[0] if len(shown) == 1 else f"one of {', '.join(shown)}"


def _how_to_type(where: str, value: Any, hint: Any) -> str:
    """What to type instead, where the value tells what was meant."""
    options = alternatives(hint)
    names = [str(name) for option in options for name in _names(option)]
    meant = closest(value, names, cutoff=0.7) if isinstance(value, str) else show(value)
    if meant in names and meant.lower() in _READ_ELSE:
        return f"; for a text, quote it twice: '{where}=\"{meant}\"'"
    if isinstance(value, str):
        if meant:
            return f" (did you mean `{meant}`?)"
        listed = any(_is_list_type(option) and _fits([value], option) for option in options)
        if not listed:
            return ""
        plain = (
            value.isascii()
            and value.replace("_", "").replace(".", "").isalnum()
            and not value[0].isdigit()
            and value.lower() not in _READ_ELSE
        )
        return f"; type {where}=[{value}]" if plain else f"; type {shlex.quote(f'{where}=[{as_quoted(value)}]')}"
    if not _is_number(value):
        return ""
    if DurationText in _members(hint):
        return f"; type '{where}={value:g} steps'" if 0 <= value < math.inf else ""
    if str in options:
        return f"; for a text, quote it twice: '{where}=\"{value}\"'"
    if not _is_float(value):
        return "; it must be finite" if isinstance(value, float) else "; it must fit in 64 bits"
    if isinstance(value, float) and value.is_integer() and _fits(int(value), hint):
        return f"; type {where}={int(value)}"
    return ""


_READ_ELSE = ("true", "false", "null", "nan", "inf")
"""Words that Hydra takes for something else than a text, however they are written."""


def as_quoted(value: str) -> str:
    """A text in quotes as Hydra's grammar reads them: a backslash before a quote takes it for itself."""
    return '"{}"'.format(re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + m[2].replace('"', '\\"'), value))


def _members(hint: Any) -> tuple[Any, ...]:
    """The members of a union, as they are annotated."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_list_type(hint: Any) -> bool:
    return hint in (list, tuple) or typing.get_origin(hint) in (*LISTS, tuple)


def _names(option: Any) -> Sequence[Any]:
    if typing.get_origin(option) is Literal:
        return typing.get_args(option)
    return [member.value for member in option] if isinstance(option, type) and issubclass(option, Enum) else []


def show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return short(repr(value) if isinstance(value, str) else str(value))
