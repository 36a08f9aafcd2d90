"""Normalizations: moments of the training set after them, agreement with torchvision, and refusals."""

from __future__ import annotations

import pytest
import torch
from augment_samples import Images, pictures, spec

from cnnlab import augment
from cnnlab.augment import moments
from cnnlab.augment.normalize import MAX_WHITENED


def fitted(normalize, images, seed=0):
    normalize.fit(Images(images), seed)
    return normalize


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_standardize_gives_mean_0_and_deviation_1(channels, monkeypatch):
    monkeypatch.setattr(moments, "_CHUNK_VALUES", 5000)  # several chunks
    images = pictures(40, channels=channels)
    values = fitted(augment.Standardize(), images)(images)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.mean((0, 2, 3)), torch.zeros(channels), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std((0, 2, 3), correction=0), torch.ones(channels), atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_deviation_of_a_million_pixels_is_exact(channels):
    """As of MNIST's, a fifth of which is bright: summed in float32, the variance is off by .5 % with one channel."""
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(1024, channels, 32, 32, generator=generator) < 0.2).to(torch.uint8) * 255
    state = fitted(augment.Standardize(), images).state_dict()
    expected = (images.double() / 255).std((0, 2, 3), correction=0)
    torch.testing.assert_close(state["std"].double(), expected, rtol=1e-6, atol=0)


def test_a_constant_channel_becomes_zero():
    images = pictures(4)
    images[:, 1] = 200
    values = fitted(augment.Standardize(), images)(images)
    assert values[:, 1].abs().max() < 1e-5


@pytest.mark.parametrize(
    "normalize",
    [
        augment.Identity(),
        augment.Half(),
        augment.Standardize(),
        augment.Pretrained(),
        augment.PerImage(),
        augment.ZcaWhitening(),
    ],
    ids=lambda part: type(part).__name__,
)
def test_uint8_and_float_images_agree(normalize):
    images = pictures(6, size=(6, 5))
    fitted(normalize, images)
    kept = images.clone()
    torch.testing.assert_close(normalize(images), normalize(images / 255), atol=1e-5, rtol=1e-5)
    assert torch.equal(images, kept)


def test_half_is_in_plus_minus_one_half():
    values = augment.Half()(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2))
    assert values.flatten().tolist() == [-0.5, 0.5]


def test_pretrained_is_torchvisions_normalize():
    from torchvision.transforms.v2.functional import normalize

    images = pictures(2)
    expected = normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(augment.Pretrained()(images), expected, atol=1e-5, rtol=0)
    assert augment.Pretrained((0.5,), (0.5,)).supports(spec(channels=1)) is None
    reason = augment.Pretrained().supports(spec(channels=1))
    assert reason is not None and "3, received 1" in reason
    with pytest.raises(ValueError, match="received 3 and 1"):
        augment.Pretrained(std=(0.5,))


def test_per_image_moments_and_flat_images():
    images = pictures(5)
    images[4] = 9
    values = augment.PerImage()(images)
    torch.testing.assert_close(values.mean((1, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(values[:4].flatten(1).std(1, correction=0), torch.ones(4))
    assert values[4].abs().max() < 1e-3


@pytest.fixture(scope="module")
def correlated():
    """(2000, 2, 5, 6) uint8 whose values are correlated, of full rank."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(60, 60, generator=generator)
    rows = torch.randn(2000, 60, generator=generator) @ mixing
    return (rows * 4 + 128).clamp(0, 255).round().to(torch.uint8).view(2000, 2, 5, 6)


@pytest.mark.parametrize("kind", [augment.PcaWhitening, augment.ZcaWhitening])
def test_whitened_values_have_the_identity_as_covariance(kind, correlated):
    values = fitted(kind(epsilon=0.0), correlated)(correlated)
    assert values.shape == correlated.shape
    covariance = torch.cov(values.flatten(1).T, correction=0)
    torch.testing.assert_close(covariance, torch.eye(60), atol=2e-3, rtol=0)


def test_epsilon_leaves_the_variance_that_it_should(correlated):
    """Variances λ / (λ + ε), in decreasing order."""
    epsilon = 0.02
    eigenvalues = torch.linalg.eigvalsh(torch.cov((correlated.double() / 255).flatten(1).T, correction=0)).flip(0)
    values = fitted(augment.PcaWhitening(epsilon), correlated)(correlated).flatten(1)
    variance = values.var(0, correction=0).double()
    torch.testing.assert_close(variance, eigenvalues / (eigenvalues + epsilon), atol=1e-4, rtol=1e-3)


def test_zca_is_symmetric_and_near_the_image(correlated):
    normalize = fitted(augment.ZcaWhitening(), correlated)
    weight = normalize.state_dict()["weight"]
    torch.testing.assert_close(weight, weight.T, atol=1e-5, rtol=1e-4)
    centred = correlated.float().flatten(1) - correlated.float().flatten(1).mean(0)
    similar = torch.nn.functional.cosine_similarity(normalize(correlated).flatten(1), centred).mean()
    rotated = fitted(augment.PcaWhitening(), correlated)(correlated).flatten(1)
    assert similar > 0.5 > torch.nn.functional.cosine_similarity(rotated, centred).mean()


def test_values_that_never_vary_are_left_at_zero():
    images = pictures(100, size=(6, 5))
    images[:, :, 0] = 31
    for kind in (augment.PcaWhitening, augment.ZcaWhitening):
        values = fitted(kind(epsilon=0.0), images)(images)
        assert bool(torch.isfinite(values).all())
    assert values[:, :, 0].abs().max() < 1e-2


def test_whitening_refuses_large_images():
    with pytest.raises(
        ValueError, match=rf"normalize: expected images of at most {MAX_WHITENED} values.*3x64x64 = 12288"
    ):
        augment.Pipeline({}, augment.ZcaWhitening(), spec=spec(size=(64, 64)), seed=0)


def test_large_sets_are_sampled_reproducibly(monkeypatch):
    monkeypatch.setattr(moments, "MAX_IMAGES", 30)
    images = pictures(100)
    first, again, other = (moments.channel_moments(Images(images), seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert [len(chunk) for chunk in moments.chunks(Images(images), 0)] == [30]


def test_moments_do_not_cancel(monkeypatch):
    """Nearly constant bright images: the plain E[x²] - E[x]² in float32 would lose the variance."""
    monkeypatch.setattr(moments, "_CHUNK_VALUES", 20000)
    images = 250 + (torch.arange(60 * 3 * 16 * 20).view(60, 3, 16, 20) % 2)
    mean, covariance = moments.channel_moments(Images(images.to(torch.uint8)), 0)
    torch.testing.assert_close(mean, torch.full((3,), 250.5 / 255, dtype=torch.float64), atol=1e-7, rtol=0)
    expected = torch.full((3,), (0.5 / 255) ** 2, dtype=torch.float64)
    torch.testing.assert_close(covariance.diagonal(), expected, rtol=1e-4, atol=0)
