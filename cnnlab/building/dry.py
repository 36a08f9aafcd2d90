"""Parts tried on nothing, for what they refuse only when they are used: a network on the meta device, a forward pass of
an empty batch, an optimizer's first step on four weights."""

from __future__ import annotations

import torch
from torch import nn

from cnnlab.building.assemble import make_penalties
from cnnlab.composing.experiment import Experiment
from cnnlab.inspect.meta import reads_values
from cnnlab.machine.memory import is_out_of_memory
from cnnlab.optim.traits import Traits
from cnnlab.protocols import ConvNet, DataSpec
from cnnlab.train.forward import Penalties


def passes(model: nn.Module, spec: DataSpec) -> None:
    """A pass in training of two empty images through a network on the CPU. The random state stays as it is.

    What this machine has no memory for is left to the run. Raises what the network's parts do.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            model.train()(torch.zeros(2, spec.channels, *spec.size))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise


def headed(model: nn.Module, spec: DataSpec) -> None:
    """Lets shapes run through a network whose head was made apart from it: a norm layer may refuse a map of one pixel.

    What reads values, and cannot run so, is left to the first batch. Raises `ValueError` with the reason.
    """
    first = next(model.parameters(), None)
    if not isinstance(model, ConvNet) or model.head is None or first is None or not first.is_meta:
        return
    try:
        model.train()(torch.empty(2, spec.channels, *spec.size, device="meta"))
    except (RuntimeError, ValueError) as error:
        if reads_values(error):
            return
        raise ValueError(
            f"{type(model.head).__name__} cannot read what {type(model).__name__} gives for images of "
            f"{spec.size[0]}x{spec.size[1]} ({str(error).splitlines()[0]}); type another head, norm or model, or "
            "larger images"
        ) from error


def penalized(experiment: Experiment, model: nn.Module) -> None:
    """Lets the penalties see the shapes of a network's weights. Raises `ValueError` with the reason where one refuses.

    What reads values, and cannot run so, is left to the first batch.
    """
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, penalty in make_penalties(experiment).named.items():
        try:
            Penalties({name: penalty})(weights)
        except Exception as error:  # a third party's formula may raise anything
            if reads_values(error):
                continue
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(text if text.startswith("`") else f"`penalty.{name}`: {text}") from error


def steps(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> None:
    """The first step of an optimizer of one weight, on the loss Σw². Raises what it does."""
    traits = Traits.of(type(optimizer))

    def closure() -> torch.Tensor:
        loss = (weight * weight).sum()
        if not traits.create_graph:
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        if traits.closure or traits.create_graph:
            optimizer.step(closure)  # type: ignore[arg-type]
        else:
            closure()
            optimizer.step()
