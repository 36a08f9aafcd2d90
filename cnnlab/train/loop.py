"""The loop. What watches, measures, saves or shows it listens from outside."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from cnnlab.data.loader import Loader
from cnnlab.observe.observer import Look
from cnnlab.train.run import Run
from cnnlab.train.state import Totals


def fit(run: Run) -> dict[str, float]:
    """Trains from where the run's clock stands to its end and evaluates the test split once.

    Returns the final metrics, named `test/accuracy` and so on.

    Raises:
        DivergedError: the loss became non-finite.
        InterruptedRun: SIGINT or SIGTERM arrived; the run was saved and `resume=RUN` goes on with it.
    """
    with run.session():
        while not run.complete():
            train_epoch(run)
            close_epoch(run)
        run.checkpointer.take_best(run)
        run.tell("on_trained")
        run.metrics = evaluate(run, "test")
    return run.metrics


def train_epoch(run: Run) -> None:
    """One pass over the training set, or the rest of one."""
    for _ in updates(run):
        pass


def updates(run: Run) -> Iterator[Look]:
    """The updates of `train_epoch` one by one, for who wants to do something in between; each with its look."""
    run.train_mode()
    for batch, count in run.batches():
        with run.observer(run.clock.step) as look:
            result = run.step(batch, count, run.clock.step, look)
        run.clock.advance(count)
        run.tell("on_step", result)
        run.settle(result)
        yield look


def close_epoch(run: Run) -> None:
    """Evaluates on val when it is due or the run is over, decides what follows from it, and saves."""
    run.clock.close(run.steps_per_epoch)
    due = run.clock.epoch % run.trainer.eval_every == 0 or run.finished()
    figures = evaluate(run, "val") if due else {}
    better = run.decide(figures)
    run.tell("on_epoch", figures)
    run.checkpointer.after_epoch(run, best=better)


def evaluate(run: Run, name: str) -> dict[str, float]:
    """The metrics of the split `name` over all ranks, as `val/accuracy`; the network as it is evaluated."""
    figures = run.describe(summed(run, run.loaders[name]))
    run.record({**run.place(), "split": name, **figures})
    return {f"{name}/{metric}": value for metric, value in figures.items()}


def summed(run: Run, loader: Loader) -> dict[str, Tensor]:
    """The task's measures, summed over a split and over all ranks, and the penalty of the weights; the network as it is
    evaluated."""
    totals = Totals(run.ranks, run.device)
    with run.evaluating():
        run.share_buffers()
        for batch in run.evaluated_batches(loader):
            if len(batch["index"]):
                totals.add(run.forward(batch)[1])
        return run.with_penalty(totals.take())
