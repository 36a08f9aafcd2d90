"""What each setting means, from where its author said so: the comment beside it in the YAML, else the docstring of
the class that takes it."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from itertools import pairwise
from typing import Any

import yaml
from omegaconf import OmegaConf

from cnnlab.composing import rates
from cnnlab.composing.composer import Composer
from cnnlab.composing.groups import GROUPS
from cnnlab.composing.kinds import is_part
from cnnlab.composing.overrides import as_quoted
from cnnlab.composing.signature import MISSING, RESERVED, TargetError, locate, parameters_of
from cnnlab.composing.trust import TYPED, Trust
from cnnlab.composing.values import describe
from cnnlab.errors import ConfigError

Comments = Mapping[str, str]
"""What a YAML file says of each of its keys, by dotted path below the file's own top."""


@dataclass(frozen=True)
class Knob:
    """A setting: its dotted key, the value that it has unasked, what it takes in words, and what it means."""

    key: str
    value: Any
    takes: str
    meaning: str

    @property
    def typed(self) -> str:
        """`KEY=VALUE` as Hydra's grammar reads it."""
        return f"{self.key}=..." if self.value == MISSING else f"{self.key}={as_typed(self.value)}"


def as_typed(value: Any) -> str:
    """A plain value as it is typed after `KEY=`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{as_typed(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(as_typed, value)) + "]"
    if not isinstance(value, str):
        return str(value)
    plain = re.fullmatch(r"[\w.%/-]+( [\w.%/-]+)*", value, re.ASCII) and yaml.safe_load(value) == value
    return value if plain and not _is_number(value) else as_quoted(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# ---- what the files say ----


def node_of(text: str) -> dict[str, Any]:
    """A YAML file's values, read as Hydra reads them (`1e-5` is a number), its interpolations as they stand."""
    found: Any = OmegaConf.to_container(OmegaConf.create(text))
    return found if isinstance(found, dict) else {}


def summary_of(text: str) -> str:
    """The comment that a YAML file begins with, line by line; Hydra's `@package` is none."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not re.match(r"#\s*@package", line):
            lines.append(line.lstrip("#").removeprefix(" ").rstrip())
    return "\n".join(lines).strip()


def first_sentence(text: str) -> str:
    """Up to a full stop before a capital letter, or the end of a paragraph."""
    paragraph = re.sub(r"\s+", " ", text.split("\n\n")[0])
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph)[0].removesuffix(".")


def comments_of(text: str) -> dict[str, str]:
    """The comment beside each key of a YAML file, else the one above it that is not the file's own."""
    lines = text.splitlines()
    own = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    found = {}
    for path, first, last in _places(yaml.compose(text), ""):
        beside = re.search(r"(?:^|\s)#\s*(.*)", lines[last.line][last.column :] if last.line < len(lines) else "")
        above: list[str] = []
        for line in reversed(lines[own : first.line]):
            if not line.lstrip().startswith("#"):
                break
            above.insert(0, line.lstrip().lstrip("#").strip())
        if meaning := (beside[1] if beside else " ".join(above)).strip():
            found[path] = meaning
    return found


def _places(node: Any, prefix: str) -> Iterator[tuple[str, yaml.Mark, yaml.Mark]]:
    """Each key of a YAML mapping, with where it begins and where the value that stands on its line ends."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        block = isinstance(value, yaml.CollectionNode) and not value.flow_style
        yield f"{prefix}{key.value}", key.start_mark, key.end_mark if block else value.end_mark
        yield from _places(value, f"{prefix}{key.value}.")


def comments_on(composer: Composer, group: str, option: str) -> dict[str, str]:
    """What an option's file says of its keys, and the files that it is made from."""
    text = composer.text_of(group, option)
    own = comments_of(text)
    for entry in node_of(text).get("defaults") or []:
        if isinstance(entry, str) and entry != "_self_":
            path = entry.partition("@")[0]
            other, _, name = path.lstrip("/").rpartition("/") if path.startswith("/") else (group, "", path)
            own = comments_on(composer, other, name) | own
    return own


# ---- what the classes say ----


def docs_of(target: Callable[..., Any]) -> dict[str, str]:
    """What a class or function says of each parameter: under a dataclass's field, or in a docstring's list of
    arguments; its bases' where it is silent."""
    found: dict[str, str] = {}
    for owner in target.__mro__[:-1] if inspect.isclass(target) else [target]:
        fields = _field_docs(owner) if inspect.isclass(owner) and is_dataclass(owner) else {}
        texts = [owner.__doc__, vars(owner).get("__init__").__doc__ if "__init__" in vars(owner) else None]
        found = {**_arguments(*texts), **fields, **found}
    return found


