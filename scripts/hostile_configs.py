"""Tries hostile overrides and run folders on `cnnlab`, and counts what was executed, what was "a fault of cnnlab", and
which run folders were left half-made. Aim: none. What takes too long is stopped, and counted as exit code -14.

    python scripts/hostile_configs.py --overrides 2000 --folders 100 --seed 0

Every command runs in a process of its own, forked from one that has loaded torch, with a limit of time and memory, in
an empty folder. A run folder is half-made where the command was refused (2, 5), or where its data could not be used (3)
and its `run.json` does not say `failed` and why. What a config has executed leaves a marker file: `called` (by
`os.system` and the like, or a function of the module `marker`), `imported` (the module `marker`, which only a run
folder's config may not import).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from forked import warm
from hydra.core.plugins import Plugins

from cnnlab.cli import main
from cnnlab.composing.composer import composer

BASE = (
    *("data.limit=64", "trainer.batch_size=32", "trainer.epochs=1", "trainer.device=cpu", "trainer.precision=fp32"),
    *("trainer.threads=1", "trainer.step=eager", "stats=off", "trainer.max_steps=2"),
)
SECONDS, GIBIBYTES = 20, 12
MARKER = 'open("{folder}/imported", "w").close()\ndef call(*a, **k):\n    open("{folder}/called", "w").close()\n'
TARGETS = (
    *("os.system", "subprocess.call", "builtins.exec", "torch.os.system", "pathlib.Path.touch", "marker.call"),
    *("torch.hub.load", "cnnlab.runs.folder.write_atomically", "torch.nn.ReLU", "torch.optim.SGD", "nowhere.Net"),
)
VALUES = (
    *("abc", "''", "null", "true", "-1", "0", "1.5", "1e400", "1e30", "nan", "inf", "-inf", "9" * 40, "[]", "[1,a]"),
    *("[[1],[2]]", "{}", "{a:1}", "{a:{b:[1]}}", "é", "日本", "🙂", "'a\\tb'", "${seed}", "${x.y}", "${oc.env:HOME}"),
    *("${oc.decode:1}", "${", "???", "../..", "/dev/full", "/proc/self/mem", "a,b", "range(3)", "=", "'", "a" * 3000),
)


def keys() -> list[str]:
    """Every key of every option, and the options of each group."""
    found: list[str] = []
    with composer() as opened:
        for group in opened.groups():
            found += [f"{group}={option}" for option in opened.options(group)]
        found += list(_paths(opened.compose([]).config))
    return [*found, *("hydra.run.dir", "hydra.sweep.dir", "hydra.job.name", "hydra.callbacks", "x", "optim.x", "_own")]


def _paths(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield prefix + str(key)
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")


def target(random_: random.Random, folder: Path) -> dict[str, Any]:
    name = random_.choice(TARGETS)
    extra = random_.choice(({}, {"command": f"touch {folder}/called"}, {"args": ["touch", f"{folder}/called"]}))
    return {"_target_": name, **extra, **random_.choice(({}, {"_partial_": True}, {"_args_": [f"{folder}/called"]}))}


def override(random_: random.Random, known: list[str], folder: Path) -> str:
    key = random_.choice(known)
    start = random_.choice(("", "", "", "", "+", "++", "~"))
    if "=" in key and random_.random() < 0.5:
        return start + key
    key = key.partition("=")[0]
    kind = random_.random()
    if kind < 0.3:
        inner = json.dumps(target(random_, folder)).replace('": ', '":').replace('{"', "{").replace(', "', ",")
        return f"{start}{key}{random_.choice(('', '', '.x'))}=" + inner.replace('":', ":")
    if kind < 0.35:
        return f"{start}{key}._target_={random_.choice(TARGETS)}"
    return f"{start}{key}={random_.choice(VALUES)}" if kind < 0.95 else start + key


def outcome(action: Callable[[], int], folder: Path) -> tuple[int, str]:
    """The exit code (or -signal) of an action in a forked process, and what it wrote to stderr."""
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_AS, (GIBIBYTES << 30, GIBIBYTES << 30))
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.chdir(folder / "here")
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        try:
            code = action()
        except BaseException as error:  # `main` promises to raise nothing
            print("RAISED", repr(error), file=sys.stderr)
            code = 99
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code, (folder / "err").read_text(errors="replace")


def faults(code: int, told: str, folder: Path, stored: bool) -> list[str]:
    found = []
    if (folder / "called").exists() or (stored and (folder / "imported").exists()):
        found.append("executed")
    if "fault of cnnlab" in told or "Traceback" in told or "RAISED" in told or code == 1 or code in (-6, -11):
        found.append("fault")
    records = [path for path in (folder / "here").glob("**/run.json") if path.is_file() and not stored]
    told_why = [record for record in map(_read, records) if record.get("status") == "failed" and record.get("reason")]
    if (code in (2, 5) and records) or (code == 3 and len(told_why) < len(records)):
        found.append("half-made")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        return {}
    return record


def try_overrides(count: int, seed: int) -> Iterator[tuple[list[str], int, str, list[str]]]:
    # Another process lists the keys, so that no composition is left over in those that are forked.
    listed = subprocess.run(
        [sys.executable, "-c", "import hostile_configs, json; print(json.dumps(hostile_configs.keys()))"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    random_, known, done = random.Random(seed), json.loads(listed.stdout), 0
    while done < count:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "here").mkdir()
            (folder / "here" / "marker.py").write_text(MARKER.format(folder=folder))
            chosen = [override(random_, known, folder) for _ in range(min(count - done, random_.choice((1, 1, 2, 3))))]
            done += len(chosen)
            code, told = outcome(lambda: main(["train", *BASE, *chosen]), folder)  # noqa: B023
            yield chosen, code, told, faults(code, told, folder, stored=False)


def damage(run: Path, random_: random.Random, folder: Path) -> str:
    """Puts a part, an alias or garbage into a file of the folder; what was done."""
    (folder / "theirs").mkdir()
    (folder / "theirs" / "marker.py").write_text(MARKER.format(folder=folder))
    record = json.loads((run / "run.json").read_text())
    record["config_dirs"] = [str(folder / "theirs")]
    (run / "run.json").write_text(json.dumps(record))
    which = random_.random()
    if which < 0.1:
        (run / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump({"hydra": {"callbacks": target(random_, folder)}}))
        return "hydra.yaml"
    path = run / ".hydra" / "config.yaml"
    if which < 0.2:
        text = random_.choice(
            ("a: &a [*a]\n", "a: &a {b: 1}\nc: *a\n", "x: !!python/object/apply:os.system ['touch x']\n")
        )
        path.write_text(text + path.read_text())
        return text
    config = yaml.safe_load(path.read_text())
    places = list(_paths(config))
    place = random_.choice(places).split(".")
    node = config
    for key in place[:-1]:
        node = node[key]
    part: Any = target(random_, folder)
    node[place[-1]] = random_.choice((part, [part], {"a": part}, {**part, "b": [part]}))
    path.write_text(yaml.safe_dump(config))
    return f"{'.'.join(place)}: {node[place[-1]]}"


def try_folders(count: int, seed: int) -> Iterator[tuple[list[str], int, str, list[str]]]:
    random_ = random.Random(seed)
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / "here").mkdir()
        code, told = outcome(lambda: main(["train", *BASE, "hydra.run.dir=run"]), Path(made))
        assert code == 0, (code, told)
        for number in range(count):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                (folder / "here").mkdir()
                run = shutil.copytree(Path(made) / "here" / "run", folder / "here" / "run")
                (folder / "here" / "marker.py").write_text(MARKER.format(folder=folder))
                what = damage(run, random_, folder)
                verb = ["eval", "run"] if number % 2 else ["train", "resume=run", "trainer.max_steps=3"]
                code, told = outcome(lambda: main(verb), folder)  # noqa: B023
                yield [*verb, what], code, told, faults(code, told, folder, stored=True)


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overrides", type=int, default=2000)
    parser.add_argument("--folders", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        warm(Path(name))  # imports once, before the first fork, and computes nothing here
    Plugins.instance()
    total = 0
    for title, cases in (
        ("overrides", try_overrides(asked.overrides, asked.seed)),
        ("stored configs", try_folders(asked.folders, asked.seed)),
    ):
        codes, kinds, commands = Counter[int](), Counter[str](), 0
        for command, code, told, found in cases:
            commands += 1
            codes[code] += 1
            kinds.update(found)
            if commands % 50 == 0:
                print(f"{title}: {commands} commands so far, {dict(codes)}, {dict(kinds)}", flush=True)
            for kind in found:
                print(f"{kind}: exit {code}: {command}\n    {told.strip()[-400:]}", flush=True)
        print(f"{title}: {commands} commands, exit codes {dict(sorted(codes.items()))}, {dict(kinds) or 'no faults'}")
        total += sum(kinds.values())
    return min(total, 1)


if __name__ == "__main__":
    sys.exit(run())
