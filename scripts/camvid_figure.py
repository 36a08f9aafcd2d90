"""Segmentation of CamVid: the ways to enlarge a map side by side, and by hand, in as many updates of as many images.

    scripts/camvid_figure.py CAMVID WORK [--epochs 6] [--seeds 3] [--size 90 120] [--only bilinear,nearest]
    scripts/camvid_figure.py CAMVID WORK --draw PNG     the table and the picture of what there is

CAMVID holds images and masks by split, and classes.txt. Runs of `experiment=camvid_cpu` (a narrow VGG), seed by seed,
so that part of them says something; `strided` and `dilated` are a narrow ResNet-18 whose last stages halve the map, or
dilate. By hand (`scripts/segmentation_by_hand.py`, seed 0): a plain FCN, torchvision's LR-ASPP. What is in WORK is not
done again, and a run that was cut goes on. Shown: mean IoU and pixel accuracy on val with the last weights.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

RESNET = ("model=resnet18", "model.width=16", "head=bilinear", "head.skips=false")
WAYS: dict[str, tuple[str, ...]] = {
    "bilinear": ("head=bilinear",),
    "nearest": ("head=nearest",),
    "transposed": ("head=transposed",),
    "unet": ("head=unet",),
    "unpool": ("head=unpool",),
    "strided": RESNET,
    "dilated": (*RESNET, "model.output_stride=8"),
}
HANDS = ("fcn", "lraspp")
BATCH, TRAINING_IMAGES = 12, 367
Found = dict[str, dict[int, tuple[float, float]]]
"""(mean IoU, pixel accuracy) by way and seed."""


def train(way: str, seed: int, root: Path, work: Path, epochs: int, size: list[int]) -> None:
    run = work / f"{way}-{seed}"
    record = run / "run.json"
    if record.exists() and json.loads(record.read_text()).get("status") == "completed":
        return
    anew = [
        "experiment=camvid_cpu", f"data.root={root}", f"data.size=[{size[0]},{size[1]}]", f"seed={seed}",
        f"trainer.epochs={epochs}", f"trainer.batch_size={BATCH}", f"trainer.eval_every={epochs}", "stats=off",
        "trainer.threads=1", "trainer.step=eager", *WAYS[way], f"hydra.run.dir={run}",
    ]  # fmt: skip
    resumes = (run / "checkpoints" / "last.pt").exists()
    told = [f"resume={run}"] if resumes else anew
    subprocess.run([sys.executable, "-m", "cnnlab", "train", "trainer.progress=false", *told], check=True)


def by_hand(name: str, root: Path, work: Path, epochs: int, size: list[int]) -> None:
    answer = work / f"by-hand-{name}.txt"
    if answer.exists():
        return
    script = Path(__file__).with_name("segmentation_by_hand.py")
    steps = epochs * -(-TRAINING_IMAGES // BATCH)
    told = [name, "--root", str(root), "--steps", str(steps), "--batch", str(BATCH), "--size", *map(str, size)]
    done = subprocess.run([sys.executable, str(script), *told], check=True, capture_output=True, text=True)
    answer.write_text(done.stdout)


def found(work: Path) -> Found:
    figures: Found = {}
    for way in WAYS:
        for run in sorted(work.glob(f"{way}-*")):
            if json.loads((run / "run.json").read_text()).get("status") != "completed":
                continue
            records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            last = [record for record in records if record["split"] == "val"][-1]
            figures.setdefault(way, {})[int(run.name.rpartition("-")[2])] = (last["mean_iou"], last["pixel_accuracy"])
    for name in HANDS:
        answer = work / f"by-hand-{name}.txt"
        text = answer.read_text() if answer.exists() else ""
        if match := re.search(r"val: mean_iou ([\d.]+)\s+pixel_accuracy ([\d.]+)", text):
            figures[f"by hand: {name}"] = {0: (float(match[1]), float(match[2]))}
    return figures


def table(figures: Found) -> str:
    lines = ["| | mean IoU by seed | mean | pixel accuracy, mean |", "|---|---|---|---|"]
    for way, seeds in figures.items():
        ious, accuracies = zip(*(seeds[seed] for seed in sorted(seeds)))
        each = " ".join(f"{iou:.3f}"[1:] for iou in ious)
        lines.append(f"| `{way}` | {each} | {statistics.mean(ious):.3f} | {statistics.mean(accuracies):.3f} |")
    return "\n".join(lines)


def draw(figures: Found, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 0.4 + 0.4 * len(figures)), layout="constrained")
    axes = figure.add_subplot()
    for place, seeds in enumerate(reversed(figures.values())):
        ious = [iou for iou, _ in seeds.values()]
        axes.barh(place, statistics.mean(ious), height=0.6, color="0.8")
        axes.plot(ious, [place] * len(ious), "o", color="0.2", markersize=4)
    axes.set_yticks(range(len(figures)), list(reversed(figures)))
    axes.set_xlabel("mean IoU on val, CamVid (dots: seeds)")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("camvid", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--epochs", type=int, default=6, help="31 updates of 12 images each")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, nargs=2, default=[90, 120])
    parser.add_argument("--only", default=",".join((*WAYS, *HANDS)))
    parser.add_argument("--draw", type=Path, help="draws what there is, and runs nothing")
    told = parser.parse_args()
    wanted = told.only.split(",")
    if told.draw is None:
        told.work.mkdir(parents=True, exist_ok=True)
        for seed in range(told.seeds):
            for way in (way for way in WAYS if way in wanted):
                train(way, seed, told.camvid, told.work, told.epochs, told.size)
                print(table(found(told.work)), flush=True)
            for name in (name for name in HANDS if name in wanted and seed == 0):
                by_hand(name, told.camvid, told.work, told.epochs, told.size)
    else:
        draw(found(told.work), told.draw)
    print(table(found(told.work)))


if __name__ == "__main__":
    main()
