"""Does `cnnlab` hold what it promises wherever it is started? Tries names, consoles and environments on every verb.

    python scripts/surroundings.py                     all of it; an hour of a CPU core
    python scripts/surroundings.py names --only C      one locale
    python scripts/surroundings.py consoles environments

`names`: 14 sets of what people write (escape sequences, bells, carriage returns, C1, bidi, line breaks, bytes that are
no UTF-8, emoji, 255 bytes, leading dashes, markup, percent signs, quotes, spaces) as class names, files, folders and
overrides, in four locales. `consoles`: a terminal that is closed before the first step and in the middle, `/dev/full`,
a closed stdout, one that is `None`, a reader that goes away, each with `--json` and without. `environments`: a user
without home and name, left-over variables of torchrun, a removed working folder, no temporary folder, few descriptors,
narrow and dumb terminals.

Well is: a documented exit code, no traceback, in the output nothing that gives a terminal orders; a training on a
console that fails is completed. Anything else is listed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import collections
import csv
import ctypes
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

from forked import TINY, Ended, Forked, finished, warm
from full_disks import at_step
from random_kills import pictures

_WRITTEN = {
    "escape": "\x1b[31mred\x1b[2J",
    "bell": "bell\x07\x08",
    "carriage return": "over\rwritten",
    "C1": "c1\x9b31m\x85",
    "bidi": "\u202egpj.\u2066x",
    "line break": "two\nlines\u2028three",
    "bytes": os.fsdecode(b"caf\xe9"),
    "emoji": "👩‍🚀 東京",
    "long": "l" * 255,
    "dash": "-rf",
    "markup": "[red]x[bold] :smile: [link=x]",
    "percent": "100%d %(x)s {0} ${oc.env:HOME}",
    "quotes": 'it\'s "q" \\ `x`',
    "spaces": "  a  b ",
}
NAMES = {what: os.fsdecode(name.encode(errors="surrogateescape")) for what, name in _WRITTEN.items()}
"""As the process has them: where its files' names are ASCII, bytes beyond are Python's stand-ins for them."""
LOCALES = {
    "C": {"LC_ALL": "C"},
    "C.UTF-8": {"LC_ALL": "C.UTF-8"},
    "ASCII": {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "Latin-1": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "iso8859-1"},
}
"""`C` is coerced to UTF-8 by Python; the third is what an old system has; the fourth a terminal that is not UTF-8."""
SMALL = (*TINY, "model=cnn", "model.widths=[4]", "trainer.max_steps=4")
FILES = ("data=folder", "data.size=8", "data.channels=1", "data.limit=null")
ORDERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
FAULTS = ("Traceback", "fault of cnnlab", "Exception ignored", "UnicodeEncodeError", "Fatal Python")

Found = tuple[str, list[str]]


def verbs(run: Path, data: Sequence[str], photos: Path, out: Path) -> dict[str, list[str]]:
    """A command of each verb; those that read a run read `run`."""
    return {
        "train": ["train", *SMALL, *data, f"hydra.run.dir={quoted(out / 'again')}"],
        "train --json": ["train", *SMALL, *data, "--json", f"hydra.run.dir={quoted(out / 'json')}"],
        "train -m": ["train", "-m", *SMALL, *data, "seed=0,1", f"hydra.sweep.dir={quoted(out / 'sweep')}"],
        "resume": ["train", resume(run)],
        "eval": ["eval", str(run)],
        "eval --json": ["eval", str(run), "--json"],
        "predict": ["predict", str(run), str(photos)],
        "predict --csv": ["predict", str(run), str(photos), "--csv"],
        "predict --json": ["predict", str(run), str(photos), "--json"],
        "explain": ["explain", str(run), "--count", "2", "--out", str(out / "maps")],
        "explain files": ["explain", str(run), str(photos), "--out", str(out / "maps2"), "--json"],
        "export": ["export", str(run), "--format", "state_dict", "--out", str(out / "exported")],
        "summary": ["summary", *SMALL, *data],
        "check": ["check", *SMALL, *data],
        "probe": ["probe", *SMALL, *data, "--no-figure"],
        "lr-find": ["lr-find", str(run), "--steps", "12", "--no-figure"],
        "landscape": ["landscape", str(run), "--parts", "noise", "--samples", "32", "--no-figure"],
        "help": ["help", "model=cnn"],
        "unknown verb": ["evla", str(run)],
    }


CODES = (0, 1, 2, 3)


def quoted(path: Path | str) -> str:
    """As Hydra takes any text: of backslashes, only those before a quote are doubled."""
    text = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), str(path))
    return "'" + text.replace("${", "\\${") + "'"


def resume(path: Path) -> str:
    """No part of a config, so nothing in it is looked up."""
    return f"resume={quoted(path)}".replace("\\${", "${")


def complaints(ended: Ended, place: Path, codes: Sequence[int] = CODES, *, terminal: bool = False) -> list[str]:
    """What is wrong with how a command ended, and with what it wrote in `place`."""
    found = [] if ended.code in codes else [f"exit {ended.code}"]
    for name in ("stdout", "stderr"):
        content = (place / name).read_bytes() if (place / name).exists() else b""
        text = content.decode("utf-8", "surrogateescape")
        if not terminal and ((orders := ORDERS.findall(text)) or "\udce9" in text):
            found.append(f"raw on {name}: {sorted({ascii(one) for one in orders})}")
        found += [f"{fault} on {name}" for fault in FAULTS if fault in text]
    return found + ([ascii(ended.errors[-400:])] if found else [])


# ---- names ----


def named_photos(root: Path) -> tuple[Path, Path]:
    """A data set with all names as classes, and a folder with a file of each name. What a file system does not take
    (255 bytes and a suffix) is shortened."""
    from PIL import Image

    data, photos = root / "named", root / "photos"
    photos.mkdir()
    for value, name in enumerate(NAMES.values()):
        (data / name).mkdir(parents=True)
        for number in range(4):
            Image.new("L", (8, 8), value * 10 + number).save(data / name / f"{number}.png")
        Image.new("L", (8, 8), value).save(photos / f"{name[:250]}.png")
    return data, photos


def names(root: Path, locale: str) -> Iterator[Found]:
    data, photos = named_photos(root)
    here = root / "here"
    overrides = (*FILES, f"data.root={quoted(data)}", f"data.cache={root / 'cache'}")
    run = root / "run"
    finished(["train", *SMALL, *overrides, f"hydra.run.dir={run}"], here)
    for verb, command in verbs(run, overrides, photos, root / "out").items():
        found = complaints(Forked(command, here).wait(), here)
        yield f"{locale}: classes, {verb}", found + [text for text in read_back(verb, here) if text]
    found = complaints(
        on_a_terminal(["train", *SMALL, *overrides, f"hydra.run.dir={root / 'shown'}"], here), here, (0,)
    )
    yield f"{locale}: classes, train on a terminal", found
    for what, name in NAMES.items():
        place = root / "places" / name
        shutil.copytree(root / "named" / NAMES["spaces"], place / "a")
        shutil.copytree(root / "named" / NAMES["dash"], place / "b")
        short = (*FILES, f"data.root={quoted(place)}")
        folder = root / "runs" / name
        commands = {
            "train": ["train", *SMALL, *short, f"hydra.run.dir={quoted(folder)}"],
            "resume": ["train", resume(folder)],
            "eval": ["eval", str(folder)],
            "predict": ["predict", str(folder), str(place / "a"), "--json"],
            "explain": ["explain", str(folder), str(place / "a" / "0.png")],
            "export": ["export", str(folder), "--format", "state_dict"],
            "lr-find": ["lr-find", str(folder), "--steps", "12"],
        }
        for verb, command in commands.items():
            yield f"{locale}: folders, {what}, {verb}", complaints(Forked(command, here).wait(), here, (0,))
        for command in (
            ["train", *SMALL, f"name={quoted(name)}", f"paths.outputs={root / 'o'}"],
            ["train", f"model={name}"],
            ["train", f"{name}=1"],
            ["train", f"data.root={name}"],
            ["train", "data=folder", f"data.root={quoted(name)}"],
            ["train", "data=folder", f"data.root={quoted(data)}", f"data.classes={quoted(name)}"],
            ["eval", name],
            ["predict", str(run), name],
            ["explain", str(run), "--targets", name],
            ["help", name],
            [name],
        ):
            shown = ascii(" ".join(command[:1] if command[0] == name else command))[:60]
            yield f"{locale}: words, {what}, {shown}", complaints(Forked(command, here).wait(), here)


def read_back(verb: str, place: Path) -> Iterator[str]:
    """What a program cannot read of what was printed for it."""
    out = (place / "stdout").read_text(errors="surrogateescape")
    try:
        if verb == "predict --csv":
            yield "" if len({len(row) for row in csv.reader(io.StringIO(out))}) == 1 else "rows of several lengths"
        elif verb == "predict --json":
            yield "" if all(isinstance(json.loads(line), dict) for line in out.splitlines()) else "no documents"
        elif "--json" in verb:
            json.loads(out)
    except ValueError as error:
        yield f"not readable: {error}"


def on_a_terminal(command: Sequence[str], place: Path, hook: Callable[[], None] | None = None) -> Ended:
    """In a terminal of its own; what it showed is kept without rich's own sequences (colours, cursor)."""
    master, slave = pty.openpty()
    shown = bytearray()

    def read() -> None:
        with suppress(OSError):
            while part := os.read(master, 1 << 16):
                shown.extend(part)

    def become() -> None:
        for number in range(3):
            os.dup2(slave, number)
        os.environ["TERM"] = "xterm"
        if hook is not None:
            hook()

    process = Forked(command, place, become)
    os.close(slave)
    reader = threading.Thread(target=read)
    reader.start()
    ended = process.wait()
    reader.join(5)
    os.close(master)
    plain = re.sub(rb"\x1b\[[0-9;?]*[A-Zlhm]|\r", b"", bytes(shown).replace(b"\x1b[31mred", b"\x07"))
    (place / "stdout").write_bytes(plain)
    return ended


