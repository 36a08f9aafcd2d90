"""Affine parts against torchvision, exactness, antialiasing, and masks and boxes that follow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from augment_samples import batch_of, draws_of, pictures, spec

from cnnlab.augment import (
    AlternatingFlip,
    HorizontalFlip,
    Identity,
    PadCrop,
    Pipeline,
    RandomResizedCrop,
    Rotate,
    Scale,
    Shear,
    Translate,
    VerticalFlip,
)
from cnnlab.augment.warp import affine, compose, copy_pixels, invert, resample
from cnnlab.protocols import VOID

ALWAYS, NEVER = 0.0, 0.999


@pytest.mark.parametrize(
    "angle, factor, x, y", [(25.0, 1.3, 2.0, -1.5), (-70.0, 1.0, 0.0, 3.25), (8.0, 2.0, -4.0, 1.0)]
)
def test_rotation_scale_and_translation_fold_to_torchvisions_affine(angle, factor, x, y):
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import affine as oracle

    images = pictures(2).float() / 255
    height, width = images.shape[-2:]
    both = [[0.0], [0.0]]
    matrix = Scale(factor, factor).matrix(draws_of(both, images))
    matrix = compose(Rotate(angle).matrix(draws_of([[1.0], [1.0]], images)), matrix)
    shift = torch.tensor([[x / width, y / height]] * 2) / 2 + 0.5
    matrix = compose(Translate(1.0).matrix(draws_of(shift, images)), matrix)
    moved = resample({"image": images}, matrix, "zeros")["image"]
    expected = oracle(images, -angle, [x, y], factor, [0.0], InterpolationMode.BILINEAR)
    torch.testing.assert_close(moved, expected, atol=2e-4, rtol=0)


def test_shear_along_x_is_torchvisions():
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import affine as oracle

    images = pictures(1).float() / 255
    matrix = Shear(20.0).matrix(draws_of([[1.0, 0.5]], images))
    moved = resample({"image": images}, matrix, "zeros")["image"]
    expected = oracle(images, 0.0, [0, 0], 1.0, [-20.0, 0.0], InterpolationMode.BILINEAR)
    torch.testing.assert_close(moved, expected, atol=2e-4, rtol=0)


def test_resized_crop_is_the_part_of_the_image_stretched():
    images = pictures(1, size=(16, 16)).float() / 255
    # A quarter of the area, square, in the top left corner.
    matrix = RandomResizedCrop((0.25, 0.25), (1.0, 1.0)).matrix(draws_of(torch.zeros(1, 22), images))
    moved = resample({"image": images}, matrix, "edge")["image"]
    stretched = F.interpolate(images[:, :, :8, :8], size=(16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(moved[:, :, :15, :15], stretched[:, :, :15, :15], atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_resized_crop_stays_inside_the_image_and_in_its_ranges(seed):
    images = pictures(1).expand(500, -1, -1, -1)
    uniforms = torch.rand(500, 22, generator=torch.Generator().manual_seed(seed))
    inverse = invert(RandomResizedCrop((0.1, 0.9), (0.5, 2.0)).matrix(draws_of(uniforms, images)))
    part_x, part_y = inverse[:, 0, 0], inverse[:, 1, 1]
    assert bool((part_x * part_y <= 0.9 + 1e-4).all())
    uncut = (part_x < 1) & (part_y < 1)
    assert bool((part_x * part_y >= 0.1 - 1e-4)[uncut].all())
    ratio = (part_x * 20 / (part_y * 16))[uncut]
    assert bool((ratio <= 2 + 1e-3).all() and (ratio >= 0.5 - 1e-3).all())
    for axis, part in ((0, part_x), (1, part_y)):
        assert bool((inverse[:, axis, 2].abs() + part * (20, 16)[axis] / 2 <= (20, 16)[axis] / 2 + 1e-3).all())


@pytest.mark.parametrize("part, dims", [(HorizontalFlip(), [3]), (VerticalFlip(), [2])])
def test_flips_are_exact(part, dims):
    images = pictures(2)
    matrix = part.matrix(draws_of([[ALWAYS], [NEVER]], images))
    moved = copy_pixels({"image": images}, matrix, "zeros")["image"]
    assert moved.dtype == torch.uint8
    assert torch.equal(moved[0], images[0].flip([d - 1 for d in dims]))
    assert torch.equal(moved[1], images[1])


@pytest.mark.parametrize("fill, mode", [("zeros", "constant"), ("reflect", "reflect"), ("edge", "replicate")])
@pytest.mark.parametrize("size", [(16, 20), (7, 5)])
def test_pad_crop_is_padding_and_cropping(fill, mode, size):
    padding = 3
    images = pictures(49, size=size)
    corners = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    matrix = PadCrop(padding, fill).matrix(draws_of((corners + 0.5) / 7, images))
    moved = copy_pixels({"image": images}, matrix, fill)["image"]
    padded = F.pad(images.float(), [padding] * 4, mode=mode).to(torch.uint8)
    for n, (u, v) in enumerate(corners.tolist()):
        left, top = 2 * padding - u, 2 * padding - v
        assert torch.equal(moved[n], padded[n, :, top : top + size[0], left : left + size[1]])


def test_an_exact_group_is_the_parts_one_after_the_other():
    images = pictures(64)
    parts = {"crop": PadCrop(4, "reflect"), "flip": HorizontalFlip(), "vertical_flip": VerticalFlip()}
    results = [
        Pipeline(parts, Identity(), spec=spec(), seed=3, fold=fold)(batch_of(images), epoch=1, train=True)["image"]
        for fold in (True, False)
    ]
    assert torch.equal(*results)
    assert torch.equal((results[0] * 255).round() / 255, results[0])
    assert not torch.equal(results[0], images / 255)


def test_an_affine_group_is_the_parts_one_after_the_other_up_to_interpolation():
    """Waves of 20 pixels, of which each bilinear pass costs some 1e-2; only the group sees beyond borders."""
    x = torch.arange(48.0)
    images = (0.5 + 0.4 * torch.sin(x / 3.2)[None, :] * torch.cos(x / 3.2)[:, None]).expand(16, 3, 48, 48)
    parts = {
        "rotate": Rotate(20.0),
        "scale": Scale(1.0, 1.2),
        "translate": Translate(0.05),
        "flip": HorizontalFlip(),
    }
    folded, unfolded = (
        Pipeline(parts, Identity(), spec=spec(size=(48, 48)), seed=0, fold=fold)(batch_of(images), epoch=0, train=True)[
            "image"
        ][:, :, 14:-14, 14:-14]
        for fold in (True, False)
    )
    assert (folded - unfolded).abs().max() < 0.03
    assert (folded - images[:, :, 14:-14, 14:-14]).abs().max() > 0.2


def test_alternating_flip_shows_both_sides_in_two_epochs():
    images = pictures(200)
    pipeline = Pipeline({"flip": AlternatingFlip()}, Identity(), spec=spec(), seed=0)
    epochs = [pipeline(batch_of(images), epoch=epoch, train=True)["image"] for epoch in range(4)]
    assert torch.equal(epochs[0], epochs[1].flip(3))
    assert torch.equal(epochs[0], epochs[2]) and torch.equal(epochs[1], epochs[3])
    flipped = (epochs[0] != images / 255).flatten(1).any(1).float().mean()
    assert 0.35 < flipped < 0.65


def test_resampling_by_the_identity_changes_nothing_however_many_readings():
    images = pictures(2).float() / 255
    for samples in (1, 3):
        moved = resample({"image": images}, affine(images), "zeros", samples)["image"]
        torch.testing.assert_close(moved, images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("factor", [0.5, 0.25])
def test_downscaling_is_antialiased_like_interpolate(factor):
    size = 64
    images = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    part = Scale(factor, factor)
    pipeline = Pipeline({"scale": part}, Identity(), spec=spec(size=(size, size)), seed=0)
    small = round(size * factor)
    edge = (size - small) // 2

    def inner(tensor):
        return tensor[:, :, edge + 2 : -edge - 2, edge + 2 : -edge - 2]

    oracle = F.interpolate(images, scale_factor=factor, mode="bilinear", antialias=True)[:, :, 2:-2, 2:-2]
    ours = inner(pipeline(batch_of(images), epoch=0, train=True)["image"])
    plain = inner(resample({"image": images}, part.matrix(draws_of([[0.0]] * 4, images)), "zeros")["image"])
    assert (ours - oracle).square().mean() < 0.1 * (plain - oracle).square().mean()
    torch.testing.assert_close(ours.std(), oracle.std(), rtol=0.15, atol=0)


GEOMETRIES = {
    "crop": {"crop": PadCrop(3)},
    "flips": {"h": HorizontalFlip(1.0), "v": VerticalFlip(1.0)},
    "scale": {"scale": Scale(0.6, 1.4), "translate": Translate(0.1)},
    "rotate by right angles": {"rotate": Rotate(0.0), "flip": HorizontalFlip()},
    "resized crop": {"resized_crop": RandomResizedCrop((0.5, 1.0)), "flip": HorizontalFlip()},
}


@pytest.mark.parametrize("parts", GEOMETRIES.values(), ids=GEOMETRIES)
def test_mask_and_box_follow_the_image(parts):
    """A bright rectangle: where the image is bright, the mask says so, and its bounds are the box."""
    count, height, width = 24, 40, 48
    top, bottom, left, right = 12, 27, 9, 30
    images = torch.zeros(count, 3, height, width, dtype=torch.uint8)
    images[:, :, top:bottom, left:right] = 255
    mask = (images[:, 0] > 0).long()
    box = torch.tensor([left / width, top / height, right / width, bottom / height]).expand(count, 4)
    pipeline = Pipeline(parts, Identity(), spec=spec(size=(height, width)), seed=1)
    moved = pipeline(batch_of(images, mask=mask, box=box), epoch=0, train=True)
    assert moved["mask"].dtype == torch.int64
    for n in range(count):
        inside = moved["mask"][n] == 1
        bright = moved["image"][n, 0]
        assert bright[inside].mean() > 0.93 and (bright[inside] > 0.2).all()
        known = (moved["mask"][n] == 0) & ~(F.max_pool2d(inside[None].float(), 3, 1, 1)[0] > 0)
        assert bright[known].max() < 1e-3
        rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
        bounds = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])[:, 0]
        pixels = moved["box"][n] * torch.tensor([width, height, width, height])
        assert (bounds - pixels).abs().max() <= 1.0


def test_the_box_of_a_turned_rectangle_bounds_it():
    images = torch.zeros(1, 1, 64, 64)
    images[:, :, 20:40, 24:50] = 1
    matrix = Rotate(30.0).matrix(draws_of([[1.0]], images))
    box = torch.tensor([[24 / 64, 20 / 64, 50 / 64, 40 / 64]])
    moved = resample({"image": images, "mask": images[:, 0].long(), "box": box}, matrix, "zeros")
    inside = moved["mask"][0] == 1
    rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
    bounds = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])[:, 0]
    assert (bounds - moved["box"][0] * 64).abs().max() <= 1.5


@pytest.mark.parametrize("fill", ["zeros", "edge", "reflect"])
def test_what_comes_from_outside_is_void_in_the_mask(fill):
    images = pictures(1)
    mask = torch.ones(1, 16, 20, dtype=torch.int64)
    matrix = affine(images, x=5.0, y=-3.0)
    for moved in (
        copy_pixels({"image": images, "mask": mask}, matrix, fill),
        resample({"image": images / 255, "mask": mask}, matrix, fill),
    ):
        expected = torch.full((16, 20), VOID)
        expected[:13, 5:] = 1
        assert torch.equal(moved["mask"][0], expected)


@pytest.mark.parametrize("fill", ["zeros", "edge", "reflect"])
def test_copying_and_resampling_agree_on_whole_pixels(fill):
    images = pictures(2)
    matrix = compose(affine(images, x=5.0, y=-3.0), affine(images, xx=-1.0))
    copied = copy_pixels({"image": images}, matrix, fill)["image"] / 255
    resampled = resample({"image": images / 255}, matrix, fill)["image"]
    torch.testing.assert_close(resampled, copied, atol=1e-4, rtol=0)


def test_a_box_that_leaves_the_image_is_empty_and_does_not_come_back():
    """Clipped, it would be a line on the border, which a rotation gives an area again."""
    images = pictures(1)
    away, back = affine(images, x=-10.0), Rotate(40.0).matrix(draws_of([[1.0]], images))
    moved = copy_pixels({"image": images, "box": torch.tensor([[0.0, 0.2, 0.2, 0.4]])}, away, "zeros")
    assert moved["box"].tolist() == [[0, 0, 0, 0]]
    for matrix in (back, affine(images, x=10.0), compose(back, affine(images, x=5.0, y=5.0))):
        assert resample({**moved, "image": images / 255}, matrix, "zeros")["box"].tolist() == [[0, 0, 0, 0]]


def test_a_single_row_of_pixels():
    images = pictures(4, size=(1, 9))
    parts = {"crop": PadCrop(2, "reflect"), "rotate": Rotate(0.0)}
    pipeline = Pipeline(parts, Identity(), spec=spec(size=(1, 9)), seed=0)
    moved = pipeline(batch_of(images), epoch=0, train=True)
    assert bool(torch.isfinite(moved["image"]).all())


def test_wrong_knobs_are_refused():
    with pytest.raises(ValueError, match="expected fill to be one of zeros, edge, reflect, received 'mirror'"):
        PadCrop(4, "mirror")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="low <= high"):
        Scale(1.2, 0.8)
    with pytest.raises(ValueError, match="scale"):
        RandomResizedCrop((0.5, 1.5))
