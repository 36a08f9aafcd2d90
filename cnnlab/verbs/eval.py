"""`cnnlab eval RUN`: the metrics of a run's checkpoint on one of its splits."""

from __future__ import annotations

import json
from collections.abc import Sequence

from cnnlab.config import Composed
from cnnlab.rundir import RunDir, jsonable
from cnnlab.schema import DataPath, Device, StepKind
from cnnlab.verbs.arguments import Parser
from cnnlab.verbs.reopen import reopened

EXAMPLES = """examples:
  cnnlab eval outputs/digits-resnet/2026-11-22_10-00-00-1a2b
  cnnlab eval RUN --split val --checkpoint last
  cnnlab eval RUN --json
"""


def main(arguments: Sequence[str]) -> int:
    parser = Parser("eval", "Evaluates a run's checkpoint; the run folder is left as it is.", EXAMPLES)
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--split", choices=["train", "val", "test"], default="test")
    parser.add_argument("--checkpoint", choices=["best", "last"], default="best")
    parser.add_argument("--device", choices=[device.value for device in Device], help="as trainer.device")
    parser.add_argument("--config-dir", action="append", default=[], help="where your own parts are now")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_all(arguments)
    folder = RunDir(args.run)
    reopened(folder, args.config_dir)  # its own parts are importable from here on
    figures = evaluate_run(folder, args.split, args.checkpoint, args.device)
    if args.json:
        print(json.dumps(jsonable(figures)))
    else:
        for name, value in figures.items():
            print(f"{name:<24} {value:.4f}")
    return 0


def evaluate_run(folder: RunDir, split: str, which: str = "best", device: str | None = None) -> dict[str, float]:
    """The metrics of the checkpoint `which` of a run on `split`, named as in its `run.json`.

    It computes as the run did (precision and layout), where it finds the kind of device that the run had. A
    run that has no best checkpoint, because it was never evaluated, has its last one measured.

    Raises:
        UsageError: no run folder.
        CheckpointError: its checkpoint is missing or damaged.
    """
    from cnnlab import checkpoint
    from cnnlab.builder import build
    from cnnlab.check import bind_section
    from cnnlab.data.loader import Loader
    from cnnlab.device import as_recorded
    from cnnlab.schema import Trainer
    from cnnlab.train.loop import evaluate
    from cnnlab.validate import check

    config = reopened(folder).config
    path = folder.best if which == "best" and folder.best.exists() else folder.last
    state = checkpoint.load(path)
    if device is not None:
        config["trainer"]["device"] = device
    config["trainer"]["step"] = StepKind.eager.value  # no step is taken: none is tried, compiled or captured
    composed = Composed(config, folder.path, {}, ())
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
    return evaluate(run, split, loader)
