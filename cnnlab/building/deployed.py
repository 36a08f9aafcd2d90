"""A trained network with its preprocessing as one module, which can be exported: decoded images in, outputs out."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from cnnlab.building.opened import Opened
from cnnlab.data.pixels import Recipe
from cnnlab.protocols import as_outputs

_ONE = float(1 << 22)


class Resized(nn.Module):
    """Images (N, C, h, w) uint8 of any one size as the recipe has them, (N, C, H, W) uint8.

    The resize is Pillow's, as in training: bilinear with antialiasing, across and then down, with 8 bits between. As a
    product with two matrices, of which only the rows that the crop keeps are made, it is the same in every runtime, to
    the pixel.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.fit = recipe.fit
        self.target = (recipe.height, recipe.width)
        self.resize = recipe.resize

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        across, down = self._matrices(height, width)
        seen = _rounded(images.double() @ across.T)
        return _rounded(down @ seen).to(torch.uint8)

    def _matrices(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        sides = [torch.full((), side, dtype=torch.float64) for side in (width, height)]
        short, found = torch.minimum(*sides), []
        zoom = torch.minimum(self.target[1] / sides[0], self.target[0] / sides[1])
        for side, count, to in zip(sides, (width, height), reversed(self.target), strict=True):
            scaled, first = torch.full((), float(to), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
            if self.fit == "crop":
                scaled = torch.clamp(torch.floor(side * self.resize / short), min=to)
                first = torch.floor((scaled - to) / 2)
            elif self.fit == "letterbox":
                scaled = torch.clamp(torch.round(side * zoom), min=1, max=to)
                first = -torch.floor((to - scaled) / 2)
            found.append(_filter(side, count, scaled, first, to))
        return found[0], found[1]


def _filter(side: Tensor, count: int, scaled: Tensor, first: Tensor, to: int) -> Tensor:
    """(to, count) float64: the weights of a side's pixels in those from `first` on of the side at the size `scaled`; 0
    beyond it. They have 22 bits, as Pillow's, so that sums are exact."""
    own = torch.arange(to, dtype=torch.float64) + first
    step = side / scaled
    centre = (own + 0.5) * step
    place = torch.arange(count, dtype=torch.float64) + 0.5
    weights = torch.relu(1 - (place[None] - centre[:, None]).abs() / torch.clamp(step, min=1))
    inside = ((own >= 0) & (own < scaled)).to(torch.float64)[:, None]
    weights = weights / torch.clamp(weights.sum(1, keepdim=True), min=1e-12)
    return torch.floor(weights * _ONE + 0.5) / _ONE * inside


def _rounded(values: Tensor) -> Tensor:
    return torch.clamp(torch.floor(values + 0.5), 0, 255)


class Deployed(nn.Module):
    """`images` (N, C, h, w) uint8, upright, of any one size, to the outputs by the order of `names`, float32.

    It computes in float32 on the CPU, whatever the run computed in; test-time views are in it.
    """

    def __init__(self, network: Opened) -> None:
        super().__init__()
        self.resized = Resized(network.recipe)
        self.model = copy.deepcopy(network.model).cpu().float().to(memory_format=torch.contiguous_format).eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self._normalize = network.pipeline.normalize
        self._task = network.task
        self.names: tuple[str, ...] = ()
        sample = torch.zeros(1, network.spec.channels, *network.spec.size, dtype=torch.uint8)
        with torch.no_grad():
            self.names = tuple(name for name in self._outputs(sample) if name != "aux")

    def _outputs(self, images: Tensor) -> dict[str, Tensor]:
        views = self._task.views(self._normalize(self.resized(images)))
        return dict(self._task.merge([(weight, as_outputs(self.model(view))) for weight, view in views]))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self._outputs(images)
        return tuple(outputs[name].float() for name in self.names)
