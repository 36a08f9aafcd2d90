"""What the records say of a run: one count of updates and epochs in all files, and each loss with all of its parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lab_runs import Recorded, fitted, interrupted_at, make_run, resume_run, watched
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cnnlab.errors import CheckpointError
from cnnlab.protocols import Listener
from cnnlab.runs import checkpoint
from cnnlab.runs.folder import RunDir
from cnnlab.sinks.jsonl import read_records
from cnnlab.sinks.records import as_first_version, current
from cnnlab.sinks.tensorboard import TensorBoard
from cnnlab.train import fit
from cnnlab.verbs.eval import evaluate_run

EACH_STEP = ("trainer.log_every=1", "stats.every=1", "trainer.max_steps=6")
TASKS = {
    "classification": (),
    "segmentation": ("data=shapes", "task=segmentation", "model=cnn", "model.widths=[4,4]", "data.size=16"),
}


class Norms(Listener):
    """The norm of each update's gradient, by the number of updates that are then done."""

    def __init__(self) -> None:
        self.norms: dict[int, float] = {}

    def on_step(self, run, result):
        each = [p.grad.norm() for p in run.step.parameters if p.grad is not None]
        self.norms[run.clock.step] = torch.stack(each).norm().item()


@pytest.mark.parametrize("task", TASKS)
def test_a_join_on_step_and_epoch_pairs_what_belongs_together(tmp_path: Path, task: str):
    run, norms = make_run(*TASKS[task], *EACH_STEP, folder=tmp_path), Norms()
    run.listeners.insert(0, norms)
    board = TensorBoard(RunDir(tmp_path).tensorboard)
    run.listeners.append(board)
    fit(run)
    metrics, stats = list(read_records(tmp_path / "metrics.jsonl")), list(read_records(tmp_path / "stats.jsonl"))
    trained = {r["step"]: r for r in metrics if r["split"] == "train"}
    assert [(r["step"], r["epoch"]) for r in stats] == [(r["step"], r["epoch"]) for r in trained.values()]
    steps = run.steps_per_epoch
    assert [r["epoch"] for r in trained.values()] == [1 + (step - 1) // steps for step in range(1, 7)]
    for record in stats:
        assert record["gradient/global_norm"] == pytest.approx(norms.norms[record["step"]], rel=1e-4)
    evaluated = [r for r in metrics if r["split"] != "train"]
    assert [(r["split"], r["step"], r["epoch"]) for r in evaluated] == [("val", 4, 1), ("val", 6, 2), ("test", 6, 2)]
    assert all(r["epoch"] == trained[r["step"]]["epoch"] for r in evaluated), "also where the run was cut in an epoch"
    best = RunDir(tmp_path).read()["best"]
    assert best["value"] == next(r for r in evaluated if r["epoch"] == best["epoch"])[best["metric"].split("/")[1]]
    found = EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0})
    found.Reload()
    for tag, expected in (
        ("train/loss", [1, 2, 3, 4, 5, 6]), ("gradient/global_norm", [1, 2, 3, 4, 5, 6]), ("val/loss", [4, 6]),
        ("test/loss", [6]),
    ):  # fmt: skip
        assert [event.step for event in found.Scalars(tag)] == expected


def penalty_by_hand(model: torch.nn.Module) -> float:
    weights = [p.detach().double() for p in model.parameters() if p.ndim > 1]
    return float(sum(0.01 * w.square().sum() / 2 + 0.001 * w.abs().sum() for w in weights))


