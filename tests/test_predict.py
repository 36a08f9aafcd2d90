"""`cnnlab predict`: what a trained network says of files, in their order, whatever is beside them."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import Answer
from lab_runs import fitted, resume_run
from PIL import Image

import cnnlab
from cnnlab.building import prediction
from cnnlab.building.opened import Opened
from cnnlab.building.prediction import Predicted, predicted
from cnnlab.data.decode import decode, decode_chunk
from cnnlab.data.inputs import Missing, Named, named_files
from cnnlab.data.pixels import Recipe
from cnnlab.data.seen import box_of_file, mask_of_file, window
from cnnlab.errors import DataError

Cli = Callable[..., Answer]
CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos` of several sizes, and a `run` on them, 8x8."""
    base, random = tmp_path_factory.mktemp("predict"), np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (base / "photos" / name).mkdir(parents=True)
        for picture in range(12):
            pixels = random.integers(0, 90, (10 + picture, 14, 3), np.uint8)
            pixels[..., number] += 60
            Image.fromarray(pixels).save(base / "photos" / name / f"{picture}.png")
    fitted(
        *("data=folder", f"data.root={base / 'photos'}", f"data.cache={base / 'cache'}", "data.size=8"),
        *("data.resize=9", "data.limit=null", "model=cnn", "normalize=standardize", "optim=adam", "trainer.epochs=3"),
        folder=base / "run",
    )
    return base


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masks") / "run"
    fitted("task=segmentation", "data=shapes", "model=cnn", "data.size=16", folder=folder)
    return folder


def answers(network: Opened, paths: Sequence[Path], **settings: Any) -> list[dict[str, Any]]:
    files = named_files([str(path) for path in paths], lambda: b"")
    batches: Iterator[list[Predicted | Missing]] = predicted(network, files, **settings)
    found = [one for batch in batches for one in batch]
    assert all(isinstance(one, Predicted) for one in found)
    return [one.answer for one in found if isinstance(one, Predicted)]


def test_alone_or_anywhere_in_any_batch_the_answer_is_the_same_to_the_last_bit(trained: Path):
    network = cnnlab.open(trained / "run")
    files = sorted((trained / "photos").glob("*/*.png"))
    together = answers(network, files, batch_size=16)
    assert [row["class"] for row in together] != [together[0]["class"]] * len(files)
    assert answers(network, files[::-1], batch_size=16) == together[::-1]
    for number in (0, 7, 35):
        assert answers(network, [files[number]], batch_size=16) == [together[number]]


def test_it_says_what_the_evaluation_says(trained: Path):
    network = cnnlab.open(trained / "run")
    record = json.loads((trained / "run" / "run.json").read_text())
    names = list(resume_run(trained / "run").files["test"])
    rows = answers(network, [trained / "photos" / name for name in names])
    right = sum(row["class"] == name.split("/")[0] for row, name in zip(rows, names, strict=True))
    assert right / len(names) == record["metrics"]["test/accuracy"]
    outputs = network.outputs(network.read([trained / "photos" / name for name in names]))["logits"]
    sure = torch.tensor([row["probability"] for row in rows])
    torch.testing.assert_close(sure, outputs.softmax(1).amax(1), rtol=1e-6, atol=0)


def test_rows_are_in_the_order_of_the_files_and_bad_ones_are_told(trained: Path, cli: Cli, tmp_path: Path):
    (tmp_path / "no.png").write_text("no image")
    photos = trained / "photos"
    paths = [photos / "cat" / "3.png", tmp_path / "no.png", photos / "ant" / "11.png", tmp_path / "gone.png"]
    answer = cli("predict", str(trained / "run"), *map(str, paths), str(photos / "bee"), "--json")
    assert answer.code == 3
    rows = [json.loads(line) for line in answer.out.splitlines()]
    bees = sorted((photos / "bee").glob("*.png"))
    assert [row["path"] for row in rows] == [str(path) for path in (paths[0], paths[2], *bees)]
    assert rows[0]["size"] == [14, 13]
    assert f"{tmp_path / 'no.png'}: UnidentifiedImageError" in answer.err
    assert f"{tmp_path / 'gone.png'}: no such file" in answer.err
    assert "2 of 16 could not be read" in answer.err


