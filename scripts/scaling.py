"""How time and memory grow with depth, batch, image size and the size of the data set; a picture of each.

    python scripts/scaling.py                        all four, some minutes on two CPU cores
    python scripts/scaling.py --axes depth batch --seconds 5
    python scripts/scaling.py --json scaling.json --figures docs/pictures

Each point is a process of its own, so that its peak memory is its own. It builds the experiment as `cnnlab train` does,
with the default statistics, and trains for a few seconds; the first steps are not counted. Data is generated.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from cnnlab.errors import UsageError

DEPTHS = (20, 32, 56, 110, 218, 434, 1202)
COMMON = ("data=shapes", "augment=standard", "trainer.epochs=100", "trainer.progress=false", "trainer.step=eager")


@dataclass(frozen=True)
class Axis:
    """What grows, and the experiments at each size."""

    label: str
    power: int
    """Of the size, with which a step's arithmetic grows."""
    points: dict[str, dict[int, tuple[str, ...]]]
    """Curves: size to overrides."""


def depth(checkpoint: bool) -> dict[int, tuple[str, ...]]:
    common = (
        "model=resnet20",
        f"model.checkpoint={str(checkpoint).lower()}",
        "trainer.batch_size=16",
        "data.train=512",
    )
    return {layers: (*common, f"model.depth={layers}") for layers in DEPTHS}


AXES = {
    "depth": Axis(
        "layers of a CIFAR ResNet (32 px, batch 16)",
        1,
        {"activations kept": depth(False), "activations recomputed": depth(True)},
    ),
    "batch": Axis(
        "batch size (ResNet-20, 32 px)",
        1,
        {
            "ResNet-20": {
                size: ("model=resnet20", f"trainer.batch_size={size}", "data.train=4096")
                for size in (1, 4, 16, 64, 256, 1024)
            }
        },
    ),
    "image": Axis(
        "side of the image in pixels (ResNet-18 of width 16, batch 16)",
        2,
        {
            "ResNet-18": {
                side: (
                    "model=resnet18",
                    "model.width=16",
                    "model.stem=imagenet",
                    "trainer.batch_size=16",
                    f"data.size={side}",
                    "data.train=256",
                )
                for side in (32, 64, 96, 128, 192, 256)
            }
        },
    ),
    "data": Axis(
        "training images (32 px, small CNN, batch 64)",
        0,
        {
            "CNN": {
                count: ("model=cnn", "trainer.batch_size=64", f"data.train={count}", "data.contrast=0")
                for count in (500, 2_000, 8_000, 32_000)
            }
        },
    ),
}

CHILD = """
import json, resource, sys, time
began = time.perf_counter()
from cnnlab.building.builder import build
from cnnlab.building.trial import compose
from cnnlab.train.loop import updates
seconds, overrides = float(sys.argv[1]), sys.argv[2:]
run = build(compose(overrides))
built = time.perf_counter() - began
times, start = [], None
while True:
    for _ in updates(run):
        now = time.perf_counter()
        times.append(now)
        if len(times) == 3:
            start = now
        if start is not None and len(times) >= 6 and now - start > seconds:
            break
    else:
        run.clock.close(run.steps_per_epoch)
        continue
    break
steps = len(times) - 3
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({"step": (times[-1] - start) / steps, "steps": steps, "build": built, "memory": peak}))
"""


def measure(overrides: tuple[str, ...], seconds: float) -> dict[str, float]:
    """`step` (seconds), `steps` timed, `build` (seconds to the first step, imports included), `memory` (peak bytes)."""
    command = [sys.executable, "-c", CHILD, str(seconds), *COMMON, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"{' '.join(overrides)} failed:\n{done.stderr.strip()[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def exponent(sizes: list[int], values: list[float]) -> float:
    """Slope of log(value) over log(size) between the last two points: 1 is proportional growth."""
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


def draw(axis: Axis, measured: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Time a step and peak memory against the size; the time with a line that grows as the arithmetic does."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = sorted({size for points in measured.values() for size in points})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, key, scale, title in (
        (left, "step", 1e3, "time a step (ms)"),
        (right, "memory", 2.0**-20, "peak memory of the process (MiB)"),
    ):
        for name, points in measured.items():
            values = [point[key] * scale for point in points.values()]
            (line,) = axes.plot(list(points), values, marker="o", label=name)
            if key == "step":
                own = list(points)
                arithmetic = [values[-1] * (size / own[-1]) ** axis.power for size in own]
                axes.plot(own, arithmetic, ":", color=line.get_color(), label="as the arithmetic grows")
        axes.set(xscale="log", xlabel=axis.label, title=title)
        axes.set_xticks(sizes, labels=[f"{size:,}" for size in sizes], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_yscale("log") if key == "step" else axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def table(name: str, axis: Axis, measured: dict[str, dict[int, dict[str, float]]]) -> Table:
    found = Table(title=f"{name}: {axis.label}", title_justify="left")
    for heading in ("", "size", "ms a step", "steps timed", "MiB at most", "s to the first step"):
        found.add_column(heading, justify="right" if heading else "left")
    for curve, points in measured.items():
        for size, point in points.items():
            figures = (f"{1e3 * point['step']:.1f}", f"{point['steps']:.0f}", f"{point['memory'] / 2**20:,.0f}")
            found.add_row(curve, f"{size:,}", *figures, f"{point['build']:.1f}")
        slope = exponent(list(points), [point["step"] for point in points.values()])
        found.add_row(curve, "", f"grows with size^{slope:.2f}", "", "", "", style="dim")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES), metavar="AXIS")
    parser.add_argument("--seconds", type=float, default=4.0, help="of training a point (default: 4)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--figures", type=Path, default=Path("outputs/scaling"), help="folder of the pictures")
    arguments = parser.parse_args()
    console = Console()
    document = {}
    for name in arguments.axes:
        axis = AXES[name]
        cells = [(curve, size, what) for curve, points in axis.points.items() for size, what in points.items()]
        measured: dict[str, dict[int, dict[str, float]]] = {curve: {} for curve in axis.points}
        for curve, size, overrides in track(cells, description=name, console=Console(stderr=True)):
            try:
                measured[curve][size] = measure(overrides, arguments.seconds)
            except UsageError as error:
                console.print(f"{curve} at {size}: {error}", markup=False)
        console.print(table(name, axis, measured))
        draw(axis, measured, arguments.figures / f"scaling-{name}.png")
        document[name] = measured
        if arguments.json:
            arguments.json.write_text(json.dumps(document, indent=1))
    console.print(f"pictures: {arguments.figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