@pytest.mark.parametrize("averaged", [(), ("regularization.ema=0.5",)])
def test_an_evaluation_states_the_penalty_of_the_weights_that_it_takes(tmp_path: Path, averaged: tuple[str, ...]):
    """Of the averages where these are evaluated; in the records, the metrics and `cnnlab eval` alike."""
    overrides = ("regularization.l2=0.01", "regularization.l1=0.001", "schedule=constant", "optim.lr=0.2", *averaged)
    run, said = watched(*overrides, "trainer.log_every=1", folder=tmp_path)
    with run.averaged():
        expected = penalty_by_hand(run.model)
    *trained, val, test = said.records
    assert val["penalty"] == test["penalty"] == pytest.approx(expected, rel=1e-6)
    if averaged:
        assert val["penalty"] != pytest.approx(penalty_by_hand(run.model), rel=1e-4), "not that of the last weights"
    assert trained[-1]["penalty"] == pytest.approx(expected, rel=0.05)
    for record in (val, test):
        assert record["loss"] == pytest.approx(record["data_loss"] + record["penalty"])
    assert evaluate_run(RunDir(tmp_path), "test")["test/loss"] == pytest.approx(test["loss"])


def test_without_a_penalty_it_is_zero():
    _, said = watched("regularization.l2=0", "trainer.max_steps=1", "trainer.log_every=1")
    assert [r["penalty"] for r in said.records] == [0, 0, 0]


# ---- folders of version 1 ----


def as_of_version_1(folder: Path, steps_per_epoch: int) -> None:
    """Rewrites a run folder's records and version as the earlier version left them."""
    for name in ("metrics.jsonl", "stats.jsonl"):
        done = [as_first_version(r, r["step"] // steps_per_epoch) for r in read_records(folder / name)]
        (folder / name).write_text("".join(json.dumps(r, separators=(",", ":")) + "\n" for r in done))
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "schema_version": 1}))
    state = checkpoint.load(folder / "checkpoints" / "last.pt")
    del state["records"]["checksums"]  # of version 2
    checkpoint.save(state, folder / "checkpoints" / "last.pt")


def test_records_of_version_1_are_read_as_those_of_this_one(tmp_path: Path):
    run = fitted(*EACH_STEP, "regularization.l2=0", folder=tmp_path)
    expected = {name: list(read_records(tmp_path / name)) for name in ("metrics.jsonl", "stats.jsonl")}
    as_of_version_1(tmp_path, run.steps_per_epoch)
    old = list(read_records(tmp_path / "metrics.jsonl"))
    assert [(r["split"], r["step"], r["epoch"]) for r in old] == [
        *(("train", step, 0) for step in (1, 2, 3, 4)), ("val", 4, 1), ("train", 5, 1), ("train", 6, 1), ("val", 6, 1),
        ("test", 6, 1),
    ]  # fmt: skip
    assert [(r["step"], r["epoch"]) for r in read_records(tmp_path / "stats.jsonl")][-3:] == [(3, 0), (4, 1), (5, 1)]
    for name, records in expected.items():
        read = list(current(read_records(tmp_path / name), RunDir(tmp_path).schema))
        unknown = [{**r, "penalty": None} if r.get("split") in ("val", "test") else r for r in records]
        assert read == unknown


def test_a_run_begun_by_version_1_goes_on_counting_so(tmp_path: Path):
    interrupted_at(5, *EACH_STEP, folder=tmp_path)
    as_of_version_1(tmp_path, 4)
    run, said = resume_run(tmp_path), Recorded()
    run.listeners.insert(0, said)
    fit(run)
    assert RunDir(tmp_path).read()["schema_version"] == 1
    assert [(r["step"], r["epoch"]) for r in read_records(tmp_path / "stats.jsonl")] == [
        (0, 0), (1, 0), (2, 0), (3, 0), (4, 1), (5, 1),
    ]  # fmt: skip
    assert [(r["step"], r["epoch"]) for r in said.stats] == [(6, 2)], "listeners are told as ever"


def test_a_newer_versions_folder_is_refused_by_its_number(tmp_path: Path):
    fitted("trainer.max_steps=1", folder=tmp_path)
    RunDir(tmp_path).update(schema_version=99)
    with pytest.raises(CheckpointError, match=r"run\.json: expected a schema_version of 1 to 2, received 99"):
        resume_run(tmp_path)
