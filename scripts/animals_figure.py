"""Animals with boxes: a recipe chosen on val, and what it reaches on test, beside one box for every image.

    scripts/animals_figure.py ANIMALS WORK [--seeds 3]

ANIMALS holds JPEGImages, Annotations and ImageSets/Main (Pascal VOC). Each recipe runs with each seed, seed by seed;
what is in WORK is not done again, and a run that was cut goes on. The recipe with the highest mean IoU on val, its mean
over the seeds, is chosen; only of this one is test shown. The constant box is the mean of the training boxes, its class
the most frequent one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

RECIPES: dict[str, tuple[str, ...]] = {
    "animals_cpu": (),
    "one convolution a block": ("model.depth=1",),
    "head=box": ("head=box",),
    "box losses of weight 1": ("task.smooth_l1=1", "task.giou=1"),
}
SHOWN = ("accuracy", "mean_iou", "accuracy_at_iou_50")


def train(told: tuple[str, ...], seed: int, root: Path, run: Path) -> dict[str, Any]:
    """The record of the run, made or gone on with."""
    record = run / "run.json"
    if not (record.exists() and json.loads(record.read_text()).get("status") == "completed"):
        anew = [
            "experiment=animals_cpu", f"data.root={root}", f"seed={seed}", "stats=off", "trainer.threads=1",
            "trainer.step=eager", *told,
            f"hydra.run.dir={run}",
        ]  # fmt: skip
        again = [f"resume={run}"] if (run / "checkpoints" / "last.pt").exists() else anew
        subprocess.run([sys.executable, "-m", "cnnlab", "train", "trainer.progress=false", *again], check=True)
    return json.loads(record.read_text())


def chosen_on_val(run: Path) -> dict[str, float]:
    """The figures on val of the epoch that val chose."""
    best = json.loads((run / "run.json").read_text())["best"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(r for r in records if r["split"] == "val" and r["epoch"] == best["epoch"])


def constant(root: Path) -> dict[str, float]:
    """What one box and one class for every image reach on test."""
    import cnnlab
    from cnnlab.tasks.boxes import iou

    run = cnnlab.build(
        cnnlab.compose(["experiment=animals_cpu", f"data.root={root}", "stats=off", "trainer.step=eager"])
    )
    train, test = (
        loader.split.fetch(torch.arange(len(loader.split))) for loader in (run.loaders["train"], run.loaders["test"])
    )
    overlap = iou(train["box"].mean(0, keepdim=True).expand(len(test["box"]), 4), test["box"])
    right = test["label"] == torch.bincount(train["label"]).argmax()
    figures = (right.float().mean(), overlap.mean(), ((overlap >= 0.5) & right).float().mean())
    return dict(zip(SHOWN, (figure.item() for figure in figures), strict=True))


def row(name: str, figures: list[dict[str, float]], prefix: str = "") -> str:
    cells = []
    for metric in SHOWN:
        values = [found[f"{prefix}{metric}"] for found in figures]
        each = " ".join(f"{value:.3f}" for value in values)
        cells.append(f"{each}, mean {statistics.mean(values):.3f}" if len(values) > 1 else each)
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("animals", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    told = parser.parse_args()
    told.work.mkdir(parents=True, exist_ok=True)
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in RECIPES}
    on_val: dict[str, list[dict[str, float]]] = {name: [] for name in RECIPES}
    for seed in range(told.seeds):
        for place, (name, overrides) in enumerate(RECIPES.items()):
            run = told.work / f"recipe-{place}-seed-{seed}"
            records[name].append(train(overrides, seed, told.animals, run))
            on_val[name].append(chosen_on_val(run))
            print(row(f"val: {name}", on_val[name]), flush=True)
    best = max(RECIPES, key=lambda name: statistics.mean(found["mean_iou"] for found in on_val[name]))
    print("\n| | accuracy | mean IoU | accuracy at IoU .5 |\n|---|---|---|---|")
    for name in RECIPES:
        print(row(f"val: {name}", on_val[name]))
    print(row(f"test: {best}", [record["metrics"] for record in records[best]], "test/"))
    print(row("test: one box", [constant(told.animals)]))


if __name__ == "__main__":
    main()
