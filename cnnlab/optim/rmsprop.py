"""RMSProp with ε inside the square root."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cnnlab.optim.common import Batched, evaluate
from cnnlab.schema import Momentum, NonNegative, Positive
from cnnlab.torch_private import (
    foreach_add,
    foreach_add_,
    foreach_addcmul_,
    foreach_div,
    foreach_mul_,
    foreach_sqrt_,
    foreach_sub_,
)


class RMSPropInside(Optimizer):
    """RMSProp as Inception v3 was trained with it: s = ρs + (1-ρ)g², v = βv + αg/√(s + ε), w = w - v.

    With ε = 1 inside the root the step is close to plain momentum wherever gradients are small, which
    PyTorch's g/(√s + ε) is not: there the step keeps the length α however small the gradient is
    (Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", section 8).

    Args:
        params: parameters or parameter groups.
        lr: α, a number or a scalar tensor; it is inside the velocity, so a new rate acts on new gradients
            only.
        decay: ρ, of the mean of squared gradients.
        eps: ε.
        momentum: β.
        weight_decay: λ of an L2 term, added to the gradient as λw.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: Positive = 0.02,
        decay: Momentum = 0.9,
        eps: Positive = 1.0,
        momentum: Momentum = 0.9,
        weight_decay: NonNegative = 0.0,
    ):
        defaults = {"lr": lr, "decay": decay, "eps": eps, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update from the gradients; returns the closure's loss, if there is a closure."""
        loss = evaluate(closure)
        for group in self.param_groups:
            for batch in Batched.of(group["params"]):
                self._update(group, batch)
        return loss

    def _update(self, group: dict[str, Any], batch: Batched) -> None:
        grads = batch.grads
        if group["weight_decay"]:
            grads = list(foreach_add(grads, batch.params, alpha=group["weight_decay"]))
        squares = batch.state(self, "square_avg")
        foreach_mul_(squares, group["decay"])
        foreach_addcmul_(squares, grads, grads, 1 - group["decay"])
        roots = foreach_add(squares, group["eps"])
        foreach_sqrt_(roots)
        steps = list(foreach_div(grads, roots))
        foreach_mul_(steps, group["lr"])
        if group["momentum"]:
            velocities = batch.state(self, "velocity")
            foreach_mul_(velocities, group["momentum"])
            foreach_add_(velocities, steps)
            steps = velocities
        foreach_sub_(batch.params, steps)
