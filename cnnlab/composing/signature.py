"""Binds a composed config to the signatures of the parts that it names, and reports every mismatch.

A part is any importable class or function, so its signature is the schema: unknown keys, missing ones, types
and ranges (`Annotated[float, Range(...)]`) are read from it. The fixed sections are dataclasses, bound alike.
"""

from __future__ import annotations

import importlib
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from os import PathLike
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Union

from cnnlab.composing.kinds import (
    LISTS,
    STANDARD,
    alternatives,
    hints_of,
    is_factory,
    is_part,
    is_standard,
    nested_parts,
    unfit,
)
from cnnlab.composing.trust import TYPED, Trust
from cnnlab.errors import closest, did_you_mean, listing, short
from cnnlab.schema import DurationText, IsDuration, Range, ranges_of

MISSING = "???"
RESERVED = {"_target_", "_partial_", "_convert_", "_recursive_"}


class TargetError(ValueError):
    """A `_target_` that cannot be imported or called."""


# ---- finding a part ----


def locate(target: str) -> Any:
    """The class or function that `package.module.Name` names. Raises `TargetError` with what went wrong.

    Python's own (`os.system`) are none of them, by whatever name they are reached.
    """
    parts = target.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise TargetError(f"expected `package.module.Name`, received {short(repr(target))}")
    found = None if parts[0] in STANDARD else _imported(parts)
    if found is None or is_standard(found):
        raise TargetError("expected a class or a function that makes a part, received one of Python's own")
    return found


def _imported(parts: Sequence[str]) -> Any:
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
                continue
            raise TargetError(f"importing {name} failed: {error}") from error
        except (Exception, SystemExit) as error:  # the module is the user's: it may raise anything
            raise TargetError(f"importing {name} failed: {type(error).__name__}: {error}") from error
        return _attribute(found, parts, cut)
    raise TargetError(
        f"no module {parts[0]!r} can be imported; expected `package.module.Name`, "
        "with its file in the current folder, beside the --config-dir, or installed"
    )


def _attribute(module: Any, parts: Sequence[str], cut: int) -> Any:
    found = module
    for depth, attribute in enumerate(parts[cut:], cut):
        if not hasattr(found, attribute):
            owner = ".".join(parts[:depth])
            raise TargetError(f"{owner} has no {attribute!r}{did_you_mean(attribute, dir(found))}")
        found = getattr(found, attribute)
    if not callable(found):
        raise TargetError(f"expected a class or a function, found a {type(found).__name__}")
    return found


