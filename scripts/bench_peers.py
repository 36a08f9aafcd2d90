"""Is `cnnlab train` as fast as what one would take otherwise? Trains the same networks side by side with its peers.

    python scripts/bench_peers.py                                           all cells, about an hour on two CPU cores
    python scripts/bench_peers.py --cells resnet20 --arms "bare loop" "timm, equal"
    python scripts/bench_peers.py --rounds 20 --seconds 2 --json peers.json
    python scripts/bench_peers.py --start-up                                time from process start, instead
    python scripts/bench_peers.py --device cuda --batch 512 --cells alexnet vgg16_bn inception resnet20 resnet18

A cell is a network, an image size and a batch size. Its arms take short turns, round by round, each in a process of
its own (`remote_arm.py`), as one would run it:

- `cnnlab train`: the ordinary trainer with all that it does by default (decoded images from its cache, augmentation,
  statistics, records, TensorBoard) in a temporary folder. Evaluation and checkpoints are left out.
- the same without statistics, and the same again (`--arms "cnnlab train, stats=off" "cnnlab train, again"`).
- the barest loop by hand, the same compiled and (on CUDA) as one graph; timm, Lightning and torchvision's reference
  recipe, at equal settings and at their defaults: `scripts/peer_arms.py` says what that means.

Compared are images/s, by medians over the rounds of the ratio to an arm in the same round. All arms begin with the same
weights. The peers train torchvision's own module where it takes cnnlab's weights (AlexNet, and the ResNets at 224
pixels); elsewhere (small stems, ResNet-20) cnnlab's module, so that the arms differ in how they train, not in what.
Lightning owns its loop, so its `fit` runs in a thread that waits in a callback for its next turn. Between its turns a
process is stopped, with the worker processes that it has.

The images are generated, JPEG (224) or PNG (below), and written to a temporary folder; `--images FOLDER` takes yours.
The peers are a development extra: pip install -e '.[peers]'.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_arms import ARMS, Setting, refusal
from PIL import Image
from remote_arm import RemoteArm
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cnnlab.bench import process
from cnnlab.bench.arms import TrainerArm, ordinary
from cnnlab.bench.rounds import Arm, Turn, interleave, rates, ratios
from cnnlab.building.assemble import make_network
from cnnlab.building.trial import compose
from cnnlab.machine.device import place
from cnnlab.train.run import Run

OURS = "cnnlab train"
VARIANTS = {"cnnlab train, stats=off": ["stats=off"], "cnnlab train, again": []}
"""cnnlab once more: what the statistics cost, and how far two arms lie apart that do the same."""
CLASSES = 10


@dataclass(frozen=True)
class Cell:
    """A network with its images. `torchvision` names its twin there, if there is one; `epoch` is that of the peers."""

    model: tuple[str, ...]
    size: int
    batch: int
    channels: int = 3
    torchvision: str | None = None

    @property
    def images(self) -> int:
        return max(8192 if self.size <= 32 else 1024, 8 * self.batch)

    @property
    def epoch(self) -> int:
        return 50_000 if self.size <= 32 else 20_000

    @property
    def epochs(self) -> int:
        """Of cnnlab's run, over the fewer images that there are: as long as 100 of the peers' epochs."""
        return 100 * self.epoch // self.images


CELLS = {
    "small-cnn28": Cell(("model=cnn",), 28, 128, channels=1),
    "resnet20": Cell(("model=resnet20",), 32, 128),
    "resnet18": Cell(("model=resnet18",), 32, 64),
    "vgg16_bn": Cell(("model=vgg16", "norm=batch"), 32, 64),
    "alexnet224": Cell(("model=alexnet", "model.width=1.0"), 224, 32, torchvision="alexnet"),
    "resnet18-224": Cell(("model=resnet18",), 224, 16, torchvision="resnet18"),
    "resnet50-224": Cell(("model=resnet50",), 224, 8, torchvision="resnet50"),
    "alexnet": Cell(("model=alexnet",), 32, 128),
    "inception": Cell(("model=inception",), 32, 128),
}
USUAL = list(CELLS)[:7]
"""Of those, what is measured unless cells are named."""


class Logits(nn.Module):
    """cnnlab's network as its peers expect one: it returns a tensor."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)["logits"]


