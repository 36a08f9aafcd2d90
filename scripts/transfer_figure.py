"""Does a network that was trained before help where photos are few? Eight classes of CIFAR-10, then the other two.

    scripts/transfer_figure.py CIFAR10 WORK             all of it, in portions: what is in WORK is not done again
    scripts/transfer_figure.py CIFAR10 WORK --draw PNG  the table and the picture of what there is

CIFAR10 holds {train,test}/<class>/<image>. Three convolutions (24,000 parameters) learn all classes but cat and dog.
Then 20, 50, 100 and 500 images of each of these two are told apart: by such a network from scratch, by the frozen
features (`features`), by all of it at a tenth of the rate (`full`), by layers that join one after the other
(`gradual`), and with the last convolution begun afresh (`partial`). Each way takes as many updates (200, or 15 epochs
if that is more), and the last weights: no validation images decide.

The rate of each way is chosen on val (1,000 images), by one run a rate that is not among the reported ones, for 100
images. Reported: test accuracy (2,000 images), the mean over seeds, each with other training images and another head,
and its 95 % interval (Student's t). The pretrained network is always the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TWO = ("cat", "dog")
SIZES = (20, 50, 100, 500)
WAYS: dict[str, tuple[str, ...]] = {
    "scratch": (),
    "features": ("finetune=features",),
    "full": ("finetune=full",),
    "gradual": ("finetune=gradual", "finetune.every={every}"),
    "partial": ("finetune=partial", "finetune.until=blocks.1"),
}
RATES = (0.001, 0.003, 0.01)
DECIDING_SEED, DECIDING_IMAGES = 100, 100
UPDATES, EPOCHS, BATCH = 200, 15, 32
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t of 95 %, by the number of runs."""
COMMON = (
    "data=folder",
    "data.size=32",
    "data.stored=input",
    "data.workers=0",
    "model=cnn",
    "model.widths=[16,32,64]",
    "norm=batch",
    "optim=adam",
    "augment=[crop,flip]",
    "augment.crop.padding=4",
    "trainer.threads=1",
    "trainer.step=eager",
    "stats=off",
)
PRETRAINING = ("optim.lr=0.01", "schedule=one_cycle", "trainer.epochs={epochs}", "trainer.batch_size=250")


def linked(source: Path, work: Path) -> tuple[Path, Path]:
    """Folders of links: the eight classes, and the two."""
    for split in ("train", "test"):
        for folder in sorted((source / split).iterdir()):
            link = work / ("two" if folder.name in TWO else "eight") / split / folder.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(folder.resolve(), target_is_directory=True)
    return work / "eight", work / "two"


def pretrained(eight: Path, work: Path, epochs: int) -> Path:
    """The run of the eight classes, made or gone on with."""
    run = work / "pretrained"
    record = json.loads((run / "run.json").read_text()) if (run / "run.json").exists() else {}
    if record.get("status") == "completed":
        return run
    told = [text.format(epochs=epochs) for text in PRETRAINING]
    anew = [*COMMON, f"data.root={eight}", "data.val=0.02", *told, f"hydra.run.dir={run}"]
    resumes = (run / "checkpoints" / "last.pt").exists()
    subprocess.run([sys.executable, "-m", "cnnlab", "train", *([f"resume={run}"] if resumes else anew)], check=True)
    return run


