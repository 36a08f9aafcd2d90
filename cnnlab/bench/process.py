"""This process: its age, its memory, and the settings of torch that a measurement must leave as they were."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def age() -> float | None:
    """Seconds since the operating system started this process, interpreter and imports included.

    From field 22 of `/proc/self/stat` (clock ticks from boot, 10 ms each) and the clock that counts from boot;
    `None` where there is no such file.
    """
    try:
        stat = Path("/proc/self/stat").read_text()
        ticks = int(stat.rpartition(")")[2].split()[19])  # the name before it may hold spaces
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return None


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> tuple[int | None, str]:
    """Bytes at most, and of what: tensors on a GPU since `reset_peak`; elsewhere the whole process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "tensors on the GPU"
    try:
        import resource
    except ImportError:  # Windows
        return None, "unknown here"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "resident memory of the process"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Puts torch's global settings and random state back to what they were: building a run changes them."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    precision = torch.get_float32_matmul_precision()
    denormals = _keeps_denormals()
    flags = {name: getattr(torch.backends.cudnn, name) for name in ("benchmark", "deterministic")}
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_float32_matmul_precision(precision)
        torch.set_flush_denormal(not denormals)
        for name, value in flags.items():
            setattr(torch.backends.cudnn, name, value)


def _keeps_denormals() -> bool:
    """Whether numbers below the smallest normal one stay; torch has a switch for it, and nothing to ask."""
    smallest = torch.tensor([torch.finfo(torch.float32).tiny])
    return bool((smallest / 2 > 0).item())
