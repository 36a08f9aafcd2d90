"""Random resized crops of whole stored photos beside torchvision's of the files, as docs/pictures/crops.jpg has them.

    .venv/bin/python scripts/crops_picture.py docs/pictures/crops.jpg

Three photos that scikit-learn and matplotlib bring along, one of them standing, go the way of `experiment=resnet_2015`:
decoded and stored at 256 x 342, cut and resampled by the augmentation. Beside each crop is torchvision's `resized_crop`
(antialiased, at 224) of the same part of the file. Prints the mean and the 99th percentile of their distance, of 255.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional as their

from cnnlab.augment import Identity, Pipeline, RandomResizedCrop
from cnnlab.data.decode import Recipe, decode
from cnnlab.data.whole import usual_side, views, whole
from cnnlab.protocols import VIEW, DataSpec

PHOTOS = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
)
SEEN = Recipe(3, 224, 224, "crop", 256)
CROPS, GAP, HEAD = 3, 6, 22
COLOURS = ("red", "lime", "cyan")


def paths() -> list[Path]:
    """The files, in the libraries' folders."""
    found = []
    for package, file in PHOTOS:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"expected {package} to be installed")
        found.append(Path(spec.origin).parent / file)
    return found


def crops_of(path: Path) -> tuple[Image.Image, list[tuple[Tensor, Tensor]]]:
    """The photo with its crops drawn in, and pairs of ours and torchvision's, (3, 224, 224) in [0, 1]."""
    stored = whole(SEEN, usual_side(SEEN))
    pixels, own = decode(str(path), stored)
    batch = {
        "image": torch.from_numpy(pixels.copy())[None],
        "index": torch.tensor([sum(path.name.encode())]),
        VIEW: views(torch.tensor([own]), SEEN, stored),
    }
    pipeline = Pipeline({"crop": RandomResizedCrop()}, Identity(), spec=DataSpec(3, (224, 224), ("a", "b")), seed=0)
    file = Image.open(path).convert("RGB")
    image = torch.from_numpy(np.array(file)).permute(2, 0, 1).float() / 255
    draw, pairs = ImageDraw.Draw(file), []
    for epoch in range(CROPS):
        drawn = pipeline.draw(batch, epoch)
        down, across, x, y = (RandomResizedCrop().parts(drawn["crop"])[0] * min(own) / SEEN.resize).tolist()
        top, left = own[0] / 2 + y - down / 2, own[1] / 2 + x - across / 2
        part = [round(value) for value in (top, left, down, across)]
        draw.rectangle((part[1], part[0], part[1] + part[3] - 1, part[0] + part[2] - 1), None, COLOURS[epoch], 4)
        pairs.append((pipeline.augment(batch, drawn)["image"][0], their.resized_crop(image, *part, [224, 224])))
    return file, pairs


def as_picture(image: Tensor) -> Image.Image:
    return Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def main(target: str) -> None:
    rows = [crops_of(path) for path in paths()]
    width = 300 + CROPS * (224 * 2 + 3 * GAP)
    canvas = Image.new("RGB", (width, HEAD + len(rows) * (224 + GAP)), "white")
    text = ImageDraw.Draw(canvas)
    text.text((GAP, 5), "photo, and the parts cut out", "black")
    for number in range(CROPS):
        at = 300 + number * (224 * 2 + 3 * GAP)
        text.text((at + GAP, 5), "cnnlab, of 256 x 342", "black")
        text.text((at + 224 + 2 * GAP, 5), "torchvision, of the file", "black")
    distances = []
    for row, (photo, pairs) in enumerate(rows):
        top = HEAD + row * (224 + GAP)
        photo.thumbnail((300 - GAP, 224))
        canvas.paste(photo, (0, top))
        for number, (ours, theirs) in enumerate(pairs):
            at = 300 + number * (224 * 2 + 3 * GAP)
            text.rectangle((at + GAP - 3, top - 1, at + 2 * 224 + 2 * GAP + 2, top + 226), COLOURS[number])
            canvas.paste(as_picture(ours), (at + GAP, top + 1))
            canvas.paste(as_picture(theirs), (at + 224 + 2 * GAP, top + 1))
            distances.append((ours - theirs).abs().flatten() * 255)
    canvas.save(target, quality=85)
    every = torch.cat(distances)
    sys.stdout.write(f"mean {every.mean():.1f}, 99th percentile {every.quantile(0.99):.1f} of 255\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
