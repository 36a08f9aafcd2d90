"""Noise on the gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from cnnlab import rng
from cnnlab.protocols import Intervention
from cnnlab.schema import NonNegative, Positive


class GradientNoise(Intervention):
    """Adds N(0, η / (1 + t)^γ) to every gradient at update t (Neelakantan et al. 2015, equation 1; η of .01, .3 or 1
    and γ = .55 are the paper's).

    The draws come from a stream of their own, (seed, "gradient_noise", step), equal on all ranks.
    """

    def __init__(self, eta: Positive = 0.01, gamma: NonNegative = 0.55):
        self.eta = eta
        self.gamma = gamma
        self._seed = 0

    def attach(self, model: nn.Module, seed: int) -> None:
        self._seed = seed

    @torch.no_grad()
    def gradients(self, parameters: Sequence[nn.Parameter], step: int) -> None:
        std = (self.eta / (1 + step) ** self.gamma) ** 0.5
        found = [p.grad for p in parameters if p.grad is not None]
        if not found:
            return
        generator = torch.Generator(found[0].device)
        generator.manual_seed(rng.derive(self._seed, "gradient_noise", step))
        for gradient in found:
            noise = torch.randn(gradient.shape, generator=generator, device=gradient.device, dtype=gradient.dtype)
            gradient.add_(noise, alpha=std)
