"""Binds a composed config to the signatures of the parts that it names, and reports every mismatch.

A part is any importable class or function, so its signature is the schema: unknown keys, missing ones, types
and ranges (`Annotated[float, Range(...)]`) are read from it. The fixed sections are dataclasses and bound alike.
"""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum
from typing import Annotated, Any, Literal, Union

from cnnlab.errors import did_you_mean, listing
from cnnlab.schema import Range

MISSING = "???"
RESERVED = {"_target_", "_partial_", "_convert_", "_recursive_"}


class TargetError(ValueError):
    """A `_target_` that cannot be imported."""


def locate(target: str) -> Any:
    """The object that `package.module.Name` names. Raises `TargetError` with what went wrong."""
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
                continue
            raise TargetError(f"importing {name} failed: {error}") from error
        except Exception as error:
            raise TargetError(f"importing {name} failed: {type(error).__name__}: {error}") from error
        for depth, attribute in enumerate(parts[cut:], cut):
            if not hasattr(found, attribute):
                owner = ".".join(parts[:depth])
                raise TargetError(f"{owner} has no {attribute!r}{did_you_mean(attribute, dir(found))}")
            found = getattr(found, attribute)
        return found
    raise TargetError(
        f"no module {parts[0]!r} can be imported; expected `package.module.Name`, "
        "with its file in the current folder, beside the --config-dir, or installed"
    )


def is_part(node: Any) -> bool:
    return isinstance(node, Mapping) and "_target_" in node


def parameters_of(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """The parameters of a class's constructor or of a function, and their resolved annotations."""
    signature = inspect.signature(target)
    function = target.__init__ if inspect.isclass(target) else target
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception:  # a third party's annotation that names what it does not import: left unchecked
        hints = {}
    return dict(signature.parameters), hints


def accepts(target: Callable[..., Any], name: str) -> bool:
    """Whether `target` takes a parameter of this name (`**kwargs` does not count)."""
    parameters, _ = parameters_of(target)
    found = parameters.get(name)
    return found is not None and found.kind in (found.POSITIONAL_OR_KEYWORD, found.KEYWORD_ONLY)


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
            meant = did_you_mean(str(key), named).replace("`" + str(key), "`" + path)
            known = listing(k for k in named if k not in wired)
            problems.append(f"`{where}`: {path} takes no {str(key)!r}{meant}; it takes: {known}")
        elif isinstance(value, str) and value == MISSING:
            problems.append(f"`{where}` needs a value: {where}=...")
        elif is_part(value):
            problems += check_part(value, where)
        elif key in hints and (reason := mismatch(value, hints[key])):
            problems.append(f"`{where}={_show(value)}`: {reason}")
    if not node.get("_partial_", False):
        given = {*node, *wired}
        problems += [
            f"`{path}.{name}` needs a value: {path}.{name}=..."
            for name, p in named.items()
            if p.default is p.empty and name not in given
        ]
    return problems


def check_section(section: type, node: Any, path: str) -> list[str]:
    """Every problem of a fixed section against its dataclass."""
    if not isinstance(node, Mapping):
        return [f"`{path}`: expected the keys of {section.__name__}, received {_show(node)}"]
    return check_call(section, node, path)


def bind_section(section: type, node: Mapping[str, Any]) -> Any:
    """The dataclass with the (checked) values of a fixed section; lists become tuples, names enums."""
    hints = typing.get_type_hints(section)
    return section(**{key: _converted(value, hints[key]) for key, value in node.items()})


def _converted(value: Any, hint: Any) -> Any:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    return tuple(value) if isinstance(value, list) else value


def mismatch(value: Any, hint: Any) -> str | None:
    """`'expected ..., received ...'` where `value` does not have the annotated type and range, else `None`.

    Annotations that YAML cannot express (modules, tensors, callables) accept anything.
    """
    if _fits(value, hint):
        return None
    return f"expected {describe(hint)}, received {_show(value)}"


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        ranges = [mark for mark in arguments[1:] if isinstance(mark, Range)]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return _fits(value, arguments[0]) and all(r.allows(value) for r in ranges if number)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if origin in (list, Sequence, set, frozenset, Collection):
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
    if origin is tuple:
        return isinstance(value, list | tuple) and _fits_tuple(value, arguments)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(_fits(item, arguments[1]) for item in value.values())
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    if hint in (list, tuple):
        return isinstance(value, list | tuple)
    if hint is dict:
        return isinstance(value, Mapping)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return value in [option.value for option in hint]
    if isinstance(hint, type) and origin is None:
        return isinstance(value, hint) or hint is object or _is_open(hint)
    return True


def _is_open(hint: type) -> bool:
    """Classes that a YAML value never is: the author of the part takes care of them."""
    return hint.__module__.partition(".")[0] not in ("builtins", "pathlib")


def _fits_tuple(value: Sequence[Any], arguments: tuple[Any, ...]) -> bool:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return all(_fits(item, arguments[0]) for item in value)
    return len(value) == len(arguments) and all(map(_fits, value, arguments))


_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null", dict: "a mapping"}


def describe(hint: Any) -> str:
    """An annotation in words: `Annotated[float, Range(0, 1)]` is `a number >= 0 and <= 1`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        ranges = [str(mark) for mark in arguments[1:] if isinstance(mark, Range)]
        return " ".join([describe(arguments[0]), *ranges])
    if origin in (Union, types.UnionType):
        words = list(dict.fromkeys(describe(argument) for argument in arguments))
        return " or ".join(words)
    if origin is Literal:
        return "one of " + listing(map(str, arguments))
    if origin in (list, Sequence, tuple, set, frozenset, Collection):
        inner = [describe(argument) for argument in arguments if argument is not Ellipsis]
        return f"a list [{', '.join(inner)}{', ...' if Ellipsis in arguments or origin is not tuple else ''}]"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + listing(str(option.value) for option in hint)
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) else str(value)
