"""The table of groups: a row is all that the check needs to know of a group of parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from lab_runs import SMALL

from cnnlab.building import trial
from cnnlab.composing import groups, overrides
from cnnlab.composing.composer import composer, config_root
from cnnlab.composing.groups import GROUPS, Group
from cnnlab.composing.kinds import public_name
from cnnlab.composing.make import make
from cnnlab.errors import ConfigError

PART = """
from typing import Protocol
from cnnlab.schema import Positive

class Ruler(Protocol):
    unit: str
    def length(self, x: float) -> float: ...

class Metre:
    unit = "m"
    def __init__(self, scale: Positive = 1.0):
        self.scale = scale
    def length(self, x: float) -> float:
        return self.scale * x

class Unitless:
    def length(self, x: float) -> float:
        return x

class Weight:
    unit = "kg"
"""
FILES = {
    "rulers.py": PART,
    "ruler/metre.yaml": "metre: {_target_: rulers.Metre, scale: 1.0}",
    "ruler/unitless.yaml": "unitless: {_target_: rulers.Unitless}",
    "ruler/weight.yaml": "weight: {_target_: rulers.Weight}",
}


@pytest.fixture
def with_rulers(user_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of rulers, and a row for them."""
    row = Group(("rulers.Ruler",), named=True, later=True)
    table = {**GROUPS, "ruler": row}
    monkeypatch.setattr(groups, "GROUPS", table)
    for reader in (trial, overrides):
        monkeypatch.setattr(reader, "GROUPS", table)
    return user_folder(FILES)


def test_a_new_group_is_a_row_and_a_folder(with_rulers: Path):
    with composer([with_rulers]) as open_composer:
        found = trial.checked(open_composer, [*SMALL, "+ruler=metre", "ruler.metre.scale=2"])
        assert "ruler" in open_composer.groups()
    (metre,) = (make(node) for node in found.config["ruler"].values())
    assert metre.length(3.0) == 6.0


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["+ruler=metre", "ruler.metre.scale=0"], r"`ruler\.metre\.scale=0`: expected a number > 0, received 0"),
        (["+ruler=metre", "+ruler.metre.sclae=2"], "did you mean `scale`"),
        (["+ruler=weight"], r"rulers\.Weight has no `length`; see rulers\.Ruler"),
        (["+ruler=unitless"], r"rulers\.Unitless has no `unit`; see rulers\.Ruler"),
    ],
)
def test_its_parts_are_checked_as_all_are(with_rulers: Path, typed: list[str], words: str):
    with composer([with_rulers]) as open_composer, pytest.raises(ConfigError, match=words):
        trial.checked(open_composer, [*SMALL, *typed])


def test_without_its_row_nothing_reads_it(user_folder: Callable[..., Path]):
    with composer([user_folder(FILES)]) as open_composer, pytest.raises(ConfigError, match="nothing reads this key"):
        trial.checked(open_composer, [*SMALL, "+ruler=metre"])


@pytest.mark.parametrize("name", GROUPS)
def test_a_rows_kind_is_there_and_public(name: str):
    group = GROUPS[name]
    assert len(group.kinds) == len(group.kind)
    if not group.factory:
        assert [public_name(kind) for kind in group.kinds] == list(group.kind), (
            "as a message says where it is described"
        )


def test_every_row_has_its_folder_and_every_folder_of_parts_its_row():
    folders = {path.name for path in config_root().iterdir() if path.is_dir()}
    assert folders - {*trial.SECTIONS, "experiment", "debug"} == set(GROUPS)
