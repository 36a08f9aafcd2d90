"""What becomes of a damaged run folder? Damages copies of one interrupted run, and lets `cnnlab` read them.

    python scripts/damaged_runs.py                        400 + 150 + 40 checkpoints, 600 side files
    python scripts/damaged_runs.py --scale 0.1 --only content

Kinds: `accident` (bits, cuts, zeroed blocks, other files in a checkpoint's place), `content` (a right checksum over
other types, missing keys, other shapes and dtypes, a pickle with code), `others` (the checkpoint of a run with another
seed, optimizer, model or data), `side` (run.json, metrics.jsonl, stats.jsonl, .hydra/*.yaml, evidence, files.json.gz:
bits, cuts, gone, a folder in place, another type, deep nesting, an alias bomb, a self-reference).

Each is resumed to its end and evaluated. Well is: exit 5 (2 where no run folder is left) with the file's name, or the
unbroken run's result; of side files also an end that told what is missing. Anything else is listed, and the exit
code is 1: a hang (ten minutes), another code, a traceback, executed code, or another result without a word.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import pickle
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from forked import TINY, cnnlab, finished, warm
from random_kills import differences, leaves

RUN = ("model=cnn", "model.widths=[4,8]", "optim=adam", "schedule=plateau", "regularization=ema", "trainer.epochs=3")
OTHERS = {"seed": "seed=5", "optimizer": "optim=rmsprop", "model": "model.widths=[4,4]", "data": "data.limit=90"}
SIDE = (
    *("run.json", "metrics.jsonl", "stats.jsonl", ".hydra/config.yaml", ".hydra/overrides.yaml"),
    *("evidence/sample_loss.f16", "evidence/shape.json", "files.json.gz"),
)
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
)
TEXTS = ("[]", "3", '"text"', "null", "{}", "[" * 5000, BOMB, "a: &a [*a]\n", "\0\0\0", "{", "NaN", '{"status": 3}')
LONGER = "trainer.max_steps=12"
"""The run ends in the middle of its third epoch, and goes on to that epoch's end."""
MARK = "executed"


class Code:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def by_accident(path: Path, luck: random.Random) -> str:
    content = bytearray(path.read_bytes())
    place = luck.randrange(len(content) or 1)
    what = luck.choice(["bit", "bit", "cut", "zeros", "other file"])
    if what == "bit" and content:
        content[place] ^= 1 << luck.randrange(8)
    elif what == "cut":
        del content[place:]
    elif what == "zeros":
        content[place : place + 4096] = bytes(len(content[place : place + 4096]))
    else:
        content[:] = luck.choice([b"", b"\x89PNG\r\n", b"PK\x03\x04", b"<html>", b"{}", pickle.dumps({"model": 1})])
    path.write_bytes(content)
    return f"{what} at {place}"


def by_content(path: Path, luck: random.Random) -> str:
    """One leaf of the checkpoint (or a branch above it) replaced or removed, under a right checksum."""
    import torch

    from cnnlab.runs import checkpoint

    state = copy.deepcopy(checkpoint.load(path))
    if luck.random() < 0.05:
        state["model"] = Code(path.parent / MARK)
        checkpoint.save(state, path)
        return "a pickle with code"
    part = luck.choice(sorted(state))
    names = [name for name, _ in leaves(state[part])]
    if not names:
        del state[part]
        checkpoint.save(state, path)
        return f"{part} removed"
    keys = luck.choice(names).split("/")[1:]
    owner = state[part]
    for key in keys[:-1]:
        owner = owner[_key(owner, key)]
    last = _key(owner, keys[-1])
    old = owner[last]
    changes: list[Any] = [None, "text", [], {}, {"a": 1}, torch.zeros(3, 7)]
    if isinstance(old, torch.Tensor):
        changes += [old.double() if old.is_floating_point() else old.float(), old[None], old.reshape(-1)[:1].half()]
    elif isinstance(old, int) and not isinstance(old, bool):
        changes += [-1, 10**12, float("nan")]
    owner = list(owner) if isinstance(owner, tuple) else owner
    if luck.random() < 0.2 or isinstance(owner, tuple):
        del owner[last]
        what = "removed"
    else:
        owner[last] = luck.choice(changes)
        what = f"becomes {str(owner[last])[:30]!r}"
    checkpoint.save(state, path)
    return f"{part}/{'/'.join(keys)} {what}"


def _key(owner: Any, text: str) -> Any:
    return int(text) if isinstance(owner, list | tuple) else next(key for key in owner if str(key) == text)


def of_side(path: Path, luck: random.Random) -> str:
    what = luck.choice(["accident", "gone", "a folder", "text", "text", "text"])
    if what == "accident" and path.exists():
        return by_accident(path, luck)
    path.unlink(missing_ok=True)
    if what == "a folder":
        path.mkdir()
    elif what == "text":
        text = luck.choice(TEXTS)
        path.write_text(text)
        return repr(text[:20])
    return what


