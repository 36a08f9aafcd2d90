"""A run folder opened as the network in it: `cnnlab.open`, and `cnnlab eval` on it."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runs import Answer
from lab_runs import fitted, make_run, resume_run
from PIL import Image

import cnnlab
from cnnlab.building.opened import open_run
from cnnlab.errors import CheckpointError, DataError
from cnnlab.protocols import Listener
from cnnlab.runs import checkpoint
from cnnlab.runs.folder import RunDir, write_atomically
from cnnlab.train import fit, origin

Cli = Callable[..., Answer]
CLASSES = ("ant", "bee", "cat")


def photos(root: Path, classes: tuple[str, ...] = CLASSES, seed: int = 0, size: tuple[int, int] = (10, 14)) -> None:
    """Twelve of each class, which its colour tells."""
    random = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(12):
            pixels = random.integers(0, 90, (*size, 3), np.uint8)
            pixels[..., CLASSES.index(name)] += 120
            Image.fromarray(pixels).save(root / name / f"{number}.png")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos`, a `cache` and a `run` on them, 8x8."""
    base = tmp_path_factory.mktemp("opened")
    photos(base / "photos")
    fitted(
        *("data=folder", f"data.root={base / 'photos'}", f"data.cache={base / 'cache'}", "data.size=8"),
        *("data.resize=9", "data.limit=null", "regularization.ema=0.5", "model=cnn", "normalize=standardize"),
        *("regularization.l2=0.01", "optim=adam", "optim.lr=0.01", "trainer.epochs=4"),
        folder=base / "run",
    )
    return base


def test_a_network_is_usable_with_its_data_and_cache_gone(trained: Path, tmp_path: Path):
    shutil.copytree(trained / "run", tmp_path / "run")
    before = cnnlab.open(trained / "run", "last")
    (trained / "photos").rename(trained / "away")
    try:
        network = cnnlab.open(tmp_path / "run", "last")
    finally:
        (trained / "away").rename(trained / "photos")
    assert network.classes == CLASSES
    assert network.spec.size == (8, 8)
    files = [trained / "photos" / "bee" / f"{number}.png" for number in range(5)]
    images = network.read(files)
    assert images.shape == (5, 3, 8, 8)
    for name, output in network.outputs(images).items():
        assert torch.equal(output, before.outputs(images)[name])


def test_it_says_what_the_run_said_of_its_own_images(trained: Path):
    """Pixels, normalization, averages: the logits are the run's own, to the last bit."""
    run = resume_run(trained / "run")
    network = cnnlab.open(trained / "run", "last")
    loader = run.loaders["test"]
    batch = next(iter(loader.batches(0)))[0]
    with run.evaluating():
        expected = run.forward.outputs(batch["image"])["logits"]
    stored = loader.split.fetch(batch["index"])["image"]
    assert torch.equal(network.outputs(stored)["logits"], expected)
    last = next(iter(run.model.parameters()))
    assert not torch.equal(last, next(iter(network.model.parameters()))), "averages are not the last weights"
    files = [trained / "photos" / name for name in run.files["test"]]
    found = network.read(files)
    assert torch.equal(found, loader.split.fetch(torch.arange(len(loader.split)))["image"])


def test_the_network_keeps_its_averages_when_what_it_was_opened_as_is_gone(trained: Path):
    network = cnnlab.open(trained / "run", "last")
    alone = cnnlab.open(trained / "run", "last").model.state_dict()
    gc.collect()
    for name, value in network.model.state_dict().items():
        assert torch.equal(alone[name], value), name


def test_alone_or_in_any_batch_the_answer_is_the_same(trained: Path):
    network = cnnlab.open(trained / "run")
    images = network.read([trained / "photos" / name / "3.png" for name in CLASSES])
    together = network.predictions(images)
    for number in range(3):
        alone = network.predictions(images[number : number + 1])
        assert torch.equal(alone["label"], together["label"][number : number + 1])
        torch.testing.assert_close(alone["probability"], together["probability"][number : number + 1])


