"""Binds a composed config to the signatures of the parts that it names, and reports every mismatch.

A part is any importable class or function, so its signature is the schema: unknown keys, missing ones, types
and ranges (`Annotated[float, Range(...)]`) are read from it. The fixed sections are dataclasses, bound alike.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from cnnlab.composing.kinds import STANDARD, hints_of, is_factory, is_part, is_standard, nested_parts, unfit
from cnnlab.composing.trust import TYPED, Trust
from cnnlab.composing.values import check_value, converted, one_of, show
from cnnlab.errors import closest, did_you_mean, listing, short
from cnnlab.schema import ranges_of

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
            meant = closest(attribute, dir(found))
            hint = f" (did you mean `{owner}.{meant}`?)" if meant else ""
            raise TargetError(f"{owner} has no {attribute!r}{hint}")
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
        return [f"`{path}`: expected a part with a `_target_`, received {show(node)}"]
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
    return [f"`{where}={show(value)}`: expected {one_of(allowed[key])}, received {show(value)}"]


def _unknown(path: str, key: str, known: Collection[str]) -> str:
    hint = did_you_mean(key, known) or f"; it takes: {listing(known)}"
    return f"`{path}.{key}`: {path} has no {key!r}{hint}"


def _is_default(value: Any, parameter: inspect.Parameter | None) -> bool:
    """What the author chose is right, whatever the annotation says (`limit: float = None`)."""
    return parameter is not None and type(value) is type(parameter.default) and bool(value == parameter.default)


def check_section(section: type, node: Any, path: str) -> list[str]:
    """Every problem of a fixed section against its dataclass, in which no part may stand."""
    if not isinstance(node, Mapping):
        return [f"`{path}`: expected the keys of {section.__name__}, received {show(node)}"]
    hydras = [f"`{path}.{key}`: no part may stand here; {path} has plain values" for key in node if key in _HYDRAS]
    return hydras + check_call(section, {k: v for k, v in node.items() if k not in _HYDRAS}, path)


def bind_section(section: type, node: Mapping[str, Any]) -> Any:
    """The dataclass with the (checked) values of a fixed section."""
    return section(**converted(section, node))
