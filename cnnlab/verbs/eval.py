"""`cnnlab eval RUN`: the metrics of a run's checkpoint on one of its splits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cnnlab.errors import CheckpointError
from cnnlab.rundir import RunDir, jsonable
from cnnlab.schema import DataPath, Device, StepKind
from cnnlab.terminal import one_line, say
from cnnlab.trust import TYPED, Trust
from cnnlab.verbs.arguments import TRUST, Parser
from cnnlab.verbs.reopen import reopened

MOST_CLASSES = 20
"""Are shown, those with the least recall."""
EXAMPLES = """examples:
  cnnlab eval outputs/digits-resnet/2026-11-22_10-00-00-1a2b
  cnnlab eval RUN --split val --checkpoint last
  cnnlab eval RUN --json
"""


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        "eval",
        "Evaluates a run's checkpoint, as a whole and class by class; the run folder is left as it is.",
        EXAMPLES,
    )
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--split", choices=["train", "val", "test"], default="test")
    parser.add_argument("--checkpoint", choices=["best", "last"], default="best")
    parser.add_argument("--device", choices=[device.value for device in Device], help="as trainer.device")
    parser.add_argument("--config-dir", action="append", default=[], metavar="DIR", help="where your own parts are")
    parser.add_argument("--trust", **TRUST)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_all(arguments)
    folder = RunDir(args.run)
    trust = Trust.of(args.trust, args.config_dir)
    reopened(folder, trust)
    which = available(folder, args.checkpoint)
    figures, classes = measured(folder, args.split, which, args.device, trust)
    if args.json:
        say(json.dumps(jsonable({**figures, "checkpoint": which, "classes": classes})))
    else:
        _show(folder, which, figures, classes)
    return 0


def _show(folder: RunDir, which: str, figures: Mapping[str, float], classes: Sequence[Mapping[str, Any]]) -> None:
    best = folder.read().get("best") or {}
    epoch = f", of epoch {best['epoch']}" if which == "best" and "epoch" in best else ""
    say(f"{'checkpoint':<24} {which}{epoch}")
    for name, value in figures.items():
        say(f"{name:<24} {value:.4f}")
    found = [row for row in classes if row["samples"]]
    worst = sorted(found, key=lambda row: row["recall"])[:MOST_CLASSES]
    if not worst:
        return
    heading = "class" if len(worst) == len(found) else f"worst {MOST_CLASSES} of {len(found)}"
    say(f"\n{heading:<24} {'samples':>9} {'recall':>7} {'precision':>9} {'IoU':>7}  mostly taken for")
    for row in worst:
        recall, precision, iou = ("-" if row[k] is None else f"{row[k]:.4f}" for k in ("recall", "precision", "iou"))
        name, taken_for = one_line(row["class"]), one_line(row["taken_for"] or "")
        say(f"{name:<24} {row['samples']:>9,} {recall:>7} {precision:>9} {iou:>7}  {taken_for}".rstrip())


def available(folder: RunDir, wanted: str) -> str:
    """The checkpoint to take: of a run that was never evaluated, and so has no best one, the last.

    Raises `CheckpointError` if the best one is gone.
    """
    if wanted != "best" or folder.best.exists():
        return wanted
    if (folder.read().get("best") or {}).get("epoch") is not None:
        raise CheckpointError(f"{folder.best} is missing; type --checkpoint last for the one of the last epoch")
    return "last"


def evaluate_run(folder: RunDir, split: str, which: str = "best", device: str | None = None) -> dict[str, float]:
    """The metrics of `measured`, by themselves."""
    return measured(folder, split, available(folder, which), device)[0]


def measured(
    folder: RunDir, split: str, which: str, device: str | None = None, trust: Trust = TYPED
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The metrics of the checkpoint `which` of a run on `split`, named as in its `run.json`; and what became of each
    class (see `cnnlab.tasks.metrics.by_class`).

    It computes as the run did (precision and layout), where it finds the kind of device that the run had.

    Raises:
        UsageError: no run folder, or one that names code that nobody vouches for (see `cnnlab.trust`).
        CheckpointError: its checkpoint is missing or damaged.
    """
    from cnnlab import checkpoint
    from cnnlab.builder import build
    from cnnlab.check import bind_section
    from cnnlab.data.loader import Loader
    from cnnlab.device import as_recorded
    from cnnlab.schema import Trainer
    from cnnlab.train.loop import measure
    from cnnlab.train.run import describe_sums
    from cnnlab.validate import check

    composed = reopened(folder, trust)
    config = composed.config
    state = checkpoint.load(folder.best if which == "best" else folder.last)
    if device is not None:
        config["trainer"]["device"] = device
    config["trainer"]["step"] = StepKind.eager.value  # no step is taken: none is tried, compiled or captured
    check(composed)
    choices = state.get("origin", {}).get("choices", {})
    trainer = as_recorded(bind_section(Trainer, config["trainer"]), choices)
    for name in ("device", "precision", "layout"):
        config["trainer"][name] = getattr(trainer, name).value
    if choices.get("data_path") == DataPath.stream.value:  # nobody waits for a cache to be built
        config["loading"]["path"] = DataPath.stream.value
    run = build(composed, resumed=True)
    parts = ["model", "normalize", *(["ema"] if run.ema is not None else [])]
    run.state.load_state_dict(state, only=tuple(parts))
    run.listeners.clear()
    loader = run.loaders["val"]
    if split == "train":  # as the network is evaluated: neither augmented nor shuffled
        source = run.loaders["train"].split
        size = min(loader.batch_size, len(source))
        loader = Loader(source, size, seed=0, shuffle=False, device=run.device, transform=loader.transform)
    elif split == "test":
        loader = run.loaders["test"]
    sums = measure(run, loader)
    classes = run.task.by_class(sums) if hasattr(run.task, "by_class") else []
    return {f"{split}/{metric}": value for metric, value in describe_sums(run.task, sums).items()}, classes
