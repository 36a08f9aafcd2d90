"""`cnnlab landscape` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import TINY, Answer
from PIL import Image

Cli = Callable[..., Answer]
QUICK = ("--samples", "48", "--products", "10", "--probes", "2", "--steps", "4", "--points", "3", "--top", "1")


def test_it_measures_an_experiment_at_initialization(cli: Cli, tmp_path: Path):
    answer = cli("landscape", *TINY, *QUICK)
    assert answer.code == 0, answer.err
    for word in ("λmax", "λmin", "trace", "noise scale", "gradient's variance", "at initialization", "float32"):
        assert word in answer.out
    assert "mode                     train: moments of each micro-batch" in answer.out
    assert "-> " in answer.out
    assert [path.name for path in tmp_path.iterdir()] == ["landscape.png"]
    with Image.open("landscape.png") as picture:
        assert picture.size[0] > 1000


def test_json_of_some_parts_in_another_mode_and_precision(cli: Cli, tmp_path: Path):
    flags = ("--parts", "eigenvalues,noise", "--mode", "frozen", "--precision", "fp64", "--json", "--no-figure")
    answer = cli("landscape", *TINY, *QUICK, *flags)
    document = json.loads(answer.out)
    assert (document["mode"], document["norms"], document["dtype"]) == ("frozen", "running moments", "float64")
    assert len(document["eigenvalues"]["residuals"]) == 2 and document["noise_scale"]["low"] >= 0
    assert document["surface"] is None and "spectrum" not in document
    assert document["verdicts"][0]["name"] in ("slope", "undecided")
    assert not list(tmp_path.iterdir())


def test_a_run_folder_is_measured_at_its_checkpoint_and_stays_as_it_is(cli: Cli):
    assert cli("train", *TINY, "hydra.run.dir=here").code == 0
    before = {path: path.read_bytes() for path in Path("here").rglob("*") if path.is_file()}
    answer = cli("landscape", "here", *QUICK, "--parts", "noise", "--checkpoint", "best")
    assert answer.code == 0, answer.err
    assert "best checkpoint, step 2" in answer.out
    Path("here/figures/landscape.png").unlink()
    assert {path: path.read_bytes() for path in Path("here").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--parts", "eigenvalue"), "did you mean `eigenvalues`?"),
        (("--parts", ","), "received none"),
        (("--samples", "1"), "--samples: expected 2 or more, received 1"),
        (("--points", "two"), "invalid int value"),
        (("--tolerance", "nan"), "--tolerance: expected"),
        (("--mode", "test"), "choose from 'train', 'frozen', 'eval'"),
        (("--precision", "bf16"), "choose from 'fp32', 'fp64'"),
        (("--device", "cpu"), "type trainer.device=cpu"),
    ],
)
def test_a_mistake_is_one_message(cli: Cli, tmp_path: Path, flags: tuple[str, ...], told: str):
    answer = cli("landscape", *TINY, *flags)
    assert answer.code == 2 and told in answer.err and answer.out == ""
    assert not list(tmp_path.iterdir())


def test_a_run_folder_that_is_none_is_one_message(cli: Cli):
    answer = cli("landscape", "nowhere")
    assert answer.code == 2 and "nowhere" in answer.err


def test_layers_and_the_way_to_another_checkpoint(cli: Cli, tmp_path: Path):
    assert cli("train", *TINY, "trainer.epochs=2", "hydra.run.dir=one").code == 0
    assert cli("train", *TINY, "seed=1", "hydra.run.dir=two").code == 0
    answer = cli("landscape", "one", *QUICK, "--parts", "layers,surface", "--towards", "two", "--figure", "f.png")
    assert answer.code == 0, answer.err
    assert "barrier" in answer.out and "trace" in answer.out and "conv" in answer.out
    with Image.open("f.png") as picture:
        assert picture.size[0] > 1000
    flags = ("--parts", "surface", "--towards", "best", "--json", "--no-figure")
    document = json.loads(cli("landscape", "one", *QUICK, *flags).out)
    assert document["path"]["places"][0] == -0.5 and "eigenvalues" not in document
    assert document["surface"]["directions"][0].startswith("from these weights")
    at = document["surface"]["x"]
    assert (min(at), max(at)) == (-0.5, 1.5)
    assert cli("landscape", *TINY, "--towards", "best").code == 2
    assert cli("landscape", "one", *QUICK, "--towards", "one", "--mode", "eval").code == 2
    assert cli("landscape", "one", *QUICK, "--towards", "nowhere").code == 2
    assert cli("train", *TINY, "model.width=8", "hydra.run.dir=o").code == 0
    other = cli("landscape", "one", *QUICK, "--towards", "o")
    assert other.code == 2 and "of the same network" in other.err
