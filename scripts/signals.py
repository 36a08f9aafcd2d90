"""How soon does a run end when it is asked to? Sends signals to `cnnlab train`, whatever it does.

    python scripts/signals.py                             60 signals: 15 moments of a run, 4 signals each
    python scripts/signals.py --only frozen --signals INT,INT+INT

Moments: the first second; while the run is built, compiles, trains, saves, evaluates, streams, decodes its cache; with
frozen decoders (SIGSTOP, as a disk that does not answer) in all three; a sweep. Signals: INT, TERM, HUP, and INT twice
within .15 seconds.

Well is: ended within 5 seconds (1 after a second Ctrl-C), with 128 + the signal's number, no process left, the last
checkpoint readable, and `run.json` (where there is one) not left at "running". Seconds are those from the last signal
to the end of the process, on a machine whose load is told (beside them, how many of them the process had a core).
Anything else is listed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

from forked import Forked

from cnnlab.machine.interrupts import descendants

LONG = (
    *("model=cnn", "model.widths=[4,8]", "trainer.device=cpu", "trainer.threads=1", "trainer.batch_size=32"),
    *("trainer.epochs=100000", "trainer.log_every=1", "stats=off", "data.limit=null", "trainer.step=eager"),
)
PICTURES = 800
FIRST, SECOND = 5.0, 1.0
"""Seconds that an end may take."""
APART = 0.15
PATIENCE = 180.0
"""Seconds to end, and twice as many to come to the moment, before it is given up."""


@dataclass
class Case:
    """`seconds` are from the last signal to the end, `computed` of them on a core; `code` is `None` where it did not
    end."""

    moment: str
    signals: str
    code: int | None = None
    seconds: float = 0.0
    computed: float = 0.0
    load: float = 0.0
    status: str | None = None
    orphans: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    said: str = ""


REAL = ("after", "built", "compiling", "streaming", "frozen")
"""Moments (by how their names begin) of processes that are started as a user starts them: their start, or what the
interpreter's own end does to decoders, is looked at."""
Ready = Callable[["Process"], bool]


