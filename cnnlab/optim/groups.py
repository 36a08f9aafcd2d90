"""Parameter groups: what decays, which layers learn more slowly, what does not train."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from cnnlab.errors import did_you_mean, listing
from cnnlab.inspect.layers import head_parameters, named_layers
from cnnlab.torch_private import NormBase

_NORMS = (NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float | None,
    decoupled_decay: float = 0.0,
    decay_norm_and_bias: bool = False,
    layer_decay: float = 1.0,
    head_lr: float = 1.0,
    freeze: Iterable[str] = (),
    standing: Iterable[str] = (),
    rates: Mapping[str, float] | None = None,
    single_group: bool = False,
) -> list[dict[str, Any]]:
    """The parameters that train, as groups for an optimizer.

    The group's rate at a step is `base rate · lr_scale · schedule.factor(step, total)`; whoever runs the
    schedule sets `lr` so. `lr_scale` is `head_lr` for the head and `layer_decay ** d` for a layer d places
    before it (see `cnnlab.inspect.layers.named_layers`), times the layer's own of `rates`. Frozen parameters are in no
    group and get `requires_grad = False`; what frozen norm layers remember is kept by `cnnlab.interventions.Freeze`.

    Args:
        model: the network, its head in place.
        weight_decay: the optimizer's; `None` where it has none, and then groups have none.
        decoupled_decay: λ for `cnnlab.optim.decay`, beside an optimizer that does not decay.
        decay_norm_and_bias: whether either also acts on vectors (biases, scale and shift, PReLU slopes) and on
            norm layers of any shape.
        layer_decay: rate of each layer as a multiple of the next deeper one's.
        head_lr: rate of the head as a multiple of the base rate.
        freeze: prefixes of parameter names, whole components of them: `layer1` is not in `layer10.weight`.
        standing: whole names of parameters that do not train either.
        rates: of layers, by name, as further multiples; 1 for those that are not named.
        single_group: for an optimizer that takes one group only (L-BFGS).

    Returns:
        Groups with `params`, `name` (such as `head, no decay`), `lr_scale`, unless it is `None` `weight_decay`,
        and unless it is 0 `decoupled_decay`; in the order of the model's parameters.

    Raises:
        ValueError: an unknown prefix, a network without a known head where `head_lr` asks for one, nothing left to
            train, or different groups for an optimizer that takes one.
    """
    freeze_parameters(model, freeze)
    for name in standing:
        model.get_parameter(name).requires_grad_(False)
    rates = rates or {}
    decays = bool(weight_decay or decoupled_decay)
    no_decay = set(_norm_and_bias(model)) if decays and not decay_norm_and_bias else set()
    layers = _scaled_layers(model, layer_decay, head_lr, rates)
    groups = _grouped(model, layers, no_decay, weight_decay, decoupled_decay)
    if not groups:
        raise ValueError("expected a parameter that trains, received a network that is frozen as a whole")
    if single_group and len(groups) > 1:
        raise ValueError(_divided(decoupled_decay, layer_decay, head_lr, rates))
    return groups


def _grouped(
    model: nn.Module,
    layers: Iterable[tuple[str, float, Iterable[str]]],
    no_decay: Collection[str],
    weight_decay: float | None,
    decoupled_decay: float,
) -> list[dict[str, Any]]:
    """The parameters that train by layer's name, scale, and whether they are spared the decay."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for label, scale, names in layers:
        for name in names:
            parameter = model.get_parameter(name)
            if not parameter.requires_grad:
                continue
            spared = name in no_decay
            title = f"{label}, no decay" if spared else label
            group = groups.setdefault((title, scale, spared), {"params": [], "name": title, "lr_scale": scale})
            group["params"].append(parameter)
            if weight_decay is not None:
                group["weight_decay"] = 0.0 if spared else weight_decay
            if decoupled_decay:
                group["decoupled_decay"] = 0.0 if spared else decoupled_decay
    return list(groups.values())


def _divided(decoupled_decay: float, layer_decay: float, head_lr: float, rates: Mapping[str, float]) -> str:
    """Why an optimizer that takes one group would get several."""
    if decoupled_decay and layer_decay == 1 == head_lr:
        return (
            f"`regularization.decoupled_decay={decoupled_decay:g}`: this optimizer takes one parameter group, and "
            "norms and biases would be another; type groups.decay_norm_and_bias=true"
        )
    return (
        "expected equal rates for an optimizer that takes one parameter group, received "
        f"layer_decay={layer_decay:g}, head_lr={head_lr:g}{_in_words(rates)}; type groups.layer_decay=1 "
        f"groups.head_lr=1{' finetune.backbone_lr=1' if rates else ''}"
    )


def freeze_parameters(model: nn.Module, prefixes: Iterable[str]) -> list[str]:
    """Sets `requires_grad = False` under each prefix, and returns the names.

    Raises:
        ValueError: a prefix that is in no name, with the nearest one that is.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen = []
    for prefix in prefixes:
        wanted = prefix.rstrip(".")
        matches = [name for name in names if name == wanted or name.startswith(f"{wanted}.")]
        if not matches:
            parts = [name.split(".") for name in names]
            known = {".".join(part[:depth]) for part in parts for depth in range(1, len(part) + 1)}
            raise ValueError(
                f"expected prefixes of parameter names in freeze, received {prefix!r}"
                f"{did_you_mean(wanted, known)}; names begin with {listing({part[0] for part in parts})}"
            )
        frozen += matches
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return list(dict.fromkeys(frozen))


def _in_words(rates: Mapping[str, float]) -> str:
    found = ", ".join(f"{rate:g}" for rate in dict.fromkeys(rates.values()))
    return f", finetune.backbone_lr={found}" if found else ""


def _scaled_layers(
    model: nn.Module, layer_decay: float, head_lr: float, rates: Mapping[str, float]
) -> Iterator[tuple[str, float, list[str]]]:
    """Label, rate as a multiple of the base rate, and parameter names of each layer."""
    head = head_parameters(model)
    if head_lr != 1 and not head:
        raise ValueError(
            f"expected a network that names its head for head_lr={head_lr:g}, received "
            f"{type(model).__name__} without `head` or `classifier_modules`; type groups.head_lr=1"
        )
    found = named_layers(model)
    for place, (title, names) in enumerate(found):
        is_head = names[0] in head
        scale = head_lr if is_head else layer_decay ** (len(found) - 1 - place)
        scale *= rates.get(title, 1.0)
        if layer_decay == 1 == head_lr and not rates:
            label = "all"
        elif is_head:
            label = "head"
        else:
            one_rate = layer_decay == 1 and len({rates.get(t, 1.0) for t, names in found if names[0] not in head}) == 1
            label = "backbone" if one_rate else f"layer {place}: {title}"
        yield label, scale, names


def _norm_and_bias(model: nn.Module) -> Iterator[str]:
    """Names of vectors and scalars, and of norm layers' parameters of any shape."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2 or isinstance(module, _NORMS):
                yield f"{prefix}.{name}" if prefix else name
