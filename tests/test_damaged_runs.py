"""Run folders whose records, evidence or checkpoints hold what no run has written: refused by name, never a fault."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lab_runs import interrupted_at, resume_run

from cnnlab.errors import CheckpointError
from cnnlab.optim.schedule import Plateau
from cnnlab.runs import checkpoint
from cnnlab.runs.checkpoint import require_alike
from cnnlab.runs.folder import RunDir
from cnnlab.sinks.jsonl import read_records
from cnnlab.train import fit


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted in its second epoch."""
    folder = tmp_path_factory.mktemp("whole")
    interrupted_at(6, "model=cnn", "model.widths=[4]", "regularization.ema=0.9", "optim=rmsprop", folder=folder)
    return folder


@pytest.fixture
def own(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "own")


def altered(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A checkpoint of another content, whose checksum is right."""
    state = checkpoint.load(path)
    change(state)
    checkpoint.save(state, path)


def test_the_best_checkpoint_is_looked_at_when_a_resume_begins(own: Path):
    folder, before = RunDir(own), (own / "metrics.jsonl").read_bytes()
    changed(folder.best, lambda state: state["model"].popitem())
    with pytest.raises(CheckpointError, match=r"best\.pt: its model does not fit"):
        resume_run(own)
    assert (own / "metrics.jsonl").read_bytes() == before


def test_a_record_that_is_gone_is_told_by_a_resume(own: Path, cli: Callable[..., Any]):
    (own / "run.json").unlink()
    answer = cli("train", f"resume={own}")
    assert answer.code == 0 and "run.json is gone or empty" in answer.out


@pytest.mark.parametrize("damage", ["taken away", "emptied", "another document"])
def test_a_record_that_is_damaged_under_a_run_is_made_whole(tmp_path: Path, damage: str):
    folder = RunDir(tmp_path)
    with folder.claimed():
        folder.update(status="running", seed=3)
        if damage == "taken away":
            folder.run_json.unlink()
        else:
            folder.run_json.write_text("" if damage == "emptied" else "[]")
        folder.update(steps=5)
    assert folder.read() == {"schema_version": 2, "status": "killed", "seed": 3, "steps": 5} | {
        "reason": folder.read()["reason"]
    }
    folder.run_json.write_text("[]")
    with pytest.raises(CheckpointError, match=r"run\.json"), folder.claimed():
        folder.update(steps=6)


RECORDS = ("metrics.jsonl", "stats.jsonl", "evidence/sample_loss.f16")


@pytest.mark.parametrize("name", RECORDS)
def test_one_altered_bit_of_a_record_is_noticed_on_a_resume(own: Path, name: str):
    altered(own / name)
    before = {path: (own / path).read_bytes() for path in RECORDS}
    with pytest.raises(CheckpointError, match=rf"{name} is damaged.*take the file away"):
        resume_run(own)
    assert (own / name).read_bytes() == before[name], "it is left for whoever wants to look"
    (own / name).unlink()
    run = resume_run(own)
    assert any(name in notice for notice in run.notices), "what is missing is told"
    fit(run)


def test_what_was_lost_and_filled_up_goes_on_with_its_own_checksum(own: Path):
    (own / "evidence" / "sample_loss.f16").unlink()
    fit(resume_run(own))
    fit(resume_run(own, epochs=3))
    rows = np.fromfile(own / "evidence" / "sample_loss.f16", np.float16).reshape(3, -1)
    assert np.isnan(rows).mean(1).tolist() == [1, 0, 0], "what was lost is NaN, never a loss of 0"


@pytest.mark.parametrize("name", [*RECORDS, "error.txt", "evidence/shape.json", "run.json"])
def test_a_folder_or_a_pipe_in_a_files_place_is_refused_by_name(own: Path, name: str):
    (own / name).unlink(missing_ok=True)
    (own / name).mkdir()
    with pytest.raises(CheckpointError, match=name):
        RunDir(own).require_kinds()
    (own / name).rmdir()
    os.mkfifo(own / name)
    with pytest.raises(CheckpointError, match=name):
        RunDir(own).require_kinds()


@pytest.mark.parametrize("name", ["evidence", "tensorboard", "checkpoints"])
def test_a_file_in_a_folders_place_is_refused_by_name(own: Path, name: str):
    shutil.rmtree(own / name, ignore_errors=True)  # a run from Python has no tensorboard/
    (own / name).touch()
    with pytest.raises(CheckpointError, match=f"{name} is damaged: expected a folder"):
        RunDir(own).require_kinds()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[1]", "expected a JSON object, received a list"),
        (b"{}", "a `step`"),
        (b'{"step": "1"}', "expected `step` to be a count, received a text"),
        (b'{"step": 1, "lr": []}', "expected `lr` to be a number or null"),
        (b'{"step": 1, "layers": 3}', "expected `layers` to be a list of texts"),
        (b'{"step": NaN}', "NaN is no JSON"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_line_of_another_kind_is_refused_by_name(tmp_path: Path, line: bytes, words: str):
    path = tmp_path / "stats.jsonl"
    path.write_bytes(b'{"step":1}\n' + line + b"\n")
    with pytest.raises(CheckpointError, match=rf"stats\.jsonl is damaged: line 2: .*{words}"):
        list(read_records(path))


def first(state: Any) -> str:
    return next(iter(state))


def cast(state: dict[str, Any]) -> None:
    state["model"][first(state["model"])] = state["model"][first(state["model"])].double()


def cut(state: dict[str, Any]) -> None:
    state["ema"]["average"][0] = state["ema"]["average"][0][:1]


def narrow_losses(state: dict[str, Any]) -> None:
    state["evidence"]["losses"] = state["evidence"]["losses"].half()


def broadcast(state: dict[str, Any]) -> None:
    state["normalize"]["normalize"] = {name: torch.zeros(3, 1) for name in state["normalize"]["normalize"]}


def unfitted(state: dict[str, Any]) -> None:
    state["normalize"] = {}


def half_a_row(state: dict[str, Any]) -> None:
    state["evidence"]["rows"] = 0.5


def no_stretch(state: dict[str, Any]) -> None:
    state["observer"]["stretch"] = 0


def flat_taps(state: dict[str, Any]) -> None:
    state["taps"]["idle"] = [torch.zeros(2, 2) for _ in state["taps"]["idle"]]


WRONG = (cast, cut, narrow_losses, broadcast, unfitted, half_a_row, no_stretch, flat_taps)


@pytest.mark.parametrize("change", WRONG)
def test_shapes_and_types_of_no_state_of_this_run_are_refused(own: Path, change: Callable[[dict[str, Any]], None]):
    path = own / "checkpoints" / "last.pt"
    state = checkpoint.load(path)
    change(state)
    checkpoint.save(state, path)
    with pytest.raises(CheckpointError, match=r"last\.pt: its "):
        resume_run(own)


def test_what_grows_or_is_not_there_yet_says_nothing():
    require_alike({"best": None, "names": [], "step": 0}, {"best": 1.5, "names": ["a"], "more": 1})
    require_alike({"lr": torch.tensor(0.1)}, {"lr": 0.1})
    for own, found in (({"a": 1}, {"a": "1"}), ({"a": True}, {"a": 1}), ({"a": []}, {"a": {}}), ({}, [])):
        with pytest.raises(ValueError, match="of type"):
            require_alike(own, found)


def _without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.pop(name)


def _with(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update({name: value})


@pytest.mark.parametrize("verb", [["eval"], ["train"]], ids=" ".join)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without("trainer"), "trainer"),
        (_without("model"), "model"),
        (_without("seed"), "seed"),
        (_with("loading", 3), "loading"),
        (_with("trainer", {"epochs": "ten"}), "trainer.epochs"),
        (_with("data", []), "data"),
        (_with("augment", "crop"), "augment"),
    ],
)
def test_a_config_that_no_run_has_written_is_exit_5_and_its_name(
    own: Path, cli: Callable[..., Any], verb: list[str], change: Callable[[dict[str, Any]], None], words: str
):
    path = own / ".hydra" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config))
    answer = cli(*verb, str(own)) if verb == ["eval"] else cli(*verb, f"resume={own}")
    assert answer.code == 5, answer.err
    assert "config.yaml" in answer.err and words in answer.err
    assert "fault of cnnlab" not in answer.err


# ---- the optimizer's state, the sums of an epoch's first part, and what a fresh part does not have yet ----


def of_first(state: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's state of its first parameter."""
    return state["optimizer"]["state"][0]


def other_shape(state: dict[str, Any]) -> None:
    of_first(state)["square_avg"] = of_first(state)["square_avg"][:1]


def other_dtype(state: dict[str, Any]) -> None:
    of_first(state)["square_avg"] = of_first(state)["square_avg"].double()


def no_such_value(state: dict[str, Any]) -> None:
    of_first(state).pop("square_avg")


def no_such_parameter(state: dict[str, Any]) -> None:
    state["optimizer"]["state"][99] = of_first(state)


def others_groups(state: dict[str, Any]) -> None:
    state["optimizer"]["param_groups"][0]["params"].reverse()


def wide_sum(state: dict[str, Any]) -> None:
    state["totals"]["ranks"][0] = {name: value.new_zeros(2) for name, value in state["totals"]["ranks"][0].items()}


def no_sum(state: dict[str, Any]) -> None:
    state["totals"]["ranks"][0].pop(first(state["totals"]["ranks"][0]))


def sums_of_no_rank(state: dict[str, Any]) -> None:
    state["totals"]["ranks"] = [3]


def endless_rows(state: dict[str, Any]) -> None:
    state["evidence"]["rows"] = 10**12


def size_below_zero(state: dict[str, Any]) -> None:
    state["records"]["metrics"] = -1


def events_without_size(state: dict[str, Any]) -> None:
    state["records"]["events"] = {"events.out.tfevents.1": "long"}


LATER = (
    *(other_shape, other_dtype, no_such_value, no_such_parameter, others_groups),
    *(wide_sum, no_sum, sums_of_no_rank, endless_rows, size_below_zero, events_without_size),
)


@pytest.mark.parametrize("change", LATER, ids=lambda change: change.__name__)
def test_what_no_update_leaves_behind_is_refused_and_the_records_stay(
    own: Path, change: Callable[[dict[str, Any]], None]
):
    path = own / "checkpoints" / "last.pt"
    state = checkpoint.load(path)
    change(state)
    checkpoint.save(state, path)
    before = {name: (own / name).read_bytes() for name in RECORDS}
    with pytest.raises(CheckpointError, match=r"last\.pt: its (optimizer|totals|evidence|records) does? ?not|do not"):
        fit(resume_run(own))
    assert all((own / name).read_bytes()[: len(content)] == content for name, content in before.items())


def test_a_setting_that_an_earlier_version_did_not_keep_is_the_configs(own: Path):
    path = own / "checkpoints" / "last.pt"
    state = checkpoint.load(path)
    state["optimizer"]["param_groups"][0].pop("alpha")
    checkpoint.save(state, path)
    assert resume_run(own).optimizer.param_groups[0]["alpha"] == 0.9


@pytest.mark.parametrize("best", ["1", float("nan"), [1]])
def test_a_plateau_takes_a_number_as_its_best(best: object):
    schedule = Plateau()
    schedule.observe(0.5, "max")
    with pytest.raises(ValueError, match="expected a number as the best value"):
        schedule.load_state_dict({**schedule.state_dict(), "best": best})


@pytest.mark.parametrize("name", ["classes", "class_counts", "size"])
def test_an_evaluation_refuses_data_that_no_run_had(own: Path, cli: Callable[..., Any], name: str):
    path = own / "checkpoints" / "last.pt"
    state = checkpoint.load(path)
    state["origin"]["data"][name] = [{"a": 1}]
    checkpoint.save(state, path)
    answer = cli("eval", str(own), "--checkpoint", "last")
    assert answer.code == 5, answer.err
    assert "last.pt" in answer.err and name in answer.err
