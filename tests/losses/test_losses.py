"""Losses against independent formulas: torch.nn.functional, torchvision, scikit-learn, and hand loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from cnnlab.losses import BCE, MSE, CrossEntropy, Dice, Focal, Hinge

CLASSES = 5
ALL = {
    "cross_entropy": lambda: CrossEntropy(CLASSES),
    "smoothed": lambda: CrossEntropy(CLASSES, label_smoothing=0.1, class_weights=(1, 2, 3, 4, 5)),
    "focal_sigmoid": lambda: Focal(CLASSES),
    "focal_softmax": lambda: Focal(CLASSES, variant="softmax", prior=None),
    "hinge": lambda: Hinge(CLASSES),
    "bce": lambda: BCE(CLASSES),
    "mse": lambda: MSE(CLASSES),
}


@pytest.fixture
def flat():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(32, CLASSES, generator=generator)
    return logits, torch.randint(CLASSES, (32,), generator=generator)


@pytest.fixture
def dense():
    """(3, C, 4, 6): the first sample is void everywhere, the second in its first two rows."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, CLASSES, 4, 6, generator=generator)
    target = torch.randint(CLASSES, (3, 4, 6), generator=generator)
    target[0] = 255
    target[1, :2] = 255
    return logits, target


def soft_like(logits):
    return torch.softmax(torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)), 1)


@pytest.mark.parametrize("name", ALL)
def test_one_hot_soft_targets_equal_indices(name, flat):
    logits, target = flat
    loss = ALL[name]()
    torch.testing.assert_close(loss(logits, F.one_hot(target, CLASSES).float()), loss(logits, target))


@pytest.mark.parametrize("name", ALL)
def test_dense_values_are_means_over_valid_positions(name, dense):
    logits, target = dense
    loss = ALL[name]()
    expected = []
    for z, t in zip(logits, target):
        valid = t != 255
        values = loss(z[:, valid].T, t[valid])
        expected.append(values.mean() if len(values) else torch.zeros(()))
    torch.testing.assert_close(loss(logits, target), torch.stack(expected))


@pytest.mark.parametrize("name", [*ALL, "dice"])
def test_void_positions_have_no_gradient(name, dense):
    logits, target = dense
    logits.requires_grad_()
    loss = Dice(CLASSES, cross_entropy=1.0) if name == "dice" else ALL[name]()
    loss(logits, target).sum().backward()
    void = (target == 255)[:, None].expand_as(logits)
    assert torch.all(logits.grad[void] == 0)
    assert logits.grad[~void].abs().max() > 0
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", [*ALL, "dice"])
def test_infinite_logits_at_void_positions_do_no_harm(name, dense):
    logits, target = dense
    loss = Dice(CLASSES) if name == "dice" else ALL[name]()
    finite = loss(logits, target)
    huge = torch.where((target == 255)[:, None], 1e30, logits)
    torch.testing.assert_close(loss(huge, target), finite)


@pytest.mark.parametrize("name", ALL)
def test_gradients_match_finite_differences(name, flat):
    logits, target = flat
    loss = ALL[name]()
    logits = logits[:4].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, target[:4]), logits)


def test_class_255_of_many_is_no_void():
    logits = torch.randn(4, 300)
    target = torch.tensor([255, 0, 299, 255])
    expected = F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(CrossEntropy(300)(logits, target), expected)


def test_half_precision_logits_are_computed_in_float32(flat):
    logits, target = flat
    values = CrossEntropy(CLASSES)(logits.bfloat16(), target)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, CrossEntropy(CLASSES)(logits.bfloat16().float(), target))


