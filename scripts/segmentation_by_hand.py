"""Segmentation beside a hand-written loop: what the lab's loop costs, and what other networks reach in as many steps.

    scripts/segmentation_by_hand.py speed --head HEAD       images/s of a narrow VGG with that head, in turn by the
                                                            lab's loop and by hand, and their ratio
    scripts/segmentation_by_hand.py lraspp --root CAMVID    torchvision's LR-ASPP (MobileNetV3, from scratch) by hand
    scripts/segmentation_by_hand.py fcn --root CAMVID       strided convolutions and two classifiers by hand

By hand: Adam, one-cycle, cross entropy without void, flips; fp32 or bf16 as the lab chooses.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from in_turn import in_turn, rows
from torch import Tensor, nn
from torch.nn import functional

VOID = 255


class Fcn(nn.Module):
    """Long et al. 2015 in small: strided convolutions, two classifiers (of 1/8 and 1/4), bilinear upsampling."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = (3, 32, 64, 128)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
                nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            )
            for before, after in pairwise(widths)
        )  # fmt: skip
        self.scores = nn.ModuleList(nn.Conv2d(width, classes, 1) for width in widths[2:])

    def forward(self, x: Tensor) -> Tensor:
        size, maps = x.shape[-2:], []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        score = functional.interpolate(self.scores[1](maps[2]), size=maps[1].shape[-2:], mode="bilinear")
        return functional.interpolate(score + self.scores[0](maps[1]), size=size, mode="bilinear")


def lraspp(classes: int) -> nn.Module:
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x)["out"]

    return Logits()


def learn(make: Callable[[int], nn.Module], root: str, steps: int, batch: int, size: tuple[int, int]) -> None:
    from cnnlab.data.masks import MaskFolder

    torch.manual_seed(0)
    data = MaskFolder(root, size=size)
    splits, classes = data.load(), len(data.spec().mask_classes)
    train = splits["train"].fetch(torch.arange(len(splits["train"])))
    images = train["image"].float() / 255
    mean, std = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    model = make(classes).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    began, order = time.perf_counter(), rows(len(images), batch)
    model.train()
    for _ in range(steps):
        index = next(order)
        x, y = (images[index] - mean) / std, train["mask"][index]
        if torch.rand(()) < 0.5:
            x, y = x.flip(-1), y.flip(-1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad()
        functional.cross_entropy(logits.float(), y, ignore_index=VOID).backward()
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - began
    model.eval()
    for name in ("val", "test"):
        held = splits[name].fetch(torch.arange(len(splits[name])))
        counts = torch.zeros(classes, classes)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for x, y in zip(held["image"].split(batch), held["mask"].split(batch), strict=True):
                guess = model(((x.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)).argmax(1)
                known = y != VOID
                counts += torch.bincount(y[known] * classes + guess[known], minlength=classes**2).view(classes, classes)
        union = counts.sum(0) + counts.sum(1) - counts.diag()
        iou = (counts.diag() / union)[union > 0].mean()
        print(f"{name}: mean_iou {iou:.4f}  pixel_accuracy {counts.diag().sum() / counts.sum():.4f}")
    print(f"{steps} steps of {batch}, {seconds:.0f} s")


def speed(rounds: int, steps: int, head: str) -> None:
    """Whole updates on shapes of 90x90, alternately; each on its own copy of the same network."""
    told = [
        "data=shapes", "data.size=90", "data.train=96", "data.val=8", "data.test=8", "data.limit=null",
        "task=segmentation", "model=vgg", "model.width=0.25", "norm=batch", f"head={head}", "optim=adam",
        "trainer.batch_size=12", "trainer.step=eager",
    ]  # fmt: skip

    def by_hand(run: Any) -> Callable[[], None]:
        model = run.model.train()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
        data = run.loaders["train"].split.fetch(torch.arange(96))
        mean = data["image"].float().mean((0, 2, 3), keepdim=True) / 255
        order = rows(96, 12)

        def update() -> None:
            index = next(order)
            x = (data["image"][index].float() / 255 - mean).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=run.precision.value == "bf16"):
                logits = model(x)["mask"]
            optimizer.zero_grad()
            functional.cross_entropy(logits.float(), data["mask"][index], ignore_index=VOID).backward()
            optimizer.step()

        return update

    in_turn(told, by_hand, rounds=rounds, updates=steps, title=f"segmentation, head={head}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "lraspp", "fcn"))
    parser.add_argument("--root")
    parser.add_argument("--steps", type=int, default=186)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--size", type=int, nargs=2, default=(90, 120))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--updates", type=int, default=6, help="in each turn")
    parser.add_argument("--head", default="bilinear")
    told = parser.parse_args()
    if told.what == "speed":
        speed(told.rounds, told.updates, told.head)
    else:
        learn(lraspp if told.what == "lraspp" else Fcn, told.root, told.steps, told.batch, tuple(told.size))
