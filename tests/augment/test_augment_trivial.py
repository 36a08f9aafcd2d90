"""Each operation of TrivialAugment against torchvision's, and the choice among them."""

from __future__ import annotations

import math

import pytest
import torch
from augment_samples import batch_of, draws_of, pictures, spec

from cnnlab.augment import Identity, Pipeline, TrivialAugment
from cnnlab.augment.trivial import OPERATIONS


def transform(images, name, strength, sign=1.0, **targets):
    count = len(images)
    return TrivialAugment().transform(
        {"image": images.float() / 255, **targets},
        torch.full((count,), float(OPERATIONS.index(name))),
        torch.full((count,), strength),
        torch.full((count,), sign),
        draws_of(torch.zeros(count, 3), images),
    )["image"]


def oracle(images, name, strength, sign):
    """The same by torchvision's functions, with the paper's magnitudes; uint8 in, float out."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as f

    bilinear = InterpolationMode.BILINEAR
    float_images = images.float() / 255
    width = images.shape[-1]
    amount = sign * strength * 0.99
    shift = math.trunc(sign * strength * min(32, width))
    tilt = math.degrees(math.atan(amount))
    return {
        "identity": lambda: float_images,
        # torchvision's positive shear slants to the left
        "shear_x": lambda: f.affine(float_images, 0.0, [0, 0], 1.0, [-tilt, 0.0], bilinear, center=[0, 0]),
        "translate_x": lambda: f.affine(float_images, 0.0, [shift, 0], 1.0, [0.0, 0.0], bilinear),
        "rotate": lambda: f.rotate(float_images, sign * strength * 135, bilinear),
        "brightness": lambda: f.adjust_brightness(float_images, 1 + amount),
        "saturation": lambda: f.adjust_saturation(float_images, 1 + amount),
        "contrast": lambda: f.adjust_contrast(float_images, 1 + amount),
        "sharpness": lambda: f.adjust_sharpness(float_images, 1 + amount),
        "posterize": lambda: f.posterize(images, 8 - round(strength * 6)) / 255,
        "solarize": lambda: f.solarize(images, 255 * (1 - strength)) / 255,
        "autocontrast": lambda: f.autocontrast(images) / 255,
        "equalize": lambda: f.equalize(images) / 255,
    }[name]()


TOLERANCE = {"autocontrast": 1.01 / 255, "shear_x": 3e-4, "rotate": 3e-4, "translate_x": 3e-4}


@pytest.mark.parametrize("strength, sign", [(0.1, 1.0), (0.7, -1.0), (1.0, 1.0)])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("shear_y", "translate_y")])
def test_an_operation_is_torchvisions(name, strength, sign):
    images = pictures(3, size=(24, 24))
    expected = oracle(images, name, strength, sign)
    tolerance = TOLERANCE.get(name, 2e-4)
    torch.testing.assert_close(transform(images, name, strength, sign), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["shear", "translate"])
def test_y_is_x_of_the_transposed_image(name):
    images = pictures(2, size=(24, 24))
    across = transform(images.transpose(2, 3).contiguous(), f"{name}_x", 0.4).transpose(2, 3)
    torch.testing.assert_close(transform(images, f"{name}_y", 0.4), across, atol=1e-4, rtol=0)


def test_equalize_and_autocontrast_leave_flat_images():
    images = torch.full((1, 3, 16, 16), 77, dtype=torch.uint8)
    for name in ("equalize", "autocontrast"):
        torch.testing.assert_close(transform(images, name, 1.0), images / 255)


def test_each_image_gets_one_operation_and_all_are_used():
    """The part itself chooses; images that got the identity come back untouched, to the bit."""
    images = pictures(1).expand(700, -1, -1, -1)
    batch = batch_of(images, mask=torch.ones(700, 16, 20, dtype=torch.int64))
    pipeline = Pipeline({"trivial": TrivialAugment()}, Identity(), spec=spec(), seed=0)
    chosen = (pipeline.draw(batch, 0)["trivial"].uniforms[:, 0] * len(OPERATIONS)).floor().long()
    assert torch.bincount(chosen, minlength=14).min() > 25
    moved = pipeline(batch, epoch=0, train=True)
    same = (moved["image"] == images / 255).flatten(1).all(1)
    assert bool(same[chosen == 0].all()) and same.float().mean() < 0.4
    geometric = (chosen >= 1) & (chosen <= 5)
    assert bool((moved["mask"][~geometric] == 1).all())
    assert bool((moved["mask"][geometric] != 1).any())
