"""What an optimizer takes up from a checkpoint: the state of this very optimizer, or nothing.

torch's `load_state_dict` compares the number of groups and of parameters. A state of another shape, another dtype (it
would be cast) or with a value missing is met in the first update, as a fault or, broadcast, not at all.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Adagrad, Optimizer

from cnnlab.optim.traits import Traits
from cnnlab.runs.checkpoint import require_alike


def require_own_states(optimizer: Optimizer) -> None:
    """From here on, `optimizer.load_state_dict` raises `ValueError` for a state that is none of this optimizer's; what
    a group lacks (an earlier version had fewer settings) stays as it is."""
    optimizer.register_load_state_dict_pre_hook(_fitting)


def _fitting(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    own = optimizer.state_dict()["param_groups"]
    saved = state["param_groups"]
    if [group["params"] for group in saved] != [group["params"] for group in own]:
        raise ValueError("its parameters are grouped otherwise than this run's")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not isinstance(state["state"], dict):
        raise ValueError(f"its state is of type {type(state['state']).__name__}, expected values by parameter")
    unknown = [number for number in state["state"] if type(number) is not int or not 0 <= number < len(params)]
    if unknown:
        raise ValueError(f"it has a state of parameter {unknown[0]!r}, and this run has {len(params)} of them")
    after = states_after_an_update(optimizer)
    for number, found in state["state"].items():
        place = f"state of parameter {number}"
        if not isinstance(found, dict):
            raise ValueError(f"its {place} is of type {type(found).__name__}, expected values by name")
        if after is None:
            _require_sizes(params, found, place, closure=Traits.of(type(optimizer)).closure)
            if isinstance(optimizer, LBFGS):
                _require_lbfgs(found, place)
        else:
            _require_complete(after.get(params[number], {}), found, place)
    return {**state, "param_groups": [{**mine, **theirs} for mine, theirs in zip(own, saved, strict=True)]}


def _require_complete(expected: dict[str, Any], found: dict[str, Any], place: str) -> None:
    lost = [str(name) for name, value in expected.items() if name not in found and value is not None]
    if lost:
        raise ValueError(f"its {place} lacks {', '.join(lost)}")
    require_alike(expected, found, place)


def _require_sizes(params: list[Tensor], found: Any, place: str, *, closure: bool) -> None:
    """Of an optimizer whose state cannot be foretold: its dtypes; and of one that evaluates the loss itself, that a
    tensor is a number, a vector of all parameters (L-BFGS), or of a parameter's shape. A third party's factors have
    shapes of their own."""
    if isinstance(found, dict | list | tuple):
        for name, value in found.items() if isinstance(found, dict) else enumerate(found):
            _require_sizes(params, value, f"{place}.{name}", closure=closure)
    elif isinstance(found, Tensor):
        if found.is_floating_point() and found.dtype not in {p.dtype for p in params} | {torch.float32}:
            raise ValueError(f"its {place} is of {found.dtype}, expected {params[0].dtype}")
        shapes = {(), (sum(p.numel() for p in params),), *(tuple(p.shape) for p in params)}
        if closure and tuple(found.shape) not in shapes:
            raise ValueError(f"its {place} is of shape {tuple(found.shape)}, expected that of a parameter or of all")


def _require_lbfgs(found: dict[str, Any], place: str) -> None:
    lost = [name for name in ("func_evals", "n_iter") if type(found.get(name)) is not int]
    if not lost and found["n_iter"] > 0:
        lists = ("old_dirs", "old_stps", "ro")
        lost = [name for name in ("d", "t", "H_diag", "prev_flat_grad", "prev_loss") if found.get(name) is None]
        lost += [name for name in lists if not isinstance(found.get(name), list)]
        if not lost and len({len(found[name]) for name in lists}) > 1:
            lost = ["as many old_dirs as old_stps and ro"]
    if lost:
        raise ValueError(f"its {place} lacks {', '.join(lost)}")


def states_after_an_update(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]] | None:
    """What an optimizer keeps of each parameter after its first update, as tensors without values (device `meta`): no
    memory is taken and nothing is computed. One that has it all from the start is asked for that. `None` where it reads
    values, or evaluates the loss itself.
    """
    if Traits.of(type(optimizer)).closure:
        return None
    params = [p for group in optimizer.param_groups for p in group["params"]]
    shadows = {p: torch.empty_like(p, device="meta") for p in params}
    for shadow in shadows.values():
        shadow.grad = torch.empty_like(shadow)
    twin = copy.copy(optimizer)
    twin.state = defaultdict(dict)
    slow = {"fused": False, "foreach": False, "capturable": False}  # the kernels of a device are not to be had here
    twin.param_groups = [
        {**group, **{name: value for name, value in slow.items() if name in group}}
        | {"params": [shadows[p] for p in group["params"]], "lr": float(group["lr"])}
        for group in optimizer.param_groups
    ]
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            step: Any = type(twin).step
            getattr(step, "__wrapped__", step)(twin)  # the bare one: torch's wrapper would call the optimizer's hooks
    except Exception:  # a third party's, which reads values, or keeps more of itself than groups and state
        made = {p: dict(optimizer.state[p]) for p in params if p in optimizer.state}
        # torch 2.11's Adagrad has its state from the start, and takes no step without it
        return made if isinstance(optimizer, Adagrad) and len(made) == len(params) else None
    return {p: dict(twin.state[shadow]) for p, shadow in shadows.items() if shadow in twin.state}
