"""Colour parts against torchvision's functional, and the colour noise against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from augment_samples import Images, batch_of, draws_of, pictures, spec

from cnnlab.augment import (
    Brightness,
    ColourShift,
    Contrast,
    Cutout,
    GaussianNoise,
    Hue,
    Identity,
    PcaNoise,
    Pipeline,
    Saturation,
)
from cnnlab.augment.base import standard_normal
from cnnlab.augment.photometric import apply_matrix, turn_hue


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.3])
@pytest.mark.parametrize(
    "part, name, tolerance",
    [
        (Brightness, "adjust_brightness", 1e-6),
        (Contrast, "adjust_contrast", 2e-4),
        (Saturation, "adjust_saturation", 2e-4),
    ],
)
def test_a_factor_is_torchvisions(part, name, tolerance, factor):
    """torchvision rounds the weights of grey to 4 digits; values that it would clamp are avoided."""
    from torchvision.transforms.v2 import functional

    images = 0.3 + 0.4 * pictures(4).float() / 255
    jitter = part(strength=1.0)
    matrix = jitter.matrix(draws_of([[factor / 2]] * 4, images))
    torch.testing.assert_close(
        apply_matrix(images, matrix), getattr(functional, name)(images, factor), atol=tolerance, rtol=0
    )


@pytest.mark.parametrize("turn", [-0.5, -0.2, 0.0, 0.07, 0.31])
def test_hue_is_torchvisions(turn):
    from torchvision.transforms.v2.functional import adjust_hue

    images = torch.rand(3, 3, 12, 14, generator=torch.Generator().manual_seed(0))
    images[0, :, :3] = images[0, :1, :3]  # grey pixels
    torch.testing.assert_close(turn_hue(images, torch.full((3,), turn)), adjust_hue(images, turn), atol=2e-6, rtol=0)


def test_neighbouring_colour_parts_fold_exactly():
    """The contrast in the middle must see the mean that the saturation and the shift before it leave."""
    images = pictures(32)
    parts = {
        "saturation": Saturation(0.5),
        "colour_shift": ColourShift(0.2),
        "contrast": Contrast(0.5),
        "brightness": Brightness(0.5),
        "again": Contrast(0.3),
    }
    folded, unfolded = (
        Pipeline(parts, Identity(), spec=spec(), seed=0, fold=fold)(batch_of(images), epoch=0, train=True)["image"]
        for fold in (True, False)
    )
    torch.testing.assert_close(folded, unfolded, atol=3e-6, rtol=0)
    assert folded.min() >= 0 and folded.max() <= 1


def test_values_are_clamped_once_at_the_end():
    images = torch.full((1, 3, 16, 20), 0.8)

    class Times(Brightness):
        def __init__(self, value: float):
            super().__init__(1.0)
            self.value = value

        def factor(self, draws):
            return torch.full_like(draws.uniforms[:, 0], self.value)

    pipeline = Pipeline({"up": Times(2.0), "down": Times(0.5)}, Identity(), spec=spec(), seed=0, fold=False)
    torch.testing.assert_close(pipeline(batch_of(images), epoch=0, train=True)["image"], images)


@pytest.mark.parametrize("part", [Saturation(1.0), Hue(0.5)])
def test_grey_images_have_no_colour_to_change(part):
    images = pictures(4, channels=1)
    pipeline = Pipeline({"part": part}, Identity(), spec=spec(channels=1), seed=0)
    moved = pipeline(batch_of(images), epoch=0, train=True)["image"]
    torch.testing.assert_close(moved, images / 255)


def test_hue_refuses_what_is_not_rgb():
    with pytest.raises(ValueError, match=r"augment\.hue: expected images of 3 channels.*received 4"):
        Pipeline({"hue": Hue()}, Identity(), spec=spec(channels=4), seed=0)


def test_pca_noise_has_the_covariance_of_the_paper():
    """Offsets Σ pₖ·αₖ·λₖ have covariance sigma²·C², where C is the covariance of the colours."""
    base = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0))
    mixing = torch.tensor([[30.0, 5.0, 0.0], [20.0, -10.0, 3.0], [25.0, 0.0, 8.0]])
    colours = (mixing @ base + 128).clamp(0, 255).round()
    split = Images(colours.view(3, 10, 20, 20).transpose(0, 1).to(torch.uint8))
    part = PcaNoise(sigma=0.1)
    part.fit(split, seed=0)
    uniforms = torch.rand(20000, 3, generator=torch.Generator().manual_seed(1))
    offsets = part.matrix(draws_of(uniforms, split.images))[:, :, 3]
    covariance = torch.cov(colours / 255, correction=0)
    expected = 0.01 * covariance @ covariance
    torch.testing.assert_close(torch.cov(offsets.T), expected, atol=float(expected.max()) * 0.05, rtol=0)

    other = PcaNoise(sigma=0.1)
    with pytest.raises(RuntimeError, match="fit"):
        other.matrix(draws_of(uniforms, split.images))
    other.load_state_dict(part.state_dict())
    assert torch.equal(other.matrix(draws_of(uniforms, split.images))[:, :, 3], offsets)


def test_normal_numbers_are_finite_and_symmetric_on_the_whole_grid():
    grid = torch.tensor([0.0, 2.0**-24, 0.25, 0.5, 0.75, 1 - 2.0**-23, 1 - 2.0**-24])
    normal = standard_normal(grid)
    assert bool(torch.isfinite(normal).all())
    torch.testing.assert_close(normal[0], -normal[-1])
    torch.testing.assert_close(normal[4].item(), 0.67449, atol=1e-4, rtol=0)


def test_noise_has_its_standard_deviation_and_no_pattern():
    images = torch.full((64, 3, 16, 20), 128, dtype=torch.uint8)
    pipeline = Pipeline({"noise": GaussianNoise(0.05)}, Identity(), spec=spec(), seed=0)
    noise = pipeline(batch_of(images), epoch=0, train=True)["image"] - 128 / 255
    count = noise.numel()
    assert abs(noise.mean()) < 5 * 0.05 / math.sqrt(count)
    assert abs(noise.std() - 0.05) < 5 * 0.05 / math.sqrt(2 * count)
    rows = torch.corrcoef(noise.flatten(1))
    assert (rows - torch.eye(64)).abs().max() < 0.2


def test_cutout_covers_one_square_cut_at_the_border():
    images = torch.full((300, 3, 16, 20), 255, dtype=torch.uint8)
    pipeline = Pipeline({"cutout": Cutout(6, value=0.25)}, Identity(), spec=spec(), seed=0)
    covered = pipeline(batch_of(images), epoch=0, train=True)["image"] == 0.25
    heights = covered[:, 0].any(2).sum(1)
    widths = covered[:, 0].any(1).sum(1)
    assert torch.equal(covered.flatten(1).sum(1), 3 * heights * widths)
    assert heights.min() >= 3 and heights.max() == 6 and widths.max() == 6
    assert ((heights == 6) & (widths == 6)).float().mean() > 0.3
    assert covered[:, 0].any(0).all()
