"""Parameter groups: what decays, which layers learn more slowly, what does not train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from cnnlab.errors import did_you_mean, listing
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
    single_group: bool = False,
) -> list[dict[str, Any]]:
    """The parameters that train, as groups for an optimizer.

    The group's rate at a step is `base rate · lr_scale · schedule.factor(step, total)`; whoever runs the
    schedule sets `lr` so. `lr_scale` is `head_lr` for the head and `layer_decay ** d` for a layer d places
    before it (see `named_layers`). Frozen parameters are in no group and get `requires_grad = False`; what frozen
    norm layers remember is kept by `cnnlab.interventions.Freeze`.

    Args:
        model: the network, its head in place.
        weight_decay: the optimizer's; `None` where it has none, and then groups have none.
        decoupled_decay: λ for `cnnlab.optim.decay`, beside an optimizer that does not decay.
        decay_norm_and_bias: whether either also acts on vectors (biases, scale and shift, PReLU slopes) and on
            norm layers of any shape.
        layer_decay: rate of each layer as a multiple of the next deeper one's.
        head_lr: rate of the head as a multiple of the base rate.
        freeze: prefixes of parameter names, whole components of them: `layer1` is not in `layer10.weight`.
        single_group: for an optimizer that takes one group only (L-BFGS).

    Returns:
        Groups with `params`, `name` (such as `head, no decay`), `lr_scale`, unless it is `None` `weight_decay`,
        and unless it is 0 `decoupled_decay`; in the order of the model's parameters.

    Raises:
        ValueError: an unknown prefix, a network without a known head where `head_lr` asks for one, nothing
        left to
            train, or different groups for an optimizer that takes one.
    """
    freeze_parameters(model, freeze)
    decays = bool(weight_decay or decoupled_decay)
    no_decay = set(_norm_and_bias(model)) if decays and not decay_norm_and_bias else set()
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for label, scale, names in _scaled_layers(model, layer_decay, head_lr):
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
    if not groups:
        raise ValueError("expected a parameter that trains, received a network that is frozen as a whole")
    if single_group and len(groups) > 1 and decoupled_decay and layer_decay == 1 == head_lr:
        raise ValueError(
            f"`regularization.decoupled_decay={decoupled_decay:g}`: this optimizer takes one parameter group, and "
            "norms and biases would be another; type groups.decay_norm_and_bias=true"
        )
    if single_group and len(groups) > 1:
        raise ValueError(
            "expected equal rates for an optimizer that takes one parameter group, received "
            f"layer_decay={layer_decay:g}, head_lr={head_lr:g}; type groups.layer_decay=1 groups.head_lr=1"
        )
    return list(groups.values())


def layers(model: nn.Module) -> list[list[str]]:
    """Names of the parameters of each layer, from the input on, as `layer_decay` counts them; see `named_layers`."""
    return [names for _, names in named_layers(model)]


def named_layers(model: nn.Module) -> list[tuple[str, list[str]]]:
    """Name and parameters of each layer, from the input on, in the order of registration, which the lab's,
    torchvision's and timm's networks share with the forward pass.

    - Where one list (`Sequential`, `ModuleList`) holds the network's depth, each of its items is a layer: the blocks of
      SpeedNet, of a ViT's encoder or of MobileNet, the stages of EfficientNet or ConvNeXt. It may lie deeper, in a
      wrapper or an encoder; of lists in lists, the outer one counts.
    - Where there are several such lists side by side (the stages of a ResNet), each is a layer.
    - Of a `Sequential` of plain layers (the `features` of VGG) each convolution or linear layer is one.
    - What has no weight of its own (a norm layer, a class token, an embedding of positions) belongs to the layer
      before it; at the very start, to the first one.
    - The whole head is the last layer.
    """
    head = head_parameters(model)
    backbone = [name for name, _ in model.named_parameters() if name not in head]
    found: list[tuple[str, list[str]]] = []
    early: list[str] = []
    for title, names in _chain(model, "", backbone):
        if title and any(model.get_parameter(name).ndim >= 2 for name in names):
            found.append((title, early + names))
            early = []
        elif found:
            found[-1][1].extend(names)
        else:
            early += names
    if early:
        found.append(("all", early))
    last = [name for name, _ in model.named_parameters() if name in head]
    return [*found, ("head", last)] if last else found


def _chain(module: nn.Module, prefix: str, names: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Name and parameters of what follows one another inside `module`; no name for parameters of its own."""
    below: dict[str, list[str]] = {}
    for name in names:
        child, _, rest = name.removeprefix(prefix).partition(".")
        below.setdefault(child if rest else "", []).append(name)
    children = {child: getattr(module, child) for child in below if child}
    depths = {child: _lists_in_lists(part) for child, part in children.items()}
    deepest = [child for child, depth in depths.items() if 0 < depth == max(depths.values())]
    for child, inside in below.items():
        part = children.get(child)
        path = f"{prefix}{child}"
        if part is None:
            yield "", inside
        elif _is_plain(part):
            yield from _plain_layers(part, path, inside)
        elif deepest == [child] or (len(children) == 1 and not isinstance(part, nn.Sequential | nn.ModuleList)):
            yield from _chain(part, f"{path}.", inside)
        else:
            yield path, inside


def _is_plain(module: nn.Module) -> bool:
    """A single layer, or a `Sequential` of nothing else."""
    if not list(module.children()):
        return True
    return isinstance(module, nn.Sequential) and all(_is_plain(child) for child in module)


def _plain_layers(module: nn.Module, path: str, names: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each layer with a weight, followed by what has none; a norm layer that comes first belongs to the first one."""
    by_layer: dict[str, list[str]] = {}
    for name in names:
        by_layer.setdefault(name.rpartition(".")[0], []).append(name)
    first: list[str] | None = []
    for title, inside in by_layer.items():
        layer = module.get_submodule(title.removeprefix(path).removeprefix("."))
        has_weight = any(parameter.ndim >= 2 for parameter in layer.parameters(recurse=False))
        if has_weight:
            yield title, [*(first or ()), *inside]
            first = None
        elif first is None:
            yield "", inside
        else:
            first += inside
    if first:
        yield "", first


def _lists_in_lists(module: nn.Module) -> int:
    """How deep lists of blocks are nested in it; 0 without one."""
    if _is_plain(module):
        return 0
    inner = max((_lists_in_lists(child) for child in module.children()), default=0)
    return inner + isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)


def head_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of the network's head and of its own classifier, where it has them (empty if
    unknown)."""
    modules = [_submodule(model, name) for name in ("head", *getattr(model, "classifier_modules", ()))]
    own = {id(p) for module in modules if isinstance(module, nn.Module) for p in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = model
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


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


def _scaled_layers(model: nn.Module, layer_decay: float, head_lr: float) -> Iterator[tuple[str, float, list[str]]]:
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
        if layer_decay == 1 == head_lr:
            label = "all"
        elif is_head:
            label = "head"
        else:
            label = "backbone" if layer_decay == 1 else f"layer {place}: {title}"
        yield label, scale, names


def _norm_and_bias(model: nn.Module) -> Iterator[str]:
    """Names of vectors and scalars, and of norm layers' parameters of any shape."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2 or isinstance(module, _NORMS):
                yield f"{prefix}.{name}" if prefix else name
