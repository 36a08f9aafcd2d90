"""Localization beside a hand-written loop of the same network: what the lab's loop costs.

    scripts/localization_by_hand.py [--head box] [--rounds 15] [--updates 6]

A CNN with a box head on shapes of 32x32, cross entropy, smooth L1 and GIoU (torchvision's), Adam; images/s in turn by
the lab's loop and by hand, and their ratio. By hand there are neither measures nor records. The networks are the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from in_turn import in_turn, rows
from torch.nn import functional
from torchvision.ops import generalized_box_iou_loss

SAMPLES, BATCH, BETA = 960, 64, 0.1


def by_hand(run: Any) -> Callable[[], None]:
    model = run.model.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    data = run.loaders["train"].split.fetch(torch.arange(SAMPLES))
    mean = data["image"].float().mean((0, 2, 3), keepdim=True) / 255
    order = rows(SAMPLES, BATCH)
    half = run.precision.value == "bf16"

    def update() -> None:
        index = next(order)
        x = (data["image"][index].float() / 255 - mean).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs = model(x)
        logits, box, target = outputs["logits"].float(), outputs["box"].float(), data["box"][index]
        loss = (
            functional.cross_entropy(logits, data["label"][index])
            + functional.smooth_l1_loss(box, target, beta=BETA)
            + generalized_box_iou_loss(box, target, reduction="mean")
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return update


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", default="box", choices=("box", "box_points"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--updates", type=int, default=6, help="in each turn")
    chosen = parser.parse_args()
    told = [
        "data=shapes", "data.size=32", f"data.train={SAMPLES}", "data.val=8", "data.test=8", "data.limit=null",
        "task=localization", "model=cnn", "model.depth=2", "norm=batch", f"head={chosen.head}", "optim=adam",
        f"trainer.batch_size={BATCH}", "trainer.step=eager", "trainer.layout=channels_last",
    ]  # fmt: skip
    in_turn(told, by_hand, rounds=chosen.rounds, updates=chosen.updates, title=f"localization, head={chosen.head}")
