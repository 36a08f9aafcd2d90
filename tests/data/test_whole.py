"""Photos stored whole: the same for memory, map and stream; evaluation, masks and boxes; what is stored and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab_runs import composed
from PIL import Image
from torchvision.transforms.v2 import functional as their

from cnnlab.augment import HorizontalFlip, Identity, Pipeline, RandomResizedCrop
from cnnlab.building.builder import build
from cnnlab.data.decode import Recipe, decode
from cnnlab.data.folder import ImageFolder
from cnnlab.data.gpu_jpeg import GpuJpegs
from cnnlab.data.loader import Loader
from cnnlab.data.masks import MaskFolder
from cnnlab.data.objects import fitted_boxes
from cnnlab.data.whole import views, whole
from cnnlab.protocols import VIEW, DataSpec, Split
from cnnlab.schema import DataPath, Loading

SHAPES = [(60, 80), (80, 60), (50, 75), (64, 64), (48, 96)]


def wave(height: int, width: int, seed: int) -> np.ndarray:
    """(height, width, 3) uint8, smooth."""
    y, x = np.arange(height)[:, None, None] / height, np.arange(width)[None, :, None] / width
    phase = np.random.default_rng(seed).random(3) * 6
    return ((0.5 + 0.4 * np.sin(5 * x + phase) * np.cos(4 * y + phase)) * 255).round().astype(np.uint8)


def photos(root: Path, suffix: str = ".png", count: int = 20) -> Path:
    for n in range(count):
        path = root / ("cat", "dog")[n % 2] / f"{n:03d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(wave(*SHAPES[n % len(SHAPES)], n)).save(path)
    return root


def load(root: Path, path: str = "mapped", **settings: Any) -> dict[str, Split]:
    loading = Loading(path=DataPath(path), workers=0)
    options = {"size": 28, "resize": 32, "crops": True, "cache": str(root.parent / "cache"), "loading": loading}
    return ImageFolder(str(root), **{**options, **settings}).load()


def loader(split: Split, **settings: Any) -> Loader:
    return Loader(split, len(split), seed=0, shuffle=False, **settings)


def test_training_photos_are_stored_whole_and_the_rest_as_the_network_sees_them(tmp_path: Path) -> None:
    root = photos(tmp_path / "set")
    splits = load(root)
    plain = load(root, crops=False)
    assert splits["train"].fetch(torch.arange(2))["image"].shape == (2, 3, 32, 42)
    assert [loader(splits[name]).split.stored for name in ("train", "val", "test")] == [(32, 42), None, None]
    for name in ("val", "test"):
        every = torch.arange(len(plain[name]))
        theirs, ours = plain[name].fetch(every), splits[name].fetch(every)
        assert theirs.keys() == ours.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(splits["train"].labels, plain["train"].labels)


def test_memory_map_and_stream_give_the_same_photos(tmp_path: Path) -> None:
    root = photos(tmp_path / "set")
    batches = [next(loader(load(root, path)["train"]).batches(0))[0] for path in ("mapped", "resident", "stream")]
    for other in batches[1:]:
        assert other.keys() == batches[0].keys() >= {VIEW, "image", "label"}
        assert all(torch.equal(other[name], batches[0][name]) for name in other)


def test_what_training_sees_without_a_crop_is_what_evaluation_sees(tmp_path: Path) -> None:
    root = photos(tmp_path / "set")
    whole_photos, plain = load(root)["train"], load(root, crops=False)["train"]
    every = torch.arange(len(plain))
    pipeline = Pipeline({}, Identity(), spec=ImageFolder(str(root), size=28).spec(), seed=0)
    seen = pipeline(whole_photos.fetch(every), epoch=0, train=True)["image"]
    expected = plain.fetch(every)["image"] / 255
    assert (seen - expected).abs().mean() < 0.01
    assert (seen - expected.flip(3)).abs().mean() > 0.1


def test_a_crop_is_torchvisions_of_the_file(tmp_path: Path) -> None:
    root = photos(tmp_path / "set")
    split = load(root)["train"]
    pipeline = Pipeline({"crop": RandomResizedCrop()}, Identity(), spec=ImageFolder(str(root), size=28).spec(), seed=0)
    batch = split.fetch(torch.arange(len(split)))
    drawn = pipeline.draw(batch, 0)
    crops = pipeline.augment(batch, drawn)["image"]
    files = sorted(file for kind in ("cat", "dog") for file in (root / kind).iterdir())
    places = {tuple(decode(str(file), Recipe(3, 32, 42, "whole"))[0].ravel()[:400].tolist()): file for file in files}
    assert len(places) == len(files)
    for row, (down, across, x, y) in enumerate(RandomResizedCrop().parts(drawn["crop"]).tolist()):
        file = places[tuple(batch["image"][row].flatten()[:400].tolist())]
        image = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None].float() / 255
        scale = min(image.shape[-2:]) / 32
        top = image.shape[2] / 2 + (y - down / 2) * scale
        left = image.shape[3] / 2 + (x - across / 2) * scale
        box = [round(value) for value in (top, left, down * scale, across * scale)]
        expected = their.resized_crop(image, *box, [28, 28], antialias=True)[0]
        assert (crops[row] - expected).abs().mean() < 0.02, "torchvision's is of whole pixels of the file"


@pytest.mark.parametrize("size", [(60, 80), (80, 60)])
def test_a_photo_that_stands_lies_on_its_side(tmp_path: Path, size: tuple[int, int]) -> None:
    image = wave(*size, 0)
    for suffix in (".png", ".jpg"):
        Image.fromarray(image).save(tmp_path / f"a{suffix}", quality=95)
    recipe = whole(Recipe(3, 28, 28, "crop", 32), 32)
    lying = Image.fromarray(image if size[0] < size[1] else image.transpose(1, 0, 2))
    expected = np.asarray(lying.resize((42, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    pixels, own = decode(str(tmp_path / "a.png"), recipe)
    assert own == size
    assert np.abs(pixels.astype(int) - expected).max() <= 1
    on_device, sizes, failures = GpuJpegs(recipe, torch.device("cpu"), 1).begin([str(tmp_path / "a.jpg")])()
    assert sizes.tolist() == [list(size)] and not failures
    assert (
        on_device[0].int() - torch.from_numpy(decode(str(tmp_path / "a.jpg"), recipe)[0].astype(int))
    ).abs().max() < 3


def test_half_of_a_large_photo_still_lies_as_the_whole_would(tmp_path: Path) -> None:
    Image.new("RGB", (1001, 1002), (200, 30, 10)).save(tmp_path / "a.jpg")
    recipe = Recipe(3, 32, 42, "whole", max_pixels=600_000)
    pixels, own = decode(str(tmp_path / "a.jpg"), recipe)
    assert pixels.shape == (3, 32, 42) and own == (1002, 1001)
    assert views(torch.tensor([own]), Recipe(3, 28, 28, "crop", 32), recipe)[0, 0, 0] == 0


def test_the_stored_size_is_chosen(tmp_path: Path) -> None:
    root = photos(tmp_path / "set")

    def stored(**settings: Any) -> tuple[int, int] | None:
        return loader(load(root, **settings)["train"]).split.stored

    assert stored(resize=None) == (32, 42), "256/224 of the input"
    assert stored(resize=40) == (40, 54)
    assert stored(stored=48) == (48, 64)
    assert stored(stored=48, crops=False) == (48, 64)
    assert stored(stored="input") is None
    assert stored(crops=False, shifts=True) == (32, 42), "the image is the middle of a larger photo"
    assert stored(crops=False, shifts=True, resize=28) is None, "the image is all of the photo's shorter side"
    assert stored(size=None, resize=None) == (74, 98), "photos of many sizes are taken at 64"


def test_images_that_are_taken_as_they_are_have_nothing_beyond(tmp_path: Path) -> None:
    for n in range(20):
        path = tmp_path / "set" / ("cat", "dog")[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(wave(32, 32, n)).save(path)
    split = load(tmp_path / "set", size=None, resize=None)["train"]
    assert split.fetch(torch.arange(1))["image"].shape == (1, 3, 32, 32)


def test_a_limit_decodes_what_it_keeps(tmp_path: Path) -> None:
    load(photos(tmp_path / "set", count=40), limit=6)
    shapes = [np.load(path, mmap_mode="r").shape for path in (tmp_path / "cache").glob("*/images.npy")]
    assert sorted(shapes) == [(6, 3, 32, 42), (12, 3, 28, 28)]


def test_masks_are_stored_as_their_photos(tmp_path: Path) -> None:
    for n in range(20):
        height, width = SHAPES[n % len(SHAPES)]
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 : height // 2, width // 4 : width * 3 // 4] = 1
        for kind, pixels in (("images", np.repeat(mask[..., None] * 255, 3, 2)), ("masks", mask)):
            path = tmp_path / "set" / kind / "train" / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    (tmp_path / "set" / "classes.txt").write_text("ground\nbird\n")
    options: dict[str, Any] = {"size": (24, 32), "cache": str(tmp_path / "cache"), "workers": 0}
    data = MaskFolder(str(tmp_path / "set"), crops=True, **options)
    splits, plain = data.load(), MaskFolder(str(tmp_path / "set"), **options).load()
    batch = splits["train"].fetch(torch.arange(len(splits["train"])))
    assert batch["image"].shape[-2:] == batch["mask"].shape[-2:] == (28, 38)
    assert splits["val"].fingerprint == plain["val"].fingerprint
    pipeline = Pipeline(
        {"crop": RandomResizedCrop((0.3, 1.0)), "flip": HorizontalFlip()}, Identity(), spec=data.spec(), seed=0
    )
    moved = pipeline(batch, epoch=0, train=True)
    assert moved["mask"].shape[-2:] == (24, 32) and set(moved["mask"].unique().tolist()) == {0, 1}
    assert ((moved["image"][:, 0] > 0.5) != moved["mask"].bool()).float().mean() < 0.05


def test_boxes_lie_as_their_photos() -> None:
    stored = whole(Recipe(3, 28, 28, "letterbox"), 32)
    boxes = torch.tensor([[10.0, 0.0, 20.0, 30.0]] * 2)
    found = fitted_boxes(boxes, torch.tensor([[60, 80], [80, 60]]), stored)
    torch.testing.assert_close(found, torch.tensor([[1 / 8, 0, 1 / 4, 1 / 2], [0, 1 / 6, 3 / 8, 1 / 3]]))


@pytest.mark.parametrize("fit, resize", [("crop", 32), ("letterbox", 0), ("stretch", 0)])
def test_the_view_of_the_middle_is_what_the_recipe_makes_of_the_file(tmp_path: Path, fit: Any, resize: int) -> None:
    seen = Recipe(3, 28, 28, fit, resize)
    stored = whole(seen, 40)
    images, sizes, expected = [], [], []
    for n, size in enumerate(SHAPES):
        Image.fromarray(wave(*size, n)).save(tmp_path / f"{n}.png")
        pixels, own = decode(str(tmp_path / f"{n}.png"), stored)
        images.append(torch.from_numpy(pixels.copy()))
        sizes.append(own)
        expected.append(torch.from_numpy(decode(str(tmp_path / f"{n}.png"), seen)[0].copy()))
    batch = {"image": torch.stack(images), "index": torch.arange(5), VIEW: views(torch.tensor(sizes), seen, stored)}
    pipeline = Pipeline({}, Identity(), spec=DataSpec(3, (28, 28), ("cat", "dog")), seed=0)
    found = pipeline(batch, epoch=0, train=False)["image"]
    assert (found - torch.stack(expected) / 255).abs().mean() < 0.02


def test_a_config_of_a_run_that_knew_of_no_stored_photos_keeps_its_pixels(tmp_path: Path) -> None:
    data = (
        "data=folder",
        f"data.root={photos(tmp_path / 'set')}",
        f"data.cache={tmp_path / 'cache'}",
        "data.workers=0",
    )
    stored = []
    for known in (True, False):
        experiment = composed(*data, "augment=resized_crop", "data.size=28", "data.limit=null")
        if not known:
            del experiment.config["data"]["stored"]
        stored.append(build(experiment).loaders["train"].split.stored)
    assert stored == [(32, 42), None]
