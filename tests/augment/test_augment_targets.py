"""Image, mask and box move together: exact flips, round trips, and torchvision's v2 transforms on tv_tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from augment_samples import draws_of, pictures, spec
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as oracle

from cnnlab.augment import (
    CutMix,
    Cutout,
    HorizontalFlip,
    Identity,
    Mixup,
    PadCrop,
    Pipeline,
    Rotate,
    Scale,
    Shear,
    Translate,
    TrivialAugment,
    VerticalFlip,
)
from cnnlab.augment.base import Geometric
from cnnlab.augment.warp import affine, compose, copy_pixels, invert, resample
from cnnlab.protocols import VOID, Batch

SIZE = (24, 40)
BOX = (9.0, 5.0, 31.0, 14.0)
"""In pixels, so that what is moved by little stays inside."""


def scenes(count: int = 2) -> Batch:
    """Pictures with masks of blobs, and a box."""
    images = pictures(count, size=SIZE)
    mask = (images[:, 0] // 64).long()
    box = torch.tensor([BOX]) / torch.tensor([SIZE[1], SIZE[0], SIZE[1], SIZE[0]])
    return {"image": images, "mask": mask, "box": box.expand(count, 4).clone()}


def as_tv(batch: Batch) -> tuple[tv_tensors.Image, tv_tensors.Mask, tv_tensors.BoundingBoxes]:
    pixels = batch["box"] * torch.tensor([SIZE[1], SIZE[0], SIZE[1], SIZE[0]])
    boxes = tv_tensors.BoundingBoxes(pixels, format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=SIZE)
    return tv_tensors.Image(batch["image"]), tv_tensors.Mask(batch["mask"]), boxes


def torchvisions(batch: Batch, move: Callable[..., Tensor]) -> Batch:
    """What torchvision makes of image, mask and boxes, which it then clips."""
    image, mask, boxes = (move(tensor) for tensor in as_tv(batch))
    boxes = oracle.clamp_bounding_boxes(boxes)
    height, width = boxes.canvas_size
    scale = torch.tensor([width, height, width, height])
    return {
        "image": image.as_subclass(Tensor),
        "mask": mask.as_subclass(Tensor),
        "box": boxes.as_subclass(Tensor) / scale,
    }


def same(ours: Batch, theirs: Batch) -> None:
    """Boxes to a thousandth of a pixel, images to rounding; masks but for pixels that lie between two."""
    torch.testing.assert_close(ours["box"] * SIZE[1], theirs["box"] * SIZE[1], atol=1e-3, rtol=0)
    torch.testing.assert_close(ours["image"], theirs["image"], atol=5e-4, rtol=0)
    assert (ours["mask"] == theirs["mask"]).float().mean() > 0.99


@pytest.mark.parametrize(("part", "flip"), [(HorizontalFlip, v2.functional.hflip), (VerticalFlip, v2.functional.vflip)])
def test_flips_are_torchvisions_to_the_pixel(part: Callable[[float], Geometric], flip: Callable[..., Tensor]):
    batch = scenes()
    moved = copy_pixels(batch, part(1.0).matrix(draws_of([[0.0], [0.0]], batch["image"])), "edge")
    theirs = torchvisions(batch, flip)
    assert torch.equal(moved["image"], theirs["image"]) and torch.equal(moved["mask"], theirs["mask"])
    torch.testing.assert_close(moved["box"], theirs["box"])


@pytest.mark.parametrize(("x", "y"), [(4, -3), (-12, 0), (0, 9), (20, 10)])
def test_shifts_are_torchvisions_crops_of_the_padded(x: int, y: int):
    """Void comes in where black comes into the image; what is cut off is cut off the box."""
    batch = scenes()
    moved = copy_pixels(batch, affine(batch["image"], x=float(x), y=float(y)), "zeros")

    def move(tensor: Tensor) -> Tensor:
        fill = VOID if isinstance(tensor, tv_tensors.Mask) else 0
        return oracle.crop(oracle.pad(tensor, [30, 30, 30, 30], fill=fill), 30 - y, 30 - x, *SIZE)

    theirs = torchvisions(batch, move)
    assert torch.equal(moved["image"], theirs["image"]) and torch.equal(moved["mask"], theirs["mask"])
    torch.testing.assert_close(moved["box"], theirs["box"])


@pytest.mark.parametrize("angle", [30.0, -75.0, 90.0, 180.0])
@pytest.mark.parametrize(("factor", "x", "y"), [(1.0, 0, 0), (0.79, 3.3, -2.1), (1.43, -4.3, 2.4)])
def test_rotation_scale_and_translation_are_torchvisions_affine(angle: float, factor: float, x: float, y: float):
    """Box: the bounds of the moved corners, clipped. Mask: nearest, void outside."""
    batch = scenes()
    images = batch["image"] = batch["image"] / 255
    both = [[0.0], [0.0]]
    matrix = Scale(factor, factor).matrix(draws_of(both, images))
    matrix = compose(Rotate(angle).matrix(draws_of([[0.9999999], [0.9999999]], images)), matrix)
    shift = torch.tensor([[x / SIZE[1], y / SIZE[0]]] * 2) / 2 + 0.5
    matrix = compose(Translate(1.0).matrix(draws_of(shift, images)), matrix)

    def move(tensor: Tensor) -> Tensor:
        bilinear = isinstance(tensor, tv_tensors.Image)
        kind = v2.InterpolationMode.BILINEAR if bilinear else v2.InterpolationMode.NEAREST
        fill = VOID if isinstance(tensor, tv_tensors.Mask) else None
        return oracle.affine(tensor, -angle, [x, y], factor, [0.0, 0.0], kind, fill=fill)

    same(resample(batch, matrix, "zeros"), torchvisions(batch, move))


def test_a_shear_moves_the_box_as_torchvision_does():
    batch = scenes()
    batch["image"] = batch["image"] / 255
    matrix = Shear(20.0).matrix(draws_of([[0.9999999, 0.5]] * 2, batch["image"]))

    def move(tensor: Tensor) -> Tensor:
        bilinear = isinstance(tensor, tv_tensors.Image)
        kind = v2.InterpolationMode.BILINEAR if bilinear else v2.InterpolationMode.NEAREST
        fill = VOID if isinstance(tensor, tv_tensors.Mask) else None
        return oracle.affine(tensor, 0.0, [0, 0], 1.0, [-20.0, 0.0], kind, fill=fill)

    same(resample(batch, matrix, "zeros"), torchvisions(batch, move))


def test_there_and_back():
    """Flips and whole-pixel shifts inside the frame leave no trace; a rotation's box comes back around the first."""
    batch = scenes()
    images = batch["image"]
    for matrix in (affine(images, xx=-1.0), affine(images, yy=-1.0), affine(images, xx=-1.0, yy=-1.0)):
        again = copy_pixels(copy_pixels(batch, matrix, "zeros"), invert(matrix), "zeros")
        assert all(torch.equal(again[name], batch[name]) for name in ("image", "mask"))
        torch.testing.assert_close(again["box"], batch["box"])
    shift = affine(images, x=4.0, y=-3.0)
    again = copy_pixels(copy_pixels(batch, shift, "zeros"), invert(shift), "zeros")
    torch.testing.assert_close(again["box"], batch["box"])
    known = again["mask"] != VOID
    assert torch.equal(again["mask"][known], batch["mask"][known]) and 0.7 < known.float().mean() < 1
    turn = Rotate(10.0).matrix(draws_of([[0.9]] * 2, images))
    once = resample({**batch, "image": images / 255}, compose(invert(turn), turn), "zeros")
    torch.testing.assert_close(once["box"], batch["box"], atol=1e-5, rtol=0)
    assert (once["mask"] == batch["mask"]).all(), "folded, two maps that undo each other are none"
    twice = resample(resample({**batch, "image": images / 255}, turn, "zeros"), invert(turn), "zeros")["box"]
    assert (twice[:, :2] <= batch["box"][:, :2] + 1e-6).all() and (twice[:, 2:] >= batch["box"][:, 2:] - 1e-6).all()


