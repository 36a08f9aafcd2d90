"""The parts that a config names, put together for its data: network, task, input pipeline, optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cnnlab.augment import Pipeline
from cnnlab.check import bind_section, locate
from cnnlab.models.dropout import has_dropout, set_dropout_kind
from cnnlab.optim.decay import decouple_decay
from cnnlab.optim.groups import parameter_groups
from cnnlab.optim.traits import Traits, keep_kernels, place_rates
from cnnlab.parts import make
from cnnlab.protocols import ConvNet, DataSpec, Task
from cnnlab.schema import DropoutKind, Groups, Regularization


def make_network(config: Mapping[str, Any], spec: DataSpec, task: Task, regularization: Regularization) -> nn.Module:
    """The network of a config for such data, with the task's head in place. Raises `ValueError` if they do not
    go together."""
    kind = regularization.dropout_kind
    model = make(
        config["model"],
        num_classes=spec.num_classes,
        in_channels=spec.channels,
        image_size=spec.size,
        activation=make(config["activation"]),
        norm=make(config["norm"]),
        dropout=0.0 if kind is DropoutKind.spatial else regularization.dropout,
        stochastic_depth=regularization.stochastic_depth,
    )
    head = task.head(model)
    if head is not None:
        if not isinstance(model, ConvNet):
            raise ValueError(f"this task replaces the head, which {type(model).__name__} does not let it")
        had_dropout = has_dropout(model)
        model.replace_head(head)
        if regularization.dropout and had_dropout and not has_dropout(model) and kind is not DropoutKind.spatial:
            raise ValueError(
                f"`regularization.dropout={regularization.dropout:g}`: this task's head takes the place of the "
                "classifier, and of the dropout in it; type regularization.dropout_kind=spatial, which acts before the "
                "head, or regularization.dropout=null"
            )
    set_dropout_kind(model, kind, regularization.dropout)
    return model


def make_task(config: Mapping[str, Any], spec: DataSpec, counts: torch.Tensor | None) -> Task:
    """The task with its loss; `counts` (classes,) are those of the images' labels."""
    if "mask" in getattr(locate(config["task"]["_target_"]), "needs", ()):
        counts = None  # of pixels, nobody has counted them
    loss = make(config["loss"], num_classes=target_classes(config, spec), class_counts=counts)
    return make(config["task"], loss=loss, spec=spec)


def target_classes(config: Mapping[str, Any], spec: DataSpec) -> int:
    """How many classes the loss sees: those of the mask where the task reads one."""
    needs = getattr(locate(config["task"]["_target_"]), "needs", ("label",))
    return len(spec.mask_classes) if "mask" in needs else spec.num_classes


def make_pipeline(config: Mapping[str, Any], spec: DataSpec, seed: int) -> Pipeline:
    parts = {name: make(node) for name, node in config["augment"].items() if node is not None}
    return Pipeline(parts, make(config["normalize"]), spec=spec, seed=seed)


def make_optimizer(config: Mapping[str, Any], model: nn.Module, groups: Groups, **fast: Any) -> torch.optim.Optimizer:
    """The optimizer over the parameter groups; each group states its `base_lr`.

    Args:
        fast: what `cnnlab.optim.traits.accelerated` found for the device.
    """
    node = config["optim"]
    traits = Traits.of(locate(node["_target_"]))
    decoupled = bind_section(Regularization, config["regularization"]).decoupled_decay
    if decoupled and node.get("weight_decay"):
        raise ValueError(
            f"`regularization.decoupled_decay={decoupled:g}`: this optimizer decays by itself "
            f"(optim.weight_decay={node['weight_decay']:g}); type optim.weight_decay=0, or "
            "regularization.decoupled_decay=0"
        )
    listed = parameter_groups(
        model,
        weight_decay=node.get("weight_decay") if traits.weight_decay else None,
        decoupled_decay=decoupled,
        decay_norm_and_bias=groups.decay_norm_and_bias,
        layer_decay=groups.layer_decay,
        head_lr=groups.head_lr,
        freeze=groups.freeze,
        single_group=traits.single_group,
    )
    first = next(iter(inspect.signature(locate(node["_target_"])).parameters))
    optimizer = make({**node, **fast}, **{first: listed})
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    place_rates(optimizer)
    keep_kernels(optimizer)
    if decoupled:
        decouple_decay(optimizer)
    return optimizer
