"""Figures by matplotlib: what stands on them is what people wrote."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cnnlab.assess.figures import confusion
from cnnlab.sinks.figures import as_written, blank, save

pytest.importorskip("matplotlib")

NAMES = [os.fsdecode(b"caf\xe9"), "100% $x^ {", "\x1b[31m\n", "[red]", "東京", "-rf", "l" * 255]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_title_takes_whatever_people_wrote(name: str, tmp_path: Path):
    figure, ax = blank()
    ax.set_title(as_written(name))
    figure.suptitle(as_written(name))
    save(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_classes_have_whatever_names(tmp_path: Path):
    save(confusion(torch.eye(len(NAMES)), NAMES, "images"), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0