def twin(cell: Cell, run: Run) -> nn.Module:
    """A network with the run's present weights, on the CPU, for the peers."""
    weights = run.model.state_dict()
    made: nn.Module
    if cell.torchvision is not None:
        import torchvision

        made = getattr(torchvision.models, cell.torchvision)(num_classes=CLASSES)
        made.load_state_dict(weights)
        return made
    made = make_network(run.experiment, run.spec, run.task)
    made.load_state_dict(weights)
    return Logits(made)


# ---- images ----


def generate(folder: Path, cell: Cell) -> None:
    """Writes smooth random images to folder/{train,val,test}/<class>/; what counts is their size."""
    random = np.random.default_rng(0)
    side = max(2, cell.size // 8)
    for split, count in (("train", cell.images), ("val", CLASSES), ("test", CLASSES)):
        for number in range(count):
            coarse = random.integers(0, 256, (side, side, cell.channels), dtype=np.uint8)
            image = Image.fromarray(coarse[:, :, 0] if cell.channels == 1 else coarse)
            path = folder / split / str(number % CLASSES) / f"{number}.{'jpg' if cell.size > 64 else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.resize((cell.size, cell.size), Image.Resampling.BILINEAR).save(path)


def overrides(cell: Cell, images: Path, cache: Path, device: str) -> list[str]:
    """The experiment of a cell, as typed for `cnnlab train`."""
    data = ["data=folder", f"data.root='{images}'", f"data.cache='{cache}'", f"data.size={cell.size}"]
    optim = ["optim=momentum", "optim.lr=0.001", "optim.weight_decay=5e-4", "groups.decay_norm_and_bias=true"]
    rest = ["schedule=constant", "augment=[crop,flip]", f"trainer.batch_size={cell.batch}", f"trainer.device={device}"]
    return [*cell.model, *data, f"data.channels={cell.channels}", *optim, *rest, f"trainer.epochs={cell.epochs}"]


# ---- one cell ----


def measure(cell: Cell, names: Sequence[str], options: argparse.Namespace, tell: Callable[..., None]) -> dict[str, Any]:
    """The turns of a cell's arms, and what they say."""
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as text, ExitStack() as stack:
        folder = Path(text)
        images = options.images
        if images is None:
            tell("generating images", 0, 1)
            images = folder / "images"
            generate(images, cell)
        tell("building", 0, 1)
        typed = overrides(cell, images.resolve(), folder / "cache", options.device)
        prepared, device = prepare(cell, typed, folder, options.workers)
        skipped = {name: reason for name in names if (reason := refusal(name, device))}
        lab = RemoteArm(OURS, ours, typed, folder / "run", threads=options.threads)
        arms = [lab]
        for number, name in enumerate(names):
            if name in VARIANTS:
                made: tuple[Any, ...] = (ours, [*typed, *VARIANTS[name]], folder / f"run{number}")
            else:
                made = (peer, name, prepared)
            arms += [RemoteArm(name, *made, threads=options.threads)] if name not in skipped else []
        for arm in arms:
            stack.callback(arm.close)
        turns = interleave(arms, rounds=options.rounds, seconds=options.seconds, progress=tell)
        return {**described(turns), "skipped": skipped, "step": lab.note, "batch": cell.batch}


def prepare(cell: Cell, typed: Sequence[str], folder: Path, workers: int) -> tuple[Path, torch.device]:
    """Decodes the images into cnnlab's cache, and leaves in a file what the peers need of them and of the network."""
    experiment = compose([*typed, "trainer.step=eager"])
    placement = place(experiment.trainer, closure=False)
    run = ordinary(experiment, folder / "weights", {})
    split = run.loaders["train"].split
    batch = split.fetch(torch.arange(min(len(split), cell.images)))
    setting = Setting(
        images=batch["image"].permute(0, 2, 3, 1).contiguous().cpu(),
        labels=batch["label"].cpu(),
        network=functools.partial(copy.deepcopy, twin(cell, run)),
        device=placement.device,
        dtype=placement.dtype,
        batch=cell.batch,
        epoch=cell.epoch,
        workers=workers,
        folder=folder,
    )
    torch.save(setting, folder / "setting.pt")
    run.tell("on_end", None)
    return folder / "setting.pt", placement.device


def ours(typed: Sequence[str], folder: Path) -> tuple[Arm, str]:
    """cnnlab's arm, in its process; and the step that its trainer takes."""
    run = ordinary(compose(typed), folder, {})
    return TrainerArm(OURS, run), str(run.facts["step"])


def peer(name: str, prepared: Path) -> tuple[Arm, str]:
    """A peer's arm, in its process."""
    return ARMS[name](name, torch.load(prepared, weights_only=False)), ""


def described(turns: Mapping[str, Sequence[Turn]]) -> dict[str, Any]:
    """Images/s of each arm, and how many times as fast as it cnnlab is, round by round."""
    return {
        "arms": {
            name: {
                "images_per_second": asdict(rates(own)),
                "ratio": None if name == OURS else asdict(ratios(turns[OURS], own)),
                "turns": [asdict(turn) for turn in own],
            }
            for name, own in turns.items()
        }
    }


# ---- start-up ----

_DIGITS = """
import torch
from sklearn.datasets import load_digits
from torch import nn
data = load_digits()
x, y = torch.tensor(data.images[:64, None], dtype=torch.float32) / 16, torch.tensor(data.target[:64])
net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
"""
_STEP = "nn.functional.cross_entropy(net(x), y).backward(); optimizer.step()"
_LIGHTNING = """
import os, lightning
class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net
    def training_step(self, batch, number):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
class First(lightning.Callback):
    def on_train_batch_end(self, *arguments):
        os._exit(0)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 64)
lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, callbacks=[First()]).fit(Module(), loader)
"""
START_UPS = {
    "python alone": "",
    "import torch": "import torch",
    "torch, first step": f"{_DIGITS}\noptimizer = torch.optim.SGD(net.parameters(), lr=0.1)\n{_STEP}",
    "timm, first step": f"{_DIGITS}\nimport timm.data, timm.optim, timm.scheduler, timm.utils\n"
    f"optimizer = timm.optim.create_optimizer_v2(net, opt='sgd', lr=0.1)\n{_STEP}",
    "Lightning, first step": f"{_DIGITS}\n{_LIGHTNING}",
}
"""The least program of each: it ends right after its first update on the digits, and is timed from outside."""


def start_up(repeats: int) -> dict[str, list[float]]:
    """Seconds from process start, of each program several times, interleaved.

    `cnnlab bench` does what `cnnlab train` does up to its first update, and reports the age of its process then.
    """
    command = Path(sys.executable).with_name("cnnlab")
    programs = {name: [sys.executable, "-c", f"{code}\nimport os; os._exit(0)"] for name, code in START_UPS.items()}
    programs["cnnlab --help"] = [str(command), "--help"]
    bench = [str(command), "bench", "--rounds", "1", "--seconds", "0.01", "--json"]
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, program in programs.items():
            began = time.perf_counter()
            subprocess.run(program, capture_output=True, check=True)
            found.setdefault(name, []).append(time.perf_counter() - began)
        document = json.loads(subprocess.run(bench, capture_output=True, check=True).stdout)
        found.setdefault("cnnlab train, first step", []).append(document["start"]["first_step_seconds"])
    return found


# ---- the command ----


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    document: dict[str, Any] = {"machine": {**process.machine(), **versions()}, "threads": torch.get_num_threads()}
    console.print(", ".join(f"{name} {value}" for name, value in document["machine"].items() if value), markup=False)
    if options.start_up:
        document["start_up"] = start_up(options.rounds)
        show_start_up(console, document["start_up"])
    else:
        document |= {"rounds": options.rounds, "seconds_a_turn": options.seconds, "cells": {}}
        for name in options.cells:
            cell = CELLS[name] if options.batch is None else replace(CELLS[name], batch=options.batch)
            document["cells"][name] = measure(cell, options.arms, options, teller(name))
            show(console, name, document["cells"][name])
            write(document, options.json)  # after each cell: an interrupted hour is not lost
    write(document, options.json)
    return 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--cells", nargs="+", default=USUAL, choices=list(CELLS), metavar="CELL", help=", ".join(CELLS))
    flag("--batch", type=int, help="batch size of every cell: a GPU wants larger ones than two cores")
    arms = [*ARMS, *VARIANTS]
    flag("--arms", nargs="+", default=list(ARMS), choices=arms, metavar="ARM", help=", ".join(arms))
    flag("--rounds", type=int, default=10, help="turns of each arm (default 10)")
    flag("--seconds", type=float, default=2.0, help="length of a turn (default 2)")
    flag("--workers", type=int, default=os.cpu_count() or 1, help="worker processes at the defaults (default: cores)")
    flag("--threads", type=int, help="CPU threads of every arm (default: torch's choice)")
    flag("--device", default="auto", choices=["auto", "cpu", "cuda"])
    flag("--images", type=Path, metavar="FOLDER", help="image folder instead of generated images, with 10 classes")
    flag("--start-up", action="store_true", help="measure the time from process start instead")
    flag("--json", type=Path, metavar="OUT", help="write everything there")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or not options.seconds > 0 or options.workers < 0:
        parser.error("expected --rounds of 1 or more, --seconds above 0 and --workers of 0 or more")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return options


def versions() -> dict[str, str]:
    found = {}
    for name in ("timm", "lightning"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def teller(cell: str) -> Callable[[str, int, int], None]:
    """Progress on stderr, a line where it is no terminal; written between turns."""
    terminal = sys.stderr.isatty()
    stream = sys.stderr

    def tell(what: str, done: int, total: int) -> None:
        width = shutil.get_terminal_size().columns - 1
        text = f"{cell}: {what} ({done}/{total})"
        if terminal:
            print(f"\r{text[:width]:<{width}}", end="\n" if what == "done" else "", file=stream, flush=True)
        elif not what.startswith("round") or done % 10 == 0:
            print(text, file=stream, flush=True)

    return tell


def show(console: Console, name: str, found: Mapping[str, Any]) -> None:
    table = Table(title=f"{name}, batch {found['batch']} ({OURS}: {found['step']})", title_justify="left")
    for heading in ("arm", "images/s", "quartiles", f"{OURS} / arm", "quartiles"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm, own in found["arms"].items():
        rate, ratio = own["images_per_second"], own["ratio"]
        cells = ["", ""] if ratio is None else [f"{ratio['median']:.3f}", f"{ratio['low']:.3f} - {ratio['high']:.3f}"]
        table.add_row(arm, f"{rate['median']:,.1f}", f"{rate['low']:,.1f} - {rate['high']:,.1f}", *cells)
    console.print(table)
    for arm, reason in found["skipped"].items():
        console.print(f"without {arm}: {reason}", markup=False)


def show_start_up(console: Console, found: Mapping[str, Sequence[float]]) -> None:
    table = Table(title="Seconds from process start", title_justify="left")
    for heading in ("program", "median", "least", "most", "times import torch"):
        table.add_column(heading, justify="left" if heading == "program" else "right")
    base = statistics.median(found["import torch"])
    for name, seconds in found.items():
        median = statistics.median(seconds)
        table.add_row(name, *(f"{s:.3f}" for s in (median, min(seconds), max(seconds))), f"{median / base:.2f}")
    console.print(table)


def write(document: Mapping[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            sys.exit(main())
        except KeyboardInterrupt:
            sys.exit("interrupted")
