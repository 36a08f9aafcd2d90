"""`cnnlab lr-find`, and `optim.lr=auto`, which takes what it finds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import TINY, Answer
from lab_runs import all_state, differences, fitted, interrupted_at, make_run, resume_run
from PIL import Image

from cnnlab.train import fit

Cli = Callable[..., Answer]
SHORT = ("--steps", "30")


def test_it_shows_every_rule_and_leaves_nothing_but_a_figure(cli: Cli, tmp_path: Path):
    answer = cli("lr-find", *TINY, *SHORT)
    assert answer.code == 0, answer.err
    assert all(f"\n{rule} " in answer.out for rule in ("valley", "steep", "minimum", "limit"))
    assert "optim.lr=" in answer.out
    assert [path.name for path in tmp_path.iterdir()] == ["lr-find.png"]
    with Image.open("lr-find.png") as picture:
        assert picture.size[0] > 600


def test_json_is_one_document(cli: Cli, tmp_path: Path):
    answer = cli("lr-find", *TINY, *SHORT, "--json", "--no-figure", "--lowest", "1e-3", "--rule", "minimum")
    document = json.loads(answer.out)
    assert document["rule"] == "minimum" and document["suggestion"] == document["suggestions"]["minimum"]
    assert document["lr"][0] == pytest.approx(1e-3)
    assert len(document["lr"]) == len(document["loss"]) == len(document["smoothed"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--rule", "steap"), "did you mean `steep`?"),
        (("--lowest", "1", "--highest", "0.1"), "from 1 to 0.1"),
        (("--steps", "2"), "at least 10 steps"),
        (("--figure", "a.jpg"), "--figure: expected a file NAME.png"),
        (("--figure", "nowhere/a.png"), "in a folder that there is"),
        (("--checkpoint", "best"), "--checkpoint: there is no run folder"),
        (("-m", "optim=sgd,adam"), "takes one experiment"),
    ],
)
def test_a_mistake_is_one_message(cli: Cli, tmp_path: Path, arguments: tuple[str, ...], told: str):
    answer = cli("lr-find", *TINY, *arguments)
    assert answer.code == 2 and told in answer.err and answer.out == ""
    assert not list(tmp_path.iterdir())


def test_a_curve_without_a_suggestion_is_shown_and_is_exit_2(cli: Cli):
    answer = cli("lr-find", *TINY, *SHORT, "--no-figure", "--highest", "1e-5")
    assert answer.code == 2
    assert "valley                   -" in answer.out and "the loss does not fall at any rate up to 1e-05" in answer.err


def test_a_run_folder_is_measured_where_it_stands_and_stays_as_it_is(cli: Cli, tmp_path: Path):
    assert cli("train", *TINY, "hydra.run.dir=here").code == 0
    before = files()
    answer = cli("lr-find", "here", *SHORT)
    assert answer.code == 0, answer.err
    assert "last checkpoint, step 2" in answer.out
    picture = Path("here/figures/lr-find.png")
    assert picture.exists()
    picture.unlink()
    assert files() == before
    assert "expected overrides or one run folder" in cli("lr-find", "here", "optim=adam").err


# ---- optim.lr=auto ----


def test_auto_trains_at_the_rate_that_the_test_suggests(tmp_path: Path):
    """Bit for bit what typing that rate trains."""
    found = make_run("optim.lr=auto")
    rate = found.optimizer.param_groups[0]["base_lr"]
    assert rate == found.curve.suggestion()
    assert any(f"rate: optim.lr={rate:.3g}, by the rule `valley`" in notice for notice in found.notices)
    typed = fitted(f"optim.lr={rate!r}")
    fit(found)
    assert differences(*(without_origin(run) for run in (typed, found))) == []


def test_a_resumed_run_keeps_the_rate_it_found(tmp_path: Path):
    unbroken = fitted("optim.lr=auto", folder=tmp_path / "unbroken")
    interrupted_at(3, "optim.lr=auto", folder=tmp_path / "broken")
    resumed = resume_run(tmp_path / "broken")
    assert resumed.curve is None and resumed.origin.resolved.lr == unbroken.origin.resolved.lr is not None
    fit(resumed)
    assert differences(without_origin(unbroken), without_origin(resumed)) == []


def test_run_json_says_which_rate_it_was(cli: Cli):
    assert cli("train", *TINY, "optim.lr=auto", "hydra.run.dir=here").code == 0
    record = json.loads(Path("here/run.json").read_text())
    assert record["lr"] == pytest.approx(record["range_test"]["suggestions"]["valley"], rel=0.01)
    assert cli("eval", "here").code == cli("train", "resume=here", "trainer.epochs=2").code == 0
    assert cli("summary", *TINY, "optim.lr=auto").code == 0


def test_auto_is_for_the_rate_alone(cli: Cli):
    answer = cli("train", *TINY, "optim.momentum=auto")
    assert answer.code == 2 and "`optim.momentum=" in answer.err
    assert cli("train", *TINY, "optim.lr=automatic").code == 2


def files() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path("here").rglob("*") if path.is_file()}


def without_origin(run):  # type: ignore[no-untyped-def]
    state = all_state(run)
    return {name: part for name, part in state.items() if name != "origin"}
