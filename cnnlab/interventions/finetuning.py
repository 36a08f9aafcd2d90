"""How much of a network that has been trained before is trained further, and when (`finetune=...`).

Layers are those of `cnnlab.inspect.layers.named_layers`: the stages of a ResNet, the convolutions of a VGG; the head,
with the network's own classifier, is the last one. `cnnlab summary finetune=...` lists them with their rates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from torch import nn

from cnnlab.errors import did_you_mean
from cnnlab.inspect.layers import HEAD, named_layers
from cnnlab.interventions.freezing import Freeze, remembering
from cnnlab.schema import Positive, PositiveInt

Norm = Literal["keep", "update"]
"""Whether norm layers whose parameters stand still `keep` their running statistics, and use them in training, or
`update` them from the batches (and normalize by these), as torch does by itself."""


Cache = bool | Literal["auto"]
"""Whether something is kept; `auto`: where it can be."""


class Finetune(Freeze):
    """Base of the ways to fine-tune. What is frozen is frozen bit for bit, with what norm layers remember.

    A subclass says which layers stand still (`standing`), which rates the others have (`rates`), and which of them
    take weights over (`reuses`).

    Args:
        norm: see `Norm`. A norm layer without parameters goes with the layer before it.
    """

    eager_only: str | None = None
    cache: Cache = False
    """Whether the backbone's features are made once and kept, rather than in every epoch."""
    views: int | None = None
    """How many augmented views there are of each image; `None` for a new one in every epoch."""

    def __init__(self, norm: Norm = "keep"):
        super().__init__()
        self.norm = norm

    def standing(self, model: nn.Module) -> list[str]:
        """Names of the parameters that never train."""
        return []

    def rates(self, model: nn.Module) -> Mapping[str, float]:
        """Rate of layers, by name, as a multiple of the one that they would have; 1 for those that are not named."""
        return {}

    def reuses(self, model: nn.Module, name: str) -> bool:
        """Whether a parameter or buffer takes over what the weights have for it."""
        return True

    def attach(self, model: nn.Module, seed: int) -> None:
        for name in self.standing(model):
            model.get_parameter(name).requires_grad_(False)

    def frozen(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if self.norm == "update":
            return
        norms, stands = dict(remembering(model)), False
        for name, module in model.named_modules():
            if own := list(module.parameters(recurse=False)):
                stands = not any(p.requires_grad for p in own)
            if stands and name in norms:
                yield name, module


class Full(Finetune):
    """Everything trains; what is before the head at a smaller rate.

    Args:
        backbone_lr: rate of all layers but the head as a multiple of the base rate. Beside it `groups.layer_decay`
            makes it smaller still from layer to layer.
    """

    def __init__(self, backbone_lr: Positive = 0.1):
        super().__init__()
        self.backbone_lr = backbone_lr

    def rates(self, model: nn.Module) -> Mapping[str, float]:
        backbone, _ = parted(model)
        return {title: self.backbone_lr for title, _ in backbone}


class Features(Finetune):
    """The head alone trains, on the features of a backbone that stands still (Donahue et al. 2014).

    Where these are the same in every epoch, they need not be made in every epoch (see `cnnlab.train.feature_loader`).

    Args:
        norm: see `Finetune`.
        cache: whether the features are made once and kept in the cache, so that epochs take seconds: of an input that
            is not augmented, or has `views`. `auto` keeps them where nothing is against it, and says what is.
        views: fixed augmented views of each image, in turn from epoch to epoch; `None` draws new ones.

    Raises:
        ValueError: `cache` where the norm layers' statistics move.
    """

    def __init__(self, norm: Norm = "keep", cache: Cache = "auto", views: PositiveInt | None = None):
        super().__init__(norm)
        if cache is True and norm == "update":
            raise ValueError(
                "`finetune.cache=true`: under finetune.norm=update the statistics of norm layers move, and with them "
                "the features; type finetune.norm=keep, or finetune.cache=false"
            )
        self.cache = cache
        self.views = views

    def standing(self, model: nn.Module) -> list[str]:
        backbone, _ = parted(model)
        return [name for _, names in backbone for name in names]


class Partial(Finetune):
    """The first layers are reused, those after them begin afresh (Yosinski et al. 2014).

    Args:
        until: name of the last layer that is reused, or the beginning of it (`layer2`); those before it are, too.
        frozen: whether reused layers stand still.
        backbone_lr: rate of reused layers as a multiple of the base rate, where they train.
        norm: see `Finetune`.

    Raises:
        ValueError: no layer has this name; told when the network is known.
    """

    def __init__(self, until: str, frozen: bool = False, backbone_lr: Positive = 0.1, norm: Norm = "keep"):
        super().__init__(norm)
        self.until = until
        self.stand = frozen
        self.backbone_lr = backbone_lr

    def reused(self, model: nn.Module) -> list[tuple[str, list[str]]]:
        backbone, _ = parted(model)
        places = [place for place, (title, _) in enumerate(backbone) if _begins(title, self.until)]
        if not places:
            titles = [title for title, _ in backbone]
            raise ValueError(
                f"`finetune.until={self.until}`: expected the name of a layer before the head"
                f"{did_you_mean(self.until, titles)}; this network has {', '.join(titles)}"
            )
        return backbone[: places[-1] + 1]

    def reuses(self, model: nn.Module, name: str) -> bool:
        reused = self.reused(model)
        modules = {own.rpartition(".")[0] for _, names in reused for own in names}
        return name.rpartition(".")[0] in modules or any(_begins(name, title) for title, _ in reused)

    def standing(self, model: nn.Module) -> list[str]:
        return [name for _, names in self.reused(model) for name in names] if self.stand else []

    def rates(self, model: nn.Module) -> Mapping[str, float]:
        return {title: self.backbone_lr for title, _ in self.reused(model)}


class Gradual(Finetune):
    """The head trains first; then, from the end on, one layer more every few epochs (Howard & Ruder 2018, section 3.3).

    A layer whose turn has not come has no gradient: the optimizer neither moves nor decays it, and its moments begin
    with its turn.

    Args:
        every: epochs from one layer to the next.
        backbone_lr: rate of all layers but the head as a multiple of the base rate.
        norm: see `Finetune`.
    """

    eager_only = "finetune=gradual changes from epoch to epoch what trains"

    def __init__(self, every: PositiveInt = 1, backbone_lr: Positive = 0.1, norm: Norm = "keep"):
        super().__init__(norm)
        self.every = every
        self.backbone_lr = backbone_lr

    def rates(self, model: nn.Module) -> Mapping[str, float]:
        backbone, _ = parted(model)
        return {title: self.backbone_lr for title, _ in backbone}

    def mode(self, model: nn.Module, epoch: int) -> None:
        backbone, _ = parted(model)
        waiting = max(0, len(backbone) - epoch // self.every)
        for place, (_, names) in enumerate(backbone):
            for name in names:
                model.get_parameter(name).requires_grad_(place >= waiting)
        super().mode(model, epoch)

    def gradients(self, parameters: Sequence[nn.Parameter], step: int) -> None:
        """Processes that share a batch make zeros of what has no gradient."""
        for parameter in parameters:
            if not parameter.requires_grad:
                parameter.grad = None


def parted(model: nn.Module) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Name and parameters of each layer before the head, from the input on, and the parameters of the head.

    Raises `ValueError` for a network that names no head.
    """
    *backbone, (title, head) = named_layers(model)
    if title != HEAD or not backbone:
        raise ValueError(
            f"`finetune`: expected a network that names its head, received {type(model).__name__} without `head` or "
            "`classifier_modules`; type finetune=none"
        )
    return backbone, head


def _begins(name: str, prefix: str) -> bool:
    """Whether whole components of a name begin with those of a prefix."""
    return f"{name}.".startswith(f"{prefix.rstrip('.')}.")
