"""Sweeps: every cell in its own folder, failures recorded, interruptions survived, `sweep.json` always true."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runs import RANK_1_OF_2, TINY, Answer, record_of, run_folders

from cnnlab.runs.folder import RunDir, claim
from cnnlab.train.run import Run

Cli = Callable[..., Answer]


def cells_of(folder: str | Path) -> list[dict[str, Any]]:
    return json.loads((Path(folder) / "sweep.json").read_text())["cells"]


def statuses(folder: str | Path) -> list[str]:
    return [cell["status"] for cell in cells_of(folder)]


class During:
    """Does something at the start of the training of some cells, counted from 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, action: Callable[[], None], *cells: int):
        self.begun = 0
        original = Run.tell

        def tell(run: Run, event: str, *arguments: object) -> None:
            original(run, event, *arguments)
            if event == "on_start":
                self.begun += 1
                if self.begun - 1 in cells:
                    action()

        monkeypatch.setattr(Run, "tell", tell)


def test_a_sweep(cli: Cli):
    answer = cli("train", "-m", *TINY, "seed=0,1", "optim.lr=0.1,0.2", "experiment=null")
    assert answer.code == 0, answer.err
    (folder,) = Path("outputs/sweeps").iterdir()
    document = json.loads((folder / "sweep.json").read_text())
    assert document["schema_version"] == 2
    cells = document["cells"]
    assert [cell["cell"] for cell in cells] == [0, 1, 2, 3]
    assert [cell["overrides"][-3:] for cell in cells] == [
        ["seed=0", "optim.lr=0.1", "~experiment"],
        ["seed=0", "optim.lr=0.2", "~experiment"],
        ["seed=1", "optim.lr=0.1", "~experiment"],
        ["seed=1", "optim.lr=0.2", "~experiment"],
    ]
    assert len({cell["config_hash"] for cell in cells}) == 4
    slow, fast = document["over_seeds"]
    assert (slow["overrides"], fast["overrides"]) == ({"optim.lr": "0.1"}, {"optim.lr": "0.2"})
    reached = [cells[number]["metrics"]["test/loss"] for number in (0, 2)]
    assert slow["metrics"]["test/loss"]["mean"] == pytest.approx(sum(reached) / 2)
    assert slow["metrics"]["test/loss"]["std"] == pytest.approx(abs(reached[0] - reached[1]) / 2**0.5)
    assert "mean ± standard deviation" in answer.out
    for cell in cells:
        record = record_of(folder / cell["run"])
        assert record["status"] == cell["status"] == "completed"
        assert record["metrics"] == cell["metrics"]
        assert record["config_hash"] == cell["config_hash"]
        assert record["choices"]["model"] == "resnet"
    assert record_of(folder / "0")["seed"] == 0
    table = [line for line in answer.out.splitlines() if line.startswith("│")]
    assert len(table) == 4 + 2  # and the means over the seeds
    headings = [line for line in answer.out.splitlines() if line.startswith("┃")]
    assert len(headings) == 2 and "seed" in headings[0]
    assert not any("data.limit" in heading for heading in headings), "what all cells share is no column"


def test_one_cell_is_the_same_as_a_run(cli: Cli):
    assert cli("train", "-m", *TINY, "hydra.sweep.dir=s").code == 0
    assert cli("train", *TINY, "hydra.run.dir=r").code == 0
    assert record_of(Path("s/0"))["metrics"] == record_of(Path("r"))["metrics"]
    assert record_of(Path("s/0"))["config_hash"] == record_of(Path("r"))["config_hash"]
    config, expected = RunDir("s/0").config(), RunDir("r").config()
    assert config == expected


