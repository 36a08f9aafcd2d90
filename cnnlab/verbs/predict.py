"""`cnnlab predict RUN PATH...`: what a trained network says of image files."""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnlab.composing.trust import Trust
from cnnlab.errors import DataError, UsageError
from cnnlab.terminal import one_line, say
from cnnlab.verbs.arguments import Parser, opening_options

if TYPE_CHECKING:
    from cnnlab.building.prediction import Predicted

SILENT_SECONDS = 30.0
"""Without a word on how far it is, where nobody sees a bar."""
EXAMPLES = """examples:
  cnnlab predict outputs/photos/2026-11-22_10-00-00-1a2b cat.jpg dog.png
  cnnlab predict RUN holiday/ 'archive/**/*.jpg'       folders and patterns
  find photos -newer mark -print0 | cnnlab predict RUN -   a list on standard input, a path a line or with zero bytes
  cnnlab predict RUN photos --csv > photos.csv
  cnnlab predict RUN photos --json --top 5 | jq -r .class
  cnnlab predict RUN photos --out predicted            segmentation: masks and overlays; localization: boxes drawn

Rows are in the order of the files. A file that cannot be read is told on stderr and has no row; the exit code is then
3. All batches are filled up to one size, so that an image gets the same answer whatever is beside it. Boxes and masks
are in pixels of the upright file.
"""


def main(arguments: Sequence[str]) -> int:
    args = parser().parse_all(arguments)
    for name, value in (("--top", args.top), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise UsageError(f"{name}: expected a number from 1 on, received {value}")
    from cnnlab.building.opened import open_run
    from cnnlab.building.prediction import Predicted, predicted
    from cnnlab.building.prediction_files import PredictionFiles
    from cnnlab.data.inputs import named_files

    trust = Trust.of(args.trust, args.config_dir)
    network = open_run(args.run, args.checkpoint, device=args.device, trust=trust)
    files = PredictionFiles(Path(args.out), network) if args.out is not None else None
    show = _json if args.json else _Csv(min(args.top, len(network.classes))) if args.csv else _Table()
    named = list(named_files(args.paths, lambda: sys.stdin.buffer.read()))
    began, done, failed = time.perf_counter(), 0, 0
    with _progress(len(named)) as advance:
        for batch in predicted(network, iter(named), batch_size=args.batch_size, top=args.top):
            for found in batch:
                if isinstance(found, Predicted):
                    try:
                        row = _row(found, files.write(found) if files is not None else {})
                    except DataError as error:
                        failed += 1
                        say(f"cnnlab: passed over {one_line(error)}", err=True)
                        continue
                    show(row)
                    done += 1
                else:
                    failed += 1
                    say(f"cnnlab: passed over {one_line(found.path)}: {one_line(found.reason)}", err=True)
            advance(len(batch))
            if getattr(sys.stdout, "lost", None) is not None:  # whoever read it has seen enough
                return 1
    seconds = time.perf_counter() - began
    say(f"{done:,} image{'s' * (done != 1)} in {seconds:.1f} s ({done / seconds:,.0f}/s)", err=True)
    if failed:
        raise DataError(f"{failed:,} of {len(named):,} could not be read and {'is' if failed == 1 else 'are'} left out")
    return 0


def parser() -> Parser:
    made = Parser("predict", "Shows what a trained network says of images.", EXAMPLES)
    made.add_argument("run", help="a run folder")
    made.add_argument("paths", nargs="+", metavar="PATH", help="image files, folders, patterns; - reads a list of them")
    made.add_argument("--top", type=int, default=3, metavar="K", help="classes to name of each image (3)")
    shown = made.add_mutually_exclusive_group()
    shown.add_argument("--csv", action="store_true", help="comma-separated values with a heading, instead of a table")
    shown.add_argument("--json", action="store_true", help="a JSON document an image, each on a line")
    made.add_argument("--out", metavar="DIR", help="write masks (palette PNG) and overlays to this new folder")
    made.add_argument("--batch-size", type=int, metavar="N", help="images at once, instead of what fits well")
    opening_options(made)
    return made


def _row(found: Predicted, written: Mapping[str, str]) -> dict[str, Any]:
    height, width = found.size
    return {"path": found.file.path, **found.answer, "size": [width, height], **written}


# ---- rows ----


def _json(row: Mapping[str, Any]) -> None:
    say(json.dumps(row))


def _flat(row: Mapping[str, Any], top: int) -> dict[str, Any]:
    """The row with a column for each value: `class`, `probability`, `class_2`, ..., `x1`, ...

    Args:
        top: classes that have columns; of those that a row does not name they are empty.
    """
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name == "top":
            for rank in range(1, top + 1):
                entry = value[rank - 1] if rank <= len(value) else dict.fromkeys(value[0], "")
                flat |= {key if rank == 1 else f"{key}_{rank}": item for key, item in entry.items()}
        elif name == "box":
            flat |= dict(zip(("x1", "y1", "x2", "y2"), value, strict=True))
        elif name == "size":
            flat |= dict(zip(("width", "height"), value, strict=True))
        elif isinstance(value, list):
            flat |= {f"{name}_{number}": item for number, item in enumerate(value, 1)}
        else:
            flat[name] = value
    return flat


class _Csv:
    """A heading with the first row; then a line an image."""

    def __init__(self, top: int) -> None:
        self._top = top
        self._headed = False

    def __call__(self, row: Mapping[str, Any]) -> None:
        flat, lines = _flat(row, self._top), io.StringIO()
        writer = csv.writer(lines, lineterminator="\n")
        if not self._headed:
            writer.writerow(flat)
            self._headed = True
        writer.writerow(flat.values())
        say(lines.getvalue().removesuffix("\n"))


class _Table:
    """A line an image, as soon as it is known."""

    def __init__(self) -> None:
        self._width = 0

    def __call__(self, row: Mapping[str, Any]) -> None:
        path = one_line(row["path"])
        self._width = max(self._width, min(60, len(path)))
        ranked = [
            f"{one_line(entry['class'])} {entry.get('probability', entry.get('share')):.4f}" for entry in row["top"]
        ]
        box = [f"box {' '.join(f'{corner:.0f}' for corner in row['box'])}"] if "box" in row else []
        written = [one_line(row[name]) for name in ("mask", "overlay") if name in row]
        say(f"{path:<{self._width}}  {'  '.join([*ranked, *box, *written])}")


# ---- progress ----


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Takes how many more are done: a bar where stderr is a terminal and rows go elsewhere; else a line now and then,
    unless the rows themselves are seen."""
    if sys.stderr.isatty() and not sys.stdout.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        from cnnlab.sinks.drawing import Drawing

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Drawing(sys.stderr), transient=True, redirect_stdout=False) as bar:
            task = bar.add_task("", total=total)
            yield lambda count: bar.advance(task, count)
        return
    done, told = 0, time.perf_counter()

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        if time.perf_counter() - told > SILENT_SECONDS and not sys.stdout.isatty():
            told = time.perf_counter()
            say(f"cnnlab: {done:,} of {total:,}", err=True)

    yield advance