# ---- consoles ----


def trained(root: Path) -> Path:
    if not (root / "run").exists():
        finished(["train", *SMALL, f"hydra.run.dir={root / 'run'}"], root / "here")
    return root / "run"


def closed(number: int) -> None:
    os.close(number)
    setattr(sys, {0: "stdin", 1: "stdout", 2: "stderr"}[number], None)


def full(number: int) -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    os.dup2(descriptor, number)
    os.close(descriptor)


def gone_reader(number: int) -> None:
    read, write = os.pipe()
    os.dup2(write, number)
    os.close(read)
    os.close(write)


def each(change: Callable[[int], None], numbers: Sequence[int]) -> None:
    for number in numbers:
        change(number)


def nothing() -> None:
    sys.stdin = sys.stdout = sys.stderr = None  # type: ignore[assignment]


def vanished(step: int) -> None:
    """A terminal whose other end is closed after so many updates; 0: before anything."""
    master, slave = pty.openpty()
    for number in range(3):
        os.dup2(slave, number)
    os.close(slave)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup; without it, a lost terminal is a signal to save
    os.environ["TERM"] = "xterm"
    if step == 0:
        os.close(master)
    else:
        at_step(step, partial(os.close, master))


CONSOLES: dict[str, Callable[[], None]] = {
    "a terminal closed before the first step": partial(vanished, 0),
    "a terminal closed in the middle": partial(vanished, 3),
    "stdout full": partial(full, 1),
    "stderr full": partial(full, 2),
    "both full": partial(each, full, (1, 2)),
    "stdout closed": partial(closed, 1),
    "stderr closed": partial(closed, 2),
    "all closed": partial(each, closed, (0, 1, 2)),
    "none": nothing,
    "a reader that went away": partial(gone_reader, 1),
}


