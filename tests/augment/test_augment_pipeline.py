"""What the pipeline promises whatever its parts: reproducible samples, no waiting, evaluation, state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from augment_samples import Images, batch_of, pictures, spec
from torch import Tensor

from cnnlab import augment
from cnnlab.augment import Barrier, Colour, Geometric, Pipeline
from cnnlab.augment.warp import affine

LISTS: dict[str, Callable[[], dict[str, augment.Part]]] = {
    "standard": lambda: {"crop": augment.PadCrop(2), "flip": augment.HorizontalFlip()},
    "affine": lambda: {
        "rotate": augment.Rotate(),
        "scale": augment.Scale(0.5, 1.1),
        "shear": augment.Shear(),
        "translate": augment.Translate(),
    },
    "colour": lambda: {
        "brightness": augment.Brightness(),
        "contrast": augment.Contrast(),
        "saturation": augment.Saturation(),
        "shift": augment.ColourShift(),
        "hue": augment.Hue(),
    },
    "alexnet": lambda: {
        "crop": augment.PadCrop(2, "reflect"),
        "flip": augment.AlternatingFlip(),
        "pca_noise": augment.PcaNoise(),
    },
    "inception": lambda: {
        "resized_crop": augment.RandomResizedCrop(),
        "flip": augment.HorizontalFlip(),
        "contrast": augment.Contrast(0.5),
    },
    "trivial": lambda: {"trivial": augment.TrivialAugment()},
    "erasing": lambda: {"cutout": augment.Cutout(5), "noise": augment.GaussianNoise()},
}
MIXING: dict[str, Callable[[], dict[str, augment.Part]]] = {
    "mixup": lambda: {"mixup": augment.Mixup()},
    "cutmix": lambda: {"cutmix": augment.CutMix()},
}
every_list = pytest.mark.parametrize("parts", [pytest.param(make, id=name) for name, make in LISTS.items()])
every_list_and_mixing = pytest.mark.parametrize(
    "parts", [pytest.param(make, id=name) for name, make in {**LISTS, **MIXING}.items()]
)


def pipeline_of(parts, images, normalize=None, **knobs) -> Pipeline:
    pipeline = Pipeline(parts, normalize or augment.Standardize(), spec=spec(), seed=5, **knobs)
    pipeline.fit(Images(images))
    return pipeline


@every_list
def test_a_sample_does_not_depend_on_its_batch(parts):
    images = pictures(24)
    batch = batch_of(images, mask=(images[:, 0] > 128).long(), box=torch.rand(24, 4).sort().values)
    pipeline = pipeline_of(parts(), images)
    whole = pipeline(batch, epoch=2, train=True)
    chosen = torch.tensor([17, 3, 4, 20, 11])
    some = pipeline({name: tensor[chosen] for name, tensor in batch.items()}, epoch=2, train=True)
    for name in whole:
        torch.testing.assert_close(some[name], whole[name][chosen], atol=1e-6, rtol=0)


@every_list
def test_epoch_seed_and_name_change_a_sample_and_nothing_else_does(parts):
    images = pictures(8)
    first = pipeline_of(parts(), images)
    result = first(batch_of(images), epoch=0, train=True)["image"]
    assert torch.equal(first(batch_of(images), epoch=0, train=True)["image"], result)
    assert not torch.equal(first(batch_of(images), epoch=1, train=True)["image"], result)
    other = Pipeline(parts(), augment.Standardize(), spec=spec(), seed=6)
    other.fit(Images(images))
    assert not torch.equal(other(batch_of(images), epoch=0, train=True)["image"], result)


def test_a_further_part_does_not_change_the_others():
    images = pictures(8)
    alone = pipeline_of({"flip": augment.HorizontalFlip()}, images)
    both = pipeline_of({"noise": augment.GaussianNoise(0.0), "flip": augment.HorizontalFlip()}, images)
    torch.testing.assert_close(
        both(batch_of(images), epoch=0, train=True)["image"],
        alone(batch_of(images), epoch=0, train=True)["image"],
    )


@every_list_and_mixing
def test_evaluation_only_normalizes_and_batches_are_not_changed(parts):
    images = pictures(8)
    batch = batch_of(images, label=torch.arange(8) % 4)
    kept = {name: tensor.clone() for name, tensor in batch.items()}
    pipeline = pipeline_of(parts(), images)
    plain = pipeline_of({}, images)
    evaluated = pipeline(batch, epoch=3, train=False)
    assert torch.equal(evaluated["image"], plain(batch, epoch=0, train=True)["image"])
    assert evaluated["label"] is batch["label"]
    trained = pipeline(batch, epoch=3, train=True)
    assert trained["image"].dtype == torch.float32 and trained["image"].shape == images.shape
    assert all(torch.equal(batch[name], kept[name]) for name in kept)


@every_list_and_mixing
def test_nothing_depends_on_values(parts):
    """Tensors without values, and a graph without breaks: reading a value anywhere raises in both."""
    images = pictures(8)
    batch = batch_of(images, label=torch.arange(8) % 4)
    pipeline = pipeline_of(parts(), images)
    on_meta = pipeline({name: tensor.to("meta") for name, tensor in batch.items()}, epoch=0, train=True)
    assert on_meta["image"].shape == images.shape and on_meta["image"].dtype == torch.float32

    draws = pipeline.draw(batch, 0)
    torch.compiler.reset()

    def transform(batch):
        return pipeline.normalize(pipeline.augment(batch, draws)["image"])

    compiled = torch.compile(transform, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch), pipeline(batch, epoch=0, train=True)["image"])


def test_a_users_own_parts_fold_and_stand_alone():
    class Nudge(Geometric):
        """One pixel to the right."""

        exact = True
        fill = "zeros"

        def matrix(self, draws):
            return affine(draws.uniforms, x=1.0)

    class Invert(Colour):
        def matrix(self, draws):
            eye = torch.eye(draws.channels).expand(len(draws.uniforms), -1, -1)
            return torch.cat([-eye, torch.ones_like(eye[:, :, :1])], dim=2)

    class Stamp(Barrier):
        draws = 1
        bounded = True

        def apply(self, batch, draws):
            return {
                **batch,
                "image": torch.where(draws.uniforms[:, 0, None, None, None] < 2, 0.25, batch["image"]),
            }

    images = pictures(4)
    pipeline = Pipeline(
        {"nudge": Nudge(), "flip": augment.HorizontalFlip(1.0), "invert": Invert()},
        augment.Identity(),
        spec=spec(),
        seed=0,
    )
    expected = 1 - torch.nn.functional.pad(images, (1, 0))[..., :20].flip(3) / 255
    torch.testing.assert_close(pipeline(batch_of(images), epoch=0, train=True)["image"], expected)
    stamped = Pipeline({"stamp": Stamp()}, augment.Identity(), spec=spec(), seed=0)
    assert bool((stamped(batch_of(images), epoch=0, train=True)["image"] == 0.25).all())


def test_one_line_says_what_is_done():
    pipeline = Pipeline(
        {
            "crop": augment.PadCrop(4, "reflect"),
            "flip": augment.HorizontalFlip(),
            "rotate": augment.Rotate(),
            "scale": augment.Scale(0.5),
            "brightness": augment.Brightness(),
            "contrast": augment.Contrast(),
            "cutout": augment.Cutout(),
        },
        augment.Half(),
        spec=spec(),
        seed=0,
    )
    assert pipeline.describe() == (
        "train: crop+flip (copied) -> rotate+scale (1 resampling, 2x2 readings)"
        " -> brightness+contrast (1 matrix) -> cutout -> clamp -> Half; evaluation: Half"
    )


def test_state_restores_what_was_fitted():
    images = pictures(8)
    parts = LISTS["alexnet"]
    fitted = pipeline_of(parts(), images)
    state = fitted.state_dict()
    assert set(state) == {"augment.pca_noise", "normalize"}
    assert all(isinstance(t, Tensor) and t.device.type == "cpu" for part in state.values() for t in part.values())
    restored = Pipeline(parts(), augment.Standardize(), spec=spec(), seed=5)
    with pytest.raises(RuntimeError, match="fit"):
        restored(batch_of(images), epoch=0, train=True)
    restored.load_state_dict(state)
    first, second = (p(batch_of(images), epoch=0, train=True)["image"] for p in (fitted, restored))
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match=r"received that of augment\.pca_noise"):
        pipeline_of({}, images).load_state_dict(state)


def test_what_is_no_augmentation_is_refused():
    with pytest.raises(ValueError, match="expected subclasses of Geometric, Colour or Barrier, received flip"):
        Pipeline({"flip": torch.nn.Identity()}, augment.Identity(), spec=spec(), seed=0)  # type: ignore[dict-item]
