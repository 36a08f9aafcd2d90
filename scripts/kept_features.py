"""A head-only epoch with the backbone's features kept (`finetune.cache`) against one in which the backbone runs.

    scripts/kept_features.py [--model resnet18] [--size 64] [--images 1024] [--rounds 5]

Epochs of two runs in turn, on shapes, by the lab's own loop, without statistics; each with its evaluation on a quarter
as many images of val, and without. Features are made before the first timed epoch; how long that takes is told, too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch


def seconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def main(model: str, size: int, images: int, rounds: int, batch: int) -> None:
    import cnnlab
    from cnnlab.train.loop import evaluate, train_epoch

    told = [
        "data=shapes", f"data.size={size}", f"data.train={images}", f"data.val={images // 4}", "data.test=8",
        "data.limit=null", f"model={model}", f"trainer.batch_size={batch}", "trainer.step=eager", "stats=off",
        "trainer.epochs=100000", "schedule=constant", "optim.lr=0.001", "finetune=features",
    ]  # fmt: skip
    runs = {kept: cnnlab.build(cnnlab.compose([*told, f"finetune.cache={kept}"])) for kept in ("false", "true")}

    def epoch(run: Any) -> None:
        train_epoch(run)
        run.clock.close(run.steps_per_epoch)

    def both(run: Any) -> tuple[float, float]:
        return seconds(lambda: epoch(run)), seconds(lambda: evaluate(run, "val"))

    made = sum(both(runs["true"]))
    both(runs["false"])
    print(f"{runs['true'].loaders['train'].route()}; the epoch that makes them: {made:.2f} s")
    alone, whole = [], []
    for _ in range(rounds):
        (run_train, run_val), (kept_train, kept_val) = both(runs["false"]), both(runs["true"])
        alone.append(run_train / kept_train)
        whole.append((run_train + run_val) / (kept_train + kept_val))
        print(f"backbone runs {run_train:.2f} + {run_val:.2f} s, kept {kept_train:.3f} + {kept_val:.3f} s", flush=True)
    same = all(
        torch.equal(one, other)
        for one, other in zip(runs["true"].model.parameters(), runs["false"].model.parameters(), strict=True)
    )
    print(
        f"{model}, {images} images of {size}x{size}, batch {batch}: weights {'equal' if same else 'DIFFER'} bit for bit"
    )
    for what, ratios in (("an epoch", alone), ("with its evaluation", whole)):
        print(f"{what}: {statistics.median(ratios):.1f} times as fast ({min(ratios):.1f} to {max(ratios):.1f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["CNNLAB_CACHE"] = cache
        main(chosen.model, chosen.size, chosen.images, chosen.rounds, chosen.batch)