def consoles(root: Path, wanted: Collection[str]) -> Iterator[Found]:
    here, run = root / "here", trained(root)
    for console, hook in CONSOLES.items():
        for verb, command in verbs(run, (), root / "pictures" / "a", root / "out").items():
            if wanted and verb not in wanted:
                continue
            shutil.rmtree(root / "out", ignore_errors=True)
            trains = verb.startswith(("train", "resume"))
            if "middle" in console and not trains:  # it is closed after some updates
                continue
            ended = Forked(command, here, hook).wait()
            found = complaints(ended, here, (0,) if trains else CODES, terminal=True)
            for record in (root / "out").rglob("run.json"):
                status = json.loads(record.read_text())["status"]
                found += [] if status == "completed" else [f"{record.parent.name}: {status}"]
            yield f"{console}, {verb}: exit {ended.code}", found


# ---- environments ----


def nameless() -> None:
    """A user without name and home, as `docker run --user 12345` has it; the files stay readable."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x10000000) != 0:  # CLONE_NEWUSER
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text("12345 0 1")
    Path("/proc/self/gid_map").write_text("12345 0 1")
    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)


def deleted() -> None:
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.environ["PWD"] = folder
    Path(folder).rmdir()


def few_descriptors() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))


def variables(**values: str | None) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if "TMPDIR" in values:
        tempfile.tempdir = None


ENVIRONMENTS: dict[str, tuple[Callable[[], None], Sequence[int]]] = {
    "a user without name and home": (nameless, (0,)),
    "RANK=3": (partial(variables, RANK="3"), (0,)),
    "WORLD_SIZE=4": (partial(variables, WORLD_SIZE="4"), (0,)),
    "RANK=3 WORLD_SIZE=4 LOCAL_RANK=x": (partial(variables, RANK="3", WORLD_SIZE="4", LOCAL_RANK="x"), (0,)),
    "the working folder is gone": (deleted, (2,)),
    "no temporary folder": (partial(variables, TMPDIR="/nowhere"), (0, 1)),
    "40 descriptors": (few_descriptors, (0, 1)),
    "COLUMNS=20": (partial(variables, COLUMNS="20", LINES="3"), (0,)),
    "TERM=dumb, NO_COLOR": (partial(variables, TERM="dumb", NO_COLOR="1"), (0,)),
    "no PATH": (partial(variables, PATH=None), (0,)),
    "an unknown locale": (partial(variables, LC_ALL="xx_YY.nothing", LANG="xx"), (0,)),
    "HOME is a file": (partial(variables, HOME="/etc/hostname"), (0,)),
}


def environments(root: Path, wanted: Collection[str]) -> Iterator[Found]:
    here, run = root / "here", trained(root)
    for environment, (hook, codes) in ENVIRONMENTS.items():
        for verb, command in verbs(run, (), root / "pictures" / "a", root / "out").items():
            if wanted and verb not in wanted:
                continue
            shutil.rmtree(root / "out", ignore_errors=True)
            ended = Forked(command, here, hook).wait()
            allowed = (2,) if verb == "unknown verb" else codes
            yield f"{environment}, {verb}: exit {ended.code}", complaints(ended, here, allowed)


# ---- all of it ----

CAMPAIGNS = {"consoles": consoles, "environments": environments}


@contextmanager
def warmed() -> Iterator[Path]:
    """A folder for a campaign, once all is imported that its runs import."""
    with tempfile.TemporaryDirectory(prefix="surroundings-") as temporary:
        root = Path(temporary)
        (root / "here").mkdir()
        warm(root / "here")
        pictures(root)
        yield root


def in_locale(locale: str) -> Iterator[Found]:
    """The names, in a process that was started in the locale: Python reads it once."""
    mine = ("LC_", "LANG", "PYTHONIO", "PYTHONUTF8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
    command = [sys.executable, __file__, "names", "--inside", locale]
    with subprocess.Popen(command, env=environment | LOCALES[locale], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            what, found = json.loads(line)
            yield what, found
    if process.returncode:
        yield locale, [f"the campaign ended with {process.returncode}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaigns", nargs="*", metavar="CAMPAIGN", help="names, consoles, environments (all)")
    parser.add_argument("--only", choices=list(LOCALES), help="one locale")
    parser.add_argument("--verb", action="append", default=[], help="consoles, environments: only with these (all)")
    parser.add_argument("--inside", choices=list(LOCALES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        with warmed() as root:
            for found in names(root, options.inside):
                print(json.dumps(found), flush=True)
        return 0
    outcomes: collections.Counter[tuple[str, str]] = collections.Counter()

    def told(campaign: str, found: Found) -> None:
        outcomes[campaign, "NOT" if found[1] else "well"] += 1
        if found[1]:
            print(f"{campaign}: {found[0]}: {'; '.join(found[1])}", flush=True)

    began = time.monotonic()
    asked = options.campaigns or ("names", *CAMPAIGNS)
    with suppress(KeyboardInterrupt):  # what was tried until then is told
        for locale in (LOCALES if options.only is None else (options.only,)) if "names" in asked else ():
            for found in in_locale(locale):
                told(f"names, {locale}", found)
        with warmed() if set(asked) & set(CAMPAIGNS) else nullcontext(Path()) as root:
            for campaign in CAMPAIGNS.keys() & set(asked):
                for found in CAMPAIGNS[campaign](root, options.verb):
                    told(campaign, found)
    for key, count in sorted(outcomes.items()):
        print(*key, count)
    print(f"{time.monotonic() - began:.0f} s")
    return int(any(key[1] == "NOT" for key in outcomes))


if __name__ == "__main__":
    sys.exit(main())
