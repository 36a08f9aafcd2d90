"""Initialization that looks at a batch of the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cnnlab.init.base import layers
from cnnlab.init.schemes import Orthogonal
from cnnlab.inspect.untouched import untouched
from cnnlab.torch_private import NormBase


class LSUV(Orthogonal):
    """Layer-sequential unit-variance: orthogonal weights, then each layer's output scaled to variance 1 on
    a batch (Mishkin & Matas 2016, "All you need is a good init", algorithm 1).

    Two phases: `init(model, seed)`, then `init.calibrate(model, images)`. A layer's output is linear in its
    weight and the biases are 0 at that time, so one division is exact and the algorithm's inner loop of
    trials is not needed; and since the division acts on the output as well, one forward pass treats all
    layers in their order.
    """

    needs_batch = True

    @torch.no_grad()
    def calibrate(self, model: nn.Module, images: Tensor) -> None:
        """Scales every layer that the forward pass reaches.

        The pass is a training one (batch statistics, auxiliary heads) without dropout; running statistics,
        modes and the random state are as before afterwards. A layer with a constant output keeps its weight.

        Args:
            images: (N, C, H, W) as the network gets them, on its device; more samples, less noise.
        """
        done: set[nn.Module] = set()
        handles = [layer.register_forward_hook(_scaler(done)) for _, layer in layers(model)]
        try:
            with training_without_noise(model):
                model(images)
        finally:
            for handle in handles:
                handle.remove()


def _scaler(done: set[nn.Module]) -> Any:
    def scale(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if layer in done:  # a layer that is used twice is scaled by its first use
            return None
        done.add(layer)
        std = output.float().std()
        # Without reading it back: a network has hundreds of layers, and each read would wait for the device.
        factor = torch.where(std > 0, 1 / std, torch.ones_like(std))
        assert isinstance(layer.weight, Tensor)
        layer.weight.mul_(factor)
        return output * factor

    return scale


@contextmanager
def training_without_noise(model: nn.Module) -> Iterator[None]:
    """Training mode but for leaf modules that are no norm layers (dropout); see `untouched` for what is put back."""
    with untouched(model):
        for module in model.modules():
            leaf = not any(True for _ in module.children())
            module.training = not leaf or isinstance(module, NormBase)
        yield
