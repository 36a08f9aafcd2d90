"""What decides is the run's own: a listener changes nothing, and the order of the listeners does not matter."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_runs import differences, make_run
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from cnnlab.errors import DivergedError
from cnnlab.protocols import Listener
from cnnlab.runs import checkpoint
from cnnlab.sinks.jsonl import read_records
from cnnlab.sinks.usual import attach
from cnnlab.train import fit

OVERRIDES = (
    "trainer.log_every=3",
    "regularization=[ema,early_stopping]",
    "schedule=plateau",
    "stats.max_overhead=null",
    "model=cnn",
    "model.widths=[4]",
)
TIMES = ("started", "ended", "created", "seconds", "images_per_second", "statistics", "time")


class Meddles(Listener):
    """Changes all that it is handed."""

    def on_record(self, run: Any, record: dict[str, Any]) -> None:
        record["loss"] = math.nan
        record.clear()

    def on_stats(self, run: Any, record: dict[str, Any]) -> None:
        record.clear()

    def on_epoch(self, run: Any, figures: dict[str, float]) -> None:
        figures.clear()


def events_of(folder: Path) -> list[tuple[int, bytes]]:
    """All events, without the time at which they were written or that they state."""
    found = []
    for path in sorted(folder.glob("*tfevents*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            if event.HasField("summary") and "_hparams_" not in event.summary.value[0].tag:
                found.append((event.step, event.summary.SerializeToString()))
    return found


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in (*TIMES, "wall", "training", "charged")}
    return value


def left_by(order: list[int] | None, folder: Path, *, meddling: bool = False) -> dict[str, Any]:
    """What a run leaves in its folder, its usual listeners in this order."""
    run = make_run(*OVERRIDES, folder=folder)
    assert run.folder is not None
    attach(run, run.folder, io.StringIO())
    if order is not None:
        run.listeners = [run.listeners[place] for place in order]
    if meddling:
        run.listeners = [Meddles(), *run.listeners, Meddles()]
    fit(run)
    states = {which: checkpoint.load(folder / "checkpoints" / f"{which}.pt") for which in ("last", "best")}
    return {
        "names": sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if "tfevents" not in p.name),
        "files": {
            name: (folder / name).read_bytes()
            for name in ("metrics.jsonl", "stats.jsonl", "evidence/sample_loss.f16", "evidence/shape.json")
        },
        "run": without_times(json.loads((folder / "run.json").read_text())),
        "checkpoints": {
            which: {**without_times(state), "records": {k: v for k, v in state["records"].items() if k != "events"}}
            | {"events": list(state["records"]["events"].values())}
            for which, state in states.items()
        },
        "events": events_of(folder / "tensorboard"),
    }


def test_the_order_of_the_listeners_does_not_matter(tmp_path: Path):
    """Recorder, evidence, progress, console, TensorBoard and pictures."""
    usual = left_by(None, tmp_path / "usual")
    assert len(usual["events"]) > 10
    for number, order in enumerate(([5, 4, 3, 2, 1, 0], [3, 5, 1, 0, 4, 2], [4, 0, 5, 2, 3, 1])):
        other = left_by(order, tmp_path / f"{number}")
        assert differences(other, usual) == []


def test_a_listener_changes_nothing_not_even_for_the_others(tmp_path: Path):
    usual, meddled = left_by(None, tmp_path / "usual"), left_by(None, tmp_path / "meddled", meddling=True)
    assert differences(meddled, usual) == []


def test_without_any_listener_a_run_decides_the_same(tmp_path: Path):
    kept = []
    for name in ("some", "none"):
        run = make_run(*OVERRIDES, folder=tmp_path / name)
        if name == "none":
            run.listeners.clear()
        fit(run)
        kept.append((run.selection.state_dict(), run.schedule.state_dict(), run.metrics, run.model.state_dict()))
        assert {p.name for p in (tmp_path / name / "checkpoints").iterdir()} == {"last.pt", "best.pt"}
    assert differences(*kept) == []


def test_an_evaluation_that_was_not_due_decides_nothing():
    run = make_run("schedule=plateau", "regularization.patience=1")
    before = (run.selection.state_dict(), run.schedule.state_dict())
    assert run.decide({}) is False
    assert (run.selection.state_dict(), run.schedule.state_dict()) == before
    assert run.decide({"val/accuracy": 0.5}) is True
    assert run.decide({"val/accuracy": 0.4}) is False
    assert run.stopped_early


def test_what_diverged_is_told_to_all_before_the_run_ends(tmp_path: Path):
    """The record with the loss that is not finite is what the user looks for."""
    heard: list[dict[str, Any]] = []

    class Hears(Listener):
        def on_record(self, run: Any, record: dict[str, Any]) -> None:
            heard.append(record)

    run = make_run("trainer.epochs=1", folder=tmp_path)
    with torch.no_grad():
        next(m for m in run.model.modules() if isinstance(m, torch.nn.BatchNorm2d)).running_var.fill_(math.nan)
    run.listeners.append(Hears())
    with pytest.raises(DivergedError, match="loss on val is non-finite"):
        fit(run)
    assert heard[-1]["split"] == "val"
    assert not math.isfinite(heard[-1]["loss"])
    assert [r["split"] for r in read_records(tmp_path / "metrics.jsonl")][-1] == "val"
