"""Whatever a message tells to type is not refused for the same key again."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from cnnlab.building.trial import SECTIONS, VALUES, check, checked
from cnnlab.composing.composer import Composed, Composer, config_root
from cnnlab.composing.groups import GROUPS
from cnnlab.composing.kinds import is_part
from cnnlab.composing.overrides import ALIASES, LISTS, first_key, is_choice, is_plain, key_of, line
from cnnlab.composing.signature import locate, parameters_of
from cnnlab.composing.values import check_value
from cnnlab.errors import ConfigError, DataError, short

PLACEHOLDER = re.compile(r"^(-m )?[\w./]+=(\.\.\.|[A-Z]+|A,B,C)$")
"""A form to fill in, which is no suggestion of a value."""


WORD = r"""(?:-m )?[\w.]+=(?:\[[^\]]*\]|"[^"]*"|[^\s;,()`'"]*[^\s;,().:`'"])(?:,[^\s;,()`]+)*"""
QUOTED = r"""'[\w.]+=(?:[^']|'"'"')*'|"[\w.]+=(?:\\.|[^"\\])*\""""
NAMED = re.compile(r"`([^`]+)`")


def suggestions(problem: str) -> Iterator[list[str]]:
    """What a message tells to type, as the shell hands it on."""
    start = problem.startswith("`") and problem.index("`: ") if "`: " in problem else 0
    head, advice = problem[: start + 1], problem[start + 1 :]
    for text in re.findall(f"{QUOTED}|{WORD}", advice):
        words = shlex.split(text)
        if not PLACEHOLDER.match(text) and first_key(words[-1]) in {*GROUPS, *SECTIONS, *VALUES}:
            yield words
    for meant in re.findall(r"did you mean ((?:`[^`]+`(?: or )?)+)", advice):
        for name in NAMED.findall(meant):
            key, equals, _ = head.strip("`").partition("=")
            if equals and key and "=" not in name:  # another value for the key
                yield [f"{key}={name}"]


WRONG: tuple[Any, ...] = (
    "abc",
    "",
    "1",
    "true",
    "null",
    "10",
    "5 %",
    "a b",
    "it's",
    'say "x"',
    "a,b",
    "[1]",
    "é",
    -1,
    0,
    1,
    2,
    10,
    -0.5,
    0.0,
    1.0,
    2.0,
    1.5,
    1e3,
    1e-9,
    1e30,
    2**40,
    2**70,
    float("nan"),
    float("inf"),
    True,
    None,
    [],
    [1],
    ["a"],
    [1.5, "a"],
    [[1]],
    {},
    {"a": 1},
)


def hints() -> dict[str, Any]:
    """The annotation of each knob of each option of each group, and of the fixed sections."""
    found = dict(VALUES)
    for name, section in SECTIONS.items():
        found |= {f"{name}.{key}": hint for key, hint in parameters_of(section)[1].items() if key != "return"}
    for group in GROUPS:
        for option in (config_root() / group).glob("*.yaml"):
            node = yaml.safe_load(option.read_text())
            for key, part in node.items() if GROUPS[group].named else [("", node)]:
                if is_part(part) and part["_target_"] is not None:
                    path = ".".join(filter(None, (group, str(key))))
                    annotated = parameters_of(locate(part["_target_"]))[1]
                    found |= {f"{path}.{name}": hint for name, hint in annotated.items() if name in part}
    return found


def near(hint: Any) -> list[str]:
    """Words that are almost what an annotation names: each option with its letters changed."""
    words = re.findall(r"\b[a-z_0-9]{3,}\b", str(check_value("\0", hint, "x"))) if hint is not Any else []
    return [word[:-1] + "xx" for word in words] + [word.upper() for word in words]


def test_every_value_that_a_message_suggests_is_taken(shared_composer: Composer):
    parser = OverridesParser.create(config_loader=shared_composer.hydra.config_loader)
    typed = 0
    for key, hint in hints().items():
        for value in (*WRONG, *near(hint)):
            for problem in check_value(value, hint, key):
                for words in suggestions(problem):
                    (override,) = parser.parse_overrides(words)
                    assert override.key_or_group == key, problem
                    assert check_value(override.value(), hint, key) == [], f"{problem}: {words} is refused again"
                    typed += 1
    assert typed > 500


REFUSED = [
    "name=1e3",
    "name=1_000",
    "name=true",
    "name=null",
    "name=[a]",
    "paths.outputs=3.50",
    "name=it's",
    "name=a,b",
    'name="x',
    "name=(a",
    "name=a:b c}",
    "name=a'b,c",
    "name=$x{",
    "resnet",
    "sgd",
    "vgg16 ",
    "augment=crop,flip",
    "optim=sgd,adam",
    "optim=[sgd,adam]",
    "optim.lr=1e-2,1e-1",
    "name=x,y",
    "trainer.epochs=1e3",
    "trainer.precision=bf61",
    "groups.freeze=conv1",
    "schedule.warmup=10",
    "schedule.warmup=1e3",
    "schedule=step  schedule.milestones=[5]",
    "schedule=exponential  schedule.every=0 steps",
    "augment.crop.padding=2",
    "augment.crop=2",
    "lr=0.1",
    "optim.momentun=0.9",
    "optim.lr.x=1",
    "epochs=3",
    "moddel=vgg",
    "model=resnt",
    "stats=offf",
    "regularization=[dropuot]",
    "regularization=dropout,ema",
    "augment=[crop,flipp]",
    "+optim.momentm=1",
    "+trainre.epochs=1",
    "+paths.output=x",
    "optim._target_=torch.optim.SDG",
    "model.depth=21",
    "norm=group  norm.groups=7",
    "trainer.accumulate=65",
    "optim=newton_cg  trainer.accumulate=2",
    "optim=newton_cg  trainer.precision=bf16",
    "optim=newton_cg  trainer.clip_norm=1",
    "optim=lbfgs  trainer.step=compiled",
    "optim=lbfgs  intervention=[gradient_noise]",
    "loading.path=stream",
    "loading.decode=cuda  trainer.device=cpu",
    "model=mlp  regularization=[stochastic_depth]",
    "regularization.dropout_kind=spatial",
    "regularization.dropout_kind=classic",
    "regularization=[dropout]  model=resnet  data=shapes  task=segmentation",
    "init=whitening",
    "init=he  init.zero_residual=true  model=vgg",
    "head=nearest",
    "model=vgg  schedule.warmup=200 %",
    "data=folder  data.resize=10  data.size=20",
    "trainer.sync_batch_norm=3",
    "regularization.decoupled_decay=.1  optim=adamw",
    "optim=lbfgs  groups.head_lr=2",
    "optim.weight_decay=.1  groups.layer_decay=.5  optim=lbfgs",
    "seed=1.0",
    "seed=1e400",
    *(f"{group}={next(iter(names))}" for group, names in ALIASES.items()),
]


@pytest.fixture(scope="module")
def told(shared_composer: Composer) -> dict[str, list[str]]:
    """What is told of those that Hydra does not compose: in as few command lines as can tell them all."""
    lines: list[list[str]] = [[]]
    for text in REFUSED:
        if "  " not in text and quickly(shared_composer, [text]) is None:
            fits = [own for own in lines[1:] if first_key(text) not in map(first_key, own)]
            own = lines[0] if unreadable(shared_composer, text) else fits[0] if fits else []
            if not any(own is known for known in lines):
                lines.append(own)
            own.append(text)
    found: dict[str, list[str]] = {}
    for own in lines:
        for problem in problems(shared_composer, own):
            head = problem.split("`")[1]
            whose = [text for text in own if head == short(text)]
            whose = whose or [text for text in own if key_of(head) == key_of(text)]
            whose = whose or [text for text in own if first_key(head) == first_key(text)]
            assert len(whose) == 1, problem
            found.setdefault(whose[0], []).append(problem)
    return found


def unreadable(composer: Composer, text: str) -> bool:
    try:
        composer.parse([text])
    except ConfigError:
        return True
    return False


@dataclass(frozen=True)
class Advice:
    """What a refusal of the overrides `text` tells to type, beside what of them is `kept`."""

    text: str
    problem: str
    typed: str
    kept: tuple[str, ...]


def test_what_a_refusal_tells_to_type_is_not_refused_again(shared_composer: Composer, told: dict[str, list[str]]):
    given: list[Advice] = []
    for text in REFUSED:
        overrides = text.split("  ")
        found = told.get(text) or problems(shared_composer, overrides)
        assert found, f"{text} is not refused"
        for problem in found:
            about = key_of(problem.split("`")[1])
            for words in suggestions(problem):
                if "-m" in words:
                    assert len(shared_composer.cells(words[-1:])) > 1, problem
                    continue
                kept = [override for override in overrides if "=" in override]
                kept = [override for override in kept if key_of(override) not in (about, key_of(words[-1]))]
                given.append(Advice(text, problem, words[-1], tuple(kept)))
    assert len(given) > 60
    assert [*refused_again(shared_composer, given)] == []


def refused_again(composer: Composer, given: list[Advice]) -> Iterator[str]:
    """Each advice whose key is refused once it is typed. A check takes most of a second, so those that stand alone are
    typed together where their keys differ, and each by itself only where something of that is refused."""
    alone: list[list[Advice]] = []
    for advice in given:
        if advice.kept:
            alone.append([advice])
            continue
        apart = (
            own for own in alone if not own[0].kept and first_key(advice.typed) not in {first_key(a.typed) for a in own}
        )
        together = next(apart, None)
        if together is None:
            alone.append([advice])
        else:
            together.append(advice)
    for together in alone:
        keys = {key_of(advice.typed) for advice in together}
        if not keys & refused_keys(composer, [*together[0].kept, *(advice.typed for advice in together)]):
            continue
        for advice in together:
            if key_of(advice.typed) in refused_keys(composer, [*advice.kept, advice.typed]):
                yield f"{advice.problem}: {advice.typed} is refused again"


def refused_keys(composer: Composer, overrides: list[str]) -> set[str]:
    return {key_of(problem.split("`")[1]) for problem in problems(composer, overrides)}


def problems(composer: Composer, overrides: list[str]) -> list[str]:
    try:
        composed = quickly(composer, overrides)
        check(composed) if composed is not None else checked(composer, overrides)
    except ConfigError as error:
        return error.problems
    except DataError:
        pass
    return []


_COMPOSED: dict[tuple[str, ...], Composed] = {}


def quickly(composer: Composer, overrides: list[str]) -> Composed | None:
    """What Hydra composes, of which it does the options (once), and we the plain values; `None` where an override is
    anything else: wrong, or of another form."""
    try:
        parsed = composer.parse(overrides)
    except ConfigError:
        return None
    groups = composer.groups()
    chosen = [override for override in parsed if is_choice(override, groups)]
    values = [override for override in parsed if override not in chosen]
    if not all(map(is_plain, parsed)) or misused(chosen, composer):
        return None
    names = tuple(map(line, chosen))
    if names not in _COMPOSED:
        _COMPOSED[names] = composer.compose(names)
    config = copy.deepcopy(_COMPOSED[names].config)
    for override in values:
        *path, last = override.key_or_group.split(".")
        node: Any = config
        for name in path:
            node = node.get(name) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            return None
        node[last] = override.value()
    return replace(_COMPOSED[names], config=config, overrides=tuple(overrides))


def misused(chosen: list[Override], composer: Composer) -> bool:
    """Whether an option is none of its group's, or one of several where one is taken."""
    for override in chosen:
        value, known = override.value(), composer.options(override.key_or_group)
        several = isinstance(value, list) and override.key_or_group in LISTS
        if not set(map(str, value if several else [value])) <= set(known):
            return True
    return False


@pytest.mark.parametrize(
    "text", ["optim.lr=-1", "model=vgg  norm=group  model.depth=12", "name=1e3", "optim=lion  seed=x"]
)
def test_the_quick_way_is_hydras(shared_composer: Composer, text: str):
    overrides = text.split("  ")
    composed = quickly(shared_composer, overrides)
    assert composed is not None
    slowly = shared_composer.compose(overrides)
    assert composed.config == {**slowly.config, "name": composed.config["name"]}
    assert composed.overrides == slowly.overrides
