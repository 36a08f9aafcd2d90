"""Image files for the tests of folders: plain colours, so that what was decoded can be told."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

RED, GREEN = (220, 20, 40), (30, 200, 60)


def save_plain(path: Path, colour: tuple[int, int, int] = RED, size: tuple[int, int] = (20, 16)) -> None:
    """A file of one colour; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def make_folder(root: Path, counts: dict[str, int]) -> Path:
    """`root/<class>/<n>.png`, class k in the grey level 10 * k, sizes that vary with n."""
    for level, (name, count) in enumerate(counts.items()):
        for n in range(count):
            save_plain(root / name / f"{n:03d}.png", (10 * level,) * 3, (12 + n % 5, 14 + n % 3))
    return root
