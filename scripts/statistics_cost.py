"""What default statistics cost a run of ResNet-20, end to end: `cnnlab train` with and without them, in turns.

    python scripts/statistics_cost.py DATA [--rounds 3] [--cells 20x128 80x128 400x128 4000x8]

DATA is a folder of 32x32 images, `DATA/<class>/*`. Each run is a process of its own, from its start to its end; wall
seconds and CPU seconds (user and system, children included) are taken of the whole. The table has the medians of both
arms, and the median of the differences of each round, which is what the statistics cost; the aim is 1 % or one second.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ARMS = ("stats=default", "stats=off")


def run(data: str, steps: int, batch: int, arm: str, folder: Path) -> dict[str, float]:
    """One run: `wall` and `cpu` seconds, and what `run.json` says: `samples` and `told` seconds."""
    overrides = [
        *(
            "data=folder",
            f"data.root={data}",
            "data.size=32",
            "model=resnet20",
            "augment=[crop,flip]",
            "optim=momentum",
        ),
        *(f"trainer.batch_size={batch}", "trainer.epochs=10000", f"trainer.max_steps={steps}", "trainer.step=eager"),
        *("trainer.device=cpu", "trainer.eval_every=10000", arm, f"hydra.run.dir={folder}"),
    ]
    began, before = time.perf_counter(), os.times()
    command = [sys.executable, "-m", "cnnlab", "train", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    wall, after = time.perf_counter() - began, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    told = json.loads((folder / "run.json").read_text())["statistics"]
    return {"wall": wall, "cpu": cpu, "samples": told["samples"], "told": told["seconds"] or 0.0}


def cell(data: str, steps: int, batch: int, rounds: int) -> dict[str, float]:
    """Medians over interleaved rounds, whose arms take turns at being first."""
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for number in range(rounds):
        for arm in ARMS if number % 2 == 0 else reversed(ARMS):
            with tempfile.TemporaryDirectory() as folder:
                found[arm].append(run(data, steps, batch, arm, Path(folder) / "run"))
    row: dict[str, float] = {}
    for clock in ("wall", "cpu"):
        pairs = [(one[clock], other[clock]) for one, other in zip(found[ARMS[0]], found[ARMS[1]], strict=True)]
        row[clock] = statistics.median(one for one, _ in pairs)
        row[f"{clock} off"] = statistics.median(other for _, other in pairs)
        row[f"{clock} cost"] = statistics.median(one - other for one, other in pairs)
    for name in ("samples", "told"):
        row[name] = statistics.median(one[name] for one in found[ARMS[0]])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a folder of 32x32 images, one folder a class")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cells", nargs="+", default=["20x128", "80x128", "400x128", "4000x8"], metavar="STEPSxBATCH")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:  # decodes the images into the cache
        run(arguments.data, 5, 128, ARMS[0], Path(folder) / "run")
    print(f"{arguments.rounds} rounds, load average {os.getloadavg()[0]:.1f} at the start", flush=True)
    print("| steps, batch | wall s, on | off | cost | CPU s, on | off | cost | samples | s by run.json |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in arguments.cells:
        steps, batch = map(int, name.split("x"))
        row = cell(arguments.data, steps, batch, arguments.rounds)
        clocks = [f"{row[key]:.2f}" for clock in ("wall", "cpu") for key in (clock, f"{clock} off", f"{clock} cost")]
        figures = " | ".join([*clocks, f"{row['samples']:.0f}", f"{row['told']:.2f}"])
        print(f"| {steps:,}, {batch} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
