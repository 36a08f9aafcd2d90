"""Semantic segmentation: one class a pixel, decoded from a backbone's features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnnlab.protocols import VOID, Batch, ConvNet, DataSpec, Features, Loss, Outputs
from cnnlab.tasks.metrics import by_class, confusion, picture_grid

Upsample = Literal["auto", "unpool", "nearest"]


class Segmentation:
    """Minimizes the mean over each image's pixels of `loss(logits, mask)`.

    Raises `ValueError` for a backbone that hands on no pooling indices when they are asked for.
    """

    needs: tuple[str, ...] = ("mask",)
    monitor: tuple[str, Literal["max", "min"]] = ("mean_iou", "max")

    def __init__(self, loss: Loss, spec: DataSpec, upsample: Upsample = "auto"):
        self.criterion = loss
        self.spec = spec
        self.upsample = upsample
        self.num_classes = len(spec.mask_classes)

    def head(self, model: nn.Module) -> nn.Module:
        if not isinstance(model, ConvNet):
            raise ValueError(
                f"expected a network with feature stages (a cnnlab.protocols.ConvNet), received "
                f"{type(model).__name__}; type model=vgg or model=resnet"
            )
        if not model.spatial:
            raise ValueError(
                f"expected a network with feature maps, of which a decoder can make a mask, received "
                f"{type(model).__name__}, whose layers have no places left; type model=cnn, vgg or resnet"
            )
        indexed = bool(model.pool_channels)
        if self.upsample == "unpool" and not indexed:
            raise ValueError(
                f"task.upsample=unpool: {type(model).__name__} hands on no max-pooling indices; type model=vgg, "
                "or task.upsample=nearest"
            )
        if indexed and self.upsample != "nearest":
            return UnpoolDecoder(model.stage_channels[-1], model.pool_channels, self.num_classes)
        return NearestDecoder(model.stage_channels, self.num_classes, self.spec.size)

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.criterion(outputs["logits"], batch["mask"])}

    def measure(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"confusion": confusion(outputs["logits"].argmax(1), batch["mask"], self.num_classes)}

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`pixel_accuracy`, and `mean_iou` over the classes that occur in target or prediction."""
        counts = sums["confusion"].double()
        correct = counts.diagonal()
        union = counts.sum(0) + counts.sum(1) - correct
        present = union > 0
        return {
            "pixel_accuracy": (correct.sum() / counts.sum()).item(),
            "mean_iou": (correct[present] / union[present]).mean().item(),
        }

    def by_class(self, sums: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        return by_class(sums["confusion"], self.spec.mask_classes)

    def pictures(self, batch: Batch, outputs: Outputs | None) -> dict[str, Tensor]:
        shown = {"inputs": picture_grid(batch["image"]), "masks": picture_grid(self._coloured(batch["mask"]))}
        if outputs is not None:
            shown["predictions"] = picture_grid(self._coloured(outputs["logits"].argmax(1)))
        return shown

    def _coloured(self, mask: Tensor) -> Tensor:
        """Class indices (N, H, W) as colours (N, 3, H, W): hues around the circle, void black."""
        hues = torch.linspace(0, 2 * torch.pi, self.num_classes + 1, device=mask.device)[:-1]
        shift = torch.arange(3, device=mask.device) * (2 * torch.pi / 3)
        palette = 0.55 + 0.45 * torch.cos(hues[:, None] - shift)
        palette = torch.cat([palette, torch.zeros(1, 3, device=mask.device)])
        row = torch.where(mask == VOID, torch.full_like(mask, self.num_classes), mask)
        return palette[row].permute(0, 3, 1, 2)


def _refine(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


class UnpoolDecoder(nn.Module):
    """Undoes the backbone's max-poolings, last one first, with its indices (Badrinarayanan et al. 2015, SegNet).

    Each value returns to the place of its maximum, a convolution fills in what lies between.

    Args:
        channels: of the backbone's last map, (N, channels, H, W) of the size that the last pooling left.
        pool_channels: of the map before each pooling, in the backbone's order.
        num_classes: of the mask.
    """

    def __init__(self, channels: int, pool_channels: tuple[int, ...], num_classes: int):
        super().__init__()
        last = pool_channels[-1]
        self.bottleneck = nn.Identity() if channels == last else _refine(channels, last)
        following = (*pool_channels[:-1][::-1], pool_channels[0])
        self.blocks = nn.ModuleList(
            _refine(c, following_c) for c, following_c in zip(pool_channels[::-1], following, strict=True)
        )
        self.classifier = nn.Conv2d(pool_channels[0], num_classes, 1)

    def forward(self, features: Features) -> dict[str, Tensor]:
        x = self.bottleneck(features.stages[-1])
        for block, indices, size in zip(self.blocks, features.indices[::-1], features.sizes[::-1], strict=True):
            x = block(_unpool(x, indices, size))
        return {"logits": self.classifier(x)}


def _unpool(x: Tensor, indices: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, h, w) -> (N, C, *size), zeros but where `indices` point.

    `max_unpool2d`, but without its refusal under `trainer.deterministic`: windows that do not overlap have no
    index twice.
    """
    empty = x.new_zeros(*x.shape[:2], size[0] * size[1])
    return empty.scatter(2, indices.flatten(2), x.flatten(2)).unflatten(2, size)


class NearestDecoder(nn.Module):
    """Repeats values up to each earlier stage's size, with a convolution after each step and a sum with the
    stage's own map (the top-down path of Lin et al. 2017, Feature Pyramid Networks)."""

    def __init__(self, stage_channels: tuple[int, ...], num_classes: int, size: tuple[int, int], width: int = 64):
        super().__init__()
        self.size = size
        self.laterals = nn.ModuleList(nn.Conv2d(c, width, 1) for c in stage_channels)
        self.blocks = nn.ModuleList(_refine(width, width) for _ in stage_channels)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: Features) -> dict[str, Tensor]:
        maps = [lateral(stage) for lateral, stage in zip(self.laterals, features.stages, strict=True)]
        x = self.blocks[-1](maps[-1])
        for block, lateral in zip(list(self.blocks)[-2::-1], maps[-2::-1], strict=True):
            x = block(functional.interpolate(x, size=lateral.shape[-2:], mode="nearest") + lateral)
        return {"logits": functional.interpolate(self.classifier(x), size=self.size, mode="nearest")}
