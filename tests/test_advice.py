"""Whatever a message tells to type is not refused for the same key again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from cnnlab.building.trial import SECTIONS, VALUES, checked
from cnnlab.composing.composer import Composer, config_root
from cnnlab.composing.groups import GROUPS
from cnnlab.composing.kinds import is_part
from cnnlab.composing.overrides import ALIASES, first_key, key_of
from cnnlab.composing.signature import locate, parameters_of
from cnnlab.composing.values import check_value
from cnnlab.errors import ConfigError, DataError

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
    "name=007",
    "name=0x10",
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
    "model=mlp  norm=batch",
    "model=mlp  regularization=[stochastic_depth]",
    "model=cnn  task=segmentation  data=shapes  head=unpool",
    "regularization.dropout_kind=spatial",
    "regularization.dropout_kind=classic",
    "regularization=[dropout]  model=resnet  data=shapes  task=segmentation",
    "init=whitening",
    "init=he  init.zero_residual=true  model=vgg",
    "head=nearest",
    "model=vgg  schedule.warmup=200 %",
    "data=folder  data.resize=10  data.size=20",
    "trainer.sync_batch_norm=3",
    "data.imbalance=2  data=shapes  task=segmentation",
    "regularization.decoupled_decay=.1  optim=adamw",
    "optim=lbfgs  groups.head_lr=2",
    "optim.weight_decay=.1  groups.layer_decay=.5  optim=lbfgs",
    "seed=1.0",
    "seed=1e400",
    *(f"{group}={next(iter(names))}" for group, names in ALIASES.items()),
]


@pytest.mark.parametrize("text", REFUSED)
def test_what_a_refusal_tells_to_type_is_not_refused_again(shared_composer: Composer, text: str):
    overrides = text.split("  ")
    for problem in problems(shared_composer, overrides):
        about = key_of(problem.split("`")[1])
        for words in suggestions(problem):
            again = words[-1]
            if "-m" in words:
                assert len(shared_composer.cells([again])) > 1, problem
                continue
            kept = [override for override in overrides if "=" in override]
            kept = [override for override in kept if key_of(override) not in (about, key_of(again))]
            told = [key_of(found.split("`")[1]) for found in problems(shared_composer, [*kept, again])]
            assert key_of(again) not in told, f"{problem}: {again} is refused again"


def problems(composer: Composer, overrides: list[str]) -> list[str]:
    try:
        checked(composer, overrides)
    except ConfigError as error:
        return error.problems
    except DataError:
        pass
    return []