def test_folded_parts_keep_the_box_tight():
    """Two rotations of 20 degrees that undo each other: one at a time, each widens the box."""
    batch = {**scenes(), "index": torch.arange(2)}
    parts = {"there": Rotate(0.0), "flip": HorizontalFlip(1.0), "back": VerticalFlip(1.0)}
    moved = Pipeline(parts, Identity(), spec=spec(size=SIZE), seed=0)(batch, epoch=0, train=True)
    expected = 1 - batch["box"][:, [2, 3, 0, 1]]
    torch.testing.assert_close(moved["box"], expected)


def test_the_image_is_filled_as_configured_and_the_mask_with_void():
    batch = {**scenes(), "index": torch.arange(2)}
    for fill in ("zeros", "edge", "reflect"):
        pipeline = Pipeline({"crop": PadCrop(6, fill)}, Identity(), spec=spec(size=SIZE), seed=3)  # type: ignore[arg-type]
        moved = pipeline(batch, epoch=0, train=True)
        void = moved["mask"] == VOID
        assert void.any()
        dark = (moved["image"].amax(1)[void] == 0).float().mean()
        assert dark == 1 if fill == "zeros" else dark < 0.2


def test_what_only_covers_or_recolours_leaves_the_targets():
    batch = {**scenes(), "index": torch.arange(2)}
    moved = Pipeline({"cutout": Cutout(9)}, Identity(), spec=spec(size=SIZE), seed=0)(batch, epoch=0, train=True)
    assert torch.equal(moved["box"], batch["box"]) and torch.equal(moved["mask"], batch["mask"])
    trivial = TrivialAugment()
    still = trivial.transform(batch | {"image": batch["image"] / 255}, torch.full((2,), 12.0), torch.ones(2),
                              torch.ones(2), draws_of([[0.0] * 3] * 2, batch["image"]))  # fmt: skip
    torch.testing.assert_close(still["box"], batch["box"], atol=1e-6, rtol=0)
    assert torch.equal(still["mask"], batch["mask"])


def test_in_evaluation_nothing_moves():
    batch = {**scenes(), "index": torch.arange(2)}
    parts = {"rotate": Rotate(40.0), "flip": HorizontalFlip(1.0)}
    seen = Pipeline(parts, Identity(), spec=spec(size=SIZE), seed=0)(batch, epoch=0, train=False)
    assert torch.equal(seen["box"], batch["box"]) and torch.equal(seen["mask"], batch["mask"])


@pytest.mark.parametrize("mixing", [Mixup, CutMix])
@pytest.mark.parametrize("targets", [{"label", "box"}, {"label", "mask"}, {"label", "box", "mask"}])
def test_mixing_is_refused_beside_masks_and_boxes(mixing: type, targets: set[str]):
    with pytest.raises(ValueError, match="mixes labels only, and this data has"):
        Pipeline({"mix": mixing()}, Identity(), spec=spec(size=SIZE, targets=frozenset(targets)), seed=0)
