"""Corruptions against scipy and Pillow; what moves, moves with its targets."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from cnnlab.assess.corruptions import BLUR, CONTRAST, CORRUPTIONS, JPEG, NOISE, SHIFT, STRENGTHS
from cnnlab.protocols import VOID


def batch(count: int = 3, channels: int = 3, size: tuple[int, int] = (40, 56), **more: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (count, channels, *size), generator=generator, dtype=torch.uint8)
    return {"image": image, "index": torch.arange(count) + 5, **more}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_sample_is_corrupted_alike_in_any_batch_and_more_so_at_more_strength(name: str):
    whole = batch(6)
    before = whole["image"].clone()
    gaps = []
    for strength in range(STRENGTHS):
        found = CORRUPTIONS[name].apply(whole, strength)["image"]
        assert found.dtype == torch.uint8 and found.shape == whole["image"].shape
        alone = {key: tensor[2:3] for key, tensor in whole.items()}
        assert torch.equal(CORRUPTIONS[name].apply(alone, strength)["image"][0], found[2])
        gaps.append((found.float() - before.float()).abs().mean().item())
    assert torch.equal(whole["image"], before)
    if name != "shift":  # of noise, a pixel further is no further
        assert gaps == sorted(gaps) and gaps[0] < gaps[-1]


@pytest.mark.parametrize("strength", range(STRENGTHS))
def test_formulas(strength: int):
    flat = batch()
    flat["image"] = torch.full((4, 3, 64, 64), 128, dtype=torch.uint8)
    flat["index"] = torch.arange(4)
    noisy = CORRUPTIONS["noise"].apply(flat, strength)["image"].float() - 128
    if strength < 3:  # beyond, values are cut off at 0 and 255
        assert noisy.std().item() == pytest.approx(255 * NOISE[strength], rel=0.02)
    assert abs(noisy.mean().item()) < 1

    given = batch()
    image = given["image"][1].numpy()
    sigma = BLUR[strength] * 40
    blurred = CORRUPTIONS["blur"].apply(given, strength)["image"][1].numpy()
    reach = int(np.ceil(3 * sigma))
    wanted = [ndimage.gaussian_filter(each.astype(float), sigma, mode="mirror", radius=reach) for each in image]
    assert np.abs(blurred - np.stack(wanted)).max() <= 0.51

    dull = CORRUPTIONS["contrast"].apply(given, strength)["image"][1].numpy()
    mean = image.mean((1, 2), keepdims=True)
    assert np.abs(dull - (mean + CONTRAST[strength] * (image - mean))).max() <= 0.51

    buffer = io.BytesIO()
    Image.fromarray(np.moveaxis(image, 0, -1).copy()).save(buffer, "JPEG", quality=JPEG[strength])
    read = np.moveaxis(np.asarray(Image.open(buffer)), -1, 0)
    assert np.array_equal(CORRUPTIONS["jpeg"].apply(given, strength)["image"][1].numpy(), read)


def test_grey_images_are_jpegs_and_five_channels_are_none():
    assert CORRUPTIONS["jpeg"].apply(batch(channels=1), 4)["image"].shape == (3, 1, 40, 56)
    with pytest.raises(ValueError, match="1 or 3 channels"):
        CORRUPTIONS["jpeg"].apply(batch(channels=5), 0)


def test_what_is_shifted_takes_its_targets_along():
    """A bright block with its mask and its box: all three by the same whole pixels, in all eight ways."""
    count, side = 64, 20
    image = torch.zeros(count, 1, side, side, dtype=torch.uint8)
    image[:, :, 8:12, 6:11] = 200
    mask = (image[:, 0] > 0).to(torch.int64)
    box = torch.tensor([[6, 8, 11, 12]]) / side
    given = {"image": image, "index": torch.arange(count), "mask": mask, "box": box.repeat(count, 1)}
    ways = set()
    for strength, part in enumerate(SHIFT):
        pixels = max(1, round(part * side))
        moved = CORRUPTIONS["shift"].apply(given, strength)
        for at in range(count):
            rows, columns = torch.where(moved["image"][at, 0] > 0)
            down, right = int(rows.min()) - 8, int(columns.min()) - 6
            assert {abs(down), abs(right)} <= {0, pixels} and (down or right)
            ways.add((np.sign(down), np.sign(right)))
            assert torch.equal(moved["mask"][at] == 1, moved["image"][at, 0] > 0)
            outside = torch.ones(side, side, dtype=torch.bool)
            outside[max(0, down) : side + min(0, down), max(0, right) : side + min(0, right)] = False
            assert torch.equal(moved["mask"][at] == VOID, outside)
            wanted = torch.tensor([6 + right, 8 + down, 11 + right, 12 + down]) / side
            assert torch.allclose(moved["box"][at], wanted)
    assert len(ways) == 8


def test_a_box_that_leaves_the_frame_is_none_and_stays_none():
    box = torch.tensor([[0.9, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    given = batch(2, size=(40, 40), box=box)
    given["index"] = torch.tensor([0, 1])
    for index in range(40):
        given["index"] = torch.tensor([index, index])
        moved = CORRUPTIONS["shift"].apply(given, 4)["box"]
        assert torch.equal(moved[1], torch.zeros(4))
        assert torch.equal(moved[0], torch.zeros(4)) or moved[0, 2] > moved[0, 0]