# --- cross entropies


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_torch(flat, smoothing):
    logits, target = flat
    weights = torch.tensor([1.0, 0.5, 2.0, 3.0, 0.1])
    loss = CrossEntropy(CLASSES, label_smoothing=smoothing, class_weights=tuple(weights.tolist()))
    expected = F.cross_entropy(logits, target, weights, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(loss(logits, target), expected)


def test_balanced_weights_average_to_one_over_the_training_set():
    counts = torch.tensor([100, 10, 5, 85, 0])
    weight = CrossEntropy(CLASSES, class_counts=counts, class_weights="balanced").weight
    torch.testing.assert_close((weight * counts).sum() / counts.sum(), torch.tensor(1.0))
    totals = (weight * counts)[:4]
    torch.testing.assert_close(totals, totals[:1].expand(4))


def test_balanced_weights_equal_scikit_learn():
    sklearn = pytest.importorskip("sklearn.utils.class_weight")
    labels = torch.tensor([0] * 7 + [1] * 2 + [2] * 3)
    ours = CrossEntropy(3, class_counts=labels.bincount(), class_weights="balanced").weight
    theirs = sklearn.compute_class_weight("balanced", classes=labels.unique().numpy(), y=labels.numpy())
    torch.testing.assert_close(ours, torch.tensor(theirs).float())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_weights": "balanced"}, "expected class counts"),
        ({"class_weights": "even"}, "expected null, `balanced`"),
        ({"class_weights": (1.0, 2.0)}, "expected 5 class_weights .* received 2"),
        ({"class_weights": (1.0, 2.0, -1.0, 1.0, 1.0)}, "expected class_weights >= 0, received -1"),
    ],
)
def test_class_weights_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CrossEntropy(CLASSES, **arguments)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="at least 2 classes"):
        CrossEntropy(1)


@pytest.mark.parametrize("pos_weight", [1.0, 3.0])
def test_bce_is_torchs_summed_over_the_classes(flat, pos_weight):
    logits, target = flat
    expected = F.binary_cross_entropy_with_logits(
        logits,
        F.one_hot(target, CLASSES).float(),
        pos_weight=torch.full((CLASSES,), pos_weight),
        reduction="none",
    ).sum(1)
    torch.testing.assert_close(BCE(CLASSES, pos_weight=pos_weight)(logits, target), expected)


def test_bce_smooths_towards_the_uniform_distribution(flat):
    logits, target = flat
    smoothed = 0.8 * F.one_hot(target, CLASSES) + 0.2 / CLASSES
    torch.testing.assert_close(BCE(CLASSES, label_smoothing=0.2)(logits, target), BCE(CLASSES)(logits, smoothed))


# --- focal


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_sigmoid_focal_equals_torchvision(flat, gamma, alpha):
    from torchvision.ops import sigmoid_focal_loss

    logits, target = flat
    one_hot = F.one_hot(target, CLASSES).float()
    expected = sigmoid_focal_loss(logits, one_hot, alpha=-1 if alpha is None else alpha, gamma=gamma).sum(1)
    torch.testing.assert_close(Focal(CLASSES, gamma=gamma, alpha=alpha)(logits, target), expected)


def test_softmax_focal_is_the_formula(flat):
    logits, target = flat
    loss = Focal(CLASSES, variant="softmax", gamma=2.0, alpha=None, prior=None)(logits, target)
    for value, z, y in zip(loss, logits, target):
        p = float(torch.softmax(z.double(), 0)[y])
        assert float(value) == pytest.approx((1 - p) ** 2 * -math.log(p), rel=1e-4, abs=1e-7)


def test_gamma_zero_is_the_cross_entropy(flat):
    logits, target = flat
    softmax = Focal(CLASSES, variant="softmax", gamma=0.0, alpha=None, prior=None)
    torch.testing.assert_close(softmax(logits, target), CrossEntropy(CLASSES)(logits, target))
    sigmoid = Focal(CLASSES, gamma=0.0, alpha=None, prior=None)
    torch.testing.assert_close(sigmoid(logits, target), BCE(CLASSES)(logits, target))


@pytest.mark.parametrize("variant", ["softmax", "sigmoid"])
def test_focal_gradient_is_finite_for_certain_predictions(variant):
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    Focal(2, variant=variant, gamma=0.5, prior=None)(logits, torch.tensor([0, 0])).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_a_mixed_sample_has_the_mixture_of_its_focal_losses(flat):
    logits, target = flat
    other = (target + 1) % CLASSES
    mixed = 0.3 * F.one_hot(target, CLASSES) + 0.7 * F.one_hot(other, CLASSES)
    for loss in (Focal(CLASSES), Focal(CLASSES, variant="softmax", prior=None)):
        torch.testing.assert_close(loss(logits, mixed), 0.3 * loss(logits, target) + 0.7 * loss(logits, other))


