"""The parts that a config names, put together for its data: task, network and head, input pipeline, optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cnnlab.augment import Pipeline
from cnnlab.composing.experiment import Experiment, Node
from cnnlab.composing.signature import accepts
from cnnlab.inspect.untouched import untouched, zeros
from cnnlab.interventions import Ema, Finetune, Freeze, MaxNorm
from cnnlab.machine.device import Placement
from cnnlab.models.dropout import has_dropout, set_dropout_kind
from cnnlab.models.half import protect_narrow
from cnnlab.optim.decay import decouple_decay
from cnnlab.optim.groups import parameter_groups
from cnnlab.optim.restoring import require_own_states
from cnnlab.optim.traits import Traits, keep_kernels, place_rates
from cnnlab.penalties import L1, L2
from cnnlab.protocols import ConvNet, Data, DataSpec, Head, Intervention, Penalty, Split
from cnnlab.schema import DropoutKind, Layout, Loading
from cnnlab.tasks import Task
from cnnlab.train.forward import Penalties
from cnnlab.train.interventions import Interventions

BALANCED = "balanced"


def task_class(experiment: Experiment) -> type[Task]:
    """The class of the experiment's task. Raises `ValueError` for what is none."""
    node = experiment.node("task")
    if not (isinstance(node.target, type) and issubclass(node.target, Task)):
        raise ValueError(f"{node.name} is no subclass of Task; see cnnlab.tasks.Task")
    return node.target


def spec_for_task(experiment: Experiment, spec: DataSpec) -> DataSpec:
    """The data's spec as its task sees it. Raises `ValueError` where the data lacks a target."""
    task = task_class(experiment)
    try:
        return spec.only(task.needs)
    except ValueError as error:
        raise ValueError(f"{task.__name__} {error}") from error


def weighs_classes(loss: Node) -> bool:
    """Whether a loss, or a part of it, asks how many there are of each class. One that can weigh them alike, and does,
    does not."""
    if loss.states("parts"):
        return any(weighs_classes(part) for part in loss.parts("parts").values())
    return loss.takes("class_counts") and loss.get("class_weights", BALANCED) == BALANCED


def class_counts(experiment: Experiment, spec: DataSpec, split: Split) -> torch.Tensor | None:
    """How many there are of each class, (classes,) int64, as the experiment's loss weighs them; what takes long
    to count is counted only for a loss that does.

    Args:
        split: the training set.
    """
    kind = task_class(experiment)
    weighed = weighs_classes(experiment.node("loss"))
    return kind.weighed_counts(spec, split) if weighed else kind.class_counts(spec, split.labels)


def make_task(experiment: Experiment, spec: DataSpec, counts: torch.Tensor | None) -> Task:
    """The task with its loss, for its own view of the data; `counts` (classes,) as `class_counts` gives them."""
    names = task_class(experiment).class_names(spec)
    loss = experiment.node("loss").make(num_classes=len(names), class_counts=counts)
    return experiment.node("task").make(loss=loss, spec=spec)


def make_network(experiment: Experiment, spec: DataSpec, task: Task) -> nn.Module:
    """The experiment's network for such data, with its head in place. Raises `ValueError` if they do not go
    together."""
    regularization = experiment.regularization
    kind = regularization.dropout_kind
    dropout = 0.0 if kind is DropoutKind.spatial else regularization.dropout
    shared = {
        "num_classes": spec.num_classes,
        "image_size": spec.size,
        "activation": experiment.node("activation").make(),
        "norm": experiment.node("norm").make(),
        "dropout": dropout,
    }
    model = experiment.node("model").make(
        in_channels=spec.channels, stochastic_depth=regularization.stochastic_depth, **shared
    )
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch.nn.Module, received {type(model).__name__}")
    had_dropout = has_dropout(model)
    wired = {"mask_classes": len(spec.mask_classes), "channels": spec.channels, **shared}
    put_head(experiment.node("head"), model, task, **wired)
    if regularization.dropout and had_dropout and not has_dropout(model) and kind is not DropoutKind.spatial:
        raise ValueError(
            f"`regularization.dropout={regularization.dropout:g}`: this task's head takes the place of the "
            "classifier, and of the dropout in it; type regularization.dropout_kind=spatial, which acts before the "
            "head, or regularization.dropout=null"
        )
    set_dropout_kind(model, kind, regularization.dropout)
    return model


