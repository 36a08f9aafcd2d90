"""Does a redesign change a number? Short runs over every optimizer family, precision, task and data path, hashed.

    .venv/bin/python scripts/golden_runs.py record golden.json     # before the first change
    .venv/bin/python scripts/golden_runs.py compare golden.json    # after the last one; exit 1 where anything differs

Each run is a process of its own on one CPU thread. Of each are kept the SHA-256 of its final weights, of its
optimizer's state and of its best checkpoint's weights, and the records of `metrics.jsonl` and `stats.jsonl`. A file
belongs to one machine and one version of torch: record and compare on the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress

CLASSES = ("bird", "cat", "dog")
COMMON = (
    "trainer.max_steps=8",
    "trainer.batch_size=16",
    "trainer.log_every=2",
    "trainer.device=cpu",
    "trainer.threads=1",
    "trainer.step=eager",
    "trainer.precision=fp32",
    "trainer.progress=false",
    "stats.every=2",
    "stats.max_overhead=null",
    "data.limit=64",
)
"""What a cadence would take from the clock is fixed: no row may depend on how busy the machine is."""

ROWS: dict[str, tuple[str, ...]] = {
    # models, activations, norm layers, inits
    "resnet": (),
    "resnet18": ("model=resnet18", "model.width=8", "data=shapes"),
    "vgg": ("model=vgg", "init=xavier"),
    "inception": ("model=inception", "init=orthogonal"),
    "alexnet": ("model=alexnet", "norm=lrn"),
    "speednet": ("model=speednet", "data=shapes", "init=whitening"),
    "cnn": ("model=cnn", "activation=tanh", "norm=none", "init=lsuv"),
    "mlp": ("model=mlp", "activation=prelu", "norm=layer"),
    "torchvision": ("model=torchvision", "data=shapes"),
    "plain": ("model=plain20", "model.width=4", "norm=instance", "activation=elu"),
    # optimizers
    "momentum": ("optim=momentum", "optim.lr=0.01"),
    "nesterov": ("optim=nesterov", "optim.lr=0.01"),
    "adam": ("optim=adam",),
    "adamw": ("optim=adamw",),
    "rmsprop": ("optim=rmsprop",),
    "adagrad": ("optim=adagrad",),
    "nadam": ("optim=nadam",),
    "muon": ("optim=muon",),
    "lbfgs": ("optim=lbfgs", "optim.max_iter=2", "model=cnn"),
    "newton_cg": ("optim=newton_cg", "optim.max_iter=2", "model=cnn"),
    "soap": ("optim=soap",),
    "sophia": ("optim=sophia",),
    # schedules, precision, accumulation, clipping, groups
    "one_cycle": ("schedule=one_cycle",),
    "plateau": ("schedule=plateau", "trainer.max_steps=12"),
    "bf16": ("trainer.precision=bf16", "model=vgg"),
    "fp16": ("trainer.precision=fp16", "optim.lr=0.01"),
    "accumulate": ("trainer.accumulate=2", "norm=group", "trainer.clip_norm=0.5"),
    "groups": ("groups.layer_decay=0.8", "groups.head_lr=2", "groups.freeze=[conv1]"),
    # regularization
    "penalties": ("regularization=[l1,l2]", "model=cnn"),
    "averages": ("regularization=[ema,max_norm]",),
    "dropout": ("regularization=dropout", "model=inception"),
    "stochastic_depth": ("regularization=stochastic_depth",),
    "classic_dropout": ("regularization=classic_dropout", "model=alexnet"),
    "decoupled": ("regularization=[decoupled_decay,early_stopping]",),
    # losses, augmentation, normalization
    "focal": ("loss=focal", "augment=[crop,flip,cutout]"),
    "bce_mixup": ("loss=bce", "augment=mixup", "normalize=zca"),
    "smoothing": ("loss.label_smoothing=0.1", "augment=[cutmix,rotate,brightness]", "normalize=per_image"),
    # data paths, tasks
    "folder": ("data=folder", "data.root={folder}", "augment=standard", "loading.path=resident"),
    "mapped": ("data=folder", "data.root={folder}", "loading.path=mapped"),
    "stream": ("data=folder", "data.root={folder}", "loading.path=stream", "loading.workers=1"),
    "shards": ("data=webdataset", "data.shards='{shards}'", "data.classes=3"),
    "segmentation": ("data=shapes", "task=segmentation", "model=vgg"),
    "segmentation_dice": ("data=shapes", "task=segmentation", "model=resnet18", "model.width=8", "loss=dice"),
    "masks": ("data=masks", "data.root={masks}", "task=segmentation", "model=cnn"),
    "views": ("task.views=mirror_translate", "data=shapes"),
    "two_processes": ("data=shapes", "norm=group", "model.width=8"),
}
NO_LIMIT = ("folder", "mapped", "stream", "shards", "masks")
"""Small as they are."""


# ---- data ----


def photo(generator: np.random.Generator, kind: int, size: tuple[int, int]) -> Image.Image:
    """A picture whose brightest channel tells its class."""
    pixels = generator.integers(0, 160, (*size, 3))
    pixels[..., kind] += 90
    return Image.fromarray(pixels.astype(np.uint8))


def write_data(root: Path) -> dict[str, str]:
    """A folder of photos by class, the same in shards, and photos with masks; returns what the rows call them."""
    generator = np.random.default_rng(0)
    (root / "shards").mkdir()
    with tarfile.open(root / "shards" / "train-0000.tar", "w") as shard:
        for number in range(60):
            kind = number % len(CLASSES)
            image = photo(generator, kind, (24 + number % 9, 30))
            path = root / "folder" / CLASSES[kind] / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            for name, content in ((f"{number:03}.png", path.read_bytes()), (f"{number:03}.cls", b"%d" % kind)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, BytesIO(content))
    for split, count in (("train", 24), ("val", 8), ("test", 8)):
        for number in range(count):
            image = photo(generator, number % 3, (32, 32))
            mask = np.zeros((32, 32), np.uint8)
            mask[4 + number % 8 : 20, 6:26] = 1 + number % 2
            for folder, picture in (("images", image), ("masks", Image.fromarray(mask))):
                path = root / "masks" / folder / split / f"{number:03}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
    (root / "masks" / "classes.txt").write_text("ground\nsmall\nlarge\n")
    return {
        "folder": str(root / "folder"),
        "shards": str(root / "shards" / "train-{0000..0000}.tar"),
        "masks": str(root / "masks"),
    }


# ---- runs ----


def command(name: str, places: Mapping[str, str], folder: Path) -> list[str]:
    overrides = [text for text in COMMON if not (name in NO_LIMIT and text.startswith("data."))]
    for text in ROWS[name]:
        for place, path in places.items():
            text = text.replace(f"{{{place}}}", path)
        overrides = [o for o in overrides if o.partition("=")[0] != text.partition("=")[0]] + [text]
    start = ["-m", "cnnlab"]
    if name == "two_processes":
        start = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517", *start]
    return [sys.executable, *start, "train", *overrides, f"hydra.run.dir={folder}"]


def ran(name: str, places: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """What is left of one run. A run that is refused leaves its message."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CNNLAB_CACHE": str(folder.parent / "cache")}
    done = subprocess.run(command(name, places, folder), capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return {"failed": f"exit {done.returncode}: {done.stderr.strip()[-1000:]}"}
    last, best = (folder / "checkpoints" / f"{which}.pt" for which in ("last", "best"))
    state = torch.load(last, weights_only=True)
    return {
        "weights": digest(state["model"]),
        "optimizer": digest(state["optimizer"]),
        "best": digest(torch.load(best, weights_only=True)["model"]) if best.exists() else None,
        "metrics": lines(folder / "metrics.jsonl"),
        "stats": lines(folder / "stats.jsonl"),
    }


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def digest(state: Any) -> str:
    """SHA-256 of all the values in a nested state, in the order of its keys."""
    found = hashlib.sha256()
    for name, value in leaves(state):
        found.update(name.encode())
        if isinstance(value, torch.Tensor):
            found.update(value.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(value).encode())
    return found.hexdigest()


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from leaves(value[key], f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from leaves(item, f"{path}.{number}")
    else:
        yield path, value


# ---- comparing ----


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between two records of one row, in words; keys that are only in the later one are named."""
    if "failed" in before or "failed" in after:
        return [] if before == after else [f"{before.get('failed', 'ran')} -> {after.get('failed', 'ran')}"]
    found = [name for name in ("weights", "optimizer", "best") if before[name] != after[name]]
    for name in ("metrics", "stats"):
        old, new = before[name], after[name]
        if len(old) != len(new):
            found.append(f"{name}: {len(old)} records -> {len(new)}")
        changed = sorted({k for a, b in zip(old, new, strict=False) for k in a if k not in b or a[k] != b[k]})
        added = sorted({k for a, b in zip(old, new, strict=False) for k in b if k not in a})
        found += [f"{name}: {', '.join(changed)}"] if changed else []
        found += [f"{name}: new {', '.join(added)}"] if added else []
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    args = parser.parse_args()
    console = Console(stderr=True)
    recorded = json.loads(args.file.read_text()) if args.action == "compare" else {}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root, Progress(console=console) as progress:
        places = write_data(Path(root))
        for name in progress.track(args.rows, description=args.action):
            found[name] = ran(name, places, Path(root) / "runs" / name)
            if "failed" in found[name]:
                console.print(f"{name}: {found[name]['failed']}", markup=False)
    if args.action == "record":
        args.file.write_text(json.dumps(found))
        return int(any("failed" in row for row in found.values()))
    told = {name: differences(recorded[name], row) for name, row in found.items() if name in recorded}
    for name, words in told.items():
        print(f"{name:<20} {'equal' if not words else '; '.join(words)}")
    equal = sum(not words for words in told.values())
    print(f"{equal} of {len(told)} equal")
    return int(equal < len(told))


if __name__ == "__main__":
    sys.exit(main())