def test_a_table_and_comma_separated_values(trained: Path, cli: Cli):
    files = [str(trained / "photos" / name / "1.png") for name in CLASSES]
    table = cli("predict", str(trained / "run"), *files, "--top", "2")
    assert table.code == 0, table.err
    expected = answers(cnnlab.open(trained / "run"), [Path(file) for file in files], top=2)
    for line, file, row in zip(table.out.splitlines(), files, expected, strict=True):
        assert line.split()[:2] == [file, row["class"]]
        assert f"{row['top'][1]['class']} {row['top'][1]['probability']:.4f}" in line
    answer = cli("predict", str(trained / "run"), *files, "--top", "9", "--csv")
    rows = list(csv.DictReader(io.StringIO(answer.out)))
    assert list(rows[0]) == [
        *("path", "class", "probability", "class_2", "probability_2", "class_3", "probability_3", "width", "height")
    ]
    for row, found in zip(rows, expected, strict=True):
        assert float(row["probability"]) == found["probability"]
        assert sum(float(row[name]) for name in row if name.startswith("probability")) == pytest.approx(1)


def test_lists_on_standard_input(trained: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    odd = tmp_path / "two\nlines \x1b[31m[1].png"
    odd.write_bytes((trained / "photos" / "ant" / "0.png").read_bytes())
    listed = os.fsencode(f"{odd}\0{trained / 'photos' / 'bee' / '2.png'}\0")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed)))
    answer = cli("predict", str(trained / "run"), "-", "--json")
    assert answer.code == 0, answer.err
    assert [json.loads(line)["path"] for line in answer.out.splitlines()] == os.fsdecode(listed).split("\0")[:2]
    shown = cli("predict", str(trained / "run"), str(odd))
    assert "\x1b" not in shown.out and len(shown.out.splitlines()) == 1


def test_what_paths_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.png", "b/10.JPG", "b/deep/1.png", "b/.hidden.png", "b/notes.txt", "a[1].png", "plain"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")
    Path("empty").mkdir()

    def found(*paths: str, listed: bytes = b"") -> list[str]:
        named = named_files(paths, lambda: listed)
        return [f"{one.path}={one.name}" if isinstance(one, Named) else f"!{one.path}" for one in named]

    inside = ["b/10.JPG=10.JPG", "b/2.png=2.png", "b/deep/1.png=deep/1.png"]
    assert found("b") == inside
    assert found("plain", "b/2.png", "plain") == ["plain=plain", "b/2.png=2.png", "plain=plain"]
    assert found("a[1].png", "b/*.png", "**/1.png") == ["a[1].png=a[1].png", "b/2.png=2.png", "b/deep/1.png=1.png"]
    assert found("*.gif", "gone", "empty") == ["!*.gif", "!gone", "!empty"]
    assert found("-", "plain", listed=b"b\r\n\na[1].png\n*.png\n") == [
        *(*inside, "a[1].png=a[1].png", "!*.png", "plain=plain"),
    ]


@pytest.mark.parametrize("fit", ["crop", "letterbox", "stretch"])
@pytest.mark.parametrize("size", [(60, 90), (100, 40)])
def test_a_mask_goes_back_to_where_the_network_saw_it(fit: Any, size: tuple[int, int], tmp_path: Path):
    """A file's own mask, read as the network would get it and put back, is the mask again, but at its edges."""
    own = np.zeros(size, np.uint8)
    own[20:50, 10:30] = 3
    own[35:, 20:] = 7
    Image.fromarray(own).save(tmp_path / "mask.png")
    recipe = Recipe(1, 64, 64, fit, 72, mask=True)
    seen = decode(str(tmp_path / "mask.png"), recipe)[0][0]
    back = mask_of_file(seen, recipe, size)
    assert back.shape == size
    left, top, right, bottom = (round(edge) for edge in window(recipe, size))
    outside = np.ones(size, bool)
    outside[max(0, top) : bottom, max(0, left) : right] = False
    assert ((back == 255) == outside).mean() > 0.96
    assert (back == own)[back != 255].mean() > 0.95
    assert outside.any() == (fit == "crop")


def test_a_box_goes_back_to_the_files_pixels():
    whole = np.array([0.0, 0.0, 1.0, 1.0])
    assert box_of_file(whole, Recipe(3, 10, 10, "stretch"), (40, 80)).tolist() == [0, 0, 80, 40]
    # 80x40 at half its size is 40x20; the middle 20x20 of it begins at 10, which is 20 of the file.
    assert box_of_file(whole, Recipe(3, 20, 20, "crop", 20), (40, 80)).tolist() == [20, 0, 60, 40]
    half = np.array([0.25, 0.5, 0.5, 1.0])
    assert box_of_file(half, Recipe(3, 20, 20, "crop", 20), (40, 80)).tolist() == [30, 20, 40, 40]
    # Letterboxed to 20x20 it is 20x10 with 5 rows of black above: the frame's upper edge is 20 above the file.
    assert box_of_file(half, Recipe(3, 20, 20, "letterbox"), (40, 80)).tolist() == [20, 20, 40, 40]