def put_head(node: Node, model: nn.Module, task: Task, **wired: Any) -> None:
    """Gives the network the head that `node` names, or else the one that the task wants of it.

    The network keeps its classifier beside the head where the task reads what only the classifier gives.

    Raises:
        ValueError: task, network and head do not fit each other.
    """
    gives = model.gives if isinstance(model, ConvNet) else ("logits",)
    lacking = [output for output in task.reads if output not in gives]
    if not node and lacking:
        node = Node("head", task.own_head(_with_stages(model)))
        if not node:
            raise ValueError(
                f"`head`: {type(task).__name__} reads {', '.join(lacking)}, and {type(model).__name__} gives "
                f"{', '.join(gives)}; type head=NAME of one that gives it"
            )
    if not node:
        return
    network = _with_stages(model)
    head = _made_head(node, network, wired)
    if not set(head.gives) & set(task.reads):
        raise ValueError(
            f"`head`: {type(task).__name__} reads {', '.join(task.reads)}, and {type(head).__name__} gives "
            f"{', '.join(head.gives) or 'nothing'}; type head=auto"
        )
    own = [output for output in task.reads if output not in head.gives]
    lacking = [output for output in own if output not in gives]
    if lacking:
        raise ValueError(
            f"`head`: {type(task).__name__} reads {', '.join(lacking)}, too, and neither {type(network).__name__} nor "
            f"{type(head).__name__} gives it; type head=auto"
        )
    if own:
        network.add_head(head)
    else:
        network.replace_head(head)


def _with_stages(model: nn.Module) -> ConvNet:
    if not isinstance(model, ConvNet):
        raise ValueError(
            "`head`: expected a network with feature stages (a cnnlab.protocols.ConvNet), received "
            f"{type(model).__name__}; type model=vgg or model=resnet"
        )
    model.require_stages()
    return model


def _made_head(node: Node, model: ConvNet, wired: dict[str, Any]) -> Head:
    target = node.target
    if not (isinstance(target, type) and issubclass(target, Head)):
        raise ValueError(f"`head`: {node.name} is no subclass of Head; see cnnlab.protocols.Head")
    if target.needs_maps and not model.spatial:
        raise ValueError(
            f"`head`: expected a network with feature maps for {target.__name__}, received {type(model).__name__}, "
            "whose layers have no places left; type model=cnn, vgg or resnet"
        )
    stages: dict[str, Any] = {"stage_channels": model.stage_channels, "pool_channels": model.pool_channels}
    if accepts(target, "stage_sizes"):
        stages["stage_sizes"] = _stage_sizes(model, (wired["channels"], *wired["image_size"]))
    try:
        return node.make(**stages, **wired)
    except ValueError as error:
        raise ValueError(f"`head`: {error}") from error


def placed(model: nn.Module, placement: Placement, spec: DataSpec) -> tuple[nn.Module, list[str]]:
    """The network on its device and in its layout, and the names of the convolutions that compute in float32 there,
    whatever the precision (see `cnnlab.models.half`)."""
    model = model.to(placement.device)
    if placement.layout is Layout.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if placement.device.type == "cpu" and placement.dtype is not torch.float32:
        return model, protect_narrow(model, (spec.channels, *spec.size))
    return model, []


def _stage_sizes(model: ConvNet, image: tuple[int, int, int]) -> tuple[tuple[int, int], ...]:
    """(height, width) of the stages for images (C, H, W)."""
    with untouched(model), torch.no_grad():
        stages = model.eval().features(zeros(model, image)).stages
    return tuple((stage.shape[-2], stage.shape[-1]) for stage in stages)


