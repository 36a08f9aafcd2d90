"""The pictures of `cnnlab eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnlab.runs.folder import write_atomically
from cnnlab.terminal import one_line, say

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cnnlab.assess.samples import Samples
    from cnnlab.building.evaluation import Found, OpenedData
    from cnnlab.building.opened import Opened
    from cnnlab.tasks import Task


ELSEWHERE = "type another --out"


def figures(task: Task, found: Found, samples: Samples, document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes those that the task has something for, and returns where they are."""
    from cnnlab.assess import figures as drawn
    from cnnlab.sinks.figures import save

    unit = "pixels" if "intersection" in samples.found else "images"
    names = [one_line(name) for name in task.class_names(task.spec)]
    made: dict[str, Figure] = {}
    counts = found.sums.get("confusion")
    if counts is not None and counts.shape == (len(names), len(names)):
        made["confusion"] = drawn.confusion(counts, names, unit)
    calibration = samples.calibration()
    if calibration is not None:
        made["calibration"] = drawn.reliability(calibration, unit)
    if "iou" in samples.found:
        of = "mean IoU of an image" if unit == "pixels" else "IoU of the box"
        made["iou"] = drawn.overlaps(samples.found["iou"], of)
    if "robustness" in document:
        made["robustness"] = drawn.robustness(document["robustness"])
    written = []
    for name, figure in made.items():
        written.append(folder / f"eval-{name}.png")
        save(figure, written[-1], ELSEWHERE)
    return written


def top_losses(
    network: Opened, split: str, data: OpenedData, rows: Sequence[Mapping[str, Any]], folder: Path
) -> list[Path]:
    """Writes the picture of the samples, and says on stderr why it is without maps where it is."""
    import torch

    from cnnlab.assess.hardest import hardest_picture
    from cnnlab.sinks.picture import png

    captions = [
        [
            one_line(Path(row["sample"]).name),
            f"loss {row['loss']:.3g}",
            *([f"is {one_line(row['label'])}"] if "label" in row else []),
            *([f"IoU {row['iou']:.3f}"] if "iou" in row else []),
        ]
        for row in rows
    ]
    index = torch.tensor([row["index"] for row in rows])
    picture, why = hardest_picture(network, split, data, index, captions)
    if why:
        say(f"no maps beside the images: {one_line(why)}", err=True)
    path = folder / "eval-top-losses.png"
    write_atomically(path, png(picture.permute(1, 2, 0).numpy()), ELSEWHERE)
    return [path]
