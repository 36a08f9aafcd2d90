"""What an annotation asks for, and whether a class or function can be it, told without calling anything.

A config's `_target_` runs code, so it stands only where a part is asked for: a group, or a parameter whose annotation
names a class or a callable; and what it names must say by its own annotations that it is such a part.
"""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from typing import Annotated, Any, Protocol, Union

LISTS = (list, Sequence, set, frozenset, Collection, Iterable)
MAPPINGS = (dict, Mapping)
STANDARD = frozenset(sys.stdlib_module_names) | {"builtins"}
"""Packages of which nothing is a part: Python's own."""


def is_part(node: Any) -> bool:
    return isinstance(node, Mapping) and "_target_" in node


def root_of(name: str) -> str:
    return name.partition(".")[0]


def hints_of(function: Any) -> dict[str, Any]:
    """The annotations of a function, those that resolve."""
    function = inspect.unwrap(function)
    with suppress(Exception):
        return typing.get_type_hints(function, include_extras=True)
    found: dict[str, Any] = {}
    # An annotation of a third party names what it does not import: that one is left unchecked.
    for name, annotation in getattr(function, "__annotations__", {}).items():
        alone = types.SimpleNamespace(__annotations__={name: annotation})
        with suppress(Exception):
            scope = getattr(function, "__globals__", {})
            found |= typing.get_type_hints(alone, globalns=scope, include_extras=True)
    return found


# ---- what an annotation asks for ----


