"""The live display of a run on a terminal, drawn with rich; as high for a thousand layers as for ten."""

from __future__ import annotations

from typing import IO

from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cnnlab.sinks.drawing import Drawing, plain
from cnnlab.sinks.health import COLUMNS, Cell, Strip, Verdict
from cnnlab.sinks.records import is_loss_part
from cnnlab.sinks.snapshot import Snapshot, duration
from cnnlab.terminal import one_line

MAX_FACTS = 10
MAX_METRICS = 5
SHORT_FACT = 28
ROOM_FOR_FACTS = 24
"""Terminal lines below which the facts are left out."""
ROOM_FOR_VALUES = 96
"""Terminal columns below which the layers' findings take the place of the values."""

_COLOR = {Verdict.UNKNOWN: "bright_black", Verdict.GOOD: "green", Verdict.WATCH: "yellow", Verdict.BAD: "red"}
_BARS = "▁▂▃▄▅▆▇█"


class Display:
    """A region at the bottom of the terminal that is drawn anew at each `update`.

    Drawn by the caller's thread only: a refreshing thread of its own would compete with the training loop.
    """

    def __init__(self, stream: IO[str]):
        self._console = Drawing(stream)
        self._live = Live(console=self._console, auto_refresh=False)
        self._live.start()

    def print(self, text: str) -> None:
        self._console.print(text)

    def update(self, shown: Snapshot) -> None:
        width, height = self._console.size
        drawn = render(shown, facts=height >= ROOM_FOR_FACTS, wide=width >= ROOM_FOR_VALUES)
        self._live.update(drawn, refresh=True)

    def stop(self) -> None:
        self._live.stop()


def render(shown: Snapshot, facts: bool = True, wide: bool = True) -> RenderableType:
    """The whole display as one renderable; `wide` has room for the first and last layer's values."""
    parts: list[RenderableType] = []
    if facts and shown.facts:
        parts.append(_facts(shown))
    parts.append(_progress(shown))
    if shown.splits:
        parts.append(_metrics(shown))
    if shown.health:
        parts.append(_health(shown, wide))
    return Panel(
        Group(*parts), title=plain(f" {shown.title} ", "bold"), title_align="left", border_style="bright_black"
    )


def _facts(shown: Snapshot) -> RenderableType:
    """Two short facts a line; a long one has the line for itself."""
    facts = [(name, one_line(value)) for name, value in list(shown.facts.items())[:MAX_FACTS]]
    short = [fact for fact in facts if len(fact[1]) <= SHORT_FACT]
    long = [fact for fact in facts if len(fact[1]) > SHORT_FACT]
    width = max(len(name) for name, _ in facts)
    pairs = Table.grid(padding=(0, 2), expand=True)
    lines = Table.grid(padding=(0, 2), expand=True)
    for grid, columns in ((pairs, 2), (lines, 1)):
        for _ in range(columns):
            grid.add_column(style="bright_black", no_wrap=True, min_width=width)
            grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for position in range(0, len(short), 2):
        pairs.add_row(*(plain(word) for fact in short[position : position + 2] for word in fact))
    for fact in long:
        lines.add_row(*(plain(word) for word in fact))
    return Group(*(grid for grid in (pairs, lines) if grid.row_count), Text())


def _progress(shown: Snapshot) -> RenderableType:
    line = Table.grid(padding=(0, 2), expand=True)
    line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True, justify="right")
    line.add_row(
        Text(f"epoch {shown.epoch}/{shown.epochs}", "bold"),
        ProgressBar(total=max(shown.total_steps, 1), completed=shown.step, complete_style="cyan"),
        Text(f"step {shown.step:,}/{shown.total_steps:,}"),
    )
    words = []
    if shown.lr is not None:
        words.append(f"lr {shown.lr:.3g}")
    if shown.images_per_second is not None:
        words.append(f"{shown.images_per_second:,.0f} images/s")
    if shown.seconds_left is not None and shown.step < shown.total_steps:
        words.append(f"{duration(shown.seconds_left)} left")
    return Group(line, Text("   ".join(words)))


def _metrics(shown: Snapshot) -> RenderableType:
    names = [name for found in shown.splits.values() for name in found if not is_loss_part(name)]
    names = list(dict.fromkeys(names))[:MAX_METRICS]
    table = Table(box=None, header_style="bright_black", pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    for name in names:
        table.add_column(plain(name), justify="right")
    for split, found in shown.splits.items():
        table.add_row(plain(split), *(f"{found[name]:.4g}" if name in found else "" for name in names))
    return Group(Text(), table)


def _health(shown: Snapshot, wide: bool) -> RenderableType:
    heads = [f"layers at step {shown.stats_step:,}", "input → output", "first → last", ""]
    rows = [[Text(head, "bright_black") for head in heads]]
    for strip in shown.health:
        verdict = plain(strip.words, _COLOR[strip.verdict]) if strip.words else Text("ok", "green")
        values = Text(f"{strip.first:.2g} → {strip.last:.2g}")
        rows.append([plain(strip.title), _bars(strip), values, verdict])
    if not wide:
        rows = [[*row[:2], row[3]] for row in rows]
    grid = Table.grid(padding=(0, 2), expand=True)
    for cells in list(zip(*rows, strict=True))[:-1]:  # a narrow terminal cuts the words, not the figures
        grid.add_column(no_wrap=True, min_width=max(cell.cell_len for cell in cells))
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for row in rows:
        grid.add_row(*row)
    return Group(Text(), grid)


def _bars(strip: Strip) -> Text:
    text = Text()
    width = 2 if len(strip.cells) <= COLUMNS // 2 else 1
    for cell in strip.cells:
        text.append(_glyph(cell) * width, _COLOR[cell.verdict])
    return text


def _glyph(cell: Cell) -> str:
    if cell.height is None:
        return "·" if cell.verdict is Verdict.UNKNOWN else "×"
    return _BARS[min(int(cell.height * len(_BARS)), len(_BARS) - 1)]
