"""How many multiply-adds a network does, counted at the operators that run.

A multiply-add is one multiplication and one addition, 2 FLOP. Counted are those of convolutions and matrix products;
biases, normalization, activations and pooling are not. A training step costs about three forward passes (the backward
pass multiplies once for the input's gradient and once for the weight's).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cnnlab.inspect.untouched import untouched, zeros
from cnnlab.torch_private import TorchDispatchMode


def forward_flops(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Floating-point operations of one image's forward pass in evaluation: 2 a multiply-add, as `cnnlab summary`
    counts them.

    The meta device, which computes nothing, would first have torch import its compiler (1 s), and this takes 4 ms for
    the digits' ResNet, 0.1 s for a ResNet-50 at 224 pixels on one core.

    Args:
        input_shape: (C, H, W).
    """
    with fused_attention_off(), _Counter() as counter, untouched(model), torch.no_grad():
        model.eval()(zeros(model, input_shape))
    return 2 * counter.multiply_adds


class _Counter(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler to keep it out of a pass that is never compiled

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.multiply_adds += multiply_adds(func._schema.name.removeprefix("aten::"), args, output)
        return output


@contextmanager
def fused_attention_off() -> Iterator[None]:
    """In evaluation `nn.MultiheadAttention` may run as one fused operator, whose products nobody would
    count."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def multiply_adds(name: str, args: Sequence[Any], output: Any) -> int:
    """Of one aten operator: each output of a convolution or a product is a sum of as many products as its
    kernel, or inner dimension, is long."""
    if name == "convolution":
        inputs, weight, transposed = args[0], args[1], args[6]
        positions = inputs if transposed else output  # a transposed convolution spreads each input
        return positions.numel() * weight[0].numel()
    if name in ("mm", "bmm", "mv", "dot"):
        return output.numel() * args[0].shape[-1]
    if name in ("addmm", "baddbmm", "addmv"):
        return output.numel() * args[1].shape[-1]
    if name.startswith("_scaled_dot_product"):
        query, key, value = args[:3]
        scores = query.numel() // query.shape[-1] * key.shape[-2]
        return scores * (query.shape[-1] + value.shape[-1])
    return 0
