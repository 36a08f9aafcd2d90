"""After a resume a reader sees each point once, and hears of what is lost."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from lab_runs import Interrupt, fitted, make_run, resume_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cnnlab.errors import CheckpointError, InterruptedRun
from cnnlab.runs.folder import RunDir
from cnnlab.sinks.samples import SamplePictures
from cnnlab.sinks.tensorboard import TensorBoard
from cnnlab.train import fit
from cnnlab.train.recorder import sample_losses

OVERRIDES = (
    "stats=full",
    "stats.every=1",
    "probe.histograms.every=2",
    "trainer.log_every=1",
    "schedule=constant",
    "stats.max_overhead=null",
)


def run_on(run, folder: Path, stop: int | None = None) -> None:
    board = TensorBoard(RunDir(folder).tensorboard, picture_every=2)
    run.listeners += [board, SamplePictures(board)]
    if stop is None:
        fit(run)
        return
    run.listeners.insert(0, Interrupt(stop))
    with pytest.raises(InterruptedRun):
        fit(run)


def points(folder: Path) -> dict[str, list[int]]:
    """The steps of each tag, as a reader sees them."""
    kinds = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    found = EventAccumulator(str(folder / "tensorboard"), kinds)
    found.Reload()
    read = {"scalars": found.Scalars, "images": found.Images, "histograms": found.Histograms, "tensors": found.Tensors}
    return {f"{kind}/{tag}": [e.step for e in get(tag)] for kind, get in read.items() for tag in found.Tags()[kind]}


def test_each_point_is_seen_once_after_interrupts_and_repeated_resumes(tmp_path: Path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_on(make_run(*OVERRIDES, folder=whole), whole)
    run_on(make_run(*OVERRIDES, folder=parts), parts, stop=1)
    for stop in (4, 6, 8):
        run_on(resume_run(parts), parts, stop=stop)
    for _ in range(3):  # a finished run is tested anew each time
        run_on(resume_run(parts), parts)
    seen, expected = points(parts), points(whole)
    assert [tag for tag, steps in seen.items() if max(Counter(steps).values()) > 1] == []
    assert seen.keys() == expected.keys()
    curves = {tag for tag in expected if not tag.startswith("images/depth")}  # drawn anew from where a session began
    assert {tag: seen[tag] for tag in curves} == {tag: expected[tag] for tag in curves}


def test_the_row_of_a_cut_epoch_stays_when_the_finished_run_is_resumed(tmp_path: Path):
    fitted("trainer.max_steps=6", folder=tmp_path)
    before = sample_losses(RunDir(tmp_path))
    assert before.shape == (2, 100) and 0 < np.isfinite(before[1]).sum() < 100
    fit(resume_run(tmp_path))
    assert np.array_equal(sample_losses(RunDir(tmp_path)), before, equal_nan=True)


@pytest.mark.parametrize("left", [None, 100 * 2 + 7])
def test_lost_rows_are_unknown_and_said(tmp_path: Path, left: int | None):
    fitted(folder=tmp_path)
    path = tmp_path / "evidence" / "sample_loss.f16"
    path.unlink() if left is None else path.write_bytes(path.read_bytes()[:left])
    run = resume_run(tmp_path, epochs=3)
    lost = 2 if left is None else 1
    assert [n for n in run.notices if "sample_loss.f16" in n] == [
        f"{path} has lost {lost} of 2 epochs: their rows are NaN"
    ]
    fit(run)
    rows = sample_losses(RunDir(tmp_path))
    assert np.isnan(rows).all(1).tolist() == [left is None, True, False]


@pytest.mark.parametrize("name", ["metrics.jsonl", "stats.jsonl"])
def test_lost_records_are_said(tmp_path: Path, name: str):
    fitted("trainer.log_every=1", "stats.every=1", folder=tmp_path)
    lines = (tmp_path / name).read_bytes().splitlines(keepends=True)
    (tmp_path / name).write_bytes(b"".join(lines[:2]))
    (notice,) = [n for n in resume_run(tmp_path).notices if name in n]
    assert "2 records are left, up to step 2; the run goes on without the others" in notice
    (tmp_path / name).unlink()
    (notice,) = [n for n in resume_run(tmp_path).notices if name in n]
    assert "no record is left" in notice


@pytest.mark.parametrize("text", ["", "3", "[]", "[-1, 0]", '[-1, "a"]', "[-1, true]", "[" * 5000, "NaN", None])
def test_a_damaged_shape_of_the_evidence_is_named(tmp_path: Path, text: str | None):
    folder = RunDir(tmp_path)
    folder.evidence.mkdir()
    np.zeros(6, np.float16).tofile(folder.evidence / "sample_loss.f16")
    (folder.evidence / "shape.json").write_text("[-1, 3]")
    assert sample_losses(folder).shape == (2, 3)
    (folder.evidence / "shape.json").unlink() if text is None else (folder.evidence / "shape.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"shape\.json is damaged"):
        sample_losses(folder)
