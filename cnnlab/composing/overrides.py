"""Command-line overrides, one by one: what is wrong with each, and what was probably meant.

Hydra parses them; what it says of a wrong one is meant for its own developers.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import yaml
from hydra.core.override_parser.types import Override

from cnnlab.composing.groups import GROUPS
from cnnlab.composing.values import as_quoted
from cnnlab.errors import CnnlabError, closest, did_you_mean, listing, short

ALIASES = {
    "activation": {"swish": "silu"},
    "init": {"kaiming": "he", "glorot": "xavier", "gaussian": "normal"},
    "loss": {"ce": "cross_entropy", "crossentropy": "cross_entropy", "softmax": "cross_entropy", "l2": "mse"},
    "model": {"lenet": "cnn", "googlenet": "inception"},
    "norm": {"bn": "batch", "gn": "group", "ln": "layer", "batchnorm": "batch", "batch_norm": "batch"},
    "optim": {"gd": "sgd", "nag": "nesterov"},
    "schedule": {"cosine_annealing": "cosine", "none": "constant", "onecycle": "one_cycle", "poly": "polynomial"},
    "stats": {"none": "off"},
}
"""Other names of options, for the message that they are none here."""
LISTS = (*(name for name, group in GROUPS.items() if group.named), "regularization")
"""Groups that take several options at once, `augment=[crop,flip]`."""


def line(override: Override) -> str:
    """The override as it was typed."""
    return str(override.input_line)


def first_key(text: str) -> str:
    """The section or group that an override or a key is about."""
    return re.split(r"[./@=]", text.lstrip("+~"))[0]


def key_of(text: str) -> str:
    """The key that an override's text is about."""
    return text.partition("=")[0].lstrip("+~")


def is_for_hydra(text: str) -> bool:
    """Whether an override is about Hydra's own settings."""
    return text.lstrip("+~").startswith(("hydra.", "hydra/"))


def is_plain(override: Override) -> bool:
    """Whether it sets what is there: no `+`, no `~`, no sweep."""
    added = override.is_add() or override.is_force_add()
    return not (added or override.is_delete() or override.is_sweep_override())


def is_choice(override: Override, groups: Collection[str]) -> bool:
    """Whether it names an option of a group, rather than a value."""
    return override.key_or_group in groups and not isinstance(override.value(), dict)


def swept(override: Override) -> list[str]:
    """The values of a sweep, each as an override; none where they cannot be listed."""
    if not override.is_discrete_sweep():
        return []
    key = override.get_key_element()
    try:
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    except Exception:  # range(1, 5, 0) and the like
        return []


def repeated(parsed: Iterable[Override]) -> dict[str, list[str]]:
    """The keys that are given more than once, each with its overrides."""
    lines: dict[str, list[str]] = {}
    for override in parsed:
        lines.setdefault(override.key_or_group, []).append(line(override))
    return {key: found for key, found in lines.items() if len(found) > 1}


# ---- in words ----


def quoted(text: str) -> str:
    """The override with quotes for Hydra inside quotes for the shell."""
    key, _, value = text.partition("=")
    typed = f"{key}={as_quoted(short(value))}"
    if "'" not in typed:
        return f"'{typed}'"
    if not set(typed) & set("\\$`!"):
        return '"{}"'.format(typed.replace('"', '\\"'))
    return shlex.quote(typed)


def is_path(text: str) -> bool:
    """Whether it gives a key a path, and nothing that has a meaning of its own (lists, choices, interpolations)."""
    value = text.partition("=")[2]
    return "/" in value and not set(value) & set("'\"[]{}$,\\")


def as_text(text: str) -> str:
    """The override with its value in quotes: Hydra's grammar knows no umlauts, and parentheses are calls."""
    key, _, value = text.partition("=")
    return f'{key}="{value}"'


def misuse(override: Override, groups: Collection[str]) -> str | None:
    """What Hydra would take, or would not explain."""
    key, text = override.key_or_group, line(override)
    if not key:
        return f"`{short(text)}`: expected KEY=VALUE, received no key"
    if override.is_sweep_override():
        if key in LISTS:
            several = f"type {key}=[{short(text.partition('=')[2])}] for all of them at once, or -m for a sweep"
            return f"`{short(text)}`: several values in one run; {several}"
        as_one = (
            f", or for a text with commas, quote it twice: {quoted(text)}" if _may_be_text(override, groups) else ""
        )
        return f"`{short(text)}`: several values in one run; type -m for a sweep{as_one}"
    value = override.value()
    if key in groups and key not in LISTS and isinstance(value, list):
        names = ",".join(map(str, value))
        return f"`{short(text)}`: expected one option; for a sweep, type -m {key}={short(names)}"
    return None