def test_masks_and_overlays_are_written(segmented: Path, cli: Cli, tmp_path: Path):
    random = np.random.default_rng(1)
    for name in ("one/x.png", "two/x.png", "two/deep/y.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / name)
    out = tmp_path / "out"
    paths = [str(tmp_path / "one" / "x.png"), str(tmp_path / "two")]
    answer = cli("predict", str(segmented), *paths, "--out", str(out), "--json")
    assert answer.code == 0, answer.err
    rows = [json.loads(line) for line in answer.out.splitlines()]
    names = [Path(row["mask"]).relative_to(out / "masks").as_posix() for row in rows]
    assert names == ["x.png", "deep/y.png", "x-2.png"]
    network = cnnlab.open(segmented)
    for row in rows:
        with Image.open(row["mask"]) as mask, Image.open(row["overlay"]) as overlay:
            assert (mask.mode, mask.size, overlay.size) == ("P", (30, 20), (30, 20))
            palette = mask.getpalette()
            pixels = np.asarray(mask)
        seen = network.predictions(network.read([Path(row["path"])]))["mask"][0].to(torch.uint8).numpy()
        assert (pixels == mask_of_file(seen, network.recipe, (20, 30))).all()
        shares = np.bincount(seen.flatten(), minlength=len(network.classes)) / seen.size
        for entry in row["top"]:
            assert entry["share"] == pytest.approx(shares[network.classes.index(entry["class"])])
    assert palette is not None and len({tuple(palette[3 * n : 3 * n + 3]) for n in range(len(network.classes))}) > 3
    again = cli("predict", str(segmented), *paths, "--out", str(out))
    assert again.code == 2 and "new or an empty folder" in again.err
    flat = cli("predict", str(segmented), *paths, "--csv", "--top", "2")
    assert {len(line.split(",")) for line in flat.out.splitlines()} == {8}


def test_boxes_are_in_pixels_of_the_file(cli: Cli, tmp_path: Path):
    fitted("task=localization", "data=shapes", "model=cnn", "data.size=16", "trainer.epochs=1", folder=tmp_path / "run")
    Image.fromarray(np.full((40, 80, 3), 99, np.uint8)).save(tmp_path / "x.png")
    out = tmp_path / "out"
    answer = cli("predict", str(tmp_path / "run"), str(tmp_path / "x.png"), "--json", "--out", str(out))
    assert answer.code == 0, answer.err
    row = json.loads(answer.out)
    network = cnnlab.open(tmp_path / "run")
    box = network.predictions(network.read([tmp_path / "x.png"]))["box"][0].numpy()
    assert row["box"] == pytest.approx(box_of_file(box, network.recipe, (40, 80)).tolist(), abs=0.01)
    with Image.open(row["overlay"]) as overlay:
        assert np.asarray(overlay).max() > 200, "the box is drawn in white"
    plain = cli("predict", str(tmp_path / "run"), str(tmp_path / "x.png"))
    assert f"box {row['box'][0]:.0f} " in plain.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--top", "0"], "--top: expected a number from 1 on"),
        (["--batch-size", "-3"], "--batch-size: expected a number from 1 on"),
        (["--out", "somewhere"], "masks or boxes"),
        (["--csv", "--json"], "not allowed with"),
        (["--tpo", "1"], "did you mean `--top`"),
    ],
)
def test_what_is_refused(trained: Path, cli: Cli, arguments: list[str], words: str):
    answer = cli("predict", str(trained / "run"), str(trained / "photos"), *arguments)
    assert (answer.code, answer.out) == (2, "")
    assert words in answer.err


class Dying:
    """A pool whose process ends at a file called `kills.png`."""

    def __init__(self, workers: int, patience: float | None) -> None:
        self.workers = 1

    def ask(self, items: Sequence[str], recipe: Recipe) -> Future[Any]:
        future: Future[Any] = Future()
        if any(item.endswith("kills.png") for item in items):
            future.set_exception(DataError("a decoding process died"))
        else:
            future.set_result(decode_chunk(items, recipe))
        return future

    def close(self) -> None:
        pass


def test_a_file_that_ends_its_process_is_passed_over(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    network = cnnlab.open(trained / "run")
    (tmp_path / "kills.png").write_bytes(b"")
    good = [trained / "photos" / "cat" / f"{number}.png" for number in range(3)]
    expected = answers(network, good)
    monkeypatch.setattr(prediction, "DecodingPool", Dying)
    files = named_files([str(path) for path in (good[0], tmp_path / "kills.png", *good[1:])], lambda: b"")
    first, bad, *others = next(predicted(network, files))
    assert isinstance(bad, Missing) and "died" in bad.reason
    assert [one.answer for one in (first, *others) if isinstance(one, Predicted)] == expected
