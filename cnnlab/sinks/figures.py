"""Figures of the verbs that measure: drawn by matplotlib, written whole as PNG, shown where the terminal can."""

from __future__ import annotations

import base64
import importlib.util
import io
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnlab.runs.folder import write_atomically
from cnnlab.terminal import one_line, stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WITHOUT = "no figure: it is drawn by matplotlib, which is not installed; type pip install 'cnnlab[figures]'"
DPI = 120
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which the color-blind can tell apart."""


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def blank(width: float = 8.0, height: float = 5.0, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure of inches by inches and its axes, an array of (rows, columns) where there are several. No state of
    `pyplot` is touched, and no display is needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns)
    for ax in getattr(axes, "flat", [axes]):
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def as_written(text: str, longest: int = 120) -> str:
    """What people wrote, for a title or a label: in one line, shortened, and no mathematics, which matplotlib reads
    between dollars."""
    text = one_line(text)
    return (text if len(text) <= longest else f"{text[: longest - 3]}...").replace("$", r"\$")


def save(figure: Figure, path: Path, elsewhere: str = "type another --figure") -> None:
    """Writes the PNG, whole or not at all. Raises `DiskError` where the disk refuses, with what to type instead."""
    write_atomically(path, _png(figure), elsewhere)


def show(figure: Figure) -> bool:
    """Draws it into the terminal, where that takes pictures (kitty, iTerm2, WezTerm, Ghostty); whether it did."""
    out = stream(sys.stdout)
    if not out.isatty():
        return False
    program, terminal = os.environ.get("TERM_PROGRAM", ""), os.environ.get("TERM", "")
    content = base64.standard_b64encode(_png(figure)).decode()
    if os.environ.get("KITTY_WINDOW_ID") or program == "ghostty" or "kitty" in terminal:
        parts = [content[i : i + 4096] for i in range(0, len(content), 4096)]
        for number, part in enumerate(parts):
            head = "a=T,f=100," if number == 0 else ""
            out.draw(f"\x1b_G{head}m={int(number < len(parts) - 1)};{part}\x1b\\")
    elif program in ("iTerm.app", "WezTerm"):
        out.draw(f"\x1b]1337;File=inline=1;width=80%:{content}\a")
    else:
        return False
    out.draw("\n")
    out.flush()
    return True


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a name in letters that no font here has
        figure.savefig(buffer, format="png", metadata={"Software": "cnnlab"})
    return buffer.getvalue()
