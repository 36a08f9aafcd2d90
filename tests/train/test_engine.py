"""One run on two processes is the run on one: same curve, same files, every sample once, exactly resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab_runs import (
    Interrupt,
    Recorded,
    all_state,
    differences,
    files_of,
    fitted,
    make_run,
    resume_run,
    watched,
)
from rank_processes import run_ranks

from cnnlab.errors import DivergedError, InterruptedRun, UsageError
from cnnlab.machine.ranks import Ranks
from cnnlab.runs.folder import RunDir
from cnnlab.sinks.jsonl import read_records
from cnnlab.train import fit
from cnnlab.train.recorder import sample_losses

RUNS = {
    "uneven": ("norm=group", "optim=momentum", "trainer.log_every=1", "data.limit=99", "stats.every=3"),
    "empty part": (
        "norm=group",
        "optim=momentum",
        "trainer.log_every=1",
        "data.limit=97",
        "stats.every=3",
        "regularization.l2=1e-3",
        "trainer.clip_norm=1",
        "augment=standard",
    ),
    "micro-batches": ("norm=group", "trainer.accumulate=3", "data.limit=97"),
    "mixed": (
        "norm=group",
        "augment=[crop,flip,mixup,cutmix,cutout]",
        "augment.mixup.alpha=1",
        "trainer.accumulate=3",
        "data.limit=98",
        "stats=off",
    ),
    "fp16": ("norm=group", "data.limit=97", "trainer.precision=fp16"),
    "lbfgs": ("norm=group", "optim=lbfgs", "optim.max_iter=1", "data.limit=97", "regularization.l2=1e-3"),
}
"""At 97 samples the last batch has one: the second rank's part of it is empty. At 98 each rank has one sample."""

TOLERANCE = {"fp16": 0.03, "lbfgs": 1e-3}
"""Of weights, losses and rates; 2e-5 otherwise. fp16 rounds by the shape of the batch, by which two of 97 samples may
change sides; a line search amplifies."""

STATEFUL = (
    "model=cnn", "model.widths=[4,8]", "regularization.dropout=0.3", "regularization.ema=0.9", "optim=momentum",
    "augment=standard", "trainer.accumulate=2", "trainer.log_every=3", "stats.every=3", "data.limit=104",
)  # fmt: skip