def test_failing_cells_are_recorded_and_the_rest_goes_on(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise ZeroDivisionError("of ours")

    During(monkeypatch, fail, 1)
    answer = cli("train", "-m", *TINY, "optim.lr=1e38,0.1,0.2", "hydra.sweep.dir=s")
    assert answer.code == 1
    assert statuses("s") == ["diverged", "failed", "completed"]
    assert "non-finite" in cells_of("s")[0]["reason"]
    assert cells_of("s")[1]["reason"] == "ZeroDivisionError: of ours"
    assert "of ours" in Path("s/1/error.txt").read_text()
    assert "cell 1 failed: ZeroDivisionError: of ours (traceback in s/1/error.txt)" in answer.out
    assert "cell 1: ZeroDivisionError: of ours" in answer.err
    assert "Traceback" not in answer.err


def test_a_module_that_exits_ends_its_cell_only(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    def leave() -> None:
        raise SystemExit(3)

    During(monkeypatch, leave, 0)
    assert cli("train", "-m", *TINY, "seed=0,1", "hydra.sweep.dir=s").code == 1
    assert statuses("s") == ["failed", "completed"]


def test_json_is_one_document(cli: Cli):
    answer = cli("train", "-m", *TINY, "seed=0", "hydra.sweep.dir=s", "--json")
    document = json.loads(answer.out)
    assert document["sweep"] == "s"
    assert document["cells"] == cells_of("s")
    assert "cell 0: " in answer.err


def test_wrong_cells_are_refused_before_the_first_one(cli: Cli):
    answer = cli("train", "-m", *TINY, "seed=0,1", "optim.lr=0.1,abc", "model.dpeth=3")
    assert answer.code == 2
    assert not Path("outputs").exists()
    assert len(answer.problems) == 2
    assert "in 2 cells, first: " in answer.err
    assert "optim.lr=abc" in answer.err
    assert "did you mean `depth`" in answer.err


def test_missing_data_is_told_before_the_first_cell(cli: Cli):
    answer = cli("train", "-m", *TINY[1:], "data=folder", "data.root=nowhere,gone")
    assert answer.code == 3
    assert "data.root=nowhere" in answer.err
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["seed=interval(0,1)"], "expected values to list"),
        (["seed=0,1", "resume=x"], "type it without -m"),
        (["seed=0,1", "hydra.sweep.subdir=same"], "several cells one folder"),
        (["seed=0,1", "hydra.sweep.subdir=${nope}"], "nope"),
        (["seed=0,1", "hydra.sweep.dir=file/s"], "cannot be written"),
        (["seed=0,1", "hydra/launcher=nothing"], "no option 'nothing'"),
        (["seed=0,1", "hydra.sweeper._target_=other.Sweeper"], "type hydra/sweeper=basic"),
    ],
)
def test_sweeps_that_are_refused(cli: Cli, overrides: list[str], words: str):
    Path("file").write_text("")
    answer = cli("train", "-m", *TINY, *overrides)
    assert answer.code == 2, answer.err
    assert words in answer.err
    assert not run_folders(Path())


