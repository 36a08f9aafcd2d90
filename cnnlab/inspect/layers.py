"""The layers of a network in the order of its forward pass, and its head: what rates and freezing are told by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

HEAD = "head"
"""The name of the last layer, which is the whole head."""


def named_layers(model: nn.Module) -> list[tuple[str, list[str]]]:
    """Name and parameters of each layer, from the input on, as `layer_decay` counts them: in the order of registration,
    which the lab's, torchvision's and timm's networks share with the forward pass.

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
    return [*found, (HEAD, last)] if last else found


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
    own = {id(p) for module in head_modules(model).values() for p in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The network's head and its own classifier by name, where it has them (empty if unknown)."""
    found = {name: _submodule(model, name) for name in (HEAD, *getattr(model, "classifier_modules", ()))}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = model
    for name in path.split("."):
        found = getattr(found, name, None)
    return found
