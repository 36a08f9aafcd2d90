"""Figure: is a NaN found where it was planted, and what does looking for one cost a healthy run?

    .venv/bin/python scripts/planted_nonfinite.py locate --count 50        # one line each; goes on with --start N
    .venv/bin/python scripts/planted_nonfinite.py cost --rounds 20         # on a quiet machine
    .venv/bin/python scripts/planted_nonfinite.py cost --rounds 20 model=resnet18 trainer.batch_size=64

`locate` plants a NaN at a random (update, layer, sample), in the forward pass or in the backward pass, of short runs of
several networks; the run has to stop at that update, name that layer and that sample, leave its weights as they were,
and the file that it leaves has to say the same when it is run again. `cost` times the same updates with the guard and
without, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cnnlab
from cnnlab.building.replaying import replay
from cnnlab.errors import DivergedError
from cnnlab.observe.observer import IDLE
from cnnlab.protocols import Listener
from cnnlab.runs.folder import RunDir
from cnnlab.terminal import say
from cnnlab.train.guard import UNGUARDED

NETWORKS: tuple[tuple[str, ...], ...] = (
    ("model=resnet", "model.width=4"),
    ("model=cnn", "model.widths=[6,8]", "norm=none", "activation=tanh"),
    ("model=vgg", "model.width=0.0625", "norm=batch"),
    ("model=resnet", "model.width=4", "norm=group", "optim=adam", "trainer.accumulate=2"),
    ("model=plain20", "model.width=4", "optim=lbfgs", "optim.lr=0.1"),
)
COMMON = (
    "data.limit=120",
    "trainer.batch_size=16",
    "trainer.epochs=2",
    "trainer.max_steps=12",
    "trainer.eval_every=10",
    "trainer.device=cpu",
    "trainer.threads=1",
    "trainer.precision=fp32",
    "trainer.step=eager",
    "stats=off",
)


class Weights(Listener):
    """Those before the last update."""

    def __init__(self, step: int):
        self.step = step
        self.kept: dict[str, Tensor] = {}

    def on_step(self, run: Any, result: Any) -> None:
        if run.clock.step == self.step - 1:
            self.kept = {name: t.clone() for name, t in run.model.state_dict().items()}


def layers_of(overrides: tuple[str, ...]) -> list[str]:
    """Names of the layers that give a tensor, in the order in which they run."""
    run = cnnlab.build(cnnlab.compose([*COMMON, *overrides]))
    found: list[str] = []
    names = {id(module): name for name, module in run.model.named_modules() if not list(module.children())}

    def seen(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and names[id(module)] not in found:
            found.append(names[id(module)])

    for module in run.model.modules():
        if id(module) in names:
            module.register_forward_hook(seen)
    batch, _ = run.loaders["train"].first()
    run.model(batch["image"])
    return found


def one(number: int, network: tuple[str, ...], layers: list[str], folder: Path) -> dict[str, Any]:
    """Plants one NaN; what became of it."""
    generator = torch.Generator().manual_seed(number)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    backward, layer, step = bool(draw(2)), layers[draw(len(layers))], 2 + draw(11)
    accumulate = 2 if "trainer.accumulate=2" in network else 1
    sample = draw(8 // accumulate)
    name = "intervention.planted_nan"
    planted = (f"{name}.layer={layer}", f"{name}.step={step}", f"{name}.sample={sample}", f"{name}.backward={backward}")
    experiment = cnnlab.compose([*COMMON, *network, f"seed={number}", "intervention=planted_nan", *planted])
    directory = RunDir(folder)
    directory.create(experiment.config, experiment.overrides)
    run = cnnlab.build(experiment, directory)
    weights = Weights(step)
    run.listeners.append(weights)
    result: dict[str, Any] = {"layer": layer, "step": step, "sample": sample, "backward": backward}
    try:
        cnnlab.fit(run)
    except DivergedError:
        pass
    else:
        return {**result, "exact": False, "said": "the run went on"}
    epoch, batch = divmod(step - 1, run.steps_per_epoch)
    index = int(run.loaders["train"].order(epoch)[16 * batch + sample])
    event = directory.read()["non_finite"][-1]
    located = event["located"]
    again = replay(folder / "nonfinite" / f"step-{event['step']}.pt")
    state = run.model.state_dict()
    unharmed = all(torch.equal(state[key], value) for key, value in weights.kept.items())
    right = {
        "step": event["step"] == step,
        "layer": located["layer"] == layer,
        "samples": located["samples"] == [index],
        "phase": located["phase"] == ("backward" if backward else "forward"),
        "weights": unharmed and bool(weights.kept),
        "again": again.same,
    }
    late = run.clock.step - step
    return {**result, "exact": all(right.values()), "right": right, "late": late, "said": again.recorded.sentence()}


def locate(count: int, start: int) -> int:
    known = {network: layers_of(network) for network in NETWORKS}
    exact = tried = 0
    for number in range(start, start + count):
        network = NETWORKS[number % len(NETWORKS)]
        with tempfile.TemporaryDirectory() as folder:
            found = one(number, network, known[network], Path(folder) / "run")
        tried += 1
        exact += found["exact"]
        where = f"step {found['step']}, {found['layer']}, {'backward' if found['backward'] else 'forward'}"
        wrong = "" if found["exact"] else f"; WRONG: {found.get('right', '')} {found['said']}"
        say(f"{number} {network[0]} {where}: stopped {found.get('late')} updates late{wrong}")
    say(f"{exact} of {tried} exact")
    return 0 if exact == tried else 1


def cost(rounds: int, overrides: list[str]) -> int:
    usual = ["model=resnet20", "data=shapes", "data.size=32", "trainer.batch_size=128", "stats=off"]
    run = cnnlab.build(cnnlab.compose([*usual, *overrides]))
    batch, count = run.loaders["train"].first()
    run.train_mode()
    guard = run.step.guard
    number, seconds = 0, {"guarded": [], "not": []}  # type: ignore[var-annotated]
    for turn in range(rounds + 1):
        arms = ("guarded", "not") if turn % 2 else ("not", "guarded")
        for arm in arms:
            run.step.guard = guard if arm == "guarded" else UNGUARDED
            began = time.perf_counter()
            for _ in range(4):
                run.step(dict(batch), count, number, IDLE)
                run.nonfinite.settle(run)
                number += 1
            if turn:  # the first one warms up
                seconds[arm].append((time.perf_counter() - began) / 4)
    ratios = [one / other for one, other in zip(seconds["guarded"], seconds["not"], strict=True)]
    cut = statistics.quantiles(ratios, n=4)
    say(f"{1e3 * statistics.median(seconds['not']):.1f} ms an update, with the guard {statistics.median(ratios):.4f} "
        f"of it (quartiles {cut[0]:.4f} to {cut[2]:.4f}, {rounds} rounds of 4)")  # fmt: skip
    own = []
    for _ in range(200):
        began = time.perf_counter()
        guard.before(run.model)
        guard.judge(torch.tensor(1.0), run.step.own_gradients(), run.optimizer)
        own.append(time.perf_counter() - began)
    share = statistics.median(own) / statistics.median(seconds["not"])
    say(f"the guard by itself: {1e6 * statistics.median(own):.0f} us, {share:.3%} of an update")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["locate", "cost"])
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    return locate(args.count, args.start) if args.what == "locate" else cost(args.rounds, args.overrides)


if __name__ == "__main__":
    raise SystemExit(main())