def alternatives(hint: Any) -> list[Any]:
    """The members of a union, without `Annotated`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return alternatives(arguments[0])
    if origin in (Union, types.UnionType):
        return [option for argument in arguments for option in alternatives(argument)]
    return [hint]


def kinds_of(hint: Any) -> list[Any]:
    """The kinds of part that an annotation asks for: classes that are no plain values, and callables."""
    return [option for option in alternatives(hint) if _is_kind(option)]


def _is_kind(option: Any) -> bool:
    if is_factory(option):
        return True
    cls = typing.get_origin(option) or option
    if not inspect.isclass(cls) or issubclass(cls, Enum) or root_of(cls.__module__) in STANDARD:
        return False
    # A tensor is a value, and so is what torch and numpy name with it.
    return not any((root_of(base.__module__), base.__name__) in _VALUES for base in cls.__mro__)


_VALUES = {("torch", name) for name in ("Tensor", "dtype", "device", "Size", "layout", "memory_format", "Generator")}
_VALUES |= {("numpy", "ndarray"), ("numpy", "generic")}


def is_factory(option: Any) -> bool:
    """Whether a callable or a class itself is asked for."""
    return _is_callable(option) or typing.get_origin(option) is type or option is type


def _is_callable(option: Any) -> bool:
    return option is Callable or option is typing.Callable or typing.get_origin(option) is Callable


def nested_parts(value: Any, hint: Any, where: str) -> Iterator[tuple[Mapping[str, Any], str, list[Any]]]:
    """The parts in a value, each with its path and the kinds that its place asks for (none: no part may be there)."""
    if is_part(value):
        yield value, where, kinds_of(hint)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from nested_parts(item, inside(hint, MAPPINGS), f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from nested_parts(item, inside(hint, (*LISTS, tuple)), f"{where}.{number}")


def inside(hint: Any, containers: Collection[Any]) -> Any:
    """The annotation of what is in a container; `None`, which asks for nothing, where there is no such one."""
    found: list[Any] = []
    for option in alternatives(hint):
        if typing.get_origin(option) in containers:
            arguments = typing.get_args(option)
            found += arguments[1:] if containers is MAPPINGS else [a for a in arguments if a is not Ellipsis]
    return Union[tuple(found)] if found else None  # noqa: UP007 (made at run time)


# ---- whether a class or function can be it ----


def unfit(target: Any, kinds: Sequence[Any], *, partial: bool = False, vouched: bool = False) -> str | None:
    """Why calling `target` gives none of the `kinds`, as `'expected ..., received ...'`, or `None`.

    Args:
        partial: `target` is not called itself, but handed on as a factory.
        vouched: whether the user vouches for functions that do not say what they return.
    """
    made = _Made(target, partial)
    answers = [made.fits(kind) for kind in kinds]
    if True in answers or (vouched and None in answers):
        return None
    wanted = " or ".join(dict.fromkeys(map(name_of, kinds)))
    if None in answers:
        return (
            f"expected {wanted}, received a function that does not say what it returns; annotate it (def "
            f"{getattr(target, '__name__', 'it')}(...) -> ...), or type --trust {root_of(_module_of(target) or 'NAME')}"
        )
    return made.lacking(kinds) or f"expected {wanted}, received {made}"


def name_of(kind: Any) -> str:
    """A kind in words: `a torch.nn.Module`."""
    if is_factory(kind):
        returned = [name_of(k) for k in _returned(kind)]
        return "a callable" + (f" that gives {' or '.join(returned)}" if returned else "")
    return f"a {public_name(typing.get_origin(kind) or kind)}"


def public_name(cls: Any) -> str:
    """Where users find a class: `torch.nn.Module`, not `torch.nn.modules.module.Module`."""
    module, own = str(cls.__module__).split("."), str(cls.__name__)
    for cut in range(1, len(module) + 1):
        name = ".".join(module[:cut])
        if getattr(sys.modules.get(name), own, None) is cls:
            return f"{name}.{own}"
    return f"{cls.__module__}.{own}"


class _Made:
    """What calling a class or function gives."""

    def __init__(self, target: Any, partial: bool):
        self.partial = partial
        self.is_class = inspect.isclass(target)
        self.options: list[Any] | None = [target]  # `None` where they are not known
        if not self.is_class:
            returned = hints_of(target).get("return", Any)
            self.options = None if returned in (Any, object) else alternatives(returned)

    def __str__(self) -> str:
        made = " or ".join(getattr(option, "__name__", str(option)) for option in self.options or ["something"])
        return f"partial of {made}" if self.partial else made

    def fits(self, kind: Any) -> bool | None:
        """`None` where it cannot be told."""
        if self.partial:
            if (only := _only_called(kind)) is None:
                return False
            return self._gives(only)
        return self._gives([kind])

    def _gives(self, kinds: Sequence[Any]) -> bool | None:
        if not kinds:
            return True
        if self.options is None:
            return None
        return any(_provides(option, kind, self.is_class) for option in self.options for kind in kinds)

    def lacking(self, kinds: Sequence[Any]) -> str | None:
        """What a class lacks of the one protocol that is asked for."""
        if self.partial or len(kinds) != 1 or not self.options or not _is_protocol(kinds[0]):
            return None
        (kind,), (option, *_) = kinds, self.options
        names = ", ".join(f"`{name}`" for name in _methods(kind) if not _has(option, name))
        return f"{public_name(option)} has no {names}; see {public_name(kind)}" if inspect.isclass(option) else None


def _only_called(kind: Any) -> list[Any] | None:
    """What a kind that is only called returns; `None` where more is asked of it."""
    if is_factory(kind):
        return _returned(kind)
    if _is_protocol(kind) and _methods(kind) == ["__call__"]:
        hint = hints_of(kind.__call__).get("return")
        return [hint] if inspect.isclass(hint) and hint is not type(None) else []
    return None


def _returned(kind: Any) -> list[Any]:
    """What a callable that is asked for gives; nothing where that is left open."""
    arguments = typing.get_args(kind)
    return kinds_of(arguments[-1]) if arguments else []


def _provides(option: Any, kind: Any, exactly: bool) -> bool:
    """Whether an object of the annotation `option` is of this kind; unless it is `exactly` of this class, or may be."""
    if _is_callable(option):
        return _only_called(kind) is not None
    cls, wanted = typing.get_origin(option) or option, typing.get_origin(kind) or kind
    if not inspect.isclass(cls):
        return False
    if _is_callable(kind):
        return _has(cls, "__call__")
    if _is_protocol(wanted):
        return all(_has(cls, name) for name in _methods(wanted))
    if not inspect.isclass(wanted) or wanted is type:
        return False
    return issubclass(cls, wanted) or (not exactly and issubclass(wanted, cls))


def _is_protocol(kind: Any) -> bool:
    return inspect.isclass(kind) and Protocol in kind.__mro__ and getattr(kind, "_is_protocol", False)


def _methods(kind: Any) -> list[str]:
    own = [vars(base) for base in kind.__mro__ if base not in (object, Protocol, typing.Generic)]
    names = dict.fromkeys(name for members in own for name, member in members.items() if inspect.isfunction(member))
    return [name for name in names if name == "__call__" or not name.startswith("_")]


def _has(cls: type, name: str) -> bool:
    """Whether objects of the class have it (every class itself can be called)."""
    return any(name in vars(base) for base in cls.__mro__)


def lacking(made: Any, kinds: Sequence[Any]) -> str | None:
    """What keeps an object from being any of the `kinds`, as `'has no `factor`; see ...'`, or `None`."""
    problems = []
    for kind in kinds:
        if _is_protocol(kind):
            names = [name for name in (*_attributes(kind), *_methods(kind)) if not hasattr(made, name)]
            listed = ", ".join(f"`{name}`" for name in names)
            problems.append(f"has no {listed}; see {public_name(kind)}" if names else None)
        elif is_factory(kind):
            problems.append(None if callable(made) else f"gave {type(made).__name__}, which is no callable")
        else:
            problems.append(None if isinstance(made, kind) else f"gave {type(made).__name__}; see {public_name(kind)}")
    return None if None in problems else problems[0]


def _attributes(kind: Any) -> list[str]:
    return [name for base in kind.__mro__ for name in vars(base).get("__annotations__", {}) if not name.startswith("_")]


# ---- where it comes from ----


def _module_of(target: Any) -> str | None:
    owner = getattr(target, "__objclass__", target)
    return getattr(owner, "__module__", None)


def is_standard(target: Any) -> bool:
    """Whether it is Python's own, by whatever name it was reached (`torch.os.system`)."""
    module = _module_of(target)
    if module is None:
        module = getattr(type(getattr(target, "__self__", None)), "__module__", None)
    return module is not None and root_of(module) in STANDARD


def defined_in(target: Any) -> str:
    """The full name of the module that defines a class or function; empty where that cannot be told."""
    defined = inspect.isclass(target) or inspect.isfunction(target)
    return (_module_of(target) or "") if defined else ""
