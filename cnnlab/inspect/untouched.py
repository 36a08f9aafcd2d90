"""Looking at a network without a trace: what a pass moves is put back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cnnlab import rng


@contextmanager
def kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Puts the values of the tensors back, in place, whatever happens in the block."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values in before:
                tensor.copy_(values)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Puts each module back in training or evaluation, as it was before the block."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Lets a network be after the block what it was before: each module's mode, the buffers, which parameters ask for
    gradients and what gradients they have, and torch's generators of the CPU and of the network's device. Inside, no
    parameter has a gradient yet. The weights themselves are nobody's to change meanwhile.
    """
    parameters = list(model.parameters())
    asked = [(p, p.requires_grad, p.grad) for p in parameters]
    device = parameters[0].device if parameters else torch.device("cpu")
    with rng.restored(device), modes_kept(model), kept(model.buffers()):
        for p in parameters:
            p.grad = None
        try:
            yield
        finally:
            for p, wanted, gradient in asked:
                p.requires_grad_(wanted)
                p.grad = gradient


def zeros(model: nn.Module, input_shape: Sequence[int]) -> Tensor:
    """One image of zeros, of shape (C, H, W), as the network takes it and where it is."""
    parameter = next(model.parameters())
    return torch.zeros(1, *input_shape, dtype=parameter.dtype, device=parameter.device)