def _field_docs(section: type) -> dict[str, str]:
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    except (OSError, SyntaxError):  # made at run time
        return {}
    statements = getattr(body, "body", [])
    return {
        field.target.id: inspect.cleandoc(text.value.value).replace("\n", " ")
        for field, text in pairwise(statements)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


_SECTION = re.compile(r"^( *)(Args|Arguments|Parameters|Attributes):\s*$", re.MULTILINE)
_ENTRY = re.compile(r"\*{0,2}(\w+(?:, *\w+)*)(?: *\([^)]*\))?:(?:\s+(.*)|$)")
_SPHINX = re.compile(r"^:param (?:[\w.\[\], |]+ )?(\w+): ((?:.|\n(?!\s*:|\s*\n))*)", re.MULTILINE)


def _arguments(*docstrings: str | None) -> dict[str, str]:
    """The entries of `Args:`, and of Sphinx's `:param name:`."""
    found: dict[str, str] = {}
    for doc in (inspect.cleandoc(text) for text in docstrings if text):
        for match in _SPHINX.finditer(doc):
            found.setdefault(match[1], _clean(match[2]))
        for section in _SECTION.finditer(doc):
            found = {**dict(_entries(doc[section.end() :].splitlines(), len(section[1]))), **found}
    return found


def _entries(lines: list[str], indent: int) -> Iterator[tuple[str, str]]:
    names: list[str] = []
    text: list[str] = []
    depth: int | None = None
    for line in [*lines, "end"]:
        inside = len(line) - len(line.lstrip())
        ends = bool(line.strip()) and inside <= indent
        depth = inside if depth is None and line.strip() else depth
        entry = _ENTRY.match(line.strip()) if inside == depth else None
        if (entry or ends) and names:
            yield from ((name, _clean(" ".join(text))) for name in names)
            names = []
        if ends:
            return
        if entry:
            names, text = re.split(r", *", entry[1]), [entry[2] or ""]
        else:
            text.append(line.strip())


def _clean(text: str) -> str:
    """A docstring's words without its markup, and without what the config says better: the default."""
    text = re.sub(r":\w+:`([^`]*)`", r"\1", text).replace("``", "`").replace("\\", "").strip()
    return re.sub(r"\s+", " ", re.sub(r"\.? *\(?[Dd]efault:? [^)]*\)|\.? *[Dd]efault: *\S+$", "", text)).strip()


# ---- settings ----


def knobs_of(
    where: str, node: Mapping[str, Any], comments: Comments, section: type | None = None, trust: Trust = TYPED
) -> Iterator[Knob]:
    """The settings of a part, of those inside it, or of a fixed section.

    Args:
        where: its place in the config, as in `model` or `augment.crop`.
        comments: of its file; what a section's class says comes before them.

    Raises `ConfigError` where the part cannot be imported, or may not be.
    """
    target = section or _target(where, node, trust)
    hints, docs = ({}, {}) if target is None else (parameters_of(target)[1], docs_of(target))
    for key, value in node.items():
        if key in RESERVED:
            continue
        parts = _parts_in(key, value)
        for inner, part in parts.items():
            below = {path.removeprefix(f"{inner}."): text for path, text in comments.items() if path.startswith(inner)}
            yield from knobs_of(f"{where}.{inner}", part, below, trust=trust)
        if not parts:
            said, doc = comments.get(key, ""), docs.get(key, "")
            meaning = doc or said if section is not None else said or doc
            takes = describe(hints[key]) if key in hints else ""
            if f"{where}.{key}" == rates.KEY:
                takes += f", or {rates.AUTO} (a range test chooses: cnnlab help lr-find)"
            yield Knob(f"{where}.{key}", value, takes, meaning)


def _target(where: str, node: Mapping[str, Any], trust: Trust) -> Any:
    name = str(node.get("_target_") or "")
    if not name:
        return None
    try:
        if refusal := trust.refuses_name(name):
            raise TargetError(refusal)
        return locate(name)
    except TargetError as error:
        raise ConfigError([f"`{where}._target_={name}`: {error}"]) from error


def _parts_in(key: str, value: Any) -> dict[str, Mapping[str, Any]]:
    """The parts that a value is, or holds by name."""
    if is_part(value):
        return {key: value}
    named = value if isinstance(value, Mapping) else {}
    return {f"{key}.{name}": part for name, part in named.items() if is_part(part)}


def parts_of(group: str, node: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The parts of a group's node, by their place in the config."""
    if GROUPS[group].named:
        return {f"{group}.{name}": part for name, part in node.items() if is_part(part)}
    return {group: node}
