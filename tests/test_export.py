"""`cnnlab export`: what was trained, as files that compute the same elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import Answer
from lab_runs import fitted
from PIL import Image

import cnnlab
from cnnlab.building import export as exporting
from cnnlab.building.deployed import Deployed, Resized
from cnnlab.data.pixels import Pixels, Recipe
from cnnlab.data.pixels import fitted as pillows
from cnnlab.runs.folder import config_hash

Cli = Callable[..., Answer]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run"
    fitted("model=cnn", "task.views=mirror", "normalize=standardize", folder=folder)
    return folder


@pytest.mark.parametrize("fit", ["crop", "letterbox", "stretch"])
@pytest.mark.parametrize("size", [(61, 90), (200, 140), (20, 33), (64, 48), (501, 333)])
def test_the_resize_in_the_graph_is_pillows_to_the_pixel(fit: Any, size: tuple[int, int]):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    recipe = Recipe(3, 64, 48, fit, 72)
    expected = np.asarray(pillows(Pixels(Image.fromarray(pixels), recipe), recipe)).transpose(2, 0, 1)
    found = Resized(recipe)(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0].numpy()
    assert (found == expected).all()


def test_files_are_checked_and_say_whose_they_are(run: Path, cli: Cli, tmp_path: Path):
    answer = cli(
        "export", str(run), "--format", "torch", "--format", "state_dict", "--out", str(tmp_path / "e"), "--json"
    )
    assert answer.code == 0, answer.err
    about = json.loads(answer.out)
    assert [file["format"] for file in about["files"]] == ["state_dict", "torch"]
    assert all(max(file["differences"].values()) <= 1e-4 for file in about["files"])
    assert json.loads((tmp_path / "e" / "export.json").read_text()) == about
    network = cnnlab.open(run)
    assert about["classes"] == list(network.classes)
    kept = {"cnnlab.json": ""}
    program = torch.export.load(tmp_path / "e" / "model.pt2", extra_files=kept).module()
    assert json.loads(kept["cnnlab.json"]).items() <= about.items()
    assert about["config_hash"] == config_hash(network.experiment.config)
    for count, height, width in ((1, 8, 8), (3, 30, 17)):
        images = torch.randint(0, 256, (count, 1, height, width), dtype=torch.uint8)
        seen = Resized(network.recipe)(images)
        torch.testing.assert_close(program(images)[0], network.outputs(seen)["logits"], rtol=0, atol=1e-5)
    weights = torch.load(tmp_path / "e" / "weights.pt", weights_only=True)
    assert all(torch.equal(weights[name], tensor) for name, tensor in network.model.state_dict().items())
    card = (tmp_path / "e" / "README.md").read_text()
    assert "test/accuracy: 0." in card and "8x8" in card


def test_what_computes_something_else_does_not_stay(
    run: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def wrong(network: Any, module: Deployed, program: Any, about: Any) -> Any:
        return b"wrong", lambda batch: [one * 1.001 + 0.01 for one in module(batch)]

    monkeypatch.setitem(exporting._PACKERS, "state_dict", wrong)
    answer = cli("export", str(run), "--format", "state_dict", "--out", str(tmp_path / "e"))
    assert answer.code == 1 and "expected outputs within 0.0001" in answer.err
    assert not (tmp_path / "e").exists()


def test_without_its_packages_onnx_is_refused_in_words(run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    answer = cli("export", str(run))
    assert answer.code == 2 and "pip install 'cnnlab[export]'" in answer.err
    assert not (run / "export").exists() and "onnxruntime" not in sys.modules


def test_images_of_ones_own_to_try_it_on(run: Path, cli: Cli, tmp_path: Path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)).save(tmp_path / "x.png")
    to = ("--out", str(tmp_path / "e"), "--format", "state_dict")
    answer = cli("export", str(run), str(tmp_path / "x.png"), *to)
    assert answer.code == 0, answer.err
    assert "0.00% of the pixels differ" in answer.out
    refused = cli("export", str(run), str(tmp_path / "gone.png"), *to)
    assert refused.code == 3 and "gone.png" in refused.err