def scenarios(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Everything that the tests below look at, in one start of the processes."""
    found: dict[str, Any] = {}
    for name, overrides in RUNS.items():
        run, said = make_run(*overrides, folder=folder / name, ranks=ranks), Recorded()
        run.listeners.insert(0, said)
        fit(run)
        found[name] = {
            "model": run.model.state_dict(),
            "indices": said.indices,
            "records": said.records,
            "stats": said.stats,
        }
    whole = make_run(*STATEFUL, folder=folder / "whole", ranks=ranks)
    fit(whole)
    for after in (2, 4, 7):
        parts = make_run(*STATEFUL, folder=folder / f"parts {after}", ranks=ranks)
        if ranks.rank == 1:  # one process hears the signal, and all stop
            parts.listeners.insert(0, Interrupt(after))
        with pytest.raises(InterruptedRun):
            fit(parts)
        assert parts.clock.step in (after, after + 1)  # at an epoch's end at once, else a step later
        resumed = resume_run(folder / f"parts {after}", ranks=ranks)
        fit(resumed)
        found[f"differences {after}"] = differences(all_state(resumed), all_state(whole)) if ranks.is_main else []
        found[f"weights {after}"] = differences(resumed.model.state_dict(), whole.model.state_dict())
    found["averages"] = all_state(whole)["ema"]["average"]
    # without a common disk: a rank that is not the main one writes nothing at all
    apart = make_run(*STATEFUL, folder=folder / f"of rank {ranks.rank}", ranks=ranks)
    fit(apart)
    found["written"] = sorted(p.name for p in (folder / f"of rank {ranks.rank}").rglob("*"))
    found["apart"] = apart.metrics
    nowhere = make_run(*STATEFUL, ranks=ranks)
    fit(nowhere)
    found["nowhere"] = nowhere.metrics
    with pytest.raises(DivergedError) as caught:
        fit(make_run("optim.lr=1e8", "schedule=constant", "norm=none", folder=folder / "diverged", ranks=ranks))
    found["diverged"] = str(caught.value)
    for overrides, word in ((("optim=newton_cg",), "one process"), (("trainer.batch_size=1",), "at least 2 samples")):
        with pytest.raises(UsageError, match=word):
            make_run(*overrides, ranks=ranks)
    lsuv = make_run("init=lsuv", ranks=ranks)
    found["lsuv"] = lsuv.model.state_dict()
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_ranks(scenarios, folder)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_learn_what_one_does(two, name: str, tmp_path: Path):
    _, (first, second) = two
    run, said = watched(*RUNS[name], folder=tmp_path)
    tolerance = TOLERANCE.get(name, 2e-5)
    for key, value in run.model.state_dict().items():
        assert torch.allclose(first[name]["model"][key], value, atol=tolerance), key
        assert torch.equal(first[name]["model"][key], second[name]["model"][key]), key
    for mine, alone in zip(first[name]["records"], said.records, strict=True):
        assert mine.keys() == alone.keys()
        for key in ("split", "step", "epoch", "lr"):
            assert mine.get(key) == alone.get(key)
        for key in ("loss", "data_loss", "penalty"):
            assert mine[key] == pytest.approx(alone[key], rel=tolerance, abs=tolerance)
        assert mine["accuracy"] == pytest.approx(alone["accuracy"], abs=max(0.02, tolerance))
    assert second[name]["records"] == first[name]["records"], "figures are reduced, on every rank"


@pytest.mark.parametrize("name", ["uneven", "empty part"])
def test_statistics_are_those_of_the_whole_batch(two, name: str):
    _, (first, second) = two
    _, said = watched(*RUNS[name])
    assert second[name]["stats"] == []
    assert len(first[name]["stats"]) == len(said.stats) == 3
    for mine, alone in zip(first[name]["stats"], said.stats, strict=True):
        assert mine.keys() == alone.keys()
        for tag, value in alone.items():
            names = tag in ("layers", "tensors")
            assert mine[tag] == (value if names else pytest.approx(value, rel=2e-3, abs=1e-5, nan_ok=True)), tag


@pytest.mark.parametrize("name", RUNS)
def test_every_sample_is_seen_once_an_epoch(two, name: str):
    folder, (first, second) = two
    samples = {"uneven": 99, "mixed": 98}.get(name, 97)
    mine, theirs = first[name]["indices"], second[name]["indices"]
    assert len(mine) == len(theirs) == 8
    for epoch in (0, 1):
        seen = torch.cat([*mine[4 * epoch : 4 * epoch + 4], *theirs[4 * epoch : 4 * epoch + 4]])
        assert torch.equal(seen.sort().values, torch.arange(samples))
    evidence = sample_losses(RunDir(folder / name))
    assert evidence.shape == (2, samples)
    assert not np.isnan(evidence).any()
    alone = fitted(*RUNS[name], folder=folder / f"{name} alone")
    assert alone.clock.samples == 2 * samples
    assert np.allclose(evidence, sample_losses(RunDir(folder / f"{name} alone")), atol=5 * TOLERANCE.get(name, 2e-3))


@pytest.mark.parametrize("after", [2, 4, 7])
def test_an_interrupted_job_goes_on_exactly(two, after: int):
    folder, found = two
    assert [f[f"differences {after}"] for f in found] == [[], []]
    assert [f[f"weights {after}"] for f in found] == [[], []]
    assert files_of(folder / f"parts {after}") == files_of(folder / "whole")


def test_a_job_goes_on_on_another_number_of_processes(two, tmp_path: Path):
    folder, _ = two
    import shutil

    run = fitted("norm=group", "data.limit=99", "trainer.max_steps=4", folder=tmp_path / "alone")
    assert run.clock.step == 4
    shutil.copytree(folder / "whole", tmp_path / "two")
    resumed = resume_run(tmp_path / "two", epochs=3)
    fit(resumed)
    records = [r for r in read_records(tmp_path / "two" / "metrics.jsonl") if r["split"] == "train"]
    assert [r["step"] for r in records] == sorted({r["step"] for r in records})
    assert resumed.clock.step == 12


def test_only_the_main_process_writes(two):
    _, (first, second) = two
    assert "run.json" in first["written"]
    assert second["written"] == []
    assert second["apart"] == first["apart"], "the chosen checkpoint is read once and shared"
    assert first["nowhere"] == second["nowhere"] == first["apart"], "without a file it is kept in memory"


def test_the_averages_of_buffers_are_evaluated_as_the_checkpoint_has_them(two):
    """Each rank's batch norm sees other samples: the network that was measured is the one that is kept."""
    folder, _ = two
    from cnnlab.verbs.eval import evaluate_run

    record = RunDir(folder / "whole").read()["metrics"]
    assert evaluate_run(RunDir(folder / "whole"), "test") == pytest.approx(record, rel=1e-5)


def test_a_diverged_job_ends_on_all_processes_at_once(two):
    folder, (first, second) = two
    assert first["diverged"] == second["diverged"]
    record = RunDir(folder / "diverged").read()
    assert record["status"] == "diverged"


def test_weights_that_depend_on_data_begin_alike_and_as_on_one_process(two):
    _, (first, second) = two
    alone = make_run("init=lsuv").model.state_dict()
    assert differences(first["lsuv"], second["lsuv"]) == []
    assert differences(first["lsuv"], alone) == []


@pytest.mark.parametrize("name", ["empty part", "mixed"])
def test_the_moments_of_the_inputs_are_those_of_the_whole_batch(two, name: str, tmp_path: Path):
    folder, _ = two
    fitted(*RUNS[name], "trainer.max_steps=1", folder=tmp_path / "alone")
    assert RunDir(folder / name).read()["inputs"] == RunDir(tmp_path / "alone").read()["inputs"]


# ---- the real thing: torchrun and the command line ----

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
TORCHRUN += ["-m", "cnnlab", "train"]
LONG = [
    "trainer.device=cpu", "trainer.precision=fp32", "trainer.threads=1", "trainer.epochs=6", "data.limit=400",
    "norm=group", "stats.every=5", "trainer.log_every=5",
]  # fmt: skip


def torchrun(*arguments: str) -> None:
    answer = subprocess.run([*TORCHRUN, *arguments], capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert answer.returncode == 0, answer.stderr.decode()


@pytest.mark.slow
def test_torchrun_makes_one_run_folder_and_goes_on_after_sigterm(tmp_path: Path):
    torchrun(*LONG, f"hydra.run.dir={tmp_path / 'whole'}")
    parts = tmp_path / "parts"
    process = subprocess.Popen(
        [*TORCHRUN, *LONG, f"hydra.run.dir={parts}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while sum(1 for _ in read_records(parts / "metrics.jsonl")) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    assert RunDir(parts).read()["status"] == "interrupted", output.decode()
    torchrun(f"resume={parts}")
    assert files_of(parts) == files_of(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts", "whole"]


@pytest.mark.slow
def test_without_a_folder_of_its_own_a_job_still_has_one(tmp_path: Path):
    """The time stamp in its name is rank 0's."""
    torchrun(*LONG, "trainer.max_steps=2", f"paths.outputs={tmp_path}")
    assert len(list(tmp_path.glob("*/*/run.json"))) == len(list(tmp_path.glob("*/*"))) == 1
