"""Mixup and CutMix: labels weigh what pixels weigh; their shares follow the Beta distribution."""

from __future__ import annotations

import pytest
import torch
from augment_samples import batch_of, pictures, spec

from cnnlab.augment import CutMix, Cutout, HorizontalFlip, Identity, Mixup, PadCrop, Pipeline
from cnnlab.augment.mixing import BetaQuantile
from cnnlab.data.loader import Loader
from cnnlab.data.splits import TensorSplit


def mixed(part, count=200, epoch=0):
    """Constant images 0 and 1, of class 0 and 1, in turn: a partner is always of the other kind."""
    label = torch.arange(count) % 2
    images = (label * 255).to(torch.uint8)[:, None, None, None].expand(count, 3, 16, 20)
    pipeline = Pipeline({"mix": part}, Identity(), spec=spec(), seed=0)
    return pipeline(batch_of(images, label=label), epoch=epoch, train=True)


@pytest.mark.parametrize("part", [Mixup(0.2), Mixup(1.0), Mixup(1.0, p=0.5), CutMix(1.0), CutMix(0.5, p=0.5)])
def test_label_mass_is_pixel_mass(part):
    batch = mixed(part)
    assert batch["label"].shape == (200, 4) and batch["label"].dtype == torch.float32
    torch.testing.assert_close(batch["label"].sum(1), torch.ones(200))
    torch.testing.assert_close(batch["label"][:, 1], batch["image"].mean((1, 2, 3)), atol=1e-6, rtol=0)
    untouched = ((batch["label"] == 0) | (batch["label"] == 1)).all(1).float().mean()
    if part.p < 1:
        assert 0.35 < untouched < 0.8
    assert untouched < 0.8


def test_cutmix_pastes_one_rectangle():
    batch = mixed(CutMix(1.0), epoch=1)
    partner = batch["image"][:, 0] != (torch.arange(200) % 2)[:, None, None]
    area = partner.any(2).sum(1) * partner.any(1).sum(1)
    assert torch.equal(partner.flatten(1).sum(1), area)
    assert area.unique().numel() > 50


def test_mixing_twice_mixes_soft_labels():
    images = pictures(6)
    label = torch.tensor([0, 1, 2, 3, 0, 1])
    pipeline = Pipeline({"mixup": Mixup(1.0), "cutmix": CutMix()}, Identity(), spec=spec(), seed=0)
    result = pipeline(batch_of(images, label=label), epoch=0, train=True)
    torch.testing.assert_close(result["label"].sum(1), torch.ones(6))
    assert label.dtype == torch.int64


@pytest.mark.parametrize("targets", [{"label", "box"}, {"mask"}, set()])
def test_only_labels_can_be_mixed(targets):
    with pytest.raises(ValueError, match=r"augment\.mixup: mixes labels only"):
        Pipeline({"mixup": Mixup()}, Identity(), spec=spec(targets=frozenset(targets)), seed=0)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0, 2.0, 8.0])
def test_quantiles_are_scipys(alpha):
    from scipy.stats import beta

    u = torch.linspace(0, 1, 1002)[1:-1]
    expected = torch.from_numpy(beta(alpha, alpha).ppf(u.double().numpy())).float()
    torch.testing.assert_close(BetaQuantile(alpha)(u), expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("alpha, closed", [(1.0, lambda u: u), (0.5, lambda u: torch.sin(u * torch.pi / 2) ** 2)])
def test_quantiles_in_closed_form(alpha, closed):
    """Beta(1, 1) is uniform and Beta(1/2, 1/2) the arcsine distribution."""
    u = torch.linspace(0, 1 - 2**-24, 5001)
    torch.testing.assert_close(BetaQuantile(alpha)(u), closed(u), atol=2e-6, rtol=0)


@pytest.mark.parametrize("alpha", [0.01, 1000.0])
def test_extreme_shares_are_finite_and_symmetric(alpha):
    u = torch.arange(0, 1, 2.0**-12)
    share = BetaQuantile(alpha)(u)
    assert bool(torch.isfinite(share).all()) and share.min() >= 0 and share.max() <= 1
    torch.testing.assert_close(share[1:], 1 - share[1:].flip(0))
    assert bool((share.diff() >= 0).all())
    variance = 1 / (4 * (2 * alpha + 1))
    torch.testing.assert_close(share.var().item(), variance, rtol=0.02, atol=0)


# ---- several processes ----

ORDERS = {
    "mixup": ("mixup",),
    "twice, with others in between": ("crop", "mixup", "flip", "cutmix", "cutout"),
}


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("name", ORDERS)
def test_the_ranks_parts_are_those_of_one_process(name, world):
    """Of 17 samples in batches of 8, 8 and 1: ranks with several samples, with one, and with none."""
    kinds = {"crop": PadCrop(), "flip": HorizontalFlip(), "mixup": Mixup(1.0), "cutmix": CutMix(), "cutout": Cutout(4)}
    parts = {part: kinds[part] for part in ORDERS[name]}
    pipeline = Pipeline(parts, Identity(), spec=spec(), seed=3)
    split = TensorSplit(pictures(17), {"label": torch.arange(17) % 4}, "17 pictures")

    def served(rank, world):
        def transform(batch, epoch):
            return pipeline(batch, epoch=epoch, train=True)

        loader = Loader(
            split, 8, seed=1, shuffle=True, rank=rank, world=world, transform=transform, neighbours=pipeline.neighbours
        )
        return [batch for batch, _ in loader.batches(2)]

    ranks = [served(rank, world) for rank in range(world)]
    for number, whole in enumerate(served(0, 1)):
        for key in ("index", "image", "label"):
            together = torch.cat([rank[number][key] for rank in ranks])
            assert torch.equal(together, whole[key]), key
        sizes = [len(rank[number]["index"]) for rank in ranks]
        assert max(sizes) - min(sizes) <= 1, "the work is even"