def test_torchrun_and_sweeps(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    for name, value in RANK_1_OF_2.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "without -m" in cli("train", "-m", *TINY, "seed=0,1").err


def test_an_interrupted_sweep_goes_on(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patched:
        During(patched, lambda: os.kill(os.getpid(), signal.SIGTERM), 1)
        answer = cli("train", "-m", *TINY, "seed=0,1,2", "hydra.sweep.dir=s")
    assert answer.code == 143
    assert statuses("s") == ["completed", "interrupted", "pending"]
    assert "interrupted by SIGTERM: 1 completed, 1 interrupted, 1 pending" in answer.err
    assert "hydra.sweep.dir=s" in answer.err
    first = Path("s/0/run.json").read_bytes()

    answer = cli("train", "-m", *TINY, "seed=0,1,2", "hydra.sweep.dir=s")
    assert answer.code == 0, answer.err
    assert statuses("s") == ["completed"] * 3
    assert "cell 0: done before" in answer.out
    assert Path("s/0/run.json").read_bytes() == first

    assert cli("train", *TINY, "seed=1", "hydra.run.dir=unbroken").code == 0
    assert cells_of("s")[1]["metrics"] == record_of(Path("unbroken"))["metrics"]


def test_ctrl_c_in_a_cell(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    During(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT), 0)
    answer = cli("train", "-m", *TINY, "seed=0,1", "hydra.sweep.dir=s")
    assert answer.code == 130
    assert statuses("s") == ["interrupted", "pending"]


def test_ctrl_c_between_two_cells(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cnnlab.building.launch.launch", interrupted)
    assert cli("train", "-m", *TINY, "seed=0,1", "hydra.sweep.dir=s").code == 130
    assert statuses("s") == ["pending", "pending"]


def test_a_failed_cell_begins_again(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patched:
        During(patched, lambda: [][0], 0)
        assert cli("train", "-m", *TINY, "seed=0,1", "hydra.sweep.dir=s").code == 1
    assert cli("train", "-m", *TINY, "seed=0,1", "hydra.sweep.dir=s").code == 0
    assert statuses("s") == ["completed", "completed"]
    assert not Path("s/0/error.txt").exists()


def test_another_sweep_needs_another_folder(cli: Cli):
    assert cli("train", "-m", *TINY, "seed=0", "hydra.sweep.dir=s").code == 0
    answer = cli("train", "-m", *TINY, "seed=1", "hydra.sweep.dir=s")
    assert answer.code == 2
    assert "s holds another sweep already" in answer.err
    Path("t/0").mkdir(parents=True)
    assert "which is no part of a sweep" in cli("train", "-m", *TINY, "seed=1", "hydra.sweep.dir=t").err


def test_a_sweep_that_is_running(cli: Cli):
    Path("s").mkdir()
    with claim(Path("s/.lock"), "taken"):
        answer = cli("train", "-m", *TINY, "seed=0", "hydra.sweep.dir=s")
    assert answer.code == 2
    assert "another process is running this sweep" in answer.err


def test_a_process_that_vanished(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    """A launcher's process that is killed leaves `running` behind, and nobody holds its lock."""

    def vanish(composed: Any, *_: object, **__: object) -> None:
        run = RunDir(composed.run_dir)
        run.create(composed.config, composed.overrides)
        run.update(status="running")

    with monkeypatch.context() as patched:
        patched.setattr("cnnlab.building.launch.launch", vanish)
        answer = cli("train", "-m", *TINY, "seed=0", "hydra.sweep.dir=s")
    assert answer.code == 1
    assert statuses("s") == ["killed"]
    assert "its process is gone" in answer.out
    assert cli("train", "-m", *TINY, "seed=0", "hydra.sweep.dir=s").code == 0, "it had no checkpoint: it begins again"


def test_a_cell_that_another_process_runs_is_left_alone(cli: Cli):
    """A job of Slurm outlives the sweep that started it."""
    assert cli("train", "-m", *TINY, "seed=0,1", "trainer.max_steps=1", "hydra.sweep.dir=s").code == 0
    cell = RunDir("s/1")
    cell.last.unlink()
    cell.best.unlink()
    cell.update(status="running")
    before = {path: path.read_bytes() for path in Path("s/1").rglob("*") if path.is_file()}
    with claim(Path("s/1/.hydra/lock"), "taken"):
        before.pop(Path("s/1/.hydra/lock"))
        answer = cli("train", "-m", *TINY, "seed=0,1", "trainer.max_steps=1", "hydra.sweep.dir=s")
        assert statuses("s") == ["completed", "running"]
    assert answer.code == 1
    assert "s/1: another process is writing this run" in answer.err
    assert {path: path.read_bytes() for path in before} == before


def test_a_folder_that_says_what_differs(cli: Cli):
    assert cli("train", "-m", *TINY, "seed=3,4", "hydra.sweep.dir=s", "hydra.sweep.subdir=seed-${seed}").code == 0
    assert [path.name for path in run_folders(Path("s"))] == ["seed-3", "seed-4"]
    assert [cell["run"] for cell in cells_of("s")] == ["seed-3", "seed-4"]


@pytest.mark.parametrize(
    "override",
    [
        "+hydra.callbacks={x: {_target_: os.system, command: touch EXECUTED}}",
        "+hydra.callbacks={x: {_target_: torch.nn.ReLU}}",
        "+hydra.callbacks={x: {_target_: hydra.experimental.callback.Callback, y: {_target_: torch.nn.ReLU}}}",
        "+hydra.launcher.x={_target_: torch.nn.ReLU}",
        "+hydra.launcher.x=[{_target_: os.system, command: touch EXECUTED}]",
    ],
)
def test_hydras_own_parts(cli: Cli, override: str):
    answer = cli("train", "-m", *TINY, "seed=0,1", override)
    assert answer.code == 2
    assert "hydra." in answer.err
    assert not Path("EXECUTED").exists()
    assert run_folders(Path()) == []


def test_a_callback(cli: Cli):
    callback = "+hydra.callbacks={x: {_target_: hydra.experimental.callback.Callback}}"
    assert cli("train", "-m", *TINY, "seed=0", callback).code == 0
