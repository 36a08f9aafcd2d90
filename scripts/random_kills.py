"""How exact is a resume? Kills tiny `cnnlab train` processes and compares what comes of them with unbroken runs.

    python scripts/random_kills.py                       300 kills over 30 experiments, ten minutes of a CPU core
    python scripts/random_kills.py operations            at each file operation of a short run, ten minutes more
    python scripts/random_kills.py --kills 2 --only lbfgs --kills-per-run 3

Each experiment runs once unbroken. Then, kill by kill, it is started in a folder of its own, gets the signal, and is
resumed to its end (or begun again, as the message says, where it had no checkpoint yet). `moments` kills at random
moments between the process's start and its end; `operations` at each operation on a file, one after the other: before
an open, a write, a flush to the disk, a rename, a removal, and in the middle of each write, half of which is then
there.

Compared bit for bit: the last and the best checkpoint (weights, optimizer, moving averages, position, selection, all
of the State but the seconds it took), metrics.jsonl, stats.jsonl, the evidence; the figures in run.json; what
TensorBoard's own reader (`EventAccumulator`) shows of each scalar, and at which steps it has pictures and histograms;
and no half-written file may be left.

Exit code 1 if a run differs. Processes are forked (`scripts/forked.py`), so that a run takes one second.
"""

from __future__ import annotations

import argparse
import builtins
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from forked import TINY, Forked, cnnlab, finished, warm
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

OFTEN = "trainer.checkpoint_minutes=0.0005"
"""Many are killed while they save."""
EXPERIMENTS: dict[str, tuple[str, ...]] = {
    "resnet": ("model=resnet", "model.width=4", "augment=standard", "regularization=ema", "trainer.accumulate=2"),
    "cnn": ("model=cnn",),
    "mlp": ("model=mlp", "model.hidden=[16]", "regularization.dropout=0.3"),
    "vgg": ("model=vgg", "model.width=0.05", "trainer.epochs=3"),
    "plain": ("model=plain20", "model.width=4", "init=orthogonal", "trainer.epochs=3"),
    "momentum, clipped": ("model=cnn", "optim=momentum", "trainer.clip_norm=1", "schedule=one_cycle"),
    "nesterov": ("model=cnn", "optim=nesterov", "schedule=step"),
    "rmsprop, fp16": ("model=cnn", "optim=rmsprop", "trainer.precision=fp16"),
    "adam": ("model=cnn", "optim=adam", "optim.lr=1e-3", "schedule=exponential"),
    "adamw": ("model=cnn", "optim=adamw", "optim.lr=1e-3", "groups.layer_decay=0.8"),
    "muon": ("model=cnn", "optim=muon"),
    "lbfgs": ("model=cnn", "model.widths=[4,8]", "optim=lbfgs", "optim.max_iter=3", "trainer.epochs=3"),
    "newton_cg": ("model=cnn", "model.widths=[4,8]", "optim=newton_cg", "optim.max_iter=3", "trainer.epochs=3"),
    "plateau, patience": ("model=cnn", "schedule=plateau", "schedule.patience=0", "regularization.patience=3"),
    "mixup": ("model=cnn", "augment=[mixup,flip]", "loss=bce"),
    "cutmix": ("model=cnn", "augment=[cutmix,crop]", "regularization=max_norm"),
    "zca": ("model=cnn", "normalize=zca"),
    "full statistics": ("model=cnn", "stats=full", "stats.every=3"),
    "no statistics": ("model=cnn", "stats=off"),
    "stochastic depth": ("model=resnet", "model.width=4", "regularization=stochastic_depth", "norm=group"),
    "gradient noise": ("model=cnn", "intervention=gradient_noise"),
    "cut in an epoch": ("model=cnn", "trainer.max_steps=18", "trainer.eval_every=2"),
    "lsuv, focal": ("model=cnn", "init=lsuv", "loss=focal"),
    "segmentation": ("model=vgg", "model.width=0.05", "data=shapes", "task=segmentation", "trainer.epochs=2"),
    "unet": ("model=cnn", "model.widths=[4,8]", "data=shapes", "task=segmentation", "head=unet", "trainer.epochs=3"),
    "localization": ("model=cnn", "data=shapes", "task=localization", "augment=[flip,crop]", "trainer.epochs=3"),
    "gradual": ("model=cnn", "weights=run", "finetune=gradual", "finetune.norm=update"),
    "penalty": ("model=cnn", "penalty=[group_lasso,orthogonality]", "optim=rmsprop"),
    "rate found": ("model=cnn", "optim.lr=auto", "trainer.auto_accumulate=true"),
    "stream": ("model=cnn", "data=folder", "loading.path=stream", "loading.workers=1", "data.limit=null"),
}
FILES = ("metrics.jsonl", "stats.jsonl", "evidence/sample_loss.f16", "evidence/shape.json")
FIGURES = ("status", "reason", "steps", "epochs", "metrics", "best", "samples", "data_fingerprint", "inputs")
SESSION_FACTS = ("/clock/wall", "/clock/training", "/observer/overhead/", "/records/events/")
"""What no two runs have in common: seconds, and names that hold them."""


