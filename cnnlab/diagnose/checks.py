"""What can be wrong with an experiment before it trains: each check is a measurement, a verdict and what to type.

A check looks at the run as it will train: its own batches, augmentation, loss, penalties, precision and optimizer. All
of it is put back: weights, buffers, gradients, modes, generators, optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cnnlab.diagnose.check_data import inputs, room, speed, splits_apart, targets
from cnnlab.diagnose.check_findings import Check, Finding, Subject, Verdict
from cnnlab.diagnose.check_learning import learns_by_heart, rate_in_range
from cnnlab.diagnose.check_loss import (
    finite_differences,
    gradients_arrive,
    initial_loss,
    input_matters,
    penalties,
    samples_stay_apart,
)
from cnnlab.train.range_test import unchanged
from cnnlab.train.run import Run


def check_run(run: Run, *, progress: Callable[[str, int, int], None] | None = None) -> Iterator[Finding]:
    """Every check of a run that has been built and not begun, one after the other; afterwards the run is what it was.

    A check that cannot be made of this experiment is left out, or says why its verdict is `unknown`.

    Args:
        progress: told what comes next, the checks done, and all of them.
    """
    subject = Subject.of(run)
    for number, check in enumerate(CHECKS):
        if progress is not None:
            progress(check.what, number, len(CHECKS))
        with unchanged(run):
            try:
                found = check.look(subject)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                found = Finding(check.name, Verdict.unknown, f"could not be measured: {str(error).splitlines()[0]}")
        if found is not None:
            yield found


CHECKS = (
    Check("targets", "are the labels in range, is every class there?", targets),
    Check("inputs", "is the input scaled, in training and evaluation alike?", inputs),
    Check("splits stay apart", "is an image in two splits?", splits_apart),
    Check("memory", "what will it take?", room),
    Check("loss at the start", "is the first loss that of a network which knows nothing?", initial_loss),
    Check("penalties", "does each penalty raise the loss?", penalties),
    Check("gradients arrive", "does every parameter receive a gradient?", gradients_arrive),
    Check("samples stay apart", "does one sample's loss depend on another's image?", samples_stay_apart),
    Check("the image matters", "do the outputs depend on the image?", input_matters),
    Check("gradient against differences", "is the gradient that of the loss?", finite_differences),
    Check("learns by heart", "can it learn a few samples by heart?", learns_by_heart),
    Check("learning rate", "is the rate where the loss falls?", rate_in_range),
    Check("data", "is the data faster than the step?", speed),
)
"""In the order in which they are made: what is wrong with the data comes before what it does to the loss."""
