"""What becomes of a run where the disk is full, read-only, broken, or loses folders? Tries it on small file systems.

    sudo python scripts/full_disks.py                       all of it; mounting takes root, on Linux
    sudo python scripts/full_disks.py --only sizes --seed 1

Kinds: `sizes` (a training on a disk with 20 sizes of room, on tmpfs and on ext4 in a file), `verbs` (a resume, and the
verbs that write, with three sizes of room), `limits` (`ulimit -f`), `readonly` (run folder, its parent, cache,
temporary folder, home), `broken` (a disk that answers with an input/output error from a step on), `vanish` (each
folder of a run, the run itself, the cache and the data, taken away between two steps).

Well is: exit 0, or exit 1 to 3 with one message that names a path and what to type; no traceback; the status in
`run.json` true; each checkpoint whole. Where the disk has room again, the run goes on (or begins again, where it had no
checkpoint) and ends bit for bit as on a good disk. Anything else is listed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from forked import TINY, Ended, cnnlab, finished, warm
from random_kills import differences, pictures

from cnnlab.runs.folder import RunDir

RUN = (
    *(*TINY, "model=cnn", "model.widths=[8,16]", "regularization=ema"),
    "trainer.checkpoint_minutes=0.0005",
)
"""The same records whatever the clock says."""
ROOM = 24 << 20
BLOCK = 4096
SHUTDOWN = 0x8004587D
"""The ioctl by which a file system answers with errors from then on (FS_IOC_SHUTDOWN of Linux's ext4)."""
REMEDY = re.compile(
    r"free space|type |make (it|the folder) writable|raise the limit|look at the disk|go on with|put that one back"
)


# ---- disks ----


class Disk:
    """A small file system of its own, on which the room that is left can be set.

    Args:
        kind: `tmpfs` or `ext4`.
    """

    def __init__(self, kind: str, root: Path):
        self.kind, self.path, self._image = kind, root / kind, root / f"{kind}.img"
        self.path.mkdir()
        if kind == "ext4":
            with self._image.open("wb") as file:
                file.truncate(ROOM)
            _system("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(self._image))
        self._mount()

    def _mount(self) -> None:
        source = ("-o", f"size={ROOM}", "none") if self.kind == "tmpfs" else ("-o", "loop", str(self._image))
        _system("mount", "-t", self.kind, *source, str(self.path))

    def leave(self, room: int) -> None:
        """Fills the disk up but for so many bytes."""
        self.clear()
        while (left := self.free() - room) >= BLOCK:
            number = os.open(self.path / "filler", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            try:
                os.write(number, bytes(min(left, 1 << 20)))
            except OSError:
                break
            finally:
                os.close(number)

    def clear(self) -> None:
        (self.path / "filler").unlink(missing_ok=True)

    def empty(self) -> None:
        for path in self.path.iterdir():
            if path.name == "lost+found":
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def free(self) -> int:
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    def mend(self) -> None:
        """After a break-down: what reached the disk is there."""
        _system("umount", "-l", str(self.path))
        subprocess.run(["e2fsck", "-fy", str(self._image)], capture_output=True, check=False)
        self._mount()

    def close(self) -> None:
        _system("umount", "-l", str(self.path))


def _system(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")


@contextmanager
def disk(kind: str, root: Path) -> Iterator[Disk]:
    made = Disk(kind, root)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(root / kind, ignore_errors=True)
        (root / f"{kind}.img").unlink(missing_ok=True)


@contextmanager
def readonly(path: Path) -> Iterator[None]:
    """For root, too, whom permissions do not stop."""
    _system("mount", "--bind", str(path), str(path))
    try:
        _system("mount", "-o", "remount,bind,ro", str(path))
        yield
    finally:
        _system("umount", "-l", str(path))


def break_down(path: Path) -> None:
    """The ext4 that holds `path` answers with input/output errors from here on."""
    number = os.open(path, os.O_RDONLY)
    fcntl.ioctl(number, SHUTDOWN, ctypes.c_uint32(0))  # what was written so far reaches the disk
    os.close(number)


# ---- moments ----


def at_step(step: int, action: Callable[[], None]) -> None:
    """A hook of a forked run: `action` after so many updates."""
    from cnnlab.train.run import Run

    settle = Run.settle

    def settled(run: Run, result: object) -> None:
        if run.clock.step == step:
            action()
        settle(run, result)  # type: ignore[arg-type]

    Run.settle = settled  # type: ignore[method-assign,assignment]


# ---- what is well ----


def complaints(ended: Ended, codes: tuple[int, ...] = (0, 1), place: Path | None = None) -> list[str]:
    """What is wrong with how a command ended."""
    found = [] if ended.code in codes else [f"exit {ended.code}"]
    found += [word for word in ("Traceback", "fault of cnnlab", "Exception ignored") if word in ended.errors]
    told = re.findall(r"^(?:cnnlab|cell \d+): .*(?:\n(?!cnnlab: |cell \d+: ).*)*", ended.errors, re.M)
    told = [text for text in told if not re.match(r"cell \d+: \w+[.=]|cnnlab: passed over", text)]
    cells = any(text.startswith("cell") for text in told)  # a sweep has a message for each cell that failed
    if ended.code != 0 and (not told or (len(told) > 1 and not cells)):
        found.append(f"{len(told)} messages")
    elif ended.code != 0 and (not REMEDY.search(told[0]) or (place is not None and str(place) not in told[0])):
        found.append("a message without path or remedy")
    return found + ([ended.errors[-400:]] if found else [])


def state_of(folder: Path, ended: Ended) -> list[str]:
    """What is untrue or broken in a run folder: its status, its checkpoints."""
    from cnnlab.errors import CheckpointError
    from cnnlab.runs import checkpoint

    found = []
    if (folder / "run.json").exists():
        try:
            status = json.loads((folder / "run.json").read_text()).get("status")
        except ValueError as error:
            return [f"run.json: {error}"]
        if status != ("completed" if ended.code == 0 else "failed"):
            found.append(f"exit {ended.code}, status {status}")
    for path in (folder / "checkpoints").glob("*.pt"):
        try:
            checkpoint.load(path)
        except CheckpointError as error:
            found.append(str(error))
    if (folder / "error.txt").exists():
        found.append("error.txt")
    return found


def goes_on(folder: Path, begin: list[str], unbroken: Path, root: Path) -> list[str]:
    """With room again: what differs at the end from a run that had it all the time."""
    arguments = ["train", f"resume={folder}"] if (folder / "checkpoints" / "last.pt").exists() else begin
    ended = cnnlab(arguments, root)
    if ended.code != 0:
        return [f"does not go on: exit {ended.code}: {ended.errors[-400:]}"]
    return differences(folder, unbroken)


# ---- kinds ----

Found = tuple[str, list[str]]


def sizes(root: Path, options: argparse.Namespace) -> Iterator[Found]:
    """A training on a disk with room for a part of it."""
    luck = random.Random(options.seed)
    unbroken = root / "unbroken"
    for kind in ("tmpfs", "ext4"):
        with disk(kind, root) as place:
            folder = place.path / "runs" / "run"
            begin = ["train", *RUN, f"hydra.run.dir={folder}"]
            room = place.free()
            finished(begin, root)
            # A checkpoint is written beside the one that it replaces.
            need = room - place.free() + 2 * (folder / "checkpoints" / "last.pt").stat().st_size
            shutil.rmtree(place.path / "runs")
            for number in range(options.count):
                left = round(need * (number + luck.random()) / options.count) if number else 0
                place.leave(left)
                ended = cnnlab(begin, root)
                found = complaints(ended, (0, 1, 2), place.path) + state_of(folder, ended)
                place.clear()
                if ended.code != 0:
                    found += goes_on(folder, begin, unbroken, root)
                yield f"{kind}, {left:,} of {need:,} bytes: exit {ended.code}", found
                place.empty()


def writers(root: Path, out: Path) -> dict[str, list[str]]:
    """Commands that write somewhere on the disk `out`, from a run and pictures on a good one."""
    run, picture = str(root / "unbroken"), str(root / "pictures" / "a")
    folder = (*TINY, "model=cnn", "data=folder", f"data.root={root / 'pictures'}", "data.size=8", "data.channels=1")
    stream = (*folder, "data.limit=null", "trainer.max_steps=3", f"data.cache={out / 'cache'}")
    short = (*RUN, "trainer.max_steps=3")
    figure = ("--figure", str(out / "figure.png"))
    return {
        "sweep": ["train", "-m", *short, "seed=0,1", f"hydra.sweep.dir={out / 'sweep'}"],
        "cache": ["train", *stream, f"hydra.run.dir={root / 'cached'}"],
        "mapped cache": ["train", *stream, "loading.path=mapped", f"hydra.run.dir={root / 'cached'}"],
        "predict": ["predict", run, picture, "--csv"],
        "explain": ["explain", run, "--count", "2", "--out", str(out / "maps")],
        "export": ["export", run, "--format", "state_dict", "--out", str(out / "exported")],
        "export torch": ["export", run, "--format", "torch", "--out", str(out / "exported")],
        "lr-find": ["lr-find", *RUN, "--steps", "60", *figure],
        "probe": ["probe", *short, *figure],
        "landscape": ["landscape", run, "--parts", "noise", "--samples", "64", *figure],
        "eval": ["eval", run],
        "summary": ["summary", *short],
    }


def interrupted(folder: Path, root: Path, step: int = 11) -> None:
    """A run that was killed after so many updates."""
    ended = cnnlab(
        ["train", *RUN, f"hydra.run.dir={folder}"],
        root,
        partial(at_step, step, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    )
    if ended.code != -signal.SIGKILL:
        raise SystemExit(f"expected a killed run, received exit {ended.code}: {ended.errors}")


def verbs(root: Path, options: argparse.Namespace) -> Iterator[Found]:
    """The verbs that write, onto a full disk; a run that goes on there."""
    half, unbroken = root / "half", root / "unbroken"
    interrupted(half, root)
    for kind in ("tmpfs", "ext4"):
        with disk(kind, root) as place:
            for left in (0, 3 * BLOCK, 15 * BLOCK):
                for name, arguments in writers(root, place.path).items():
                    place.leave(left)
                    ended = cnnlab(arguments, root)
                    found = complaints(ended, (0, 1, 2, 3), None if "cache" in name else place.path)
                    torn = [path.name for path in place.path.rglob(".*.tmp")]
                    yield f"{kind}, {left:,} bytes, {name}: exit {ended.code}", found + torn
                    place.empty()
                    shutil.rmtree(root / "cached", ignore_errors=True)
                folder = Path(shutil.copytree(half, place.path / "run"))
                place.leave(left)
                ended = cnnlab(["train", f"resume={folder}"], root)
                found = complaints(ended, (0, 1, 2), place.path)
                # One that could not go on stays what it was: killed, as whoever reads it is told.
                told = [f"exit {ended.code}, status running"] if RunDir(folder).status() == "killed" else []
                found += [text for text in state_of(folder, ended) if text not in told] if ended.code < 2 else []
                answer = cnnlab(["eval", str(folder), "--json"], root)
                found += complaints(answer, (0,))
                place.clear()
                if ended.code != 0:
                    found += goes_on(folder, [], unbroken, root)
                yield f"{kind}, {left:,} bytes, resume: exit {ended.code}", found
                place.empty()
    shutil.rmtree(half)


def limits(root: Path, options: argparse.Namespace) -> Iterator[Found]:
    """Files that may not grow beyond a size (`ulimit -f`)."""
    for size in (0, 1 << 10, 1 << 12, 1 << 14, 1 << 16):
        folder = root / "limited"
        begin = ["train", *RUN, f"hydra.run.dir={folder}"]
        ended = cnnlab(begin, root, partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size)))
        found = [] if size == 0 else complaints(ended, (0, 1, 2), folder)  # with 0, stderr cannot be written either
        found += state_of(folder, ended) if size >= 1 << 12 else []
        if ended.code != 0:
            found += goes_on(folder, begin, root / "unbroken", root)
        yield f"files of {size:,} bytes: exit {ended.code}", found
        shutil.rmtree(folder, ignore_errors=True)


def places(root: Path, options: argparse.Namespace) -> Iterator[Found]:
    """Read-only places; `root` is stopped by them, too."""
    out = root / "readonly"
    out.mkdir()
    with readonly(out):
        for name, arguments in writers(root, out).items():
            ended = cnnlab(arguments, root)
            yield f"{name}: exit {ended.code}", complaints(ended, (0, 1, 2, 3), None if "cache" in name else out)
            shutil.rmtree(root / "cached", ignore_errors=True)
        ended = cnnlab(["train", *RUN, f"hydra.run.dir={out / 'run'}"], root)
        yield f"train: exit {ended.code}", complaints(ended, (1, 2), out)
    half, run = root / "half", root / "unbroken"
    interrupted(half, root)
    with readonly(half), readonly(run):
        for arguments in (
            ["eval", str(run)],
            ["eval", str(half)],
            ["predict", str(run), str(root / "pictures" / "a"), "--json"],
            ["explain", str(run), "--count", "1"],
            ["export", str(run), "--format", "state_dict"],
            ["landscape", str(run), "--parts", "noise", "--samples", "64"],
            ["lr-find", str(run), "--steps", "12"],
            ["probe", str(run)],
            ["check", str(run)],
            ["summary", str(run)],
            ["train", f"resume={half}"],
            ["train", f"resume={run}"],
        ):
            ended = cnnlab(arguments, root)
            reads = arguments[0] in ("eval", "predict", "summary", "check")
            yield f"{' '.join(arguments[:2])}: exit {ended.code}", complaints(ended, (0,) if reads else (0, 1, 2))
    yield "resumed once writable", goes_on(half, [], run, root)
    shutil.rmtree(half)
    for name in ("TMPDIR", "HOME"):
        before = os.environ.get(name)
        os.environ[name] = str(out)
        with readonly(out):
            for arguments in (["train", *RUN, f"hydra.run.dir={root / 'run'}"], ["eval", str(run)]):
                ended = cnnlab(arguments, root)
                yield f"{name}, {arguments[0]}: exit {ended.code}", complaints(ended, (0, 1))
        shutil.rmtree(root / "run", ignore_errors=True)
        os.environ.pop(name)
        os.environ |= {} if before is None else {name: before}


def broken(root: Path, options: argparse.Namespace) -> Iterator[Found]:
    """A disk that answers with errors from a step on."""
    for step in (1, 4, 7, 11, 19):
        with disk("ext4", root) as place:
            folder = place.path / "run"
            begin = ["train", *RUN, f"hydra.run.dir={folder}"]
            ended = cnnlab(begin, root, partial(at_step, step, partial(break_down, place.path)))
            found = complaints(ended, (1,), place.path)
            place.mend()
            found += [text for text in state_of(folder, ended) if "status running" not in text]
            found += goes_on(folder, begin, root / "unbroken", root)
            yield f"at step {step}: exit {ended.code}", found


def vanishing(root: Path, options: argparse.Namespace) -> Iterator[Found]:
    """Folders and files of a run that are taken away between two steps, and the places that it reads from."""
    folder = root / "run"
    begin = ["train", *RUN, f"hydra.run.dir={folder}"]
    names = ("tensorboard", "evidence", "checkpoints", ".hydra", "metrics.jsonl", "stats.jsonl", "run.json", "")
    for name in names:
        for step in (2, 11, 19):
            ended = cnnlab(begin, root, partial(at_step, step, partial(remove, folder / name)))
            # Best weights that are gone are no other ones: their test is refused, and the rest is done.
            found = complaints(ended, (0, 5) if name in ("checkpoints", "") else (0,)) + state_of(folder, ended)
            if (name or "run") not in ended.errors and not name.endswith(".jsonl"):
                found.append("not told")
            found += complaints(cnnlab(["eval", str(folder), "--checkpoint", "last"], root), (0,))
            yield f"{name or 'the run'} at step {step}: exit {ended.code}", found
            shutil.rmtree(folder)
    for path in ("stream", "mapped", "auto"):
        for what in ("cache", "pictures"):
            copied = Path(shutil.copytree(root / "pictures", root / "copied"))
            data = ("data=folder", f"data.root={copied}", f"data.cache={root / 'cache'}", "data.limit=null")
            arguments = [*begin, *data, "data.size=8", "data.channels=1", f"loading.path={path}", "loading.workers=1"]
            gone = copied if what == "pictures" else root / "cache"
            ended = cnnlab(arguments, root, partial(at_step, 3, partial(remove, gone)))
            found = complaints(ended, (0, 3)) + state_of(folder, ended)
            yield f"{what}, loading.path={path}: exit {ended.code}", found
            for each in (folder, copied, root / "cache"):
                shutil.rmtree(each, ignore_errors=True)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


KINDS: dict[str, Callable[[Path, argparse.Namespace], Iterator[Found]]] = {
    "sizes": sizes,
    "verbs": verbs,
    "limits": limits,
    "readonly": places,
    "broken": broken,
    "vanish": vanishing,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(KINDS))
    parser.add_argument("--count", type=int, default=20, help="sizes of a disk, of each file system (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the sizes")
    options = parser.parse_args()
    if sys.platform != "linux" or os.geteuid() != 0:
        raise SystemExit("full_disks: expected root on Linux, since it mounts file systems")
    outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="full-disks-") as temporary:
        root = Path(temporary)
        warm(root)
        pictures(root)
        finished(["train", *RUN, f"hydra.run.dir={root / 'unbroken'}"], root)
        for kind, tried in KINDS.items():
            for what, found in tried(root, options) if options.only in (None, kind) else ():
                outcomes[kind, "well" if not found else "NOT"] += 1
                if found:
                    print(f"{kind}: {what}: {'; '.join(found)}", flush=True)
    for key, count in sorted(outcomes.items()):
        print(*key, count)
    return int(any(key[1] == "NOT" for key in outcomes))


if __name__ == "__main__":
    sys.exit(main())