def one(way: str, images: int, seed: int, rate: float, two: Path, run: Path) -> dict[str, Any]:
    """A fine-tuning; its figures."""
    import cnnlab

    batch = min(BATCH, 2 * images)
    epochs = max(EPOCHS, -(-UPDATES // -(-2 * images // batch)))
    told = [text.format(every=max(1, epochs // 8)) for text in WAYS[way]]
    start = [] if way == "scratch" else ["weights=run", f"weights.run={run}", "weights.checkpoint=last"]
    experiment = cnnlab.compose(
        [
            *COMMON, f"data.root={two}", f"data.limit={2 * images}", f"data.split_seed={seed}", f"seed={seed}",
            f"optim.lr={rate}", f"trainer.batch_size={batch}", f"trainer.epochs={epochs}",
            f"trainer.eval_every={epochs}", "trainer.checkpoint=false", *start, *told,
        ]
    )  # fmt: skip
    began = time.perf_counter()
    trained = cnnlab.build(experiment)
    figures = cnnlab.fit(trained)
    seconds = time.perf_counter() - began
    return {
        "way": way, "images": images, "seed": seed, "rate": rate, "updates": trained.clock.step,
        "val": trained.selection.as_record()["value"], "test": figures["test/accuracy"], "seconds": round(seconds, 1),
    }  # fmt: skip


def known(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def best_rate(found: list[dict[str, Any]], way: str) -> float:
    """Of those that were tried on val."""
    tried = [r for r in found if (r["way"], r["seed"]) == (way, DECIDING_SEED)]
    return float(max(tried, key=lambda record: record["val"])["rate"])


def missing(found: list[dict[str, Any]], seeds: int) -> Iterator[tuple[str, int, int, float]]:
    """What is left to do, in its order: the rates first, then seed by seed."""
    done = {(r["way"], r["images"], r["seed"], r["rate"]) for r in found}
    deciding = [(way, DECIDING_IMAGES, DECIDING_SEED, rate) for way in WAYS for rate in RATES]
    open_ones = [cell for cell in deciding if cell not in done]
    if open_ones:
        yield from open_ones
        return
    for seed in range(seeds):
        for way in WAYS:
            for images in SIZES:
                cell = (way, images, seed, best_rate(found, way))
                if cell not in done:
                    yield cell


def means(found: list[dict[str, Any]]) -> dict[tuple[str, int], tuple[float, float, int]]:
    """Mean, half of its 95 % interval, and number of runs."""
    cells: dict[tuple[str, int], list[float]] = {}
    for record in found:
        if record["seed"] != DECIDING_SEED:
            cells.setdefault((record["way"], record["images"]), []).append(record["test"])
    return {
        cell: (
            statistics.mean(values),
            T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) in T95 else float("nan"),
            len(values),
        )
        for cell, values in cells.items()
    }


def table(found: list[dict[str, Any]]) -> str:
    figures = means(found)
    lines = ["| images a class | " + " | ".join(WAYS) + " |", "|---|" + "---|" * len(WAYS)]
    for images in SIZES:
        cells = [figures.get((way, images)) for way in WAYS]
        shown = ["" if c is None else f"{c[0]:.3f} ± {c[1]:.3f}".replace("0.", ".") for c in cells]
        lines.append(f"| {images} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def draw(found: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figures = means(found)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for place, way in enumerate(WAYS):
        cells = [(size, *figures[way, size]) for size in SIZES if (way, size) in figures]
        if cells:
            sizes, middle, half, _ = zip(*cells)
            shifted = [size * 1.03 ** (place - 2) for size in sizes]
            axes.errorbar(shifted, middle, half, label=way, marker="o", markersize=4, capsize=3, linewidth=1.2)
    axes.set_xscale("log")
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.minorticks_off()
    axes.set_xlabel("training images a class")
    axes.set_ylabel("test accuracy, cat or dog")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar10", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8, help="of the pretraining")
    parser.add_argument("--draw", type=Path, help="draws what there is, and runs nothing")
    told = parser.parse_args()
    results = told.work / "results.jsonl"
    if told.draw is None:
        eight, two = linked(told.cifar10, told.work)
        run = pretrained(eight, told.work, told.epochs)
        while todo := next(missing(known(results), told.seeds), None):
            record = one(*todo, two, run)
            with results.open("a") as out:
                out.write(json.dumps(record) + "\n")
            print(record, flush=True)
    else:
        draw(known(results), told.draw)
    print(table(known(results)))


if __name__ == "__main__":
    main()
