"""Pictures of what a network looks at while it trains: they are there, and the run is what it is without them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_runs import Recorded, differences, make_run
from torch import Tensor

from cnnlab.errors import ConfigError
from cnnlab.protocols import Listener
from cnnlab.sinks.tensorboard import TensorBoard
from cnnlab.train import fit

SHAPES = ("data=shapes", "data.train=48", "data.val=12", "data.test=12", "data.limit=null", "data.size=16")
BUSY = (
    *SHAPES,
    *("model=cnn", "model.widths=[4,8]", "norm=batch", "regularization=[dropout,ema]", "augment=standard"),
    *("trainer.precision=bf16", "trainer.batch_size=16", "stats=off", "probe=[]"),
)
"""Dropout, batch norm, averages, autocast and augmentation."""


class Album(Listener):
    def __init__(self) -> None:
        self.pages: list[tuple[int, dict[str, Tensor]]] = []

    def on_pictures(self, run: Any, pictures: Mapping[str, Tensor], step: int) -> None:
        self.pages.append((step, dict(pictures)))


def seen(*overrides: str) -> tuple[Any, Recorded, Album]:
    run, recorded, album = make_run(*overrides), Recorded(), Album()
    run.listeners[:0] = [recorded, album]
    fit(run)
    return run, recorded, album


def test_a_run_with_pictures_is_bit_for_bit_the_run_without():
    run, said, album = seen(*BUSY, "listener=explain", "listener.explain.every=1", "listener.explain.count=2")
    other, expected, none = seen(*BUSY)
    assert [step for step, _ in album.pages] == [3, 6] and not none.pages
    assert differences(run.model.state_dict(), other.model.state_dict()) == []
    assert (
        differences([said.losses, said.random, said.gradients], [expected.losses, expected.random, expected.gradients])
        == []
    )
    assert said.records == expected.records and run.metrics == other.metrics
    assert {module.training for module in run.model.modules()} == {module.training for module in other.model.modules()}
    assert all(p.requires_grad for p in run.model.parameters())
    assert run.observer.overhead.charged > other.observer.overhead.charged, "their cost is counted"


def test_the_same_images_each_time_and_other_maps():
    run, _, album = seen(*SHAPES, "stats=off", "listener=explain", "trainer.epochs=5", "listener.explain.count=3")
    assert [step for step, _ in album.pages] == [2, 4, 8, 10], "after epochs 1, 2, 4, and the last"
    assert all(list(pictures) == ["explain/val 0", "explain/val 6", "explain/val 11"] for _, pictures in album.pages)
    first, last = album.pages[0][1], album.pages[-1][1]
    for name, picture in first.items():
        assert picture.dtype == torch.uint8 and picture.shape[0] == 3
        assert picture.shape == last[name].shape and not torch.equal(picture, last[name])
        assert torch.equal(picture[:, :192, :192], last[name][:, :192, :192]), "the image itself"


def test_they_are_in_tensorboard(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = make_run(*SHAPES, "listener=explain", "trainer.epochs=1", "stats=off", folder=tmp_path / "run")
    run.listeners.append(TensorBoard(tmp_path / "board"))
    fit(run)
    board = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0})
    board.Reload()
    assert "explain/val 0" in board.Tags()["images"]


def test_what_cannot_be_explained_is_said_once_and_the_run_goes_on(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        run, _, album = seen(*SHAPES, "model=mlp", "model.hidden=[8]", "stats=off", "listener=explain")
    assert run.clock.step == 4 and not album.pages
    (warning,) = [record.getMessage() for record in caplog.records if "listener" in record.getMessage()]
    assert "`listener.explain` failed" in warning and "no maps over the image" in warning


def test_unknown_methods_are_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="did you mean `gradcam`"):
        make_run("listener=explain", "listener.explain.methods=[gradkam]")
    with pytest.raises(ConfigError, match="expected"):
        make_run("listener=explain", "listener.explain.target=both")
