"""Images that are in two splits: exact copies, and the same image turned, mirrored or saved again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cnnlab import rng
from cnnlab.protocols import Split

MOST = 20_000
"""Images of a split that are looked at; of more, a random sample."""
CHUNK = 256
SIDE = 8
"""Of the thumbnails by which an image is found again."""
CLOSE = 3.0
"""Grey levels of 255, root mean square: two thumbnails of the same image, saved again; others differ by tens."""
DETAIL = 8.0
"""Grey levels: the least deviation inside a thumbnail that can be told from another one."""


@dataclass
class Copies:
    """How many images of val and test are, exactly or nearly, also in a split before theirs."""

    looked: int = 0
    exact: int = 0
    near: int = 0
    example: str = ""
    judged: int = 0
    """Images of val and test that were looked at."""

    @property
    def share(self) -> float:
        return (self.exact + self.near) / max(self.judged, 1)


@dataclass
class _Looked:
    """The images of a split that were looked at: positions, digests, thumbnails (n, SIDE²)."""

    index: list[int]
    digests: list[bytes]
    thumbs: Tensor


def copies(splits: Mapping[str, Split], seed: int) -> Copies:
    """Looks at the images of train, val and test, in this order, and counts those that came before in another split.

    Near copies are those whose thumbnails are the same but for `CLOSE`, under one of the eight turns and mirrorings of
    the square; images without detail are left out.
    """
    found = Copies()
    before: dict[str, _Looked] = {}
    for name in ("train", "val", "test"):
        looked = _looked(splits[name], seed)
        found.looked += len(looked.index)
        found.judged += len(looked.index) * (name != "train")
        places = {digest: (n, i) for n, s in before.items() for digest, i in zip(s.digests, s.index)}
        fresh = []
        for row, digest in enumerate(looked.digests):
            if digest in places:
                found.exact += 1
                found.example = found.example or _example(name, looked.index[row], *places[digest])
            else:
                fresh.append(row)
        again = _again(looked.thumbs[fresh], {n: s.thumbs for n, s in before.items()})
        found.near += len(again)
        for row, (other, position) in list(again.items())[:1]:
            place = before[other].index[position]
            found.example = found.example or _example(name, looked.index[fresh[row]], other, place)
        before[name] = looked
    return found


def _example(name: str, index: int, other: str, other_index: int) -> str:
    return f"{name} {index} and {other} {other_index}"


def _images(split: Split, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Position and pixels (C, H, W) uint8 of the images that are looked at."""
    order = torch.arange(len(split))
    if len(split) > MOST:
        order = rng.permutation(seed, 0, len(split))[:MOST].sort().values
    for part in order.split(CHUNK):
        images = split.fetch(part)["image"].cpu()
        yield from zip(part.tolist(), images)


def _looked(split: Split, seed: int) -> _Looked:
    index, digests, thumbs = [], [], []
    for number, image in _images(split, seed):
        index.append(number)
        digests.append(blake2b(image.numpy().tobytes(), digest_size=16).digest())
        thumbs.append(_thumb(image))
    return _Looked(index, digests, torch.stack(thumbs))


def _thumb(image: Tensor) -> Tensor:
    """(SIDE²,) grey levels."""
    grey = image.float().mean(0, keepdim=True)[None]
    return interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False).flatten()


def _again(thumbs: Tensor, before: Mapping[str, Tensor]) -> dict[int, tuple[str, int]]:
    """For each row (n, SIDE²) that came before in another split, turned or mirrored: that split, and its row there."""
    again: dict[int, tuple[str, int]] = {}
    square = thumbs.view(-1, SIDE, SIDE)
    detail = thumbs.std(1) >= DETAIL if len(thumbs) else torch.zeros(0, dtype=torch.bool)
    for turns in range(4):
        turned = torch.rot90(square, turns, (1, 2))
        for moved in (turned, turned.flip(2)):
            rows = moved.reshape(-1, SIDE * SIDE)
            for name, others in before.items():
                for start in range(0, len(rows), CHUNK):
                    distance = torch.cdist(rows[start : start + CHUNK], others) / SIDE  # root mean square
                    nearest, where = distance.min(1)
                    for row in (nearest <= CLOSE).nonzero().flatten().tolist():
                        if bool(detail[start + row]):
                            again.setdefault(start + row, (name, int(where[row])))
    return again
