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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from os import PathLike
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Union

from cnnlab.errors import closest, did_you_mean, listing, short
from cnnlab.schema import Range

MISSING = "???"
RESERVED = {"_target_", "_partial_", "_convert_", "_recursive_"}


class TargetError(ValueError):
    """A `_target_` that cannot be imported or called."""


# ---- finding a part ----


def locate(target: str) -> Any:
    """The class or function that `package.module.Name` names. Raises `TargetError` with what went wrong."""
    parts = target.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise TargetError(f"expected `package.module.Name`, received {target!r}")
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


def is_part(node: Any) -> bool:
    return isinstance(node, Mapping) and "_target_" in node


def parameters_of(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """The parameters of a class's constructor or of a function, and those of their annotations that resolve.

    A callable that states no signature (some C functions) takes anything.
    """
    try:
        parameters = dict(inspect.signature(target).parameters)
    except (ValueError, TypeError):
        parameters = {"anything": inspect.Parameter("anything", inspect.Parameter.VAR_KEYWORD)}
    return parameters, _hints(target.__init__ if inspect.isclass(target) else target)


def _hints(function: Any) -> dict[str, Any]:
    with suppress(Exception):
        return typing.get_type_hints(function, include_extras=True)
    found: dict[
        str, Any
    ] = {}  # an annotation of a third party names what it does not import: that one is left unchecked
    for name, annotation in getattr(function, "__annotations__", {}).items():
        alone = types.SimpleNamespace(__annotations__={name: annotation})
        with suppress(Exception):
            scope = getattr(function, "__globals__", {})
            found |= typing.get_type_hints(alone, globalns=scope, include_extras=True)
    return found


def accepts(target: Callable[..., Any], name: str) -> bool:
    """Whether `target` takes a parameter of this name (`**kwargs` does not count)."""
    parameters, _ = parameters_of(target)
    found = parameters.get(name)
    return found is not None and found.kind in (found.POSITIONAL_OR_KEYWORD, found.KEYWORD_ONLY)


# ---- checking a node ----


def check_part(node: Any, path: str, wired: Collection[str] = ()) -> list[str]:
    """Every problem of one `_target_` node; `wired` are the parameters that the builder passes itself."""
    if node is None or (is_part(node) and node["_target_"] is None):
        return []
    if not is_part(node):
        return [f"`{path}`: expected a part with a `_target_`, received {_show(node)}"]
    try:
        target = locate(str(node["_target_"]))
    except TargetError as error:
        return [f"`{path}._target_={node['_target_']}`: {error}"]
    return check_call(target, node, path, wired)


def check_call(
    target: Callable[..., Any], node: Mapping[str, Any], path: str, wired: Collection[str] = ()
) -> list[str]:
    """Every problem of calling `target` with the keys of `node`."""
    parameters, hints = parameters_of(target)
    open_keys = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {k: p for k, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    problems = []
    for key, value in node.items():
        if key in RESERVED:
            continue
        where = f"{path}.{key}"
        if key not in named and not open_keys:
            problems.append(_unknown(path, str(key), [k for k in named if k not in wired]))
        elif isinstance(value, str) and value == MISSING:
            problems.append(f"`{where}` needs a value: {where}=...")
        elif nested := list(_parts_in(value, where)):
            problems += [problem for part, place in nested for problem in check_part(part, place)]
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


def check_value(value: Any, hint: Any, where: str) -> list[str]:
    """The problem of a value that does not have the annotated type and range, with what to type instead."""
    reason = mismatch(value, hint)
    return [f"`{where}={_show(value)}`: {reason}{_how_to_type(where, value, hint)}"] if reason else []


def _unknown(path: str, key: str, known: Collection[str]) -> str:
    hint = did_you_mean(key, known) or f"; it takes: {listing(known)}"
    return f"`{path}.{key}`: {path} has no {key!r}{hint}"


def _parts_in(value: Any, where: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The parts nested in a value, with their paths."""
    if is_part(value):
        yield value, where
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _parts_in(item, f"{where}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _parts_in(item, f"{where}.{number}")


def _is_default(value: Any, parameter: inspect.Parameter | None) -> bool:
    """What the author chose is right, whatever the annotation says (`limit: float = None`)."""
    return parameter is not None and type(value) is type(parameter.default) and bool(value == parameter.default)


def check_section(section: type, node: Any, path: str) -> list[str]:
    """Every problem of a fixed section against its dataclass."""
    if not isinstance(node, Mapping):
        return [f"`{path}`: expected the keys of {section.__name__}, received {_show(node)}"]
    return check_call(section, node, path)


def bind_section(section: type, node: Mapping[str, Any]) -> Any:
    """The dataclass with the (checked) values of a fixed section."""
    return section(**converted(section, node))


# ---- values and annotations ----


def converted(target: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the annotations of `target` have them: enum members, and tuples for lists."""
    hints = _hints(target.__init__ if inspect.isclass(target) else target)
    return {key: _converted(value, hints[key]) if key in hints else value for key, value in values.items()}


def _converted(value: Any, hint: Any) -> Any:
    for option in _alternatives(hint):
        if isinstance(option, type) and issubclass(option, Enum) and not isinstance(value, Enum):
            if value in [member.value for member in option]:
                return option(value)
        elif isinstance(value, list) and (option is tuple or typing.get_origin(option) is tuple):
            return tuple(value)
    return value


def _alternatives(hint: Any) -> list[Any]:
    """The members of a union, without `Annotated`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _alternatives(arguments[0])
    if origin in (Union, types.UnionType):
        return [option for argument in arguments for option in _alternatives(argument)]
    return [hint]


def mismatch(value: Any, hint: Any) -> str | None:
    """`'expected ..., received ...'` where `value` lacks the annotated type or range, else `None`."""
    if _fits(value, hint):
        return None
    return f"expected {describe(hint)}, received {_show(value)}"


_LISTS = (list, Sequence, set, frozenset, Collection, Iterable)
_SCALARS = (bool, int, float, str)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        ranges = [mark for mark in arguments[1:] if isinstance(mark, Range)]
        return _fits(value, arguments[0]) and all(r.allows(value) for r in ranges if _is_number(value))
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in _typeable(arguments))
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if origin in _LISTS:
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
        ranges = [str(mark) for mark in arguments[1:] if isinstance(mark, Range)]
        return " ".join([describe(arguments[0]), *ranges])
    if origin in (Union, types.UnionType):
        return _describe_union(arguments)
    if origin is Literal:
        return _one_of(arguments)
    if origin in (*_LISTS, tuple):
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
    options = _alternatives(hint)
    if isinstance(value, str):
        meant = closest(value, [str(name) for option in options for name in _names(option)], cutoff=0.7)
        if meant:
            return f" (did you mean `{meant}`?)"
        listed = any(_is_list_type(option) and _fits([value], option) for option in options)
        return f"; type {where}=[{short(value)}]" if listed else ""
    if not _is_number(value):
        return ""
    if str in options:
        return f"; for a text, quote it twice: '{where}=\"{value}\"'"
    if not _is_float(value):
        return "; it must be finite" if isinstance(value, float) else "; it must fit in 64 bits"
    if isinstance(value, float) and value.is_integer() and _fits(int(value), hint):
        return f"; type {where}={int(value)}"
    return ""


def _is_list_type(hint: Any) -> bool:
    return hint in (list, tuple) or typing.get_origin(hint) in (*_LISTS, tuple)


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
