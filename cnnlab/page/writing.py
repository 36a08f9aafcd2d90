"""The page itself: one HTML file that needs no other, nor a network."""

from __future__ import annotations

from pathlib import Path

from cnnlab.page.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from cnnlab.page.reading import Contents
from cnnlab.runs.folder import write_atomically
from cnnlab.terminal import one_line


def html(contents: Contents) -> str:
    """Every word of a run folder is text in it: the template escapes them all, and the page allows itself no script,
    no style and no picture from elsewhere."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("cnnlab.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: one_line(value) if isinstance(value, str) else value,  # no marks that turn the writing
        trim_blocks=True,
        lstrip_blocks=True,
    )
    frame = {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "bottom": HEIGHT - BOTTOM,
    }
    return environment.get_template("page.html").render(page=contents, frame=frame)


def write(contents: Contents, path: Path) -> None:
    """Raises `DiskError` where the disk refuses."""
    write_atomically(path, html(contents).encode("utf-8", "backslashreplace"))
