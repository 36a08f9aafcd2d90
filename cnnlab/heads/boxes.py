"""Box heads: from a backbone's last map to the place of the one object in the image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnnlab.blocks import ActivationFactory, NormFactory, conv_norm
from cnnlab.protocols import Features, Head
from cnnlab.schema import PositiveInt


class BoxHead(Head):
    """The last map, narrowed to `width` channels and averaged in `cells` x `cells` parts, and two linear layers: places
    are where the layers' inputs are (Sermanet et al. 2013, "OverFeat", section 4.2).

    Args:
        stage_channels: of the backbone's stages.
        norm, activation: factories of the layers after the narrowing, and of the hidden units; `None` is batch norm,
            and ReLU.
        width: channels of the narrowed map.
        cells: parts of the map along each side; a map that has fewer places repeats them.
        hidden: units between the two linear layers.
    """

    gives = ("box",)
    needs_maps = False

    def __init__(
        self,
        stage_channels: tuple[int, ...],
        norm: NormFactory | None = None,
        activation: ActivationFactory | None = None,
        width: PositiveInt = 64,
        cells: PositiveInt = 4,
        hidden: PositiveInt = 128,
    ):
        super().__init__()
        self.cells = cells
        self.narrow = _narrow(stage_channels[-1], width, norm, activation)
        self.hidden = nn.Sequential(nn.Linear(width * cells**2, hidden), (activation or nn.ReLU)())
        self.box = nn.Linear(hidden, 4)

    def forward(self, features: Features) -> dict[str, Tensor]:
        """`box` (N, 4) float32, (x1, y1, x2, y2) as `boxes_from` gives them."""
        parts = averaged(self.narrow(features.stages[-1]), self.cells)
        return {"box": boxes_from(self.box(self.hidden(parts.flatten(1))))}


class PointsHead(Head):
    """Points that the network looks for, and two linear layers from their places: each of `points` maps is a softmax
    over the places of the last one, and its mean place a point (Levine et al. 2016, "End-to-End Training of Deep
    Visuomotor Policies", section 5.1: spatial softmax). The means of the features go with them.

    Args:
        stage_channels: of the backbone's stages.
        norm, activation: factories of the layers after the narrowing, and of the hidden units; `None` is batch norm,
            and ReLU.
        width: channels of the narrowed map.
        points: to look for.
        hidden: units between the two linear layers.
    """

    gives = ("box",)

    def __init__(
        self,
        stage_channels: tuple[int, ...],
        norm: NormFactory | None = None,
        activation: ActivationFactory | None = None,
        width: PositiveInt = 64,
        points: PositiveInt = 32,
        hidden: PositiveInt = 128,
    ):
        super().__init__()
        self.narrow = _narrow(stage_channels[-1], width, norm, activation)
        self.points = nn.Conv2d(width, points, 1)
        self.hidden = nn.Sequential(nn.Linear(2 * points + width, hidden), (activation or nn.ReLU)())
        self.box = nn.Linear(hidden, 4)

    def forward(self, features: Features) -> dict[str, Tensor]:
        """`box` (N, 4) float32, (x1, y1, x2, y2) as `boxes_from` gives them."""
        narrowed = self.narrow(features.stages[-1])
        places = mean_places(self.points(narrowed)).to(narrowed.dtype)
        seen = torch.cat([places.flatten(1), narrowed.mean((2, 3))], 1)
        return {"box": boxes_from(self.box(self.hidden(seen)))}


def _narrow(channels: int, width: int, norm: NormFactory | None, activation: ActivationFactory | None) -> nn.Sequential:
    conv, normalizer = conv_norm(norm or nn.BatchNorm2d, channels, width, 1)
    return nn.Sequential(conv, normalizer, (activation or nn.ReLU)())


def averaged(x: Tensor, cells: int) -> Tensor:
    """(N, C, H, W) -> (N, C, cells, cells), means of parts.

    `adaptive_avg_pool2d`, but without its refusal of gradients under `trainer.deterministic` on a GPU.
    """
    for axis in (2, 3):
        length = x.shape[axis]
        bounds = [(part * length // cells, -(-(part + 1) * length // cells)) for part in range(cells)]
        x = torch.cat([x.narrow(axis, low, high - low).mean(axis, keepdim=True) for low, high in bounds], axis)
    return x


def mean_places(maps: Tensor) -> Tensor:
    """(N, K, H, W) -> (N, K, 2) float32: x and y in (0, 1) of width and height, the mean under each map's softmax."""
    height, width = maps.shape[-2:]
    share = maps.float().flatten(2).softmax(2).view(maps.shape)
    x = (torch.arange(width, device=maps.device) + 0.5) / width
    y = (torch.arange(height, device=maps.device) + 0.5) / height
    return torch.stack([(share.sum(2) * x).sum(2), (share.sum(3) * y).sum(2)], 2)


def boxes_from(z: Tensor) -> Tensor:
    """(N, 4) of any values -> boxes (N, 4) float32, (x1, y1, x2, y2), from centre and sides in parts of the image, as
    in DETR (Carion et al. 2020, section 3.2). A box may reach over the image's edge by half of it.

    They come into [0, 1] by (1 + z/(2 + |z|))/2, which has the sigmoid's slope at 0: of its tails, nothing came back
    that a large first update of Adam had thrown there.
    """
    x, y, width, height = (0.5 + 0.5 * functional.softsign(z.float() / 2)).unbind(1)
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 1)
