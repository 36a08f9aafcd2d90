"""What an optimizer class needs from the loop and accepts in its groups, read from the class itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer

from cnnlab.composing.kinds import alternatives, hints_of

_FUSED = {"cuda": (SGD, Adam, AdamW), "cpu": (SGD, Adam, AdamW)}
"""Where torch has a single kernel for the update, which goes through memory once. On two cores: AlexNet's momentum step
18 ms instead of 44; on one, ResNet-18's AdamW step 17 instead of 40."""
_KERNELS = ("fused", "foreach", "capturable")
"""Settings of torch's optimizers that change no number but by rounding."""


@dataclass(frozen=True)
class Traits:
    """Facts that decide the step and the parameter groups.

    `closure`: `step` evaluates the batch itself, `step(closure)`, perhaps several times.
    `create_graph`: the closure returns the loss with its graph and leaves the backward pass to the
    optimizer, which differentiates twice.
    `single_group`: takes one parameter group only.
    `weight_decay`: has such an argument, so groups may differ in it.
    """

    closure: bool
    create_graph: bool
    single_group: bool
    weight_decay: bool

    @classmethod
    def of(cls, optimizer: Callable[..., Any]) -> Traits:
        """The traits of an optimizer class, ours, torch's or a third party's; or of a function that makes one, by the
        class that its annotation says it returns."""
        accepted = inspect.signature(optimizer).parameters
        said = [optimizer] if inspect.isclass(optimizer) else alternatives(hints_of(optimizer).get("return"))
        made: Any = next((option for option in said if _is_optimizer(option)), Optimizer)
        closure = inspect.signature(made.step).parameters.get("closure")
        return cls(
            closure=closure is not None and closure.default is inspect.Parameter.empty,
            create_graph=bool(getattr(made, "create_graph", False)),
            single_group=issubclass(made, LBFGS),
            weight_decay="weight_decay" in accepted,
        )


def _is_optimizer(option: Any) -> bool:
    return inspect.isclass(option) and issubclass(option, Optimizer)


def accelerated(
    optimizer: Callable[..., Any], settings: Mapping[str, Any], device: torch.device, *, captured: bool = False
) -> dict[str, Any]:
    """Arguments that make the update fast on `device`, where `settings` (the config's) leave them open.

    Args:
        captured: the update is to become part of a CUDA graph, so it must not read anything on the host.
    """
    accepted = inspect.signature(optimizer).parameters
    is_open = all(settings.get(name) is None for name in ("fused", "foreach"))
    fast = {"fused": True} if optimizer in _FUSED.get(device.type, ()) and is_open else {}
    if captured and "capturable" in accepted and "capturable" not in settings:
        fast["capturable"] = True  # Adam refuses to be captured without, fused or not
    return fast


def place_rates(optimizer: Optimizer) -> None:
    """Lets the kernels of a GPU read the rates, so that a captured update follows the schedule.

    Only where they do: other implementations would read such a rate back at every step.
    """
    for group in optimizer.param_groups:
        on_device = group.get("fused") or (group.get("capturable") and group.get("foreach") is not False)
        if on_device and group["params"][0].is_cuda:
            group["lr"] = torch.as_tensor(group["lr"], device=group["params"][0].device)


def keep_kernels(optimizer: Optimizer) -> None:
    """Lets a checkpoint bring the numbers only: which kernels compute, and where their rate lies, is for this device
    to say. A checkpoint is read to the CPU, and may be of a run on another kind of device."""
    optimizer.register_load_state_dict_pre_hook(_with_own_kernels)
    optimizer.register_load_state_dict_post_hook(place_rates)


def _with_own_kernels(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    own = [{name: group[name] for name in _KERNELS if name in group} for group in optimizer.param_groups]
    own += [{}] * (len(state["param_groups"]) - len(own))  # another number of groups is torch's to refuse
    groups = [{**saved, "lr": float(saved["lr"]), **kept} for saved, kept in zip(state["param_groups"], own)]
    return {**state, "param_groups": groups}