def damages(kind: str, number: int, run: Path, others: dict[str, Path], luck: random.Random) -> tuple[str, str]:
    """Damages `run`; the file's name, and what was done to it."""
    if kind == "side":
        name = SIDE[number % len(SIDE)]
        return name, of_side(run / name, luck)
    name = luck.choice(["last.pt", "best.pt"])
    path = run / "checkpoints" / name
    if kind == "others":
        which = list(others)[number % len(others)]
        shutil.copy(others[which] / "checkpoints" / name, path)
        return name, f"of another {which}"
    return name, (by_accident if kind == "accident" else by_content)(path, luck)


def judged(run: Path, root: Path, unbroken: Path, answer: str, name: str) -> Iterator[tuple[str, str]]:
    """The outcome of an evaluation and of a resume, each `refused`, `identical`, `told` or what is wrong."""
    for verb, arguments in (("eval", ["eval", str(run), "--json"]), ("resume", ["train", f"resume={run}", LONGER])):
        ended = cnnlab(arguments, root, timeout=600)
        output = (root / "stdout").read_text(errors="replace")
        said = ended.errors + ("" if verb == "eval" else output)  # the document of eval names files
        if list(run.rglob(MARK)):
            yield verb, "EXECUTED"
        elif ended.code is None:
            yield verb, "HUNG"
        elif "Traceback" in said or "fault of cnnlab" in said:
            yield verb, f"FAULT: {said[-300:]}"
        elif ended.code == 5 or (ended.code == 2 and ".hydra" in name):
            named = Path(name).name in said or (name.endswith(".pt") and (".pt" in said or "the data is not" in said))
            yield verb, "refused" if named else f"UNNAMED: {said[-300:]}"
        elif ended.code != 0:
            yield verb, f"CODE {ended.code}: {said[-300:]}"
        elif verb == "eval":
            same = figures(output) == answer
            yield verb, "identical" if same else "told" if Path(name).name in said else "SILENT"
        else:
            found = [
                text for text in differences(run, unbroken) if not text.startswith(f"{name}:") or name == "last.pt"
            ]
            told = Path(name).name in said or "lost" in said or "missing" in said
            yield verb, "identical" if not found else "told" if told else f"SILENT: {', '.join(found[:4])}"


def figures(text: str) -> str:
    """Of `eval --json`, without seconds."""
    document = json.loads(text)
    return repr(document.get("metrics", document))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["accident", "content", "others", "side"])
    parser.add_argument("--scale", type=float, default=1.0, help="of the counts (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the damages")
    options = parser.parse_args()
    counts = {"accident": 400, "content": 150, "others": 40, "side": 600}
    outcomes: collections.Counter[tuple[str, str, str]] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="damaged-runs-") as temporary:
        root = Path(temporary)
        warm(root)
        whole, unbroken = root / "whole", root / "unbroken"
        finished(["train", *TINY, *RUN, "trainer.max_steps=10", f"hydra.run.dir={whole}"], root)
        finished(["eval", str(whole), "--json"], root)
        answer = figures((root / "stdout").read_text())
        shutil.copytree(whole, root / "run")
        finished(["train", f"resume={root / 'run'}", LONGER], root)
        (root / "run").rename(unbroken)
        others = {name: root / name for name in OTHERS}
        for name, override in OTHERS.items():
            arguments = [*TINY, *RUN, override, "trainer.max_steps=10", f"hydra.run.dir={others[name]}"]
            finished(["train", *arguments], root)
        wanted = {kind: round(n * options.scale) for kind, n in counts.items() if options.only in (None, kind)}
        # In turn, so that a campaign that is cut short has tried all kinds.
        order = sorted((n / count, kind, n) for kind, count in wanted.items() for n in range(count))
        for done, (_, kind, number) in enumerate(order, start=1):
            run = Path(shutil.copytree(whole, root / "run"))
            luck = random.Random(f"{options.seed} {kind} {number}")
            name, what = damages(kind, number, run, others, luck)
            for verb, outcome in judged(run, root, unbroken, answer, name):
                outcomes[kind, verb, outcome.partition(":")[0]] += 1
                if outcome not in ("refused", "identical", "told"):
                    print(f"{kind} {number} {verb}: {name}, {what}: {outcome}", flush=True)
            shutil.rmtree(run)
            if done % 25 == 0 or done == len(order):
                print(f"{done} of {len(order)}: {dict(sorted(outcomes.items()))}", flush=True)
    for key, count in sorted(outcomes.items()):
        print(*key, count)
    return int(any(outcome.isupper() or "CODE" in outcome for _, _, outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
