"""The initializations that papers state for their own networks, and a network's own choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cnnlab.composing.make import make
from cnnlab.init.base import Initializer, Layer, layers
from cnnlab.init.schemes import Default, He, Normal, draw
from cnnlab.schema import Positive


class PaperAlexNet(Normal):
    """N(0, std²); biases `bias` in convolutions 2, 4 and 5 and in the hidden linear layers, elsewhere 0
    (Krizhevsky, Sutskever, Hinton 2012, section 5).

    The ones keep those ReLUs awake in the first updates, when weights of 0.01 give almost no signal. Layers
    are counted in the order of their registration; the last linear layer is the output.
    """

    def __init__(self, std: Positive = 0.01, bias: float = 1.0, *, zero_residual: bool = False):
        super().__init__(std, zero_residual=zero_residual)
        self.bias_value = bias

    @torch.no_grad()
    def __call__(self, model: nn.Module, seed: int) -> None:
        super().__call__(model, seed)
        for bias in self._biases(model):
            bias.fill_(self.bias_value)

    def notices(self, model: nn.Module) -> list[str]:
        if self._biases(model):
            return []
        return [
            f"init: `init.bias={self.bias_value:g}` has no effect, as {type(model).__name__} has no bias in "
            "convolutions 2, 4 and 5 and in hidden linear layers (a norm layer has its own)"
        ]

    def _biases(self, model: nn.Module) -> list[Tensor]:
        found = [layer for _, layer in layers(model)]
        linear: list[Layer] = [layer for layer in found if isinstance(layer, nn.Linear)]
        convolutions: list[Layer] = [layer for layer in found if not isinstance(layer, nn.Linear)]
        own = [*convolutions[1:2], *convolutions[3:5], *linear[:-1]]
        return [layer.bias for layer in own if layer.bias is not None]


class PaperVgg(Normal):
    """N(0, std²), biases 0, with which net A was trained; its layers then started the deeper nets
    (Simonyan & Zisserman 2014, section 3.1).

    The paper writes "zero mean and 10⁻² variance"; the authors' released solver has a *standard deviation* of
    0.01, and so has this. `std=0.1` is the paper to the letter.
    """

    def __init__(self, std: Positive = 0.01, *, zero_residual: bool = False):
        super().__init__(std, zero_residual=zero_residual)


class PaperSpeedNet(Default):
    """PyTorch's default, whose first filters of each 3x3 convolution pass one input channel on each; a linear layer
    of standard deviation 1; biases 0 (Jordan 2024, arXiv 2404.00498, section 3.1, and its released code).

    A convolution with more filters than input channels so keeps its input and adds to it; as many as there are
    input channels are identities.
    """

    def weight(self, layer: Layer, rng: torch.Generator) -> Tensor:
        if isinstance(layer, nn.Linear):
            return draw(layer.weight.shape, 1.0, "uniform", rng)
        weight = super().weight(layer, rng)
        count = min(layer.weight.shape[:2])
        weight[:count] = 0
        centre = weight[:count]
        for size in weight.shape[2:]:
            centre = centre.select(2, size // 2)
        centre.fill_diagonal_(1)
        return weight

    def bias(self, layer: Layer, rng: torch.Generator) -> Tensor:
        return Initializer.bias(self, layer, rng)


class Own(Initializer):
    """What a network's authors used: the model's `own_init`, a node with `_target_` (an `Initializer`) and its
    arguments; `He(mode="fan_out")` where a model states none.

    Args:
        zero_residual: overrides the model's own choice; `None` leaves it.
    """

    def __init__(self, *, zero_residual: bool | None = None):
        super().__init__(zero_residual=bool(zero_residual))
        self.override = zero_residual

    def resolve(self, model: nn.Module) -> Initializer:
        """The initialization that `model` asks for."""
        stated: dict[str, Any] = dict(getattr(model, "own_init", None) or {"_target_": "cnnlab.init.He"})
        if self.override is not None:
            stated["zero_residual"] = self.override
        init: Initializer = make(stated)
        if init.needs_batch:
            name = type(init).__name__
            raise ValueError(f"expected an initialization without data as own_init, received {name}; type init=lsuv")
        return init

    def validate(self, model: nn.Module) -> None:
        self.resolve(model).validate(model)

    def notices(self, model: nn.Module) -> list[str]:
        return self.resolve(model).notices(model)

    def __call__(self, model: nn.Module, seed: int) -> None:
        self.resolve(model)(model, seed)

    def weight(self, layer: Layer, rng: torch.Generator) -> Tensor:
        # Never asked: the call goes to the model's own initialization as a whole.
        return He().weight(layer, rng)
