"""Figure: does `cnnlab check` cry wolf, and does it find what is planted?

    .venv/bin/python scripts/check_alarms.py experiments alarms.jsonl      # every experiment=, on data that is there
    .venv/bin/python scripts/check_alarms.py combinations alarms.jsonl     # 40 healthy rows of the covering set
    .venv/bin/python scripts/check_alarms.py report alarms.jsonl

A line is appended for each case that is done, and a case that has one is passed over: a run that was stopped goes on.
Papers' experiments on ImageNet are checked on `data=shapes` at 64 px in batches of 16, others that lack their data on
`data=shapes` at 32 px: what is on trial is the network, its optimizer and its rate. Of the covering set's options those
that are known to learn are combined; what is meant to fail (init=zeros, constant, ...) is not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from covering_set import Covering

from cnnlab.building.builder import build
from cnnlab.building.trial import compose
from cnnlab.composing.composer import config_root
from cnnlab.diagnose.checks import check_run
from cnnlab.errors import CnnlabError, ConfigError
from cnnlab.terminal import say

CPU = ("trainer.device=cpu", "trainer.threads=1", "trainer.precision=fp32", "stats=off")
SMALL = ("data=shapes", "data.size=32", "trainer.batch_size=32")
LARGE = ("data=shapes", "data.size=64", "trainer.batch_size=16")
STAND_INS: dict[str, tuple[str, ...]] = {
    "alexnet_2012": LARGE,
    "vgg_2014": LARGE,
    "resnet_2015": LARGE,
    "inception_v3_2015": (*LARGE, "data.size=96"),
    "resnet_cifar_2015": SMALL,
    "cifar10_speedrun": ("data=shapes", "data.size=32", "trainer.batch_size=128"),
    "cifar10_cpu": ("data=shapes", "data.size=32", "trainer.batch_size=128"),
    "animals_cpu": SMALL,
    "camvid_cpu": ("data=shapes", "data.size=48", "trainer.batch_size=8"),
}
HEALTHY: dict[str, tuple[str, ...]] = {
    "model": ("resnet", "vgg", "cnn", "plain20", "resnet20", "inception", "speednet"),
    "norm": ("auto", "batch", "group", "layer"),
    "activation": ("auto", "relu", "leaky_relu", "elu", "gelu", "silu"),
    "init": ("auto", "he", "orthogonal", "lsuv"),
    "optim": ("sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop", "lion", "muon", "radam"),
    "schedule": ("cosine", "constant", "one_cycle", "step"),
    "normalize": ("standardize", "half", "per_image"),
    "augment": ("none", "[crop,flip]", "cutout", "mixup", "[rotate,contrast]"),
    "regularization": ("none", "l2", "ema", "max_norm"),
    "loss": ("cross_entropy", "focal", "cross_entropy loss.label_smoothing=0.1"),
    "trainer.accumulate": ("1", "2"),
    "trainer.clip_norm": ("null", "1.0"),
}
NARROW = {"resnet": "model.width=8", "plain20": "model.width=8", "resnet20": "model.width=8"}
COUNT = 40


def experiments() -> Iterator[tuple[str, list[str]]]:
    for path in sorted((config_root() / "experiment").glob("*.yaml")):
        yield path.stem, [f"experiment={path.stem}", *STAND_INS.get(path.stem, ()), *CPU]


def combinations() -> Iterator[tuple[str, list[str]]]:
    """Rows that the check of configs accepts; those that it refuses are other combinations than were meant."""
    covering = Covering(HEALTHY, seed=0)
    made = 0
    while covering.missing and made < COUNT:
        pair, row = covering.row()
        if row is None:
            covering.drop([pair])
            continue
        covering.drop([p for p in covering.missing if p <= set(row.items())])
        typed = [word for factor, option in row.items() for word in f"{factor}={option}".split(" ")]
        typed += [NARROW[row["model"]]] if row["model"] in NARROW else []
        data = "shapes" if row["model"] == "speednet" else "digits"
        overrides = [f"data={data}", *typed, *CPU]
        try:
            compose(overrides)
        except ConfigError:
            continue
        made += 1
        yield " ".join(typed), overrides


def checked(overrides: list[str]) -> dict[str, Any]:
    began = time.process_time()
    try:
        run = build(compose(overrides))
        found = [
            {"check": f.name, "verdict": f.verdict.value, "evidence": f.evidence, "advice": f.advice}
            for f in check_run(run)
        ]
    except CnnlabError as error:
        return {"refused": str(error)}
    return {"findings": found, "cpu_seconds": round(time.process_time() - began, 1)}


def report(path: Path) -> int:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    alarmed = 0
    for row in rows:
        told = [f for f in row.get("findings", []) if f["verdict"] in ("watch", "bad")]
        alarmed += bool(told)
        for finding in told:
            say(f"{row['case']}\n  {finding['verdict']} {finding['check']}: {finding['evidence']}")
        if "refused" in row:
            say(f"{row['case']}\n  refused: {row['refused']}")
    done = [row for row in rows if "findings" in row]
    say(f"{len(done)} checked, {alarmed} with an alarm, {len(rows) - len(done)} refused")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["experiments", "combinations", "report"])
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    if args.what == "report":
        return report(args.file)
    known = {json.loads(line)["case"] for line in args.file.read_text().splitlines()} if args.file.exists() else set()
    for case, overrides in experiments() if args.what == "experiments" else combinations():
        if case in known:
            continue
        with args.file.open("a") as file:
            file.write(json.dumps({"case": case, **checked(overrides)}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
