"""Convolutions that must not be computed in half precision on a CPU.

oneDNN's weight gradient of a strided convolution in bfloat16 (torch 2.11 to 2.15, AVX512-BF16) holds what happened to
lie in memory wherever the map is narrower than the stride, as at the end of a ResNet-18 on 8 x 8 pixels: up to half of
its entries, some of them infinite, and not the same ones in each run. float32 is right, and costs nothing there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cnnlab.inspect.untouched import untouched, zeros

NARROW = "oneDNN gets wrong in half precision (maps narrower than the stride)"


class _Float32:
    """Mixed into a convolution's class: computes in float32 (or float64) whatever autocast says."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(torch.promote_types(x.dtype, torch.float32)))  # type: ignore[misc]


def _in_float32(kind: Any) -> Any:
    return type(kind.__name__, (_Float32, kind), {"__doc__": kind.__doc__})


def protect_narrow(model: nn.Module, input_shape: Sequence[int]) -> list[str]:
    """Lets the convolutions whose input is narrower than their stride compute in float32; returns their names.

    Args:
        input_shape: (C, H, W).
    """
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    narrow: dict[str, nn.Conv2d] = {}

    def note(name: str, module: nn.Conv2d, args: tuple[Any, ...]) -> None:
        if args[0].shape[-1] < module.stride[1]:
            narrow[name] = module

    watched = [
        module.register_forward_pre_hook(partial(note, name))
        for name, module in convolutions.items()
        if module.stride[1] > 1 and module.kernel_size[1] > 1
    ]
    if watched:
        with untouched(model), torch.no_grad():
            model.eval()(zeros(model, input_shape))
    for handle in watched:
        handle.remove()
    for module in narrow.values():
        module.__class__ = _in_float32(type(module))
    return list(narrow)
