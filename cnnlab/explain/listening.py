"""What a network looks at, while it trains: maps of a few images of val, told as pictures."""

from __future__ import annotations

from typing import Any, Literal

from cnnlab.errors import UsageError
from cnnlab.explain.examples import Examples, explained
from cnnlab.explain.methods import require_known
from cnnlab.explain.subject import Subject
from cnnlab.protocols import Listener
from cnnlab.schema import PositiveInt


class ExplainedPictures(Listener):
    """Explains the same images of val as the run goes on, each as a picture `explain/val NUMBER` in TensorBoard.

    It looks at the network as it is evaluated, and leaves it, bit for bit, as it was. What it costs is charged to the
    statistics (`stats.max_overhead`), which are then taken more rarely; its own cadence stays.

    Args:
        count: images, from all over val.
        methods: see `cnnlab explain --help`.
        target: `true` class, or `predicted`.
        layers: modules that Grad-CAM looks at; empty takes the usual ones.
        every: epochs between pictures; `None` draws after the first evaluation, each time that twice as many epochs are
            done, and at the end.

    Raises:
        ValueError: an unknown method, or one whose library is not installed.
    """

    def __init__(
        self,
        count: PositiveInt = 4,
        methods: list[str] | None = None,
        target: Literal["true", "predicted"] = "true",
        layers: list[str] | None = None,
        every: PositiveInt | None = None,
    ):
        self.count = count
        self.methods = ["saliency", "gradcam"] if methods is None else list(methods)
        self.target = target
        self.layers = list(layers or ())
        self.every = every
        self._next = every or 1
        """The epoch from which on the next evaluation is shown."""
        try:
            require_known(self.methods)
        except UsageError as error:
            raise ValueError(str(error)) from error

    def on_epoch(self, run: Any, figures: dict[str, float]) -> None:
        epoch = -(-run.clock.step // run.steps_per_epoch)
        if not figures or not (run.finished() or epoch >= self._next):
            return
        self._next = epoch + self.every if self.every else 2 * epoch
        with run.observer.overhead.charging(), run.averaged():
            found = explained(
                Subject(run.model, run.task, run.spec),
                self._examples(run),
                [self.target],
                self.methods,
                self.layers,
            )
            pictures = {f"explain/{each.name}": each.picture for each in found}
        run.tell("on_pictures", pictures, run.clock.step)

    def _examples(self, run: Any) -> Examples:
        batch = run.loaders["val"].images.some(self.count)
        truth = {name: value for name, value in batch.items() if name in ("label", "mask")}
        names = [f"val {index}" for index in batch["index"].tolist()]
        return Examples(names, batch["image"], batch["image"], truth)
