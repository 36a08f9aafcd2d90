"""What may change a run, all of it, as the loop and the step call it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn

from cnnlab.protocols import Batch, Intervention


class Interventions:
    """The interventions of a run by name, in the order in which they act.

    A name is also that of the part's state in a checkpoint.
    """

    def __init__(self, named: Mapping[str, Intervention] | None = None):
        self.named = dict(named or {})
        self._all = tuple(self.named.values())

    def attach(self, model: nn.Module, seed: int) -> None:
        for intervention in self._all:
            intervention.attach(model, seed)

    def batch(self, batch: Batch, step: int) -> Batch:
        for intervention in self._all:
            batch = intervention.batch(batch, step)
        return batch

    def gradients(self, parameters: Sequence[nn.Parameter], step: int) -> None:
        for intervention in self._all:
            intervention.gradients(parameters, step)

    def weights(self, step: int) -> None:
        for intervention in self._all:
            intervention.weights(step)

    def train(self, model: nn.Module, epoch: int) -> None:
        """Puts the network into training mode, less what stands still. Nothing else calls `model.train()`."""
        model.train()
        for intervention in self._all:
            intervention.mode(model, epoch)

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """The network as it is evaluated."""
        with ExitStack() as stack:
            for intervention in self._all:
                stack.enter_context(intervention.evaluated())
            yield

    def stateful(self) -> dict[str, Intervention]:
        """Those that have a state of their own."""
        return {n: i for n, i in self.named.items() if overrides(i, "state_dict")}

    def eager_only(self) -> str | None:
        """Why the step cannot be compiled or captured, or `None`."""
        return next((reason for i in self._all if (reason := i.eager_only)), None)

    def of_evaluation(self) -> tuple[str, ...]:
        """Names of those without which the network is not what is evaluated."""
        return tuple(name for name, i in self.named.items() if overrides(i, "evaluated"))


def overrides(intervention: Intervention, phase: str) -> bool:
    """Whether the intervention acts in a phase."""
    return getattr(type(intervention), phase) is not getattr(Intervention, phase)
