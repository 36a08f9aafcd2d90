"""`cnnlab probe` as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_runs import Answer

from cnnlab.sinks import figures
from cnnlab.verbs.probe import labels

Cli = Callable[..., Answer]
FEW = ("data.limit=64", "--images", "8")
SMALL = (*FEW, "model=cnn", "model.widths=[4,8]")
DEEP = (*FEW, "model=plain20", "model.width=8", "norm=none")


def document(cli: Cli, *arguments: str) -> dict[str, Any]:
    answer = cli("probe", *arguments, "--json", "--no-figure")
    assert answer.code == 0, answer.err
    return json.loads(answer.out)


def test_the_document_of_one_config(cli: Cli):
    found = document(cli, *SMALL)
    (config,) = found["configs"]
    assert found["figure"] is None and config["findings"] == [] and config["mended_by"] is None
    assert (config["model"], config["init"], config["images"]) == ("CNN", "Own", 8)
    assert [row["kind"] for row in config["layers"]] == ["relu", "relu"]
    first = config["layers"][0]
    assert set(first["theory"]) == {"pre_std", "std", "signal", "gradient", "angle"}
    assert first["pre_std"] == pytest.approx(1, abs=1e-3)  # behind batch norm
    assert [row["name"] for row in config["outputs"]] == ["logits"]
    assert len(config["jacobian"]["singular_values"]) == 10 and config["jacobian"]["exact"]
    assert list(Path().iterdir()) == []


def test_pytorchs_default_in_a_deep_plain_net_is_flagged_and_mended(cli: Cli):
    answer = cli("probe", *DEEP, "init=default", "--no-figure")
    assert answer.code == 0
    assert "the signal dies at layer" in answer.out and "the gradient vanishes" in answer.out
    assert "PyTorch's default gives weights a variance of 1/(3 fan_in)" in answer.out
    assert "mended by init=he init.mode=fan_in" in answer.out
    assert document(cli, *DEEP, "init=he", "init.mode=fan_in")["configs"][0]["findings"] == []


def test_configs_are_told_apart_by_what_differs(cli: Cli):
    found = document(cli, "-m", *SMALL, "init=he,xavier", "norm=none")
    assert [config["label"] for config in found["configs"]] == ["init=he", "init=xavier"]
    assert labels([["a=1"], ["a=1"]]) == ["a=1", "a=1"]
    shown = cli("probe", "-m", *SMALL, "init=he,xavier", "norm=none", "--no-figure").out
    assert "Signals of 2 untrained networks" in shown and shown.count("fine") == 2


def test_one_figure_for_all(cli: Cli):
    pytest.importorskip("matplotlib")
    answer = cli("probe", "-m", *SMALL, "init=default,zeros", "norm=none", "--figure", "new/here.png")
    assert answer.code == 0, answer.err
    assert Path("new/here.png").read_bytes().startswith(b"\x89PNG")
    assert "figure: new/here.png" in answer.out
    assert cli("probe", *SMALL).code == 0
    (drawn,) = Path("outputs/figures").iterdir()
    assert drawn.name.startswith("probe-") and drawn.suffix == ".png"


def test_a_run_folder_as_it_began(cli: Cli):
    assert cli("train", "data.limit=64", "model=cnn", "model.widths=[4,8]", "trainer.epochs=1", "name=one").code == 0
    (run,) = Path("outputs/one").iterdir()
    before = (run / "run.json").read_bytes()
    (found,) = document(cli, str(run), "--images", "8")["configs"]
    assert found["run"] == str(run)
    (fresh,) = document(cli, *SMALL)["configs"]
    assert found["layers"] == fresh["layers"]
    assert (run / "run.json").read_bytes() == before and not (run / "figures").exists()


def test_without_matplotlib_there_is_all_but_the_figure(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(figures, "can_draw", lambda: False)
    answer = cli("probe", *SMALL)
    assert answer.code == 0 and "fine" in answer.out
    assert "pip install 'cnnlab[figures]'" in answer.err
    assert not Path("outputs").exists()
    asked = cli("probe", *SMALL, "--figure", "a.png")
    assert asked.code == 2 and "pip install 'cnnlab[figures]'" in asked.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--images", "1"], "expected 2 or more"),
        (["--figure", "a.pdf"], "ends in .png"),
        (["--figure", "a.png", "--no-figure"], "expected one of them"),
        (["nowhere"], "nowhere"),
        (["nowhere", "seed=1"], "`seed=1`: a run folder has its own config"),
        (["resume=there"], "cnnlab probe there"),
        (["model=resnt"], "did you mean"),
    ],
)
def test_mistakes_are_told(cli: Cli, arguments: list[str], words: str):
    answer = cli("probe", *arguments)
    assert answer.code == 2 and words in answer.err and "Traceback" not in answer.err
    assert list(Path().iterdir()) == []


def test_what_mends_is_what_the_configs_say():
    from cnnlab.composing.composer import config_root
    from cnnlab.diagnose.probe import INITS, NORM

    for typed, config in [*INITS.values(), NORM]:
        group, _, option = typed.split()[0].partition("=")
        stated = yaml.safe_load((config_root() / group / f"{option}.yaml").read_text())
        assert stated["_target_"] == config["_target_"]