def _may_be_text(override: Override, groups: Collection[str]) -> bool:
    """Whether several values may have been meant as one text."""
    key = override.key_or_group
    if key in groups or first_key(key) in ("trainer", "loading", "groups", "regularization", "stats", "seed"):
        return False  # nothing there is a text of one's own
    values = swept(override)
    return not values or any(not isinstance(yaml.safe_load(value.partition("=")[2]), int | float) for value in values)


def wrong_option(override: Override, known: Collection[str]) -> str | None:
    """Why a group has no such option, which are `known`."""
    group, value = override.key_or_group, override.value()
    if override.is_delete():
        return None
    for name in map(str, value if isinstance(value, list) else [value]):
        if name not in known:
            head = f"`{group}={short(name)}`: {group} has no option {short(name)!r}"
            meant = ALIASES.get(group, {}).get(name.lower())
            hint = f" (did you mean `{meant}`?)" if meant in known else did_you_mean(name, known)
            return f"{head}{hint}; its options: {listing(known)}"
    return None


def wrong_key(
    override: Override, config: Mapping[str, Any], choices: Mapping[str, Any], groups: Collection[str]
) -> str | None:
    """Why there is no such key, with the one that was probably meant.

    Args:
        config: nested values, as composed without this override.
        choices: the option taken of each group.
        groups: all groups there are.
    """
    key = override.key_or_group
    if override.is_add() or override.is_force_add() or override.package is not None or key.startswith("hydra/"):
        return None
    node: Any = config
    parts = re.split(r"[./]", key)
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth])
        if isinstance(node, list):
            return None  # an item of it; Hydra knows
        if not isinstance(node, Mapping):
            return f"`{short(key)}`: {where} is a value and has no keys; type {where}=..."
        if part not in node or "/" in key:
            if not where:
                return _no_such_section(key, config, groups)
            return _no_such_key(key, part, node, config, where, choices.get(where))
        node = node[part]
    return None


def _no_such_section(key: str, config: Mapping[str, Any], groups: Collection[str]) -> str:
    known = {*config, *groups} - {"hydra"}
    meant = _elsewhere(key, config, cutoff=1.0) or closest(key, known) or _elsewhere(key, config)
    hint = f" (did you mean `{meant}`?)" if meant else f"; known: {listing(known)}"
    return f"`{short(key)}`: no such key or group{hint}"


def _no_such_key(
    key: str, part: str, node: Mapping[str, Any], config: Mapping[str, Any], where: str, option: Any
) -> str:
    known = [str(name) for name in node if not str(name).startswith("_")]
    owner = f"{where}={option}" if isinstance(option, str) and option != "default" else where
    hint = did_you_mean(part, known)
    if not hint:
        other = _elsewhere(key, config)
        hint = (f" (did you mean `{other}`?)" if other else "") + f"; it has: {listing(known)}"
    return f"`{short(key)}`: {owner} has no {short(part)!r}{hint}"


def _elsewhere(key: str, config: Mapping[str, Any], cutoff: float = 0.8) -> str | None:
    """The key of another section with the same last part (`lr`: `optim.lr`), or with one much like it."""
    last = re.split(r"[./]", key)[-1]
    names = {path: path.rpartition(".")[2] for path in _paths(config) if not path.startswith("hydra.")}
    found = closest(last, names.values(), cutoff)
    return min((path for path, name in names.items() if name == found), key=lambda p: p.count("."), default=None)


def _paths(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """All keys below the top level, joined by dots."""
    for key, child in node.items():
        if prefix and not str(key).startswith("_"):
            yield f"{prefix}{key}"
        if isinstance(child, Mapping):
            yield from _paths(child, f"{prefix}{key}.")


_NOISE = (
    "full_key:",
    "object_type=",
    "reference_type=",
    "To append to",
    "Either remove",
    "Or add a",
    "Did you mean",
)


def reason(error: BaseException) -> str:
    """What Hydra, OmegaConf or the YAML reader found wrong, as one line; much of it hides in `__cause__`."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:  # under a debugger OmegaConf's goes round
        chain.append(cause)
    for link in chain:
        if isinstance(link, CnnlabError):  # one of our own says all of it, with whatever caused it
            return str(link)
        if isinstance(link, yaml.MarkedYAMLError) and link.problem_mark is not None:
            mark = link.problem_mark
            return f"{mark.name}, line {mark.line + 1}: expected YAML, cannot read this ({link.problem})"
    paragraphs = [re.split(r"\n\s*\n|[Ss]earch path:", str(link))[0] for link in chain[:2]]
    lines = [text.strip().rstrip(".") for paragraph in paragraphs for text in paragraph.splitlines()]
    kept = dict.fromkeys(text for text in lines if text and not text.startswith(_NOISE))
    return "; ".join(kept) or type(error).__name__
