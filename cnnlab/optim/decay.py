"""Decoupled weight decay for optimizers that have none."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from cnnlab.torch_private import foreach_mul_


def decouple_decay(optimizer: Optimizer) -> None:
    """Lets each step begin with w ← w - lr·λ·w in the groups that state λ, as `decoupled_decay`
    (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2; λ is in units of the rate, as
    in torch's AdamW, which this makes of Adam).

    The gradient is there by then and knows nothing of the decay. It is a hook of `step`, so that an update which
    loss scaling skips decays nothing.
    """
    optimizer.register_step_pre_hook(_decay)


@torch.no_grad()
def _decay(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    # A fused optimizer is called although the gradients overflowed, and skips the update by itself.
    overflow = getattr(optimizer, "found_inf", None)
    for group in optimizer.param_groups:
        if not group.get("decoupled_decay"):
            continue
        factor = 1 - group["lr"] * group["decoupled_decay"]
        if overflow is not None:
            factor = torch.where(overflow > 0, 1.0, factor)
        training = [p for p in group["params"] if p.requires_grad]  # others may wait for their turn
        if training:
            foreach_mul_(training, factor)
