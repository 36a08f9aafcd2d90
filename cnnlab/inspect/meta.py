"""Networks without memory: shapes run through them on torch's meta device. What reads values cannot, and is made or run
on the CPU instead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

Result = TypeVar("Result")


def reads_values(error: BaseException) -> bool:
    """Whether an operator, a constructor or numpy wanted values of the meta device, which has none."""
    text = str(error).lower()
    return isinstance(error, NotImplementedError) or "meta" in text or "data pointer" in text


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """A new network without memory for its weights; with it, on the CPU, where its constructor reads values
    (`torch.linspace(...).tolist()`). torch's random state stays."""
    try:
        with torch.device("meta"):
            return make()
    except (RuntimeError, TypeError) as error:
        if not reads_values(error):
            raise
    return made_on_cpu(make)


def made_on_cpu(make: Callable[[], nn.Module]) -> nn.Module:
    """A new network with its weights; torch's random state stays."""
    with torch.random.fork_rng(devices=[]):
        return make()


def run(model: nn.Module, work: Callable[[nn.Module, torch.device], Result]) -> Result:
    """What `work` gives for a copy without memory and the meta device; where that reads values, for a copy on the CPU
    and the CPU."""
    try:
        return work(_emptied(model), torch.device("meta"))
    except (RuntimeError, TypeError) as error:
        if not reads_values(error):
            raise
    with torch.device("cpu") as cpu:  # whatever the default is: the network makes tensors of its own
        return work(_filled(model), cpu)


def _emptied(model: nn.Module) -> nn.Module:
    """Each parameter and buffer is replaced before it would be copied."""
    replaced: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        replaced[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        replaced[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, replaced)


def _filled(model: nn.Module) -> nn.Module:
    """With zeros, where the network has no memory itself."""
    copied = copy.deepcopy(model)
    if not any(tensor.is_meta for tensor in (*copied.parameters(), *copied.buffers())):
        return copied.cpu()
    copied.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*copied.parameters(), *copied.buffers()):
            tensor.zero_()
    return copied
