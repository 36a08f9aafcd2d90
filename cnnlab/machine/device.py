"""The device a run uses: chosen automatically, printed, forced by `trainer.device`; and what it cannot do."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import torch

from cnnlab.errors import UsageError
from cnnlab.schema import Device, Layout, Precision, StepKind, Trainer
from cnnlab.torch_private import fast_bf16_on_cpu

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


@dataclass(frozen=True)
class Placement:
    """Where and how a run computes; no field is `auto` any more. `notices` say what was changed, and why."""

    device: torch.device
    precision: Precision
    step: StepKind
    layout: Layout
    notices: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]


def available(device: Device) -> bool:
    if device is Device.cuda:
        return torch.cuda.is_available()
    if device is Device.mps:
        return torch.backends.mps.is_available()
    return True


def choose_device(wanted: Device, local_rank: int = 0) -> torch.device:
    """The best device there is, or the wanted one. Raises `UsageError` when it is not there."""
    if wanted is Device.auto:
        wanted = next(d for d in (Device.cuda, Device.mps, Device.cpu) if available(d))
    elif not available(wanted):
        there = [d.value for d in (Device.cuda, Device.mps, Device.cpu) if available(d)]
        raise UsageError(
            f"`trainer.device={wanted.value}`: this machine has none that torch can use; "
            f"it has: {', '.join(there)}. Type trainer.device=auto"
        )
    if wanted is not Device.cuda:
        return torch.device(wanted.value)
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"expected one GPU a process, received process {local_rank + 1} on a machine with "
            f"{torch.cuda.device_count()}; type torchrun --nproc-per-node={torch.cuda.device_count()}, or "
            "trainer.device=cpu"
        )
    return torch.device("cuda", local_rank)


@cache
def cpu_has_fast_bf16() -> bool:
    """Whether bf16 matrix products run in hardware, where they beat fp32 (AMX, AVX512-BF16)."""
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    named = any(flags.get(name, False) for name in ("amx_tile", "amx_bf16", "avx512_bf16"))
    return named or fast_bf16_on_cpu()


def set_deterministic(wanted: bool) -> None:
    """Whether torch computes in a fixed order, or refuses what it cannot."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS refuses
    torch.use_deterministic_algorithms(wanted)


def prepare_cpu() -> None:
    """Settings of this process that make training on a CPU faster and change no number but denormal ones.

    - Denormal numbers become zero: up to 100 times faster where gradients vanish.
    - With glibc, freed memory is kept. By default each large activation is mapped anew and its pages are faulted in at
      every step; SpeedNet on one core trains 15 % faster without, at the same peak.
    """
    torch.set_flush_denormal(True)
    keep_freed(True)


def keep_freed(wanted: bool) -> None:
    """Whether the C library keeps memory that is freed, for what asks next; else each large block goes back at once,
    and leaves no hole between small ones that stay."""
    with suppress(OSError, AttributeError):  # another C library, or another system
        mallopt = ctypes.CDLL(None).mallopt
        for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            mallopt(parameter, 2**31 - 1 if wanted else _LARGE)


def give_back(device: torch.device) -> None:
    """Gives freed memory back, after a failure for want of it: what the allocator keeps is of no use to whoever asks
    the system itself (other threads, oneDNN for its kernels), and larger pieces may come of it. From here on large
    blocks go back at once."""
    gc.collect()
    keep_freed(False)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # another C library, or another system
        ctypes.CDLL(None).malloc_trim(0)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGE = 1 << 18
"""Bytes."""


def place(trainer: Trainer, *, closure: bool, local_rank: int = 0, world: int = 1) -> Placement:
    """Resolves device, precision, step and layout of a run.

    Args:
        closure: whether the optimizer evaluates the loss itself (L-BFGS, Newton-CG).

    Raises:
        UsageError: for a device that is not there, or a step that this device or optimizer cannot take.
    """
    device = choose_device(trainer.device, local_rank)
    notices: list[str] = []
    precision = _precision(trainer.precision, device, closure, notices)
    step = _step(trainer.step, device, closure, world)
    if trainer.sync_batch_norm and world > 1 and device.type != "cuda":
        raise UsageError(
            "`trainer.sync_batch_norm`: torch synchronizes batch statistics on GPUs only, this run is on "
            f"{device.type}; type norm=group, or trainer.sync_batch_norm=false"
        )
    layout = trainer.layout
    if layout is Layout.auto:
        layout = Layout.contiguous if device.type == "mps" else Layout.channels_last
    return Placement(device, precision, step, layout, tuple(notices))


def _precision(wanted: Precision, device: torch.device, closure: bool, notices: list[str]) -> Precision:
    if closure:
        if wanted in (Precision.bf16, Precision.fp16):
            raise UsageError(
                f"`trainer.precision={wanted.value}`: a line search or Hessian-vector product needs exact losses; "
                "type trainer.precision=fp32"
            )
        return Precision.fp32
    if wanted is Precision.auto:
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = device.type == "cpu" and cpu_has_fast_bf16()
        return Precision.bf16 if fast else Precision.fp32
    if wanted is Precision.bf16 and device.type == "cpu" and not cpu_has_fast_bf16():
        notices.append("precision: bf16 is emulated on this CPU and slower than fp32")
    if wanted is Precision.bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        notices.append("precision: this GPU has no bf16 units; fp16 is the fast one here")
    return wanted


def _step(wanted: StepKind, device: torch.device, closure: bool, world: int) -> StepKind:
    if wanted is StepKind.auto:  # of a CUDA graph, the builder finds out whether it can be made
        return StepKind.captured if device.type == "cuda" and not closure and world == 1 else StepKind.eager
    if closure and wanted is not StepKind.eager:
        raise UsageError(
            f"`trainer.step={wanted.value}`: this optimizer evaluates the loss several times a step, which only "
            "the eager step does; type trainer.step=eager"
        )
    if wanted is StepKind.compiled and device.type == "cpu" and not has_compiler():
        raise UsageError(
            f"`trainer.step=compiled`: torch.compile needs a C++ compiler, and there is no `{_compiler()}` (nor "
            "another named by CXX); install one, or type trainer.step=eager"
        )
    if wanted is StepKind.captured and device.type != "cuda":
        raise UsageError(
            f"`trainer.step=captured`: CUDA graphs need a CUDA device, this run is on {device.type}; "
            "type trainer.step=eager or trainer.step=compiled"
        )
    if wanted is StepKind.captured and world > 1:
        raise UsageError("`trainer.step=captured` runs on one process; type trainer.step=eager under torchrun")
    return wanted


def has_compiler() -> bool:
    """Whether `torch.compile` finds the C++ compiler that it needs for a CPU."""
    return shutil.which(_compiler()) is not None


def _compiler() -> str:
    """The C++ compiler that torch.compile calls, as it looks for it."""
    usual = {"darwin": "clang++", "win32": "cl"}
    return os.environ.get("CXX") or usual.get(sys.platform, "g++")
