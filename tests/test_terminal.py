"""What reaches a terminal, and what a terminal can do to a run."""

from __future__ import annotations

import ast
import errno
import io
import logging
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import TINY, record_of, run_folders
from rich.table import Table

import cnnlab
from cnnlab.protocols import Listener
from cnnlab.sinks.drawing import Drawing
from cnnlab.sinks.usual import Unfailing
from cnnlab.terminal import Stream, fitting, guarded, one_line, printable, say
from cnnlab.verbs.sweep_table import report

NASTY = {
    "\x1b[31mred": "\\x1b[31mred",
    "bell\x07": "bell\\x07",
    "over\rwritten": "over\\rwritten",
    "c1\x9b31m": "c1\\x9b31m",
    "\u202egpj.exe": "\\u202egpj.exe",
    "two\nlines": "two\\nlines",
    "para\u2029graph": "para\\u2029graph",
    "byte\udcff": "byte\\xff",
    "tag\U000e0041": "tag\\U000e0041",
    "hidden\u200b": "hidden\\u200b",
}


@pytest.mark.parametrize(("name", "shown"), NASTY.items(), ids=ascii)
def test_what_people_wrote_gives_the_terminal_no_orders(name: str, shown: str):
    assert one_line(name) == shown
    assert printable(name) == (name if "\n" in name else shown), "a message has lines"


@pytest.mark.parametrize("name", ["Straße", "मराठी", "می‌خواهم", "👩‍🚀", "東京 1", "a b"])
def test_names_in_all_the_worlds_writing_stay(name: str):
    assert one_line(name) == name


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("utf-8", "Straße → 東 ▁█ ±"), ("latin-1", "Straße > \\u6771 _# ±"), ("ascii", "Stra\\xdfe > \\u6771 _# ~")],
)
def test_what_an_encoding_lacks(encoding: str, shown: str):
    assert fitting("Straße → 東 ▁█ ±", encoding) == shown
    raw = io.BytesIO()
    out = Stream(io.TextIOWrapper(raw, encoding=encoding))
    out.write("Straße → 東 ▁█ ±")
    out.flush()
    assert raw.getvalue().decode(encoding) == shown


class Refusing(io.StringIO):
    def __init__(self, error: Exception):
        super().__init__()
        self.error, self.asked = error, 0

    def write(self, text: str) -> int:
        self.asked += 1
        raise self.error


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "I/O error"), OSError(errno.ENOSPC, "full"), BrokenPipeError(), ValueError("closed file")],
    ids=lambda error: type(error).__name__ + str(getattr(error, "errno", "")),
)
def test_a_stream_that_refuses_is_asked_once(error: Exception, monkeypatch: pytest.MonkeyPatch, capsys):
    inner = Refusing(error)
    monkeypatch.setattr(sys, "stdout", inner)
    with guarded():
        say("one")
        print("two")
        logging.getLogger("cnnlab.x").warning("a %s", "name\x1b")
    assert inner.asked == 1
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == "a name\\x1b"
    assert len(told) == (1 if isinstance(error, BrokenPipeError) else 2), "the other stream says why"


def test_no_stream_at_all(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with guarded():
        say("nobody")
        say("reads this", err=True)
        print("nor this")
        assert not sys.stdout.isatty()
    assert sys.stdout is None


def test_a_table_takes_no_markup_and_keeps_its_borders_in_ascii():
    raw = io.BytesIO()
    inner = io.TextIOWrapper(raw, encoding="ascii")
    console = Drawing(inner, elsewhere=60)
    table = Table(title="[bold]:smile:")
    table.add_column(console.plain("[a/b]"))
    for name in ("[crop]", "é\x1b\n", "[/b]"):
        table.add_row(console.plain(name))
    console.print(table)
    lines = raw.getvalue().decode("ascii").splitlines()
    assert any("[bold]:smile:" in line for line in lines)
    rows = lines[1:]
    assert len({len(line) for line in rows}) == 1, "every row is as wide as the frame"
    assert all(any(text in line for line in rows) for text in ("[a/b]", "[crop]", "\\xe9\\x1b\\n", "[/b]"))


def test_the_sweeps_table_shows_what_was_typed(capsys: pytest.CaptureFixture[str]):
    def cell(number: int, augment: str, seed: int) -> dict:
        overrides = [f"augment={augment}", f"seed={seed}", f"name=a[/b]{number}"]
        record = {"cell": number, "run": str(number), "overrides": overrides, "status": "completed", "seconds": 1.0}
        return {**record, "reason": None, "metrics": {"test/accuracy": 0.5}}

    cells = [cell(2 * i + s, augment, s) for i, augment in enumerate(("[crop]", "[crop,flip]")) for s in (0, 1)]
    report(cells, Path("[red]folder"), 1.0)
    shown = capsys.readouterr().out
    assert shown.count("[crop] ") == 4 and shown.count("[crop,flip]") == 4, "each twice in both tables"
    assert "a[/b]3" in shown and "[red]folder" in shown


def test_a_display_that_fails_is_left_out(caplog: pytest.LogCaptureFixture):
    class Broken(Listener):
        asked = 0

        def on_step(self, run, result):
            self.asked += 1
            raise RuntimeError("a fault of the display")

    broken = Broken()
    listener = Unfailing(broken)
    listener.on_step(None, None)
    listener.on_step(None, None)
    assert broken.asked == 1
    assert caplog.messages == ["the display failed (RuntimeError: a fault of the display); the run goes on without it"]


def test_one_place_writes():
    """`print` and rich's own console are used where the promises are kept, and nowhere else."""
    root = Path(cnnlab.__file__).parent
    for path in sorted(root.glob("**/*.py")):
        if path.name in ("terminal.py", "drawing.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            assert not called, f"{path}:{node.lineno}: cnnlab.terminal.say"
            if isinstance(node, ast.ImportFrom) and node.module == "rich.console":
                assert "Console" not in {alias.name for alias in node.names}, f"{path}: cnnlab.sinks.drawing.Drawing"


# ---- whole processes ----


def start(folder: Path, *arguments: str, **streams) -> subprocess.Popen:
    command = [sys.executable, "-m", "cnnlab", "train", *TINY, "trainer.epochs=2", *arguments]
    return subprocess.Popen(command, cwd=folder, env={**os.environ, "TERM": "xterm"}, **streams)


@pytest.mark.parametrize("json", [(), ("--json",)], ids=["", "json"])
def test_a_terminal_that_vanishes_ends_no_run(tmp_path: Path, json: tuple[str, ...]):
    master, slave = pty.openpty()
    process = start(tmp_path, *json, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    os.close(master)
    assert process.wait(60) == 0
    (run,) = run_folders(tmp_path)
    assert record_of(run)["status"] == "completed"


@pytest.mark.slow
@pytest.mark.parametrize("json", ["", "--json"])
@pytest.mark.parametrize("streams", [">/dev/full", ">/dev/full 2>/dev/full", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_no_stream_ends_a_run(tmp_path: Path, streams: str, json: str):
    command = f"{sys.executable} -m cnnlab train {' '.join(TINY)} {json} {streams}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    (run,) = run_folders(tmp_path)
    assert record_of(run)["status"] == "completed"
    assert (run / "metrics.jsonl").read_text().count("\n") == 3