@dataclass
class Trial:
    """One run that was killed, once or several times, and how it ended."""

    experiment: str
    moments: list[float] = field(default_factory=list)
    """Seconds after the start (or the resume's start) at which the signal was sent; or the numbers of operations."""
    places: list[str] = field(default_factory=list)
    """What was about to be done, where that is known."""
    resumed_at: list[int] = field(default_factory=list)
    """Steps from which it went on; -1 where there was no checkpoint, and it was begun again."""
    leftovers: int = 0
    """Half-written files that the kills left."""
    differs: list[str] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        return not self.differs


# ---- what is compared ----


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors and plain values of a checkpoint, by path."""
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        yield path, value
        return
    for key, item in items:
        yield from leaves(item, f"{path}/{key}")


def _same(a: Any, b: Any) -> bool:
    import torch

    if isinstance(a, torch.Tensor):
        first, second = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
        return a.dtype == b.dtype and torch.equal(first, second)
    return bool(a == b)


def _checkpoint(path: Path) -> dict[str, Any]:
    from cnnlab.runs import checkpoint

    found = leaves(checkpoint.load(path)) if path.exists() else ()
    return {name: value for name, value in found if not name.startswith(SESSION_FACTS)}


def shown(folder: Path) -> dict[str, Any]:
    """What TensorBoard shows: (step, value) of each scalar, steps of all else."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    reader.Reload()
    tags = reader.Tags()
    return {
        **{tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in tags["scalars"]},
        **{f"image {tag}": {event.step for event in reader.Images(tag)} for tag in tags["images"]},
        **{f"histogram {tag}": [event.step for event in reader.Histograms(tag)] for tag in tags["histograms"]},
    }


def differences(folder: Path, other: Path) -> list[str]:
    """The names of the files, and of the parts of the checkpoints, that differ in a bit."""
    found = []
    for name in ("last.pt", "best.pt"):
        one, two = (_checkpoint(f / "checkpoints" / name) for f in (folder, other))
        parts = [p for p in one.keys() | two.keys() if p not in one or p not in two or not _same(one[p], two[p])]
        found += sorted({f"{name}:{part.split('/')[1]}" for part in parts})
    contents = [[(f / name).read_bytes() if (f / name).exists() else None for name in FILES] for f in (folder, other)]
    found += [name for name, one, two in zip(FILES, *contents, strict=True) if one != two]
    records = [json.loads((f / "run.json").read_text()) for f in (folder, other)]
    found += [f"run.json:{name}" for name in FIGURES if records[0].get(name) != records[1].get(name)]
    curves = [shown(f) for f in (folder, other)]
    found += [f"TensorBoard:{tag}" for tag in curves[0].keys() | curves[1].keys() if not _alike(tag, *curves)]
    return found + [f"left over: {path.name}" for path in folder.rglob(".*.tmp")]


