"""What an optimizer class needs from the loop and accepts in its groups, read from the class itself."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch.optim import LBFGS, Optimizer


@dataclass(frozen=True)
class Traits:
    """Facts that decide the step and the parameter groups.

    `closure`: `step` evaluates the batch itself, `step(closure)`, perhaps several times.
    `create_graph`: the closure returns the loss with its graph and leaves the backward pass to the
    optimizer, which differentiates twice.
    `single_group`: takes one parameter group only.
    `weight_decay`: has such an argument, so groups may differ in it.
    """

    closure: bool
    create_graph: bool
    single_group: bool
    weight_decay: bool

    @classmethod
    def of(cls, optimizer: type[Optimizer]) -> Traits:
        """The traits of an optimizer class, ours, torch's or a third party's."""
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        return cls(
            closure=closure is not None and closure.default is inspect.Parameter.empty,
            create_graph=bool(getattr(optimizer, "create_graph", False)),
            single_group=issubclass(optimizer, LBFGS),
            weight_decay="weight_decay" in inspect.signature(optimizer).parameters,
        )