class Process:
    """A `cnnlab train` in a session of its own.

    Args:
        real: started as a user starts it; else forked (`scripts/forked.py`), which spares the imports.
    """

    def __init__(self, arguments: list[str], place: Path, *, real: bool):
        self.run = place / "run"
        self.began = time.monotonic()
        if not real:
            self.pid = Forked(["train", *arguments], place).pid
            return
        with (place / "stdout").open("wb") as output:
            call = [sys.executable, "-m", "cnnlab", "train", *arguments]
            self._popen = subprocess.Popen(
                call, cwd=place, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        self.pid = self._popen.pid

    def code(self) -> int | None:
        """Its exit code, or minus the signal that ended it; `None` while it goes on. To be asked once it has ended."""
        if self.alive():
            return None
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def stat(self) -> list[str]:
        with suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return []

    def alive(self) -> bool:
        """It is not waited for, so that it can be asked what it has computed when it has ended."""
        return bool(found := self.stat()) and found[0] != "Z"

    def computed(self) -> float:
        """Seconds on a core so far."""
        found = self.stat()
        return sum(map(int, found[11:13])) / os.sysconf("SC_CLK_TCK") if found else 0.0

    def records(self) -> list[str]:
        """The splits of the records so far."""
        path = next(iter(self.run.glob("**/metrics.jsonl")), None)
        if path is None:
            return []
        return [json.loads(line)["split"] for line in path.read_text().splitlines() if line.endswith("}")]

    def below(self, text: str) -> list[int]:
        """The processes that it has started, with `text` in their command line."""
        return [pid for pid in descendants(self.pid) if text in command_of(pid)]

    def until(self, ready: Ready) -> bool:
        while not ready(self):
            if not self.alive() or time.monotonic() - self.began > 2 * PATIENCE:
                return False
            time.sleep(0.02)
        return True

    def session(self) -> list[int]:
        """The processes of its session."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208 (a process may end meanwhile)
            with suppress(OSError, ValueError, IndexError):
                state, _, _, session = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.pid and state != "Z":
                    found.append(int(name))
        return found


def command_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


# ---- moments ----


def after(seconds: float) -> Ready:
    return lambda process: time.monotonic() - process.began >= seconds


def claimed(process: Process) -> bool:
    return (process.run / ".hydra" / "config.yaml").exists()


def training(process: Process) -> bool:
    return len(process.records()) >= 3


def evaluating(process: Process) -> bool:
    return "train" in process.records()


def testing(process: Process) -> bool:
    return "val" in process.records()


def compiling(process: Process) -> bool:
    return bool(process.below("cc1plus"))


def decoding(process: Process) -> bool:
    return len(process.below("cnnlab.data.decode")) >= 2


def frozen(ready: Ready) -> Ready:
    """Then the decoders stand still, for long enough that the run waits for them."""

    def freeze(process: Process) -> bool:
        if not ready(process) or not (decoders := process.below("cnnlab.data.decode")):
            return False
        for pid in decoders:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(1)
        return True

    return freeze


def moments(pictures: Path, cache: Path) -> dict[str, tuple[tuple[str, ...], Ready]]:
    folder = ("data=folder", f"data.root={pictures}", "data.size=64", f"data.cache={cache}", "data.val=0.3")
    stream = (*folder, "loading.path=stream", "loading.workers=2")
    mapped = (*folder, "data.workers=2", "loading.path=mapped")
    slowly = ("data=shapes", "data.train=32", "data.val=20000", "data.test=20000", "trainer.eval_batch_size=4")
    compiled = ("trainer.step=compiled", "trainer.threads=2")
    return {
        "after 0.2 s": ((), after(0.2)),
        "after 0.5 s": ((), after(0.5)),
        "after 1.0 s": ((), after(1.0)),
        "built": ((), claimed),
        "compiling": (compiled, compiling),
        "training": ((), training),
        "saving": (("trainer.checkpoint_minutes=1e-6",), training),
        "evaluating": (slowly, evaluating),
        "last test": ((*slowly[:2], "data.val=32", *slowly[3:], "trainer.max_steps=1"), testing),
        "streaming": (stream, training),
        "decoding a cache": (mapped, decoding),
        "frozen decoders, training": (stream, frozen(training)),
        "frozen decoders, evaluating": ((*stream, "trainer.batch_size=1000", "data.limit=32"), frozen(evaluating)),
        "frozen decoders, a cache": (mapped, frozen(decoding)),
        "sweep": (("-m", "seed=0,1"), training),
    }


def make_pictures(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    luck = np.random.default_rng(0)
    for number in range(PICTURES):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(luck.integers(0, 255, (200, 200, 3), dtype=np.uint8)).save(path, compress_level=1)


# ---- one of them ----


def tried(moment: str, names: str, place: Path, pictures: Path) -> Case:
    found = Case(moment, names)
    own, ready = moments(pictures, place / "cache")[moment]
    where = ("hydra.sweep.dir" if "-m" in own else "hydra.run.dir") + f"={place / 'run'}"
    arguments = [*own[:1], *LONG, *own[1:], where] if "-m" in own else [*LONG, *own, where]
    process = Process(arguments, place, real=moment.startswith(REAL))
    try:
        if not process.until(ready):
            found.wrong.append("never came to the moment")
            return found
        asked = [getattr(signal, f"SIG{name}") for name in names.split("+")]
        found.load = os.getloadavg()[0]
        for count, number in enumerate(asked):
            time.sleep(APART if count else 0)
            os.kill(process.pid, number)
        sent, before = time.monotonic(), process.computed()
        while process.alive() and time.monotonic() - sent < PATIENCE:
            time.sleep(0.01)
        found.seconds = round(time.monotonic() - sent, 2)
        found.computed = round(process.computed() - before, 2)
        found.code = process.code()
        time.sleep(0.2)
        found.orphans = [command_of(pid)[:100] for pid in process.session() if pid != process.pid]
        judge(found, process.run, asked[-1])
    finally:
        for pid in {*process.session(), *descendants(process.pid)}:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(process.pid, 0)
        texts = [(place / name).read_text(errors="replace") for name in ("stdout", "stderr") if (place / name).exists()]
        found.said = " ".join(text[-300:] for text in texts)
    return found


def judge(found: Case, run: Path, number: int) -> None:
    from cnnlab.errors import CheckpointError
    from cnnlab.runs import checkpoint

    early = found.moment.startswith("after") and not run.exists()  # Python may not have come to cnnlab yet
    if found.code not in (128 + number, -number if early else None):
        found.wrong.append(f"exit {found.code}, expected {128 + number}")
    if found.seconds > (SECOND if "+" in found.signals else FIRST):
        found.wrong.append(f"{found.seconds} s")
    if found.orphans:
        found.wrong.append(f"{len(found.orphans)} left")
    records = sorted(run.glob("**/run.json"))
    found.status = json.loads(records[0].read_text())["status"] if records else None
    if found.status == "running":
        found.wrong.append("the status is left at running")
    for path in run.glob("**/last.pt"):
        try:
            checkpoint.load(path)
        except CheckpointError as error:
            found.wrong.append(str(error))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="moments whose name holds this text")
    parser.add_argument("--signals", default="INT,TERM,HUP,INT+INT", help="default: INT,TERM,HUP,INT+INT")
    parser.add_argument("--json", type=Path, help="write the cases to this file, as they come")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background, and so it would be inherited
    cases: list[Case] = []
    with tempfile.TemporaryDirectory(prefix="signals-") as temporary:
        root = Path(temporary)
        make_pictures(root / "pictures")
        for name in ("cli", "verbs.train", "building.launch", "building.trial", "data.folder", "sinks.tensorboard"):
            import_module(f"cnnlab.{name}")
        for names in options.signals.split(","):
            for moment in moments(root, root):
                if options.only not in moment:
                    continue
                place = root / str(len(cases))
                place.mkdir()
                case = tried(moment, names, place, root / "pictures")
                cases.append(case)
                told = "; ".join(case.wrong) or "well"
                took = f"{case.seconds:5.2f} s ({case.computed:.2f} computed)"
                line = f"{names:<8} {moment:<28} exit {case.code}  {took}  load {case.load:4.1f}"
                print(f"{line}  {case.status or '-':<12} {told}", flush=True)
                if options.json is not None:
                    options.json.write_text(json.dumps([asdict(c) for c in cases], indent=2) + "\n")
    for twice, words in ((False, "once"), (True, "twice")):
        seconds = sorted(case.seconds for case in cases if ("+" in case.signals) is twice)
        if seconds:
            print(f"{words}: {len(seconds)}, median {seconds[len(seconds) // 2]} s, longest {seconds[-1]} s")
    well = sum(not case.wrong for case in cases)
    print(f"{well} of {len(cases)} well; {sum(bool(case.orphans) for case in cases)} with processes left")
    return int(well < len(cases))


if __name__ == "__main__":
    sys.exit(main())
