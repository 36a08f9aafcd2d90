"""An augmentation from outside: negatives."""

from __future__ import annotations

import torch
from torch import Tensor

from cnnlab.augment import Colour, Draws
from cnnlab.schema import Probability


class Invert(Colour):
    """Turns an image into its negative, 1 - x, with probability `p`."""

    draws = 1
    bounded = True

    def __init__(self, p: Probability = 0.5):
        self.p = p

    def matrix(self, draws: Draws) -> Tensor:
        inverted = (draws.uniforms[:, 0] < self.p).float()[:, None, None]
        plain = torch.eye(draws.channels, draws.channels + 1, device=inverted.device)
        offset = torch.zeros_like(plain)
        offset[:, -1] = 1
        return plain * (1 - 2 * inverted) + offset * inverted