def test_nothing_that_trains_is_made(trained: Path, monkeypatch: pytest.MonkeyPatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("an opened network needs none")

    for name in ("building.assemble.make_optimizer", "observe.observer.Observer.__init__", "augment.fitted.fit"):
        monkeypatch.setattr(f"cnnlab.{name}", never)
    from cnnlab.verbs.eval import evaluate_run

    assert evaluate_run(open_run(trained / "run").folder, "test").keys() >= {"test/accuracy", "test/loss"}


def test_the_figures_are_those_of_the_run(trained: Path, cli: Cli):
    record = json.loads((trained / "run" / "run.json").read_text())
    answer = cli("eval", str(trained / "run"), "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    for name, value in record["metrics"].items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
    assert found["test/penalty"] > 0


def test_classes_are_found_by_their_names(trained: Path, cli: Cli, tmp_path: Path):
    """The same images as another data set: with the classes in another order (a class before the others is missing)."""
    everything = cli("eval", str(trained / "run"), "--split", "test", f"data.root={trained / 'photos'}", "--json")
    photos(tmp_path / "same" / "test", ("bee", "cat"), seed=1)
    for split in ("train", "val"):
        photos(tmp_path / "same" / split, ("bee", "cat"), seed=2 + (split == "val"))
    answer = cli("eval", str(trained / "run"), "data=folder", f"data.root={tmp_path / 'same'}", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    rows = {row["class"]: row for row in found["classes"]}
    assert {name: row["samples"] for name, row in rows.items()} == {"ant": 0, "bee": 12, "cat": 12}
    network = cnnlab.open(trained / "run")
    right = 0
    for name in ("bee", "cat"):
        files = sorted((tmp_path / "same" / "test" / name).glob("*.png"))
        right += int((network.predictions(network.read(files))["label"] == CLASSES.index(name)).sum())
    assert found["test/accuracy"] == pytest.approx(right / 24)
    assert json.loads(everything.out)["data"] == "as it was"


def test_classes_that_the_network_does_not_know_are_refused_by_name(trained: Path, cli: Cli, tmp_path: Path):
    for split in ("train", "val", "test"):
        photos(tmp_path / "other" / split, ("bee", "cat"))
        (tmp_path / "other" / split / "cat").rename(tmp_path / "other" / split / "dog")
    answer = cli("eval", str(trained / "run"), "data=folder", f"data.root={tmp_path / 'other'}")
    assert answer.code == 5
    assert "dog" in answer.err and "ant, bee, cat" in answer.err


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["data=digits"], "channels"),
        (["data=folderr"], "folder"),
        (["trainer.epochs=3"], "data=OPTION"),
        (["data.nothing=1"], "data.root"),
        (["data.val=7"], "data.val"),
    ],
)
def test_other_data_that_is_refused(trained: Path, cli: Cli, typed: list[str], words: str):
    answer = cli("eval", str(trained / "run"), *typed)
    assert answer.code in (2, 5), answer
    assert words in answer.err and "fault" not in answer.err


def test_a_file_that_is_no_image_is_named(trained: Path, tmp_path: Path):
    network = cnnlab.open(trained / "run")
    (tmp_path / "no.png").write_text("no image")
    good = trained / "photos" / "ant" / "0.png"
    with pytest.raises(DataError, match=r"no\.png"):
        network.read([good, tmp_path / "no.png"])
    images, failures = network.read_all([good, tmp_path / "no.png"])
    assert list(failures) == [1]
    assert torch.equal(images[0], network.read([good])[0])
    with pytest.raises(ValueError, match=r"expected images \(N, 3, 8, 8\)"):
        network.outputs(torch.zeros(1, 3, 9, 9))


def test_a_run_without_a_checkpoint_has_nothing_to_open(tmp_path: Path):
    make_run(folder=tmp_path / "run")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        cnnlab.open(tmp_path / "run")


def test_segmentation_opens_as_well(tmp_path: Path):
    run = fitted("task=segmentation", "data=shapes", "model=cnn", "data.size=16", folder=tmp_path / "run")
    network = cnnlab.open(tmp_path / "run", "last")
    batch = next(iter(run.loaders["test"].batches(0)))[0]
    stored = run.loaders["test"].split.fetch(batch["index"])["image"]
    with run.evaluating():
        expected = run.forward.outputs(batch["image"])["mask"]
    assert torch.equal(network.outputs(stored)["mask"], expected)
    assert network.predictions(stored)["mask"].shape == (len(stored), 16, 16)


def test_what_a_folder_has_lost_is_told(trained: Path, cli: Cli, tmp_path: Path):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    (run / "run.json").write_text("{}")
    answer = cli("eval", str(run))
    assert answer.code == 0 and "run.json is gone or empty" in answer.err
    (run / ".hydra" / "overrides.yaml").unlink()
    answer = cli("eval", str(run))
    assert answer.code == 5 and "overrides.yaml" in answer.err


def test_a_reader_of_a_run_that_saves_meanwhile_reads_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Between its look at `last.pt` and its look at `best.pt` the run goes on by an epoch that is the best so far."""
    options = ("model=cnn", "model.widths=[4]", "optim.lr=0.01", "trainer.epochs=3", "trainer.checkpoint_minutes=0")
    states = []
    run = make_run(*options, folder=tmp_path)

    class Keeper(Listener):
        def on_epoch(self, run, figures):
            states.append({path: path.read_bytes() for path in (run.folder.last, run.folder.best) if path.exists()})

    run.listeners.insert(0, Keeper())
    fit(run)
    states.append({path: path.read_bytes() for path in (run.folder.last, run.folder.best)})
    folder = RunDir(tmp_path)
    best = [checkpoint.load(path)["clock"]["step"] for path in put(states[-1], folder.best)]
    assert best[0] > 4, "the best one is a later one"
    before = next(state for state in reversed(states) if state.get(folder.best) not in (None, states[-1][folder.best]))
    put(before)
    original, looks = origin.checkpoint.load, []

    def load(path: Path) -> dict:
        found = original(path)
        if not looks:
            put(states[-1])
        looks.append(path.name)
        return found

    monkeypatch.setattr(origin.checkpoint, "load", load)
    assert cnnlab.open(tmp_path).step == best[0]
    assert looks[:2] == ["last.pt", "best.pt"] and len(looks) > 2
    put({folder.last: before[folder.last]})
    with pytest.raises(CheckpointError, match="best.pt is of epoch"):
        cnnlab.open(tmp_path)


def put(files: dict[Path, bytes], *paths: Path) -> tuple[Path, ...]:
    for path, content in files.items():
        write_atomically(path, content)
    return paths
