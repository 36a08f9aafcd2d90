"""The loss that a run begins with is the one that its loss function predicts."""

from __future__ import annotations

import pytest
import torch
from lab_runs import make_run


def first_loss(*overrides: str) -> tuple[float, float]:
    """Mean loss of the training set under the initial weights, and the predicted one."""
    run = make_run("data.limit=null", "trainer.batch_size=128", *overrides)
    run.model.train()
    with torch.no_grad():
        losses = torch.cat([run.forward(batch)[0] for batch, _ in run.loaders["train"].batches(0)])
    return losses.mean().item(), run.task.criterion.expected_initial_loss()


@pytest.mark.parametrize("loss", ["focal", "focal loss.prior=0.1", "cross_entropy", "bce", "hinge"])
def test_of_logits_that_are_their_bias_it_is_exact(loss: str):
    """With zero weights the logits are the classifier's bias: focal loss's prior, or zero."""
    name, *more = loss.split()
    measured, predicted = first_loss(f"loss={name}", *more, "init=zeros")
    assert measured == pytest.approx(predicted, rel=1e-5)


def test_a_prior_lowers_the_first_focal_loss_of_an_initialized_network():
    """Lin et al. 2017, section 3.3: without it, every class begins at one half, and the many absent ones dominate."""
    measured, predicted = first_loss("loss=focal", "loss.prior=0.01", "model=cnn")
    without, equal_odds = first_loss("loss=focal", "loss.prior=null", "model=cnn")
    assert predicted < equal_odds
    assert measured < without
    assert measured == pytest.approx(predicted, rel=0.5)
