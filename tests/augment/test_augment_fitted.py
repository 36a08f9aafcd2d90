"""What is computed of a training set: of that alone, and once where it takes long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from augment_samples import pictures, spec
from lab_runs import make_run

from cnnlab import augment
from cnnlab.augment import fitted, moments
from cnnlab.augment.pipeline import Pipeline
from cnnlab.data.splits import TensorSplit

CONFIG: dict[str, Any] = {"augment.pca_noise": {"std": 0.1}, "augment.flip": {}, "normalize": {"name": "zca"}}


def pipeline(normalize: augment.Normalize | None = None, seed: int = 0) -> Pipeline:
    parts = {"pca_noise": augment.PcaNoise(), "flip": augment.HorizontalFlip()}
    return Pipeline(parts, normalize or augment.ZcaWhitening(), spec=spec(size=(6, 6)), seed=seed)


def split(seed: int = 0) -> TensorSplit:
    return TensorSplit(pictures(20, size=(6, 6), seed=seed), {"label": torch.zeros(20)}, f"pictures {seed}")


class Counted(TensorSplit):
    """Says how often it was read."""

    reads = 0

    def fetch(self, index: torch.Tensor) -> Any:
        self.reads += 1
        return super().fetch(index)


def counted(seed: int = 0) -> Counted:
    return Counted(split(seed).images, split(seed).targets, f"pictures {seed}")


def test_a_second_run_reads_no_image_and_has_the_same_numbers(tmp_path: Path):
    first, second = pipeline(), pipeline()
    fitted.fit(first, counted(), CONFIG, tmp_path, worth=0)
    again = counted()
    fitted.fit(second, again, CONFIG, tmp_path)
    assert again.reads == 0
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys() == {"normalize", "augment.pca_noise"}
    assert all(torch.equal(one[part][name], other[part][name]) for part in one for name in one[part])


@pytest.mark.parametrize(
    ("images", "config"),
    [
        (1, CONFIG),
        (0, {**CONFIG, "normalize": {"name": "zca", "epsilon": 0.5}}),
        (0, {**CONFIG, "augment.pca_noise": {"std": 0.2}}),
    ],
)
def test_other_images_or_settings_are_computed_anew(images: int, config: dict[str, Any], tmp_path: Path):
    fitted.fit(pipeline(), counted(), CONFIG, tmp_path, worth=0)
    other = counted(images)
    fitted.fit(pipeline(), other, config, tmp_path)
    assert other.reads > 0


def test_what_looks_at_no_image_changes_nothing(tmp_path: Path):
    fitted.fit(pipeline(), counted(), CONFIG, tmp_path, worth=0)
    same = counted()
    fitted.fit(pipeline(), same, {**CONFIG, "augment.flip": {"p": 0.1}}, tmp_path)
    assert same.reads == 0


def test_the_seed_counts_where_only_a_sample_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fitted.fit(pipeline(seed=1), counted(), CONFIG, tmp_path, worth=0)
    same = counted()
    fitted.fit(pipeline(seed=2), same, CONFIG, tmp_path)
    assert same.reads == 0, "all images are seen, whatever the seed"
    for module in (fitted, moments):
        monkeypatch.setattr(module, "MAX_IMAGES", 10)
    for seed, reads in ((1, True), (2, True), (1, False)):
        images = counted()
        fitted.fit(pipeline(seed=seed), images, CONFIG, tmp_path, worth=0)
        assert (images.reads > 0) is reads


def test_what_is_quick_leaves_no_file_and_neither_does_a_cache_that_cannot_be_written(tmp_path: Path):
    fitted.fit(pipeline(), split(), CONFIG, tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    made = pipeline()
    fitted.fit(made, split(), CONFIG, tmp_path / "file", worth=0)
    assert made.state_dict()


@pytest.mark.parametrize("content", [[1], {"normalize": 3}, {"normalize": {"other": torch.ones(1)}}, {"x": {}}])
def test_an_entry_with_anything_else_in_it_is_made_again(content: Any, tmp_path: Path):
    first = pipeline()
    fitted.fit(first, split(), CONFIG, tmp_path, worth=0)
    (entry,) = tmp_path.iterdir()
    torch.save(content, entry)
    again = pipeline()
    fitted.fit(again, split(), CONFIG, tmp_path, worth=0)
    assert str(again.state_dict()) == str(first.state_dict())


def test_a_damaged_entry_is_made_again(tmp_path: Path):
    fitted.fit(pipeline(), split(), CONFIG, tmp_path, worth=0)
    (entry,) = tmp_path.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[:100])
    images = counted()
    fitted.fit(pipeline(), images, CONFIG, tmp_path, worth=0)
    assert images.reads > 0 and len(entry.read_bytes()) == len(whole)


def test_a_users_part_is_computed_every_time(tmp_path: Path):
    class Mine(augment.Standardize):
        pass

    for _ in range(2):
        images = counted()
        fitted.fit(pipeline(Mine()), images, CONFIG, tmp_path, worth=0)
        assert images.reads > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("imbalance", ["null", "5"])
def test_a_run_normalizes_by_its_training_images_alone(imbalance: str):
    """Mean 0 and deviation 1 over the training split to the last digits; over val and test only about."""
    run = make_run("data.limit=null", f"data.imbalance={imbalance}", "model=cnn", "norm=none")
    moved = {}
    for name in ("train", "val", "test"):
        values = torch.cat([batch["image"].double() for batch, _ in run.loaders[name].batches(0)])
        moved[name] = values.mean().item(), values.std(correction=0).item()
    assert moved["train"] == (pytest.approx(0, abs=1e-6), pytest.approx(1, abs=1e-5))
    for name in ("val", "test"):
        assert abs(moved[name][0]) + abs(moved[name][1] - 1) > 1e-4
