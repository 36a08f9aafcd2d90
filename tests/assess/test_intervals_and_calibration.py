"""Intervals and calibration against scipy, scikit-learn and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from cnnlab.assess import intervals
from cnnlab.assess.calibration import calibration, in_words, of_bins
from cnnlab.protocols import VOID, DataSpec
from cnnlab.tasks.metrics import confusion
from cnnlab.tasks.segmentation import Segmentation


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (5, 5), (1, 1), (3, 7), (360, 400), (99_999, 100_000)])
def test_wilson_is_scipys(successes: int, trials: int):
    wanted = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    assert intervals.wilson(successes, trials) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    narrower = stats.binomtest(successes, trials).proportion_ci(0.5, method="wilson")
    assert intervals.wilson(successes, trials, 0.5) == pytest.approx((narrower.low, narrower.high), abs=1e-12)


def test_wilson_of_nothing_is_everything():
    assert intervals.wilson(0, 0) == (0.0, 1.0)


def test_class_intervals_hold_scikit_learns_rates():
    random = np.random.default_rng(0)
    target = random.integers(0, 4, 300)
    predicted = np.where(random.random(300) < 0.7, target, random.integers(0, 4, 300))
    found = intervals.class_intervals(confusion(torch.from_numpy(predicted), torch.from_numpy(target), 4))
    rates = sk.precision_recall_fscore_support(target, predicted)
    for number, name in enumerate(("precision", "recall", "f1")):
        for row, rate in zip(found, rates[number], strict=True):
            low, high = row[name]
            assert low < rate < high and high - low < 0.25
    count = int((target == 2).sum())
    wanted = stats.binomtest(int(((target == 2) & (predicted == 2)).sum()), count).proportion_ci(method="wilson")
    assert found[2]["recall"] == pytest.approx((wanted.low, wanted.high))


def test_f1_intervals_hold_the_true_value_as_often_as_they_say():
    """Of samples drawn anew from known rates; an interval of two rates as if of one would miss it more often."""
    random, count, draws = np.random.default_rng(1), 80, 600
    joint = np.array([0.5, 0.12, 0.08, 0.3])  # both, target alone, predicted alone, neither
    truth = 2 * joint[0] / (2 * joint[0] + joint[1] + joint[2])
    inside = 0
    for both, missed, wrong, _ in random.multinomial(count, joint, draws):
        low, high = intervals.f1_interval(both, both + missed, both + wrong)
        inside += low <= truth <= high
    assert 0.92 < inside / draws < 0.98


def test_bootstrap_is_scipys():
    values = np.random.default_rng(0).random(60)
    samples = {"sum": torch.from_numpy(values), "count": torch.ones(60)}
    ((low, high),) = intervals.bootstrapped(samples, lambda drawn: (drawn["sum"] / drawn["count"])[:, None], draws=4000)
    wanted = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=0).confidence_interval
    assert (low, high) == pytest.approx((wanted.low, wanted.high), abs=0.01)


def test_masks_have_intervals_over_images_not_pixels():
    """A class that one image has whole and another not at all: as pixels it would be known to a thousandth."""
    full, none = torch.tensor([1000, 1000]), torch.tensor([0, 1000])
    samples = {
        "intersection": torch.stack([full, none] * 10),
        "union": torch.full((20, 2), 1000),
    }
    mean, (first, second) = intervals.iou_intervals(samples)
    assert first[1] - first[0] > 0.3 and second == (1.0, 1.0)
    assert mean[0] < 0.75 < mean[1]


@pytest.mark.parametrize("bins", [5, 15])
def test_reliability_is_scikit_learns(bins: int):
    random = np.random.default_rng(0)
    confidence = np.concatenate([random.random(500), np.arange(1, bins + 1) / bins])  # edges, too
    right = random.random(len(confidence)) < confidence**2
    found = calibration(torch.from_numpy(confidence), torch.from_numpy(right), bins)
    accuracy, mean = calibration_curve(right, confidence, n_bins=bins)
    rows = [row for row in found.described()["bins"] if row["count"]]
    assert [row["accuracy"] for row in rows] == pytest.approx(accuracy.tolist())
    assert [row["confidence"] for row in rows] == pytest.approx(mean.tolist())
    counts = np.array([row["count"] for row in rows])
    assert found.ece == pytest.approx((counts * np.abs(accuracy - mean)).sum() / counts.sum())
    assert found.accuracy == pytest.approx(right.mean()) and found.confidence == pytest.approx(confidence.mean())


def test_equal_counts_are_scikit_learns_quantiles():
    random = np.random.default_rng(0)
    confidence = random.permutation(np.linspace(0.01, 1, 600))
    right = random.random(600) < confidence**2
    accuracy, mean = calibration_curve(right, confidence, n_bins=15, strategy="quantile")
    found = calibration(torch.from_numpy(confidence), torch.from_numpy(right))
    assert found.adaptive_ece == pytest.approx(np.abs(accuracy - mean).mean(), abs=2e-3)  # edges lie between, or on


def test_a_calibrated_network_has_no_more_than_chance_gives():
    random = np.random.default_rng(2)
    confidence = 0.3 + 0.7 * random.random(400)
    errors = [
        calibration(torch.from_numpy(confidence), torch.from_numpy(random.random(400) < confidence)) for _ in range(40)
    ]
    mean, high = errors[0].chance or (0, 0)
    assert 0.02 < mean < high
    assert np.mean([found.ece for found in errors]) == pytest.approx(mean, rel=0.1)
    assert sum(found.ece > high for found in errors) <= 6
    assert "no more than chance" in in_words(errors[0])[1]
    sure = calibration(torch.from_numpy(confidence), torch.from_numpy(random.random(400) < confidence - 0.2))
    assert sure.ece > high and "overconfident by 0.1945" in in_words(sure)[1]


def segmentation(classes: int) -> Segmentation:
    spec = DataSpec(3, (8, 8), ("a",), frozenset({"mask"}), tuple(map(str, range(classes))))
    return Segmentation(lambda logits, target: logits.flatten(1).sum(1), spec)


def test_each_mask_is_counted_as_scikit_learn_does():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, 8, 8, generator=generator)
    mask = torch.randint(0, 3, (6, 8, 8), generator=generator)
    mask[:, :2] = VOID
    mask[5] = 1
    found = segmentation(4).of_samples({"mask": logits}, {"mask": mask})
    seen, predicted = mask != VOID, logits.argmax(1)
    for image in range(6):
        truth, guess = mask[image][seen[image]], predicted[image][seen[image]]
        present = sorted(set(truth.tolist()) | set(guess.tolist()))
        wanted = sk.jaccard_score(truth, guess, labels=present, average="macro")
        assert found["iou"][image].item() == pytest.approx(wanted)
    whole = found["intersection"].sum(0) / found["union"].sum(0)
    wanted = sk.jaccard_score(mask[seen], predicted[seen], average=None, labels=range(4), zero_division=0)
    assert whole.tolist() == pytest.approx(wanted.tolist())
    sure = logits.softmax(1).amax(1)
    assert of_bins(found["reliability"]).ece == pytest.approx(
        calibration(sure[seen], (predicted == mask)[seen]).ece, rel=1e-6
    )


def test_an_image_of_void_alone_has_no_iou():
    found = segmentation(2).of_samples({"mask": torch.zeros(1, 2, 4, 4)}, {"mask": torch.full((1, 4, 4), VOID)})
    assert found["iou"].isnan().all() and not found["union"].any()
