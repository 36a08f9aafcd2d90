"""An optimizer from outside: the sign of a momentum (Bernstein et al. 2018, "signSGD", algorithm 2, Signum)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from cnnlab.schema import Momentum, NonNegative, Positive


class Signum(Optimizer):
    """m = βm + (1 - β)g, w = w - α(sign(m) + λw)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: Positive = 0.001,
        momentum: Momentum = 0.9,
        weight_decay: NonNegative = 0.0,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                average = state.setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(average.sign(), alpha=group["lr"])
        return loss
