"""Crops of whole photos, which are stored squeezed to one size, against torchvision's of the photos themselves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from augment_samples import Images, batch_of, pictures, spec
from torch import Tensor
from torchvision.transforms import RandomResizedCrop as TheirCrop
from torchvision.transforms.v2 import functional as their

from cnnlab.augment import Brightness, Cutout, Draws, HorizontalFlip, Identity, PadCrop, Pipeline, RandomResizedCrop
from cnnlab.augment.photos import Seen
from cnnlab.augment.warp import invert
from cnnlab.protocols import VIEW, Batch

STORED = (128, 170)
SIZE = (112, 112)


def photo(size: tuple[int, int], seed: int = 0) -> Tensor:
    """(1, 3, height, width) uint8 with waves of some 75 pixels in both directions."""
    height, width = size
    y, x = torch.arange(height)[:, None] / 70, torch.arange(width)[None] / 70
    phase = torch.rand(3, 1, 1, generator=torch.Generator().manual_seed(seed)) * 6
    return ((0.5 + 0.4 * torch.sin(x * 6 + phase) * torch.cos(y * 5 + phase)) * 255).round().to(torch.uint8)[None]


def stored(images: Tensor, resize: int) -> Batch:
    """The photo squeezed into `STORED`, lying on its side where it stands, to be seen at a shorter side of `resize`."""
    height, width = images.shape[-2:]
    upright = torch.tensor([[width, 0.0], [0.0, height]]) * resize / min(height, width)
    if height > width:
        images, upright = images.transpose(2, 3), upright.flip(1)
        pixels = torch.tensor([STORED[1], STORED[0]])
    else:
        pixels = torch.tensor([STORED[1], STORED[0]])
    squeezed = their.resize(images, list(STORED), antialias=True)
    return {**batch_of(squeezed), VIEW: (upright / pixels)[None]}


def pipeline(**parts: Any) -> Pipeline:
    return Pipeline(parts, Identity(), spec=spec(size=SIZE), seed=0)


@pytest.mark.parametrize("size", [(300, 400), (400, 300), (220, 330), (256, 256)])
def test_a_crop_of_the_stored_photo_is_torchvisions_of_the_photo(size: tuple[int, int]) -> None:
    images = photo(size)
    batch = stored(images, 128)
    torch.manual_seed(0)
    for _ in range(6):
        top, left, down, across = TheirCrop.get_params(images, [0.08, 1.0], [3 / 4, 4 / 3])
        middle = (left + across / 2 - size[1] / 2, top + down / 2 - size[0] / 2)
        part = torch.tensor([[down, across, *middle]]) * 128 / min(size)
        crops = pipeline(crop=_This(part))
        moved = crops(batch, epoch=0, train=True)["image"]
        expected = their.resized_crop(images.float() / 255, top, left, down, across, list(SIZE), antialias=True)
        assert moved.shape == expected.shape
        assert (moved - expected).abs().mean() < 0.005, "resampled twice, where torchvision's is once"
        assert (moved - expected).abs().max() < 0.03
        assert (moved - expected.flip(3)).abs().mean() > 0.05, "the measure tells pictures apart"


class _This(RandomResizedCrop):
    def __init__(self, part: Tensor) -> None:
        super().__init__()
        self.part = part

    def parts(self, draws: Draws) -> Tensor:
        return self.part


@pytest.mark.parametrize("size", [(300, 500), (64, 64), (90, 1000)])
def test_crops_are_drawn_as_torchvision_draws_them(size: tuple[int, int]) -> None:
    count = 1500
    images = torch.zeros(count, 3, 1, 1, dtype=torch.uint8)
    view = torch.diag(torch.tensor([float(size[1]), size[0]])).expand(count, 2, 2)
    batch = {**batch_of(images), VIEW: view}
    ours = RandomResizedCrop().parts(pipeline(crop=RandomResizedCrop()).draw(batch, 0)["crop"])
    torch.manual_seed(0)
    blank = torch.zeros(1, *size)
    rows = [TheirCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    top, left, down, across = torch.tensor(rows, dtype=torch.float32).unbind(1)
    theirs = [down, across, left + across / 2 - size[1] / 2, top + down / 2 - size[0] / 2]
    # Kolmogorov and Smirnov: one in a thousand pairs of equal distributions is farther apart than this.
    most = 1.95 * math.sqrt(2 / count)
    for mine, other in zip(ours.unbind(1), theirs, strict=True):
        places = torch.cat([mine, other]).sort().values + 0.5  # of whole pixels, which theirs are
        apart = [torch.searchsorted(part.sort().values, places).float() / count for part in (mine, other)]
        assert (apart[0] - apart[1]).abs().max() < most + 0.01


def test_evaluation_and_what_nothing_moves_see_the_middle_of_the_resized_photo() -> None:
    images = photo((300, 400))
    batch = stored(images, 128)
    expected = their.center_crop(their.resize(images.float() / 255, [128, 170], antialias=True), list(SIZE))
    for parts, train in (({}, False), ({"crop": RandomResizedCrop()}, False), ({"brightness": Brightness(0.0)}, True)):
        seen = pipeline(**parts)(batch, epoch=0, train=train)
        assert VIEW not in seen
        assert seen["image"].shape[-2:] == SIZE
        assert (seen["image"] - expected).abs().mean() < 0.01
    assert (Seen(_Stored(batch), SIZE).fetch(torch.tensor([0]))["image"].float() / 255 - expected).abs().mean() < 0.01
    assert torch.equal(Seen(Images(images), SIZE).fetch(torch.tensor([0]))["image"], images)


class _Stored(Images):
    def __init__(self, batch: Batch) -> None:
        super().__init__(batch["image"])
        self.view = batch[VIEW]

    def fetch(self, index: Tensor) -> Batch:
        return {**super().fetch(index), VIEW: self.view[index]}


def test_a_shift_shows_the_photo_beyond_the_image_and_black_only_beyond_the_photo() -> None:
    images = torch.full((1, 3, 300, 400), 200, dtype=torch.uint8)
    batch = stored(images, 128)  # 8 pixels beyond the image above and below
    within = pipeline(crop=PadCrop(8, "zeros"))(batch, epoch=0, train=True)["image"]
    assert (within - 200 / 255).abs().max() < 1e-3
    beyond = torch.stack([pipeline(crop=PadCrop(60))(batch, epoch=epoch, train=True)["image"] for epoch in range(8)])
    assert (beyond == 0).any()


def test_a_letterbox_is_black_around_the_photo_and_its_crops_are_not() -> None:
    images = torch.full((1, 3, 300, 400), 200, dtype=torch.uint8)
    batch = stored(images, 84)  # 112 wide
    seen = pipeline(flip=HorizontalFlip(1.0))(batch, epoch=0, train=True)["image"]
    assert (seen[:, :, :14] == 0).all() and (seen[:, :, 98:] == 0).all()
    assert (seen[:, :, 14:98] - 200 / 255).abs().max() < 1e-3
    crop = pipeline(crop=RandomResizedCrop())(batch, epoch=0, train=True)["image"]
    assert (crop - 200 / 255).abs().max() < 1e-3


@pytest.mark.parametrize("size", [(300, 400), (400, 300)])
def test_masks_and_boxes_go_where_their_photo_goes(size: tuple[int, int]) -> None:
    images = torch.zeros(1, 3, *size, dtype=torch.uint8)
    images[:, :, size[0] // 4 : size[0] // 2, size[1] // 4 : size[1] * 3 // 4] = 255
    batch = stored(images, 128)
    inner = (batch["image"][:, 0] > 127).long()
    box = torch.tensor([[0.25, 0.25, 0.75, 0.5]])
    batch |= {"mask": inner, "box": box if size[0] < size[1] else box[:, [1, 0, 3, 2]]}
    crops = pipeline(crop=RandomResizedCrop((0.5, 1.0)), flip=HorizontalFlip())
    for epoch in range(8):
        moved = crops(batch, epoch=epoch, train=True)
        assert moved["mask"].shape[-2:] == SIZE
        assert ((moved["image"][:, 0] > 0.5).long() != moved["mask"]).float().mean() < 0.02
        places = moved["mask"][0].nonzero().float() + 0.5
        low, high = places.min(0).values.flip(0) / SIZE[0], places.max(0).values.flip(0) / SIZE[0]
        torch.testing.assert_close(moved["box"][0], torch.cat([low, high]), atol=0.02, rtol=0)


def test_photos_are_wanted_where_a_crop_comes_before_all_that_needs_the_image() -> None:
    crop, flip, cutout = RandomResizedCrop(), HorizontalFlip(), Cutout(4)
    assert pipeline(flip=flip, crop=crop).crops
    assert pipeline(brightness=Brightness(0.5), crop=crop, cutout=cutout).crops
    shifted = pipeline(flip=flip, shift=PadCrop(4))
    assert shifted.shifts and not shifted.crops
    assert not pipeline(cutout=cutout, crop=crop).crops


def test_without_photos_a_crop_is_of_the_image() -> None:
    images = pictures(4, size=SIZE)
    crops = pipeline(crop=RandomResizedCrop())
    inverse = invert(RandomResizedCrop().matrix(crops.draw(batch_of(images), 0)["crop"]))
    assert bool((inverse[:, 0, 0] <= 1).all() and (inverse[:, 1, 1] <= 1).all())
