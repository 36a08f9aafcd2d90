"""How exact is a resume? Kills real `cnnlab train` processes at random moments and compares what comes of them.

    python scripts/random_kills.py                          50 kills, about ten minutes on two CPU cores
    python scripts/random_kills.py --kills 10 optim=rmsprop
    python scripts/random_kills.py --kills-per-run 3 --signal SIGTERM

One run goes through unbroken. Then, kill by kill, the same run is started in a folder of its own, gets the signal at
a random moment after its first checkpoint (which it writes before its first update), is resumed, and goes on to its
end. Compared bit for bit with the unbroken run: the last checkpoint (weights, optimizer, moving averages, position,
selection, all of the State but the seconds it took), metrics.jsonl, stats.jsonl and the recorded sample losses.

Exit code 1 if a run differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

OVERRIDES = (
    "trainer.device=cpu",
    "trainer.threads=1",
    "trainer.epochs=25",
    "trainer.accumulate=2",
    "trainer.checkpoint_minutes=0.002",  # many are killed while they save
    "trainer.log_every=7",
    "optim=momentum",
    "augment=standard",
    "regularization=ema",
    "stats.every=5",
)
FILES = ("metrics.jsonl", "stats.jsonl", "evidence/sample_loss.f16")
SESSION_FACTS = {"/clock/wall", "/clock/training"}
"""What no two runs have in common: seconds."""


@dataclass
class Trial:
    """One run that was killed, once or several times, and how it ended."""

    number: int
    moments: list[float] = field(default_factory=list)
    """Seconds after the first checkpoint (or after the resume's start) at which the signal was sent."""
    resumed_at: list[int] = field(default_factory=list)
    """Steps from which it went on."""
    leftovers: int = 0
    """Half-written files that the kills left."""
    differs: list[str] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        return not self.differs


def train(*arguments: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cnnlab", "train", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"cnnlab train ended with {process.returncode}:\n{errors.decode()}")


def await_file(path: Path, process: subprocess.Popen[bytes]) -> None:
    while not path.exists():
        if process.poll() is not None:
            finish(process)
            return
        time.sleep(0.002)


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


def differences(folder: Path, other: Path) -> list[str]:
    """The names of the files, and of the parts of the last checkpoints, that differ in a bit."""
    import torch

    from cnnlab.runs import checkpoint

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            first, second = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
            return a.dtype == b.dtype and torch.equal(first, second)
        return bool(a == b)

    one, two = (dict(leaves(checkpoint.load(f / "checkpoints" / "last.pt"))) for f in (folder, other))
    parts = [p for p in one.keys() | two.keys() if p not in SESSION_FACTS]
    found = {p.split("/")[1] for p in parts if p not in one or p not in two or not same(one[p], two[p])}
    return sorted(found) + [name for name in FILES if (folder / name).read_bytes() != (other / name).read_bytes()]


def trial(number: int, folder: Path, unbroken: Path, seconds: float, options: argparse.Namespace) -> Trial:
    """Starts a run, kills and resumes it, and compares its end. `seconds` is how long its training takes."""
    from cnnlab.runs import checkpoint

    found = Trial(number)
    luck = random.Random(f"{options.seed} {number}")
    last = folder / "checkpoints" / "last.pt"
    process = train(*OVERRIDES, *options.overrides, f"hydra.run.dir={folder}")
    await_file(last, process)
    for _ in range(options.kills_per_run):
        moment = luck.uniform(0, seconds)
        time.sleep(moment)
        if process.poll() is not None:
            break  # it was done first
        process.send_signal(getattr(signal, options.signal))
        process.communicate()
        found.moments.append(moment)
        found.leftovers += len(list(folder.rglob(".*.tmp")))
        found.resumed_at.append(checkpoint.load(last)["clock"]["step"])
        process = train(f"resume={folder}")
    finish(process)
    found.differs = differences(folder, unbroken)
    return found


def table_of(trials: list[Trial], console: Console) -> None:
    table = Table(title="Killed, resumed, compared with the unbroken run")
    for column in ("run", "killed after (s)", "resumed at step", "half-written files", "differs in"):
        table.add_column(column, justify="left" if column == "differs in" else "right")
    for found in trials:
        table.add_row(
            str(found.number),
            ", ".join(f"{moment:.2f}" for moment in found.moments) or "it was done first",
            ", ".join(map(str, found.resumed_at)),
            str(found.leftovers),
            "[red]" + ", ".join(found.differs) if found.differs else "[green]nothing",
        )
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as for cnnlab train, after the script's own")
    parser.add_argument("--kills", type=int, default=50, help="signals to send (default: 50)")
    parser.add_argument("--kills-per-run", type=int, default=1, help="signals to one run (default: 1)")
    parser.add_argument("--signal", choices=["SIGKILL", "SIGTERM", "SIGINT"], default="SIGKILL")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="write the trials to this file")
    options = parser.parse_args()
    console = Console()
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="random-kills-") as root:
        unbroken = Path(root) / "unbroken"
        with console.status("the unbroken run"):
            finish(train(*OVERRIDES, *options.overrides, f"hydra.run.dir={unbroken}"))
        seconds = json.loads((unbroken / "run.json").read_text())["seconds"]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            task = progress.add_task("kills", total=options.kills)
            while sum(len(t.moments) for t in trials) < options.kills:
                folder = Path(root) / f"run-{len(trials) + 1}"
                trials.append(trial(len(trials) + 1, folder, unbroken, seconds, options))
                identical = sum(t.identical for t in trials)
                progress.update(
                    task,
                    completed=sum(len(t.moments) for t in trials),
                    description=f"{identical} of {len(trials)} identical",
                )
                shutil.rmtree(folder)
    table_of(trials, console)
    kills, identical = sum(len(t.moments) for t in trials), sum(t.identical for t in trials)
    console.print(f"{kills} x {options.signal}: {identical} of {len(trials)} runs bit-identical to the unbroken one")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(t) for t in trials], indent=2) + "\n")
    return 0 if identical == len(trials) else 1


if __name__ == "__main__":
    sys.exit(main())
