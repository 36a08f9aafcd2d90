"""The samples with the highest losses, with what the network looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cnnlab.building.evaluation import OpenedData, loader_of
from cnnlab.building.opened import Opened
from cnnlab.errors import UsageError
from cnnlab.explain import Subject, explain, score_of
from cnnlab.explain.layers import usual_layers
from cnnlab.explain.pictures import LEGEND, Row, cell, painted
from cnnlab.tasks.pictures import above, captioned, grid

METHOD = "gradcam"
_AT_ONCE = 32


def hardest_picture(
    network: Opened, split: str, data: OpenedData, index: Tensor, captions: Sequence[Sequence[str]]
) -> tuple[Tensor, str]:
    """Each sample as a row: the image, and Grad-CAM of the class that is predicted and of the true one; of masks and
    boxes, what the task draws of them below.

    Args:
        index: (n,) int64 positions in the split.
        captions: lines below each image.

    Returns:
        (3, H, W) uint8, and why there are no maps where the network has none.
    """
    loader = loader_of(network, split, data)
    subject = Subject(network.model, network.task, network.spec)
    lines: list[Tensor] = []
    own: list[Tensor] = []
    why = ""
    for part in torch.arange(len(index)).split(_AT_ONCE):
        batch = loader.at(index[part])
        try:
            rows = _mapped(subject, batch["image"], {name: batch[name] for name in ("label", "mask") if name in batch})
        except UsageError as error:
            why, rows = str(error), [[] for _ in part]
        for at, maps in zip(part.tolist(), rows, strict=True):
            place = at - int(part[0])
            lines.append(_line(batch["image"][place], captions[at], maps, place))
        with torch.no_grad():
            outputs = network.forward.outputs(batch["image"])
        if {"mask", "box"} & set(outputs):
            own += list(network.task.pictures(batch, outputs).values())
    columns = max(line.shape[2] for line in lines)
    picture = torch.cat([_widened(line, columns) for line in lines], 1)
    if not why:
        legend = captioned(torch.ones(1, 3, 4, columns), [[f"Grad-CAM; {LEGEND[0]}"]])[0]
        picture = above(picture, legend)
    for each in own:
        picture = above(picture, each / 255)
    return picture, why


def _mapped(subject: Subject, images: Tensor, truth: dict[str, Tensor]) -> list[list[Row]]:
    """For each image a row for each question."""
    with subject.undisturbed(), torch.no_grad():
        outputs = subject.outputs(images)
    with subject.undisturbed():
        layers = usual_layers(subject, images[:1])
    found: list[list[Row]] = [[] for _ in images]
    for target in ("predicted", "true"):
        score = score_of(subject, outputs, target, truth=truth)
        values, likely = score.of(outputs), score.probability(outputs)
        maps = explain(subject, images, score, [METHOD], layers)
        for at, rows in enumerate(found):
            chance = None if likely is None else likely[at].item()
            rows.append(Row(f"{target} {score.names[at]}", values[at].item(), chance, [(each, at) for each in maps]))
    return found


def _line(image: Tensor, words: Sequence[str], rows: Sequence[Row], place: int) -> Tensor:
    shown = cell(image)
    cells, captions = [shown], [list(words)]
    for row in rows:
        for found, at in row.maps:
            cells.append(painted(shown, found, at))
            missing = found.evidence[at]
            asked, _, name = row.target.partition(" ")
            named = replace(row, target=name).said()
            captions.append([asked, named, found.layer or "", f"{missing}: no evidence" if missing else ""])
    most = max(map(len, captions)) + 1
    return grid(captioned(torch.stack(cells), [[*own, *[""] * (most - len(own))] for own in captions]), len(cells), 4)


def _widened(line: Tensor, width: int) -> Tensor:
    if line.shape[2] == width:
        return line
    canvas = torch.full((3, line.shape[1], width), 255, dtype=torch.uint8)
    canvas[:, :, : line.shape[2]] = line
    return canvas