def _alike(tag: str, one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    """Pictures are redrawn at a resume's own steps; the last one is there."""
    if tag.startswith("image "):
        return bool(one.get(tag)) and bool(two.get(tag)) and max(one[tag]) == max(two[tag])
    return repr(one.get(tag)) == repr(two.get(tag))  # NaN is equal to itself


# ---- moments ----


def overrides(name: str, root: Path) -> tuple[str, ...]:
    own = EXPERIMENTS[name]
    places = {
        "stream": (f"data.root={root / 'pictures'}", "data.size=8", "data.channels=1"),
        "gradual": (f"weights.run={root / 'trained'}",),
    }
    return (*TINY, OFTEN, *own, *places.get(name, ()))


def pictures(root: Path) -> None:
    """Digits as PNG, in two folders."""
    import numpy as np
    from PIL import Image

    luck = np.random.default_rng(0)
    for number in range(150):
        path = root / "pictures" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(luck.integers(0, 200, (8, 8), dtype=np.uint8) + number % 2 * 50).save(path)


def go_on(found: Trial, folder: Path, begin: list[str]) -> list[str]:
    """What to type after a kill."""
    from cnnlab.runs import checkpoint

    last = folder / "checkpoints" / "last.pt"
    found.leftovers += len(list(folder.rglob(".*.tmp")))
    found.resumed_at.append(checkpoint.load(last)["clock"]["step"] if last.exists() else -1)
    return ["train", f"resume={folder}"] if last.exists() else begin


def at_moments(name: str, number: int, root: Path, seconds: float, options: argparse.Namespace) -> Trial:
    """A run that is killed at random moments. `seconds` is how long it takes."""
    found = Trial(name)
    luck = random.Random(f"{options.seed} {name} {number}")
    folder = root / "run"
    arguments = begin = ["train", *overrides(name, root), f"hydra.run.dir={folder}"]
    for _ in range(options.kills_per_run):
        process = Forked(arguments, root)
        moment = luck.uniform(0, seconds)
        time.sleep(moment)
        process.kill(getattr(signal, options.signal))
        if process.wait().code == 0:
            return found  # it was done first
        found.moments.append(round(moment, 3))
        arguments = go_on(found, folder, begin)
    finished(arguments, root)
    return found


# ---- operations ----


class Counting:
    """Counts the operations on files of this process, and kills it at one of them.

    Args:
        kill_at: the operation, from 1; 0 kills at none.
        note: gets the number of operations at the end, or what was done at `kill_at`.
    """

    def __init__(self, kill_at: int, note: Path):
        self.count = 0
        self.kill_at = kill_at
        self._note = note
        self._open, self._os_open, self._write = io.open, os.open, os.write
        self._inside = False

    def install(self) -> None:
        """From here on, in this process."""
        io.open = builtins.open = self.open
        for name in ("replace", "rename", "unlink", "mkdir", "rmdir", "truncate", "ftruncate", "fsync", "pwrite"):
            setattr(os, name, partial(self.system_call, name, getattr(os, name)))
        os.open, os.write = self.os_open, self.os_write  # type: ignore[assignment]
        end = os._exit

        def noted(code: int) -> None:
            self.kill_at = 0
            self.say(str(self.count))
            end(code)

        os._exit = noted  # type: ignore[assignment]

    def say(self, text: str) -> None:
        descriptor = self._os_open(self._note, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._write(descriptor, text.encode())

    def at(self, what: str) -> bool:
        """An operation begins; whether it is the one."""
        self.count += 1
        return self.count == self.kill_at

    def before(self, what: str) -> None:
        if self.at(what):
            self.die(what)

    def die(self, what: str) -> None:
        self.say(what)
        os.kill(os.getpid(), signal.SIGKILL)

    def system_call(self, name: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        self.before(f"{name} {_short(arguments[0])}")
        return call(*arguments, **options)

    def os_open(self, path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) and not self._inside:
            self.before(f"open {_short(path)}")
        return self._os_open(path, flags, *arguments, **options)

    def os_write(self, descriptor: int, content: bytes) -> int:
        if descriptor <= 2:
            return self._write(descriptor, content)
        self.before("write a descriptor")
        if content and self.at("half"):
            self._write(descriptor, content[: len(content) // 2])
            self.die("half of a write to a descriptor")
        return self._write(descriptor, content)

    def open(self, path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        writes = set(mode) & set("wax+") and not isinstance(path, int)
        if writes:
            self.before(f"open {_short(path)}")
        file = self._open(path, mode, *arguments, **options)
        return _Counted(file, self, _short(path)) if writes else file


class _Counted:
    """A file whose writes are counted."""

    def __init__(self, file: Any, counting: Counting, name: str):
        self._file, self._counting, self._name = file, counting, name

    def write(self, content: Any) -> Any:
        if self._counting.at("half"):
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            self._counting.die(f"half of a write to {self._name}")
        return self._file.write(content)

    def flush(self) -> None:
        self._counting.before(f"flush {self._name}")
        self._file.flush()

    def truncate(self, *arguments: Any) -> Any:
        self._counting.before(f"truncate {self._name}")
        return self._file.truncate(*arguments)

    def close(self) -> None:
        if not self._file.closed:
            self._counting.before(f"close {self._name}")
        self._file.close()

    def __enter__(self) -> _Counted:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _short(path: Any) -> str:
    return os.path.basename(str(path))  # noqa: PTH119


SHORT = ("model=cnn", "model.widths=[4,8]", "trainer.epochs=2", "regularization=ema", "trainer.checkpoint_minutes=1e-5")


def count_operations(folder: Path, root: Path) -> int:
    note = root / "note"
    finished_with = cnnlab(["train", *TINY, *SHORT, f"hydra.run.dir={folder}"], root, Counting(0, note).install)
    if finished_with.code != 0:
        raise SystemExit(finished_with.errors)
    return int(note.read_text())


def at_operation(number: int, root: Path) -> Trial:
    found = Trial("operations", [number])
    folder, note = root / "run", root / "note"
    begin = ["train", *TINY, *SHORT, f"hydra.run.dir={folder}"]
    ended = cnnlab(begin, root, Counting(number, note).install)
    found.places.append(note.read_text())
    if ended.code != -signal.SIGKILL:
        found.differs.append(f"exit {ended.code}: {ended.errors[-200:]}")
        return found
    finished(go_on(found, folder, begin), root)
    return found


# ---- all of it ----


def trials_of(options: argparse.Namespace, root: Path, status: Callable[[str], None]) -> Iterator[tuple[int, Trial]]:
    """Each trial, with how many kills are asked for in all."""
    if options.what == "operations":
        unbroken = root / "unbroken"
        count = count_operations(unbroken, root)
        for number in range(1, count + 1, options.every):
            yield count // options.every, _judged(partial(at_operation, number, root), unbroken, root)
        return
    names = [name for name in EXPERIMENTS if options.only in name]
    pictures(root)
    finished(["train", *TINY, "model=cnn", "trainer.epochs=2", f"hydra.run.dir={root / 'trained'}"], root)
    share = -(-options.kills // len(names))
    seconds: dict[str, float] = {}
    done, tries = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    # In turn, so that a campaign that is cut short has tried all of them.
    while going := [name for name in names if done[name] < share and tries[name] < 3 * share]:
        for name in going:
            status(name)
            unbroken = root / f"unbroken-{name.replace(' ', '-').replace(',', '')}"
            if name not in seconds:
                began = time.monotonic()
                finished(["train", *overrides(name, root), f"hydra.run.dir={unbroken}"], root)
                seconds[name] = time.monotonic() - began
            tries[name] += 1
            trial = _judged(partial(at_moments, name, tries[name], root, seconds[name], options), unbroken, root)
            done[name] += len(trial.moments)
            yield options.kills, trial


def _judged(attempt: Callable[[], Trial], unbroken: Path, root: Path) -> Trial:
    try:
        found = attempt()
        found.differs += differences(root / "run", unbroken)
    except (SystemExit, OSError, ValueError) as error:
        found = Trial("one that did not go on", differs=[str(error)[-500:]])
    shutil.rmtree(root / "run", ignore_errors=True)
    return found


def table_of(trials: list[Trial]) -> Table:
    table = Table(title="Killed, resumed, compared with the unbroken run")
    for column in ("experiment", "kills", "before a checkpoint", "half-written files", "identical", "differs in"):
        table.add_column(column, justify="left" if column in ("experiment", "differs in") else "right")
    for name in dict.fromkeys(trial.experiment for trial in trials):
        of = [trial for trial in trials if trial.experiment == name]
        starts = [step for trial in of for step in trial.resumed_at]
        differs = sorted({text for trial in of for text in trial.differs})
        table.add_row(
            name,
            str(sum(len(trial.moments) for trial in of)),
            str(starts.count(-1)),
            str(sum(trial.leftovers for trial in of)),
            f"{sum(trial.identical for trial in of)} of {len(of)}",
            "[red]" + ", ".join(differs) if differs else "[green]nothing",
        )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["moments", "operations"], default="moments")
    parser.add_argument("--kills", type=int, default=300, help="signals to send at random moments (default: 300)")
    parser.add_argument("--kills-per-run", type=int, default=1, help="signals to one run (default: 1)")
    parser.add_argument("--only", default="", help="experiments whose name holds this text")
    parser.add_argument("--every", type=int, default=1, help="operations: only each n-th")
    parser.add_argument("--signal", choices=["SIGKILL", "SIGTERM", "SIGINT"], default="SIGKILL")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="write the trials to this file, as they come")
    options = parser.parse_args()
    console = Console()
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="random-kills-") as temporary:
        root = Path(temporary)
        with console.status("imports"):
            warm(root)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            task = progress.add_task("kills")
            for count, trial in trials_of(options, root, lambda name: progress.update(task, description=name)):
                trials.append(trial)
                if options.json is not None:
                    options.json.write_text(json.dumps([asdict(t) for t in trials], indent=2) + "\n")
                if trial.differs:
                    progress.print(f"[red]{asdict(trial)}")
                progress.update(task, total=count, completed=sum(len(t.moments) for t in trials))
    console.print(table_of(trials))
    kills, identical = sum(len(t.moments) for t in trials), sum(t.identical for t in trials)
    console.print(f"{kills} x {options.signal}: {identical} of {len(trials)} runs bit-identical to the unbroken one")
    return 0 if identical == len(trials) else 1


if __name__ == "__main__":
    sys.exit(main())
