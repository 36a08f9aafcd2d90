"""`cnnlab explain` on small runs: pictures, their words, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runs import Answer
from lab_runs import fitted
from PIL import Image

from cnnlab.explain.maps import Map
from cnnlab.explain.pictures import cell, painted

Cli = Callable[..., Answer]
SHAPES = ("data=shapes", "data.train=60", "data.val=12", "data.test=12", "data.limit=null", "data.size=16")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explained") / "run"
    fitted(*SHAPES, "trainer.epochs=1", folder=folder)
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pictures_of_the_runs_data_and_nothing_else_in_the_folder_changes(run: Path, cli: Cli):
    before = contents(run)
    answer = cli("explain", str(run), "--count", "3", "--targets", "top2,true", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert [each["image"] for each in found["images"]] == ["test 0", "test 6", "test 11"]
    maps = found["images"][0]["maps"]
    assert {each["method"] for each in maps} == {"saliency", "smoothgrad", "gradcam", "gradcam++"}
    first, second = maps[0], maps[len(maps) // 3]  # of three targets
    assert first["score"] > second["score"] and 0 < first["probability"] < 1
    for each in found["images"]:
        with Image.open(run / "explain" / each["picture"]) as picture:
            assert picture.width > 900
    after = contents(run)
    assert {path: after.get(path) for path in before} == before
    assert {path.parent.name for path in after.keys() - before.keys()} == {"explain"}
    again = cli("explain", str(run), "--count", "3", "--targets", "top2,true", "--json")
    assert contents(run) == after and again.out == answer.out


def test_ones_own_images_and_those_that_cannot_be_read(run: Path, cli: Cli, tmp_path: Path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 30, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"photo {number}.png")
    (photos / "torn.png").write_bytes(b"no image")
    out = tmp_path / "out"
    answer = cli("explain", str(run), str(photos), "--out", str(out), "--methods", "gradcam", "--targets", "ring")
    assert answer.code == 3 and "torn.png" in answer.err and "1 of 3" in answer.err
    assert sorted(path.name for path in out.glob("*.png")) == ["000-photo-0.png.png", "001-photo-1.png.png"]
    assert "ring" in answer.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "gradkam"], "expected saliency"),
        (["--targets", "rinng"], "did you mean `ring`"),
        (["--targets", "top7"], "top1 to top6"),
        (["--targets", "box:x1"], "gives no box"),
        (["--layers", "layer9"], "not in this network"),
        (["nowhere.png"], "no such image"),
        (["--count", "0"], "1 or more"),
        (["optim.lr=3"], "expected data=OPTION"),
    ],
)
def test_mistakes_are_one_message(run: Path, cli: Cli, words: list[str], said: str):
    answer = cli("explain", str(run), *words)
    assert answer.code == 2 and said in answer.err and "Traceback" not in answer.err


def test_segmentation_and_localization(cli: Cli, tmp_path: Path):
    for task, target in (("segmentation", "ring"), ("localization", "box:y2")):
        fitted(*SHAPES, f"task={task}", "trainer.epochs=1", folder=tmp_path / task)
        answer = cli("explain", str(tmp_path / task), "--count", "2", "--targets", f"predicted,{target}", "--json")
        assert answer.code == 0, answer.err
        maps = json.loads(answer.out)["images"][0]["maps"]
        assert {each["target"] for each in maps} >= {target}
        assert all(each["evidence"] for each in maps)
        assert (maps[-1]["probability"] is None) == (task == "localization")


@pytest.mark.parametrize("said", ["all zero", "all negative", "not finite", "the same everywhere"])
def test_what_is_no_evidence_is_never_stretched_to_colours(said: str):
    shown = cell(torch.randint(0, 255, (3, 8, 8), dtype=torch.uint8))
    values = torch.full((1, 8, 8), float("nan") if said == "not finite" else 1e-9)
    picture = painted(shown, Map("gradcam", values, False, [said], "layer4", True), 0)  # type: ignore[list-item]
    assert torch.equal(picture[0], picture[1]) and torch.equal(picture[1], picture[2])


def test_colours_start_at_zero_and_end_at_the_maximum():
    shown = cell(torch.full((3, 8, 8), 128, dtype=torch.uint8))
    values = torch.zeros(1, 8, 8)
    values[0, :, 4:] = 1.0
    values[0, :, 2:4] = 0.5
    picture = painted(shown, Map("gradcam", values, False, [""], "layer4", True), 0)
    nothing, middle, most = picture[:, 0, 0], picture[:, 0, 60], picture[:, 0, -1]
    assert nothing[0] == nothing[1] == nothing[2], "where a map is 0, the bare image is seen"
    assert most[0] > 0.8 and most[2] < 0.4, "yellow"
    assert not torch.equal(middle, most)
    signed = painted(shown, Map("occlusion", values * 2 - 1, True, [""]), 0)
    assert signed[2, 0, 0] > signed[0, 0, 0] and signed[0, 0, -1] > signed[2, 0, -1], "blue against, red for"


def test_trust_is_in_the_document_on_the_pictures_and_in_a_table(cli: Cli, tmp_path: Path):
    folder = tmp_path / "marked"
    fitted(*SHAPES, "data.objects=2", "data.shortcut=0.9", "trainer.epochs=1", folder=folder)
    before = contents(folder)
    words = ("--count", "1", "--methods", "saliency,gradcam", "--trust", "--trust-images", "6")
    answer = cli("explain", str(folder), "--json", *words)
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    trust = found["trust"]
    assert trust["images"] == 6 and trust["target"] == "predicted"
    assert set(trust["effects"]) == {"mark", "shape", "object1", "bar0", "bar1", "bar2"}
    names = {"randomization", "faithfulness", "truth", "pointing", "energy", "overlap"}
    for each in trust["methods"]:
        assert set(each["measures"]) == names == set(trust["measures"])
        floors = each["measures"]["faithfulness"]["floors"]
        assert set(floors) == {"random", "centre", "swapped"}
    said = found["images"][0]["maps"][0]["trust"]
    assert said.startswith("randomization") and "above" in said
    with Image.open(folder / "explain" / found["images"][0]["picture"]) as picture:
        taller = picture.height
    after = contents(folder)
    assert {path: after.get(path) for path in before} == before
    table = cli("explain", str(folder), *words, "--out", str(tmp_path / "again"))
    assert "score / floor" in table.out and "taking a part away" in table.out and "gradcam" in table.out
    assert json.loads((tmp_path / "again" / "maps.json").read_text()) == found
    plain = cli(
        "explain", str(folder), "--count", "1", "--methods", "saliency,gradcam", "--out", str(tmp_path / "plain")
    )
    assert plain.code == 0 and "trust" not in json.loads((tmp_path / "plain" / "maps.json").read_text())
    with Image.open(next((tmp_path / "plain").glob("*.png"))) as picture:
        assert picture.height < taller


def test_trust_on_ones_own_images_and_what_the_flag_does_not_mean(run: Path, cli: Cli, tmp_path: Path):
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    out = ("--out", str(tmp_path / "out"), "--methods", "saliency")
    answer = cli("explain", str(run), str(tmp_path), *out, "--json", "--trust")
    assert answer.code == 0, answer.err
    assert set(json.loads(answer.out)["trust"]["measures"]) == {"randomization", "faithfulness"}
    few = cli("explain", str(run), str(tmp_path / "0.png"), *out, "--trust")
    assert few.code == 2 and "expected 5 images or more" in few.err
    taken = cli("explain", str(run), "--trust", str(tmp_path / "0.png"))
    assert taken.code == 2 and "type --trust last" in taken.err
    assert cli("explain", str(run), "--trust", "--trust-images", "2").code == 2


def test_trust_of_a_segmentation_and_of_a_box(cli: Cli, tmp_path: Path):
    for task, target in (("segmentation", "predicted"), ("localization", "box:x2")):
        fitted(*SHAPES, f"task={task}", "trainer.epochs=1", folder=tmp_path / task)
        words = ("--count", "1", "--methods", "gradcam", "--targets", target, "--trust", "--trust-images", "6")
        answer = cli("explain", str(tmp_path / task), *words, "--json")
        assert answer.code == 0, answer.err
        trust = json.loads(answer.out)["trust"]
        assert {"faithfulness", "truth", "pointing"} <= set(trust["measures"])
