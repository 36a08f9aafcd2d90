"""The weights of another run of the laboratory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from cnnlab.weights.base import Trained, Weights


class RunWeights(Weights):
    """The network of a run folder, as that run evaluated it: with its averages, where it has such.

    Args:
        run: the folder.
        checkpoint: `best` or `last`; of a run that was never evaluated, and so has no best one, the last.
        opened: how a folder and a checkpoint's name become a network, with its `model`, `classes`, `step` and `epoch`
            (`cnnlab.building.opened.open_run`, with what the command line vouches for).
    """

    def __init__(
        self,
        run: str,
        checkpoint: Literal["best", "last"] = "best",
        opened: Callable[[Path, str], Any] | None = None,
    ):
        self.run = Path(run).expanduser()
        self.checkpoint = checkpoint
        self._opened = opened

    def read(self) -> Trained:
        """See `Weights.read`; raises what `open_run` does."""
        assert self._opened is not None, "whoever reads the weights says how a run is opened"
        network = self._opened(self.run, self.checkpoint)
        where = f"{self.run} ({network.checkpoint} checkpoint, epoch {network.epoch})"
        record = {"run": str(self.run), "checkpoint": network.checkpoint, "step": network.step, "epoch": network.epoch}
        state = {name: value.detach().cpu().clone() for name, value in network.model.state_dict().items()}
        return Trained(where, state, tuple(network.classes), record)
