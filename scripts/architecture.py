"""Draws docs/pictures/architecture.png: the floors of the package, and the way of a command line and of the data.

    python scripts/architecture.py

The floors are read from tests/test_cli_floors.py, so that the picture shows what is enforced.
"""

from __future__ import annotations

import ast
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).parent.parent
SAID = {
    "errors": "exit codes, did you mean",
    "blocks": "what networks and heads share",
    "usertext": "text files of people",
    "torch_private": "with reasons",
    "schema": "the fixed sections",
    "rng": "random numbers by place",
    "protocols": "what parts owe",
    "measure": "norms, moments, products",
    "terminal": "the one way to stdout",
    "machine": "device, ranks, signals, memory",
    "composing": "overrides → Experiment",
    "runs": "run folder, checkpoints",
    "sinks": "console, JSONL, TensorBoard, figures",
    "inspect": "summary, FLOPs, receptive field",
    "tasks": "what is learned, metrics",
    "observe": "taps, probes, cadence",
    "train": "loop, steps, objective, decisions",
    "building": "check, build, open, launch",
    "explain": "what a network looks at",
    "assess": "intervals, calibration",
    "bench": "ratios, arms, roofline",
    "diagnose": "check, probe, landscape",
    "page": "a run folder as one page",
    "verbs": "one module a verb",
    "cli": "dispatch, exit codes",
}
PARTS = {"data", "models", "heads", "init", "optim", "losses", "augment", "interventions", "penalties", "weights"}
INK, PALE, WAY, DATA = "#20303c", "#eef2f5", "#b4552d", "#2d6fb4"


def floors() -> list[list[str]]:
    tree = ast.parse((ROOT / "tests" / "test_cli_floors.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "FLOORS":
            assert node.value is not None
            return [sorted(floor - {"__init__", "__main__"}) for floor in ast.literal_eval(node.value)]
    raise SystemExit("tests/test_cli_floors.py has no FLOORS")


def main() -> None:
    found = [floor for floor in floors() if floor]
    figure, axes = plt.subplots(figsize=(11, 9.2), dpi=110)
    axes.set_xlim(0, 100)
    axes.set_ylim(-3, 7 * len(found) + 4)
    axes.axis("off")
    places: dict[str, tuple[float, float, float]] = {}
    for height, names in enumerate(found):
        y, width = 7 * height, 78 / len(names)
        for position, name in enumerate(names):
            x = 11 + position * width
            places[name] = (x, y, width - 1)
            color = "#fbf1e9" if name in PARTS else PALE
            box = FancyBboxPatch(
                (x, y), width - 1, 5, boxstyle="round,pad=0.1,rounding_size=0.6", fc=color, ec=INK, lw=0.8
            )
            axes.add_patch(box)
            small = len(names) > 6
            said = SAID.get(name, "")
            size = 5.8 if small else 9.5
            axes.text(
                x + (width - 1) / 2,
                y + (3.3 if said and not small else 2.5),
                name,
                ha="center",
                va="center",
                fontsize=size,
                color=INK,
                weight="bold",
            )
            if said and not small:
                axes.text(x + (width - 1) / 2, y + 1.3, said, ha="center", va="center", fontsize=6.8, color=INK)

    def arrow(points: list[tuple[float, float]], color: str) -> None:
        for start, end in pairwise(points):
            axes.add_patch(
                FancyArrowPatch(
                    start,
                    end,
                    arrowstyle="-|>",
                    mutation_scale=11,
                    color=color,
                    lw=1.5,
                    shrinkA=0,
                    shrinkB=0,
                    connectionstyle="arc3",
                )
            )

    def left(name: str) -> tuple[float, float]:
        x, y, _ = places[name]
        return x, y + 2.5

    rail = 6.5
    way = ["cli", "verbs", "building", "composing"]
    for upper, lower in pairwise(way):
        (_, y1), (x2, y2) = left(upper), left(lower)
        axes.plot([places[upper][0], rail, rail], [y1, y1, y2], color=WAY, lw=1.5)
        arrow([(rail, y2), (x2, y2)], WAY)
        rail -= 1.2
    axes.text(
        0.5, 7 * len(found) + 1.5, "a command line: cli → verb → check and build → Experiment", color=WAY, fontsize=9
    )

    right = 91.5
    for start, end in (("data", "train"), ("train", "sinks"), ("sinks", "runs")):
        (xs, ys, ws), (xe, ye, we) = places[start], places[end]
        if start == "data":  # over the other parts of its floor
            axes.plot([xs + ws / 2, xs + ws / 2, right, right], [ys + 5, ys + 6, ys + 6, ye + 3], color=DATA, lw=1.5)
        else:
            axes.plot([xs + ws, right, right], [ys + 2, ys + 2, ye + 3], color=DATA, lw=1.5)
        arrow([(right, ye + 3), (xe + we, ye + 3)], DATA)
        right += 1.6
    axes.text(
        99.5,
        7 * len(found) + 1.5,
        "the data: files → batches → step → records → run folder",
        color=DATA,
        fontsize=9,
        ha="right",
    )
    axes.text(
        50,
        -2.2,
        "a module imports only from floors below its own; the parts (shaded) do not import each other",
        ha="center",
        fontsize=8,
        color=INK,
    )
    figure.savefig(ROOT / "docs" / "pictures" / "architecture.png", bbox_inches="tight")


if __name__ == "__main__":
    main()
