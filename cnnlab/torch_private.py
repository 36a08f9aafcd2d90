"""Private names of torch, all in this file, each with the reason; a new version of torch is looked at here.

- `foreach_*`: arithmetic over lists of tensors in few kernels, by which torch's own optimizers update (up to ten times
  faster for networks of many small tensors). There is no public form.
- `NormBase`, `BatchNorm`, `ConvNd`, `ConvTransposeNd`, `DropoutNd`: the common bases of layers in one to three
  dimensions, lazy and synchronized ones among them; by public names one would list them all.
- `TorchDispatchMode`: sees every operator of a pass, for counts of FLOPs and memory; documented, and yet in a
  private module.
- `BufferSlots`: where a network keeps its buffers; `buffers()` walks all modules anew (80 us for forty).
- `found_overflows`, `skips_by_itself`: the flags by which loss scaling leaves an update out on the device; there is no
  public way to hand one over.
- `fast_bf16_on_cpu`: torch's public table of capabilities is younger than the floor, and lacks them on some builds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.nn.modules.conv import _ConvTransposeNd as ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd as DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "BatchNorm",
    "BufferSlots",
    "ConvNd",
    "ConvTransposeNd",
    "DropoutNd",
    "NormBase",
    "TorchDispatchMode",
    "compiler_error",
    "fast_bf16_on_cpu",
    "foreach_add",
    "foreach_add_",
    "foreach_addcmul_",
    "foreach_clamp_min_",
    "foreach_copy_",
    "foreach_div",
    "foreach_div_",
    "foreach_lerp",
    "foreach_lerp_",
    "foreach_mul",
    "foreach_mul_",
    "foreach_neg",
    "foreach_neg_",
    "foreach_norm",
    "foreach_pow",
    "foreach_sqrt_",
    "foreach_sub",
    "foreach_sub_",
    "found_overflows",
    "skips_by_itself",
    "version",
]

foreach_add = torch._foreach_add
foreach_add_ = torch._foreach_add_
foreach_addcmul_ = torch._foreach_addcmul_
foreach_clamp_min_ = torch._foreach_clamp_min_
foreach_copy_ = torch._foreach_copy_
foreach_div = torch._foreach_div
foreach_div_ = torch._foreach_div_
foreach_lerp = torch._foreach_lerp
foreach_lerp_ = torch._foreach_lerp_
foreach_mul = torch._foreach_mul
foreach_mul_ = torch._foreach_mul_
foreach_neg = torch._foreach_neg
foreach_neg_ = torch._foreach_neg_
foreach_norm = torch._foreach_norm
foreach_pow = torch._foreach_pow
foreach_sqrt_ = torch._foreach_sqrt_
foreach_sub = torch._foreach_sub
foreach_sub_ = torch._foreach_sub_


def fast_bf16_on_cpu() -> bool:
    """Whether the CPU has AMX or AVX512-BF16."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


class BufferSlots:
    """The places of a network's buffers, walked once; whatever tensor lies there when it is asked."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._slots = [(m._buffers, name) for m in model.modules() for name, b in m._buffers.items() if b is not None]

    def tensors(self) -> list[Tensor]:
        """What `model.buffers()` gives."""
        return [buffer for slots, name in self._slots if (buffer := slots[name]) is not None]


def found_overflows(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    """The flags of each device, 1 where `unscale_` has met an overflow; `step` leaves the update out by them."""
    found: dict[Any, Tensor] = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    return found.values()


def skips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of it does nothing where its attribute `found_inf` holds a 1."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def compiler_error() -> type[Exception]:
    """What `torch.compile` raises of its own; loaded when it is asked for (1 s)."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


def version(tensor: torch.Tensor) -> int:
    """How often the tensor was changed in place: autograd's own counter, which costs nothing to read."""
    return tensor._version