def make_data(experiment: Experiment, pipeline: Pipeline, loading: Loading) -> Data:
    """The data set, which stores photos as the augmentation needs them.

    A config without the option `stored` is of an earlier run, whose photos were not stored whole: it keeps its pixels.
    """
    node = experiment.node("data")
    known = node.states("stored")
    return node.make(loading=loading, crops=known and pipeline.crops, shifts=known and pipeline.shifts)


def make_pipeline(experiment: Experiment, spec: DataSpec) -> Pipeline:
    parts = {name: node.make() for name, node in experiment.nodes("augment").items()}
    return Pipeline(parts, experiment.node("normalize").make(), spec=spec, seed=experiment.seed)


def make_interventions(experiment: Experiment) -> Interventions:
    """What the experiment lets change the run: projections first, averages last, of what the weights have become."""
    found: dict[str, Intervention] = {}
    regularization = experiment.regularization
    if experiment.groups.freeze:
        found["freeze"] = Freeze(experiment.groups.freeze)
    if finetune := make_finetune(experiment):
        found["finetune"] = finetune
    if regularization.max_norm is not None:
        found["max_norm"] = MaxNorm(regularization.max_norm)
    for node in experiment.nodes("intervention").values():
        found[node.where] = node.make()
    if regularization.ema:
        found["ema"] = Ema(regularization.ema)
    return Interventions(found)


def make_finetune(experiment: Experiment) -> Finetune | None:
    """How a network that was trained before is trained further, where the experiment says so."""
    made: Finetune | None = experiment.node("finetune").make()
    return made


def make_penalties(experiment: Experiment) -> Penalties:
    """The terms of the loss that depend on the weights alone. Raises `ValueError` for two of one name."""
    found: dict[str, Penalty] = {}
    regularization = experiment.regularization
    if regularization.l1:
        found["l1"] = L1(regularization.l1)
    if regularization.l2:
        found["l2"] = L2(regularization.l2)
    for name, node in experiment.nodes("penalty").items():
        if name in found:
            raise ValueError(
                f"`penalty.{name}`: regularization.{name} has this name in the records; give it another in its YAML, "
                f"or type regularization.{name}=0"
            )
        found[name] = node.make()
    return Penalties(found)


def make_optimizer(experiment: Experiment, model: nn.Module, **fast: Any) -> torch.optim.Optimizer:
    """The optimizer over the parameter groups; each group states its `base_lr`.

    Args:
        fast: what `cnnlab.optim.traits.accelerated` found for the device.
    """
    node, groups, finetune = experiment.node("optim"), experiment.groups, make_finetune(experiment)
    traits = Traits.of(node.target)
    decoupled, own = experiment.regularization.decoupled_decay, node.get("weight_decay")
    if decoupled and own:
        raise ValueError(
            f"`regularization.decoupled_decay={decoupled:g}`: this optimizer decays by itself "
            f"(optim.weight_decay={own:g}); type optim.weight_decay=0, or "
            "regularization.decoupled_decay=0"
        )
    listed = parameter_groups(
        model,
        weight_decay=own if traits.weight_decay else None,
        decoupled_decay=decoupled,
        decay_norm_and_bias=groups.decay_norm_and_bias,
        layer_decay=groups.layer_decay,
        head_lr=groups.head_lr,
        freeze=groups.freeze,
        standing=[] if finetune is None else finetune.standing(model),
        rates=None if finetune is None else finetune.rates(model),
        single_group=traits.single_group,
    )
    optimizer = node.with_settings(**fast).make(**{str(node.first_parameter): listed})
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    place_rates(optimizer)
    require_own_states(optimizer)
    keep_kernels(optimizer)
    if decoupled:
        decouple_decay(optimizer)
    return optimizer