def parameters_of(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """The parameters of a class's constructor or of a function, and those of their annotations that resolve.

    A callable that states no signature (some C functions) takes anything.
    """
    try:
        parameters = dict(inspect.signature(target).parameters)
    except (ValueError, TypeError):
        parameters = {"anything": inspect.Parameter("anything", inspect.Parameter.VAR_KEYWORD)}
    hints = hints_of(target.__init__ if inspect.isclass(target) else target)
    return parameters, hints | {key: hint for key, hint in ranges_of(target).items() if key in parameters}


def accepts(target: Callable[..., Any], name: str) -> bool:
    """Whether `target` takes a parameter of this name (`**kwargs` does not count)."""
    parameters, _ = parameters_of(target)
    found = parameters.get(name)
    return found is not None and found.kind in (found.POSITIONAL_OR_KEYWORD, found.KEYWORD_ONLY)


# ---- checking a node ----


def check_part(
    node: Any,
    path: str,
    wired: Collection[str] = (),
    kinds: Sequence[Any] | None = None,
    trust: Trust = TYPED,
) -> list[str]:
    """Every problem of one `_target_` node, of which nothing is called.

    Args:
        wired: the parameters that the builder passes itself.
        kinds: what is asked for there (see `cnnlab.composing.kinds`); `None` takes any part.
        trust: who wrote the config, and what the command line vouches for.
    """
    if node is None or (is_part(node) and node["_target_"] is None):
        return []
    if not is_part(node):
        return [f"`{path}`: expected a part with a `_target_`, received {_show(node)}"]
    name = node["_target_"]
    where = f"`{path}._target_={short(str(name))}`"
    try:
        if refusal := trust.refuses_name(str(name)):
            return [f"{where}: {refusal}"]
        target = locate(str(name))
        if refusal := trust.refuses(target, node):
            return [f"{where}: {refusal}"]
    except TargetError as error:
        return [f"{where}: {error}"]
    if kinds is not None:
        partial, vouched = node.get("_partial_", False) is True, trust.vouches(target)
        if trust.stored and partial and not vouched and not any(is_factory(kind) for kind in kinds):
            return [f"{where}: a run folder may hand on no function as a part; expected a class"]
        reason = unfit(target, kinds, partial=partial, vouched=vouched)
        if reason is not None:
            return [f"`{path}`: {reason}"]
    return check_call(target, node, path, wired, trust)


def check_call(
    target: Callable[..., Any],
    node: Mapping[str, Any],
    path: str,
    wired: Collection[str] = (),
    trust: Trust = TYPED,
) -> list[str]:
    """Every problem of calling `target` with the keys of `node`."""
    parameters, hints = parameters_of(target)
    open_keys = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {k: p for k, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    problems = []
    for key, value in node.items():
        where = f"{path}.{key}"
        if key in _HYDRAS:
            problems += _check_hydras(str(key), value, where)
        elif key not in named and not open_keys:
            problems.append(_unknown(path, str(key), [k for k in named if k not in wired]))
        elif isinstance(value, str) and value == MISSING:
            problems.append(f"`{where}` needs a value: {where}=...")
        elif nested := list(nested_parts(value, hints.get(key), where)):
            problems += [problem for part, place, kinds in nested for problem in _nested(part, place, kinds, trust)]
        elif key in hints and not _is_default(value, named.get(key)):
            problems += check_value(value, hints[key], where)
    if not node.get("_partial_", False):
        given = {*node, *wired}
        problems += [
            f"`{path}.{name}` needs a value: {path}.{name}=..."
            for name, p in named.items()
            if p.default is p.empty and name not in given
        ]
    return problems


def _nested(part: Mapping[str, Any], place: str, kinds: Sequence[Any], trust: Trust) -> list[str]:
    """The problems of a part inside another's values: it may stand only where the parameter asks for one."""
    if not kinds:
        name = short(str(part["_target_"]))
        return [f"`{place}._target_={name}`: no part may stand here; {place.rpartition('.')[2]} takes a plain value"]
    return check_part(part, place, (), kinds, trust)


_HYDRAS = {*RESERVED, "_args_"}


def _check_hydras(key: str, value: Any, where: str) -> list[str]:
    """The problem of one of Hydra's keys: what it would change there and nothing does here is refused."""
    if key == "_args_":
        return [f"`{where}`: expected parameters by name, received a list of values"]
    allowed = {"_partial_": (True, False), "_recursive_": (True,), "_convert_": ("all", "none", "partial", "object")}
    if key not in allowed or any(value is option or value == option != 1 for option in allowed[key]):
        return []
    return [f"`{where}={_show(value)}`: expected {_one_of(allowed[key])}, received {_show(value)}"]


def check_value(value: Any, hint: Any, where: str) -> list[str]:
    """The problem of a value that does not have the annotated type and range, with what to type instead."""
    reason = mismatch(value, hint)
    return [f"`{where}={_show(value)}`: {reason}{_how_to_type(where, value, hint)}"] if reason else []


def _unknown(path: str, key: str, known: Collection[str]) -> str:
    hint = did_you_mean(key, known) or f"; it takes: {listing(known)}"
    return f"`{path}.{key}`: {path} has no {key!r}{hint}"


def _is_default(value: Any, parameter: inspect.Parameter | None) -> bool:
    """What the author chose is right, whatever the annotation says (`limit: float = None`)."""
    return parameter is not None and type(value) is type(parameter.default) and bool(value == parameter.default)


def check_section(section: type, node: Any, path: str) -> list[str]:
    """Every problem of a fixed section against its dataclass, in which no part may stand."""
    if not isinstance(node, Mapping):
        return [f"`{path}`: expected the keys of {section.__name__}, received {_show(node)}"]
    hydras = [f"`{path}.{key}`: no part may stand here; {path} has plain values" for key in node if key in _HYDRAS]
    return hydras + check_call(section, {k: v for k, v in node.items() if k not in _HYDRAS}, path)


def bind_section(section: type, node: Mapping[str, Any]) -> Any:
    """The dataclass with the (checked) values of a fixed section."""
    return section(**converted(section, node))


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
    return f"expected {describe(hint)}, received {_show(value)}"


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
        return _one_of(arguments)
    if origin in (*LISTS, tuple):
        inner = [describe(argument) for argument in arguments if argument is not Ellipsis]
        return f"a list [{', '.join(inner)}{', ...' if Ellipsis in arguments or origin is not tuple else ''}]"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _one_of([option.value for option in hint])
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


def _one_of(options: Iterable[Any]) -> str:
    shown = [_show(option) if not isinstance(option, str) else option for option in options]
    return shown[0] if len(shown) == 1 else f"one of {', '.join(shown)}"


def _how_to_type(where: str, value: Any, hint: Any) -> str:
    """What to type instead, where the value tells what was meant."""
    options = alternatives(hint)
    if isinstance(value, str):
        meant = closest(value, [str(name) for option in options for name in _names(option)], cutoff=0.7)
        if meant:
            return f" (did you mean `{meant}`?)"
        listed = any(_is_list_type(option) and _fits([value], option) for option in options)
        return f"; type {where}=[{short(value)}]" if listed else ""
    if not _is_number(value):
        return ""
    if DurationText in _members(hint):
        return f"; type '{where}={value:g} steps'" if value >= 0 else ""
    if str in options:
        return f"; for a text, quote it twice: '{where}=\"{value}\"'"
    if not _is_float(value):
        return "; it must be finite" if isinstance(value, float) else "; it must fit in 64 bits"
    if isinstance(value, float) and value.is_integer() and _fits(int(value), hint):
        return f"; type {where}={int(value)}"
    return ""


def _members(hint: Any) -> tuple[Any, ...]:
    """The members of a union, as they are annotated."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_list_type(hint: Any) -> bool:
    return hint in (list, tuple) or typing.get_origin(hint) in (*LISTS, tuple)


def _names(option: Any) -> Sequence[Any]:
    if typing.get_origin(option) is Literal:
        return typing.get_args(option)
    return [member.value for member in option] if isinstance(option, type) and issubclass(option, Enum) else []


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return short(repr(value) if isinstance(value, str) else str(value))
