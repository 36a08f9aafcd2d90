"""A landscape's document as a figure: the density, the plane, the line along λmin, the variance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cnnlab.sinks.figures import COLOURS, as_written, blank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLOOR = 1e-5
"""Of the highest density, below which none is drawn."""


def drawn(found: Mapping[str, Any]) -> Figure:
    """A panel for each part that was measured; one of text where none was that can be drawn."""
    panels: list[Callable[[Any, Any, Mapping[str, Any]], None]] = []
    if found.get("spectrum"):
        panels.append(_density)
    if found.get("surface"):
        panels.append(_surface)
    if found.get("path"):
        panels.append(_path)
    if found.get("layers"):
        panels.append(_layers)
    if found.get("along_smallest"):
        panels.append(_line)
    if found.get("variance"):
        panels.append(_variance)
    columns = min(2, max(1, len(panels)))
    rows = -(-max(1, len(panels)) // columns)
    figure, axes = blank(6.2 * columns, 4.4 * rows, rows, columns)
    flat = list(getattr(axes, "flat", [axes]))
    for ax, panel in zip(flat, panels):
        panel(figure, ax, found)
    for ax in flat[len(panels) :]:
        ax.axis("off")
    kind = f", {found['verdicts'][0]['name']}" if found["verdicts"] else ""
    what = as_written(found["what"], 80)
    figure.suptitle(f"{what}: loss {found['loss']:.4g}{kind} ({found['mode']}: {found['norms']})", fontsize=10)
    return figure


def _density(figure: Any, ax: Any, found: Mapping[str, Any]) -> None:
    curve = found["spectrum"]["curve"]
    floor = FLOOR * max(curve["density"])
    low = [max(floor, d - e) for d, e in zip(curve["density"], curve["error"])]
    high = [max(floor, d + e) for d, e in zip(curve["density"], curve["error"])]
    ax.fill_between(curve["value"], low, high, color=COLOURS[5], alpha=0.4, linewidth=0, label="95 % interval")
    ax.plot(curve["value"], [max(floor, d) for d in curve["density"]], color=COLOURS[0], label="density")
    ax.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    eigen = found.get("eigenvalues")
    if eigen:
        ax.plot([*eigen["largest"], eigen["smallest"]], [floor * 1.5] * (len(eigen["largest"]) + 1), "v",
                color=COLOURS[1], clip_on=False, label="extreme eigenvalues")  # fmt: skip
    ax.set_yscale("log")
    ax.set_ylim(bottom=floor)
    ax.set_xlabel("eigenvalue of the Hessian")
    ax.set_ylabel("density (an eigenvalue counts 1/n)")
    ax.legend(frameon=False, fontsize=8)


def _surface(figure: Any, ax: Any, found: Mapping[str, Any]) -> None:
    import numpy as np

    grid = found["surface"]
    loss = np.array(grid["loss"], dtype=float)
    shown = ax.contourf(grid["x"], grid["y"], np.ma.masked_invalid(loss), levels=24, cmap="viridis")
    ends = [0, 1] if found.get("path") else [0]
    ax.plot(ends, [0] * len(ends), "o", color="white", markeredgecolor="black", markersize=6)
    figure.colorbar(shown, ax=ax, label="loss")
    ax.set_xlabel(grid["directions"][0])
    ax.set_ylabel(grid["directions"][1])


def _path(figure: Any, ax: Any, found: Mapping[str, Any]) -> None:
    way = found["path"]
    ends = [way["values"][way["places"].index(t)] for t in (0.0, 1.0)]
    ax.plot([0, 1], ends, "--", color="0.5", linewidth=1)
    ax.plot(way["places"], way["values"], "o-", color=COLOURS[0], markersize=3)
    ax.plot([0, 1], ends, "o", color="white", markeredgecolor="black", markersize=6)
    ax.set_xlabel(f"from these weights (0) to the other ones (1), {way['distance']:.3g} apart")
    ax.set_ylabel("loss")
    ax.set_title(f"barrier {way['barrier']:.3g}", fontsize=9)


def _layers(figure: Any, ax: Any, found: Mapping[str, Any]) -> None:
    rows = found["layers"]
    places = range(len(rows))
    ax.plot([row["largest"] for row in rows], places, "o", color=COLOURS[1], markersize=4, label="largest")
    ax.plot([row["smallest"] for row in rows], places, "o", color=COLOURS[0], markersize=4, label="smallest")
    ax.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    top = max(abs(row[name]) for row in rows for name in ("largest", "smallest"))
    ax.set_xscale("symlog", linthresh=max(top, 1e-30) / 1e3)
    every = -(-len(rows) // 24)
    ax.set_yticks(list(places)[::every], [row["layer"] or "(own)" for row in rows][::every], fontsize=7)
    ax.invert_yaxis()
    ax.set_xlabel("eigenvalues of the layer's block of the Hessian")
    ax.legend(frameon=False, fontsize=8)


def _line(figure: Any, ax: Any, found: Mapping[str, Any]) -> None:
    along, eigen = found["along_smallest"], found["eigenvalues"]
    ax.axhline(found["loss"], color="0.8", linewidth=0.8)
    ax.plot(along["lengths"], along["values"], "o-", color=COLOURS[0], markersize=3, label="measured")
    drop, at = along["drop"]
    if drop > 0:
        ax.plot([at], [found["loss"] - drop], "o", color=COLOURS[1], label=f"falls by {drop:.2g}")
    end = max(along["lengths"])
    ax.set_xscale("symlog", linthresh=end / 64)
    ticks = [-end, -end / 8, -end / 64, 0, end / 64, end / 8, end]
    ax.set_xticks(ticks, [f"{t:.2g}" for t in ticks])
    ax.minorticks_off()
    ax.set_xlabel(f"distance along the eigenvector of λmin = {eigen['smallest']:.3g}")
    ax.set_ylabel("loss")
    ax.legend(frameon=False, fontsize=8)


def _variance(figure: Any, ax: Any, found: Mapping[str, Any]) -> None:
    rows = found["variance"]
    sizes = [row["batch"] for row in rows]
    ax.errorbar(sizes, [row["variance"] for row in rows], [min(row["error"], 0.99 * row["variance"]) for row in rows],
                fmt="o", color=COLOURS[0], capsize=3, label="measured, 95 % interval")  # fmt: skip
    first = rows[0]
    ax.plot(sizes, [first["variance"] * first["batch"] / size for size in sizes], "--", color="0.5", label="1/batch")
    ax.axhline(found["gradient_norm"] ** 2, color=COLOURS[2], linewidth=1, label="‖g‖²")
    scale = found.get("noise_scale")
    if scale and 0 < scale["scale"] < float("inf"):
        ax.axvline(scale["scale"], color=COLOURS[1], linestyle=":", label=f"noise scale {scale['scale']:.3g}")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("batch size")
    ax.set_ylabel("E‖gradient of a batch - its mean‖²")
    ax.legend(frameon=False, fontsize=8)