def test_prior_is_the_probability_that_every_class_starts_with():
    bias = Focal(CLASSES, prior=0.01).initial_bias(CLASSES)
    torch.testing.assert_close(torch.sigmoid(bias), torch.full((CLASSES,), 0.01))
    assert Focal(CLASSES, prior=None).initial_bias(CLASSES) is None
    with pytest.raises(ValueError, match="variant=sigmoid"):
        Focal(CLASSES, variant="softmax", prior=0.01)


def test_focal_class_weights_scale_a_class():
    logits, target = torch.zeros(2, 2), torch.tensor([0, 1])
    plain = Focal(2, variant="softmax", prior=None)(logits, target)
    weighted = Focal(2, variant="softmax", prior=None, class_weights=(1.0, 4.0))(logits, target)
    torch.testing.assert_close(weighted, plain * torch.tensor([1.0, 4.0]))


# --- margins


def test_hinge_equals_scikit_learn(flat):
    metrics = pytest.importorskip("sklearn.metrics")
    logits, target = flat
    expected = metrics.hinge_loss(target.numpy(), logits.numpy(), labels=list(range(CLASSES)))
    assert float(Hinge(CLASSES)(logits, target).mean()) == pytest.approx(expected, rel=1e-6)


def test_hinge_margin_and_square():
    logits, target = torch.tensor([[1.0, 0.5, -2.0], [0.0, 0.0, 5.0]]), torch.tensor([0, 2])
    torch.testing.assert_close(Hinge(3, margin=2.0)(logits, target), torch.tensor([1.5, 0.0]))
    torch.testing.assert_close(Hinge(3, margin=2.0, squared=True)(logits, target), torch.tensor([2.25, 0.0]))
    tied = torch.zeros(1, 3)
    torch.testing.assert_close(Hinge(3)(tied, torch.tensor([1])), torch.tensor([1.0]))


def test_mse_is_the_brier_score_or_least_squares(flat):
    logits, target = flat
    one_hot = F.one_hot(target, CLASSES).float()
    brier = F.mse_loss(torch.softmax(logits, 1), one_hot, reduction="none").sum(1)
    torch.testing.assert_close(MSE(CLASSES)(logits, target), brier)
    squares = F.mse_loss(logits, one_hot, reduction="none").sum(1)
    torch.testing.assert_close(MSE(CLASSES, space="logits")(logits, target), squares)


# --- dice


def test_dice_is_the_formula_over_present_classes(dense):
    logits, target = dense
    loss = Dice(CLASSES, smooth=0.1)(logits, target)
    assert float(loss[0]) == 0
    for value, z, t in list(zip(loss, logits, target))[1:]:
        valid = t != 255
        p, labels = torch.softmax(z[:, valid].double(), 0), t[valid]
        scores = []
        for c in labels.unique():
            hit = (labels == c).double()
            scores.append((2 * (p[c] * hit).sum() + 0.1) / ((p[c] ** 2).sum() + hit.sum() + 0.1))
        assert float(value) == pytest.approx(1 - float(torch.stack(scores).mean()), rel=1e-5)


def test_dice_of_a_perfect_prediction_is_zero_and_of_a_wrong_one_is_one():
    target = torch.tensor([[[0, 1], [1, 0]]])
    right = 60 * F.one_hot(target, 2).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(Dice(2)(right, target), torch.zeros(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(Dice(2)(-right, target), torch.ones(1), atol=1e-4, rtol=0)


def test_dice_adds_the_cross_entropy(dense):
    logits, target = dense
    both = Dice(CLASSES, cross_entropy=0.5)(logits, target)
    expected = Dice(CLASSES)(logits, target) + 0.5 * CrossEntropy(CLASSES)(logits, target)
    torch.testing.assert_close(both, expected)


# --- what a network should start with


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (CrossEntropy(10), math.log(10)),
        (CrossEntropy(10, label_smoothing=0.1), math.log(10)),
        (BCE(10), 10 * math.log(2)),
        (MSE(10), 0.9),
        (Hinge(10), 1.0),
        (Focal(10, variant="softmax", prior=None, alpha=None), 0.81 * math.log(10)),
        (Focal(10), 0.25 * 0.99**2 * math.log(100) - 9 * 0.75 * 0.01**2 * math.log(0.99)),
    ],
)
def test_expected_initial_loss_has_its_closed_form(loss, expected):
    assert loss.expected_initial_loss() == pytest.approx(expected, rel=1e-5)


def test_dice_expects_no_particular_initial_loss():
    assert Dice(10).expected_initial_loss() is None
