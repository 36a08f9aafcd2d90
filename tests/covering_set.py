"""Does composition hold? Trains a pairwise covering set: every option of every group beside every other option.

    .venv/bin/python tests/covering_set.py            # the whole set; writes docs/benchmarks/composition.md
    .venv/bin/python tests/covering_set.py --limit 50 --json

Each row chooses one option a factor, is composed and checked as `cnnlab train` does, built and trained for two
epochs of one step with everything that surrounds a step (evaluation, selection, records). A refused row is cut down
to the choices that are to blame; they are kept apart from then on, and the row's other pairs go into further rows.
So every pair has trained, or is refused for its own sake. A row that fails otherwise is a bug, and exit code 1.
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import json
import math
import pickle
import random
import signal
import struct
import sys
import tarfile
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cnnlab.building.builder import build
from cnnlab.building.trial import check, read
from cnnlab.composing.composer import Composed, Composer, composer
from cnnlab.errors import ConfigError, DataError, DivergedError, InterruptedRun
from cnnlab.train import fit

REPORT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "composition.md"
TIME_LIMIT = 300
"""Seconds a row may take."""
SMALL_RATE = 1e-3
"""Of the default rate, for a row that diverges with it: eight samples and a hundred layers are no fair trial."""

COMMON = (
    "data.limit=8",
    "trainer.batch_size=8",
    "trainer.epochs=2",
    "trainer.device=cpu",
    "trainer.threads=1",
    "trainer.progress=false",
    "stats.every=1",
)
"""Two epochs of one step: what happens between epochs happens, and a schedule's whole length is two steps."""

NOT_FACTORS = ("debug", "experiment", "groups", "loading", "local", "paths", "trainer", "weights")
"""Groups of presets over the other groups' values; `trainer` and `groups` are covered setting by setting;
and `weights`, which only fill what a network has."""

SETTINGS: dict[str, tuple[str, ...]] = {
    "trainer.precision": ("fp32", "bf16", "fp16"),
    "trainer.accumulate": ("1", "2"),
    "trainer.clip_norm": ("null", "1.0"),
    "trainer.layout": ("channels_last", "contiguous"),
    "groups.layer_decay": ("1.0", "0.8"),
}
"""Values that are covered like options; the first one is the default here."""

LISTS = {"regularization": ("[ema,max_norm,l1]",), "augment": ("[crop,flip,cutout,noise]",), "probe": ()}
"""Groups that take several options at once, and the combinations that are covered besides each option alone."""

_RESNET = "model.width=8"
_CIFAR_RESNET = "model.width=4"
_EIGHTH = "model.width=0.0625"
STAND_INS: dict[str, tuple[str, ...]] = {
    **{f"model=resnet{depth}": (_RESNET,) for depth in (18, 34, 50, 101, 152)},
    **{f"model=resnet{depth}": (_CIFAR_RESNET,) for depth in (20, 32, 44, 56, 110)},
    **{f"model=plain{depth}": (_CIFAR_RESNET,) for depth in (20, 56)},
    "model=resnet1202": (_CIFAR_RESNET, "model.depth=62"),
    **{f"model=vgg{depth}": (_EIGHTH,) for depth in (11, 13, 16, 19)},
    "model=alexnet_2012": (_EIGHTH,),
    "model=alexnet_2014": (_EIGHTH,),
    "model=inception_v3": ("model.width=0.1",),
    "optim=lbfgs": ("optim.max_iter=2",),
    "finetune=partial": ("finetune.until=conv1",),
    "optim=newton_cg": ("optim.max_iter=2",),
}
"""Options in a smaller size, so that a row takes a second: the code is the same, the numbers are not."""

BASES: tuple[dict[str, str], ...] = (
    {},
    {"data": "cifar10"},
    {"data": "shapes", "task": "segmentation"},
    {"data": "shapes", "task": "segmentation", "model": "vgg"},
    {"data": "shapes", "task": "localization"},
    {"data": "shapes", "task": "localization", "model": "vgg"},
    {"data": "cifar10", "model": "vgg"},
)
"""What "all else at defaults" means: no single data set has every target, and no network every place. Choices are to
blame for a refusal when they are refused beside each of these."""

Choice = tuple[str, str]
"""A factor and the option taken of it."""
Row = dict[str, str]
"""An option for each factor."""


# ---- what there is to combine ----


@dataclass(frozen=True)
class Space:
    """The factors with their options, and the overrides that take an option."""

    factors: dict[str, tuple[str, ...]]
    defaults: Row
    files: Mapping[str, Sequence[str]]

    def overrides(self, choices: Mapping[str, str]) -> list[str]:
        lines = [f"{factor}={option}" for factor, option in choices.items()]
        extra = [o for line in lines for o in (*self.files.get(line, ()), *STAND_INS.get(line, ()))]
        return [*lines, *extra]

    def restricted(self, keep: Callable[[str, str], bool]) -> Space:
        """The space of the options for which `keep(factor, option)`; a default always stays."""
        factors = {
            factor: tuple(o for o in options if o == self.defaults[factor] or keep(factor, o))
            for factor, options in self.factors.items()
        }
        return Space(factors, self.defaults, self.files)


def whole_space(open_composer: Composer, files: Mapping[str, Sequence[str]]) -> Space:
    """Every option of every group, as the folders under `configs/` have them."""
    chosen = open_composer.compose([]).choices
    factors: dict[str, tuple[str, ...]] = {}
    defaults: Row = {}
    for group in open_composer.groups():
        if group in NOT_FACTORS:
            continue
        options = open_composer.options(group)
        if group in LISTS:
            options = [f"[{option}]" for option in options] + list(LISTS[group])
        factors[group] = tuple(options)
        defaults[group] = options[0] if group == "probe" else str(chosen[group])
    for group in ("regularization", "augment"):
        defaults[group] = "[none]"
    for key, values in SETTINGS.items():
        factors[key], defaults[key] = values, values[0]
    return Space(factors, defaults, files)


@contextmanager
def data_files() -> Iterator[dict[str, tuple[str, ...]]]:
    """Small files in the formats of the data sets that come in files, and the overrides that find them."""
    with (
        tempfile.TemporaryDirectory(prefix="cnnlab-covering-") as name,
        mock.patch("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).is_file()),
    ):
        root, random_state = Path(name), np.random.default_rng(0)
        images = f"data.root={root / 'folder'}"
        decoded = (f"data.cache={root / 'cache'}", "data.workers=0")
        write_images(root / "folder", random_state)
        write_shards(root / "shards", random_state)
        write_voc(root / "voc", random_state)
        write_coco(root / "coco", random_state)
        write_masks(root / "masks", random_state)
        write_cifar(root / "sets", random_state)
        write_mnist(root / "sets", random_state)
        write_pet(root / "sets" / "oxford-iiit-pet", random_state)
        write_voc2012(root / "sets" / "VOCdevkit" / "VOC2012", random_state)
        yield {
            "data=digits": ("data.val=0.02", "data.test=0.02"),
            "data=shapes": ("data.size=16", "data.train=40", "data.val=16", "data.test=16"),
            "data=folder": (images, "data.size=16", *decoded),
            "data=imagenet": (images, "data.size=64", "data.resize=72", "data.val=0.1", *decoded),
            "data=webdataset": (
                f"data.shards={root / 'shards'}/*.tar",
                "data.size=16",
                "data.resize=null",
                "data.val=0.2",
                "data.test=0.2",
                f"data.cache={root / 'cache'}",
            ),
            "data=voc": (f"data.root={root / 'voc'}", "data.size=16", *decoded),
            "data=coco": (f"data.root={root / 'coco'}", "data.size=16", *decoded),
            "data=masks": (f"data.root={root / 'masks'}", "data.size=[16,24]", "data.val=0.2", *decoded),
            **{
                f"data={kind}": (f"data.root={root / 'sets'}",)
                for kind in ("cifar10", "cifar100", "mnist", "fashion_mnist")
            },
            **{
                f"data={kind}": (f"data.root={root / 'sets'}", "data.size=16", "data.val=0.2", *decoded)
                for kind in ("pet", "pet_segmentation", "pet_boxes", "voc2012", "voc2012_segmentation")
            },
        }


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _noise(state: np.random.Generator, *shape: int) -> np.ndarray:
    return state.integers(0, 256, shape, dtype=np.uint8)


def write_images(root: Path, state: np.random.Generator) -> None:
    for split, count in (("train", 15), ("val", 5)):
        for kind, number in itertools.product(("cat", "dog"), range(count)):
            _save(root / split / kind / f"{number}.png", _noise(state, 20, 24, 3))


def write_shards(root: Path, state: np.random.Generator) -> None:
    root.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(root / f"{shard}.tar", "w") as archive:
            for number in range(20):
                picture = io.BytesIO()
                Image.fromarray(_noise(state, 20, 24, 3)).save(picture, "PNG")
                for name, content in ((f"{number}.png", picture.getvalue()), (f"{number}.cls", b"%d" % (number % 2))):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def write_voc(root: Path, state: np.random.Generator) -> None:
    (root / "Annotations").mkdir(parents=True)
    for number in range(40):
        _save(root / "JPEGImages" / f"{number}.jpg", _noise(state, 20, 24, 3))
        sides = "".join(f"<{side}>{n}</{side}>" for side, n in zip(("xmin", "ymin", "xmax", "ymax"), (3, 4, 12, 15)))
        thing = f"<object><name>{('cat', 'dog')[number % 2]}</name><bndbox>{sides}</bndbox></object>"
        (root / "Annotations" / f"{number}.xml").write_text(f"<annotation>{thing}</annotation>")
    for split, numbers in (("train", range(24)), ("val", range(24, 32)), ("test", range(32, 40))):
        path = root / "ImageSets" / "Main" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{number}\n" for number in numbers))


def write_coco(root: Path, state: np.random.Generator) -> None:
    images, annotations = [], []
    for number in range(40):
        _save(root / "images" / f"{number}.png", _noise(state, 20, 24, 3))
        images.append({"id": number, "file_name": f"{number}.png", "width": 24, "height": 20})
        box = {"image_id": number, "category_id": number % 2, "bbox": [2, 3, 10, 12], "iscrowd": 0}
        annotations.append({"id": number, **box})
    categories = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train.json").write_text(json.dumps(document))


def write_masks(root: Path, state: np.random.Generator) -> None:
    for number in range(40):
        _save(root / "images" / "train" / f"{number}.png", _noise(state, 20, 24, 3))
        _save(root / "masks" / "train" / f"{number}.png", state.integers(0, 3, (20, 24), dtype=np.uint8))
    (root / "classes.txt").write_text("sky\nroad\nhouse\n")


def write_pet(root: Path, state: np.random.Generator) -> None:
    for split, breeds, count in (("trainval", 37, 2), ("test", 8, 1)):
        names = [(breed, f"Breed_{breed}_{split}_{n}") for breed in range(1, breeds + 1) for n in range(count)]
        for _, name in names:
            _save(root / "images" / f"{name}.jpg", _noise(state, 20, 24, 3))
            trimap = state.integers(1, 4, (20, 24), dtype=np.uint8)
            _save(root / "annotations" / "trimaps" / f"{name}.png", trimap)
        (root / "annotations" / f"{split}.txt").write_text("".join(f"{name} {breed} 1 1\n" for breed, name in names))


def write_voc2012(root: Path, state: np.random.Generator) -> None:
    write_voc(root, state)
    (root / "ImageSets" / "Segmentation").mkdir()
    for split in ("train", "val"):
        names = (root / "ImageSets" / "Main" / f"{split}.txt").read_text()
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(names)
        for name in names.split():
            mask = state.integers(0, 21, (20, 24), dtype=np.uint8)
            _save(root / "SegmentationClass" / f"{name}.png", mask)


def write_cifar(root: Path, state: np.random.Generator) -> None:
    def dump(path: Path, content: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(content))

    def part(count: int, key: str, classes: int) -> dict[str, Any]:
        return {"data": _noise(state, count, 3072), key: [n % classes for n in range(count)]}

    ten, hundred = root / "cifar-10-batches-py", root / "cifar-100-python"
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        dump(ten / name, part(20, "labels", 10))
    dump(ten / "batches.meta", {"label_names": [str(n) for n in range(10)]})
    dump(hundred / "train", part(200, "fine_labels", 100))
    dump(hundred / "test", part(16, "fine_labels", 100))
    dump(hundred / "meta", {"fine_label_names": [str(n) for n in range(100)]})


def write_mnist(root: Path, state: np.random.Generator) -> None:
    for kind, (name, count) in itertools.product(("MNIST", "FashionMNIST"), (("train", 100), ("t10k", 16))):
        raw = root / kind / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        images = struct.pack(">IIII", 2051, count, 28, 28) + _noise(state, count * 784).tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(images)
        labels = struct.pack(">II", 2049, count) + bytes(n % 10 for n in range(count))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(labels)


# ---- rows ----


class Covering:
    """Makes rows that cover pairs of choices, apart from the combinations that it has been told to avoid.

    Greedy, as AETG (Cohen et al. 1997): a row begins with a pair that is still missing; the other factors follow in
    random order, each with the option that adds most new pairs; the best of a few candidates is taken.
    """

    candidates = 4

    def __init__(self, factors: Mapping[str, Sequence[str]], seed: int):
        self.factors = factors
        self._random = random.Random(seed)
        self._avoid: dict[Choice, list[frozenset[Choice]]] = defaultdict(list)
        pairs = [
            frozenset({(one, a), (other, b)})
            for one, other in itertools.combinations(factors, 2)
            for a, b in itertools.product(factors[one], factors[other])
        ]
        self.total = len(pairs)
        self._random.shuffle(pairs)
        self.missing = dict.fromkeys(pairs)
        """In a random order that the seed fixes."""

    def avoid(self, combination: frozenset[Choice]) -> None:
        """Keeps these choices apart; pairs that contain them all are missing no longer."""
        for choice in combination:
            self._avoid[choice].append(combination)
        if len(combination) <= 2:
            self.drop([pair for pair in self.missing if combination <= pair])

    def drop(self, pairs: Iterable[frozenset[Choice]]) -> None:
        for pair in pairs:
            self.missing.pop(pair, None)

    def row(self) -> tuple[frozenset[Choice], Row | None]:
        """A missing pair, and the best row found with it; `None` where every one runs into what is to be avoided."""
        pair = next(iter(self.missing))
        found = [row for _ in range(5 * self.candidates) if (row := self._complete(pair)) is not None]
        return pair, max(found[: self.candidates], key=self._news, default=None)

    def _news(self, row: Row) -> int:
        return sum(pair in self.missing for pair in pairs_of(row))

    def _complete(self, pair: frozenset[Choice]) -> Row | None:
        row: Row = dict(sorted(pair))
        rest = [factor for factor in self.factors if factor not in row]
        self._random.shuffle(rest)
        for factor in rest:
            options = [o for o in self.factors[factor] if self._allowed(row, (factor, o))]
            if not options:
                return None
            self._random.shuffle(options)
            taken = list(row.items())
            row[factor] = max(options, key=lambda o: sum(frozenset({(factor, o), c}) in self.missing for c in taken))
        return {factor: row[factor] for factor in self.factors}

    def _allowed(self, row: Row, choice: Choice) -> bool:
        return not any(
            all(other == choice or row.get(other[0]) == other[1] for other in combination)
            for combination in self._avoid[choice]
        )


def pairs_of(row: Mapping[str, str]) -> list[frozenset[Choice]]:
    return [frozenset(pair) for pair in itertools.combinations(row.items(), 2)]


def to_blame(row: Row, refused: Callable[[Row], bool]) -> Row:
    """The choices of a refused row without which it would not be refused: none of them can be left out.

    The smallest refused prefix ends with one of them; it moves to the front, until the front alone is refused. What
    the bases differ in comes first, so that most trials need one base only.
    """
    front: list[Choice] = []
    of_bases = {factor for base in BASES for factor in base}
    rest = sorted(row.items(), key=lambda choice: choice[0] not in of_bases)
    while not refused(dict(front)):
        low, high = 0, len(rest)  # front + rest[:high] is refused, front + rest[:low] is not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if refused(dict([*front, *rest[:middle]])) else (middle, high)
        front, rest = [rest[high - 1], *front], rest[: high - 1]
    return dict(front)


# ---- judging a row ----


@dataclass
class Result:
    """What came out of a covering set. `refused` and `failed`: the choices to blame, with the reason."""

    factors: dict[str, int]
    pairs: int
    rows: int = 0
    refused_rows: int = 0
    trained_pairs: int = 0
    refused: dict[frozenset[Choice], str] = field(default_factory=dict)
    failed: dict[frozenset[Choice], str] = field(default_factory=dict)
    still: list[str] = field(default_factory=list)
    """Rows in which no weight moved."""
    slowed: list[str] = field(default_factory=list)
    """Rows that diverged at their optimizer's default rate and trained at `SMALL_RATE` times it."""
    diverged: list[str] = field(default_factory=list)
    """Rows that took a step, and whose loss was not finite even at the small rate (exit 4)."""
    missing: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Trained:
    """How a row trained: whether a weight moved, and whether that took a smaller rate."""

    moved: bool
    slowed: bool = False
    diverged: str | None = None


class RowFailed(Exception):
    """A row that the check accepted and that did not train."""


class Lab:
    """Composes, checks and trains rows."""

    def __init__(self, open_composer: Composer, space: Space):
        self._composer = open_composer
        self._space = space
        self._first_bases = [base for base in BASES if all(o in space.factors[f] for f, o in base.items())]
        self.bases = list(self._first_bases)
        self._plain = open_composer.compose([]).config
        self._common = list(_changes(self._plain, open_composer.compose(COMMON).config))
        self._changes: dict[Choice, list[_Change]] = {}

    def compose(self, row: Row) -> Composed:
        return self._composer.compose([*COMMON, *self._space.overrides(row)])

    def refusal(self, composed: Composed) -> str | None:
        """Why the check refuses it."""
        try:
            check(composed)
        except ConfigError as error:
            return " ".join(error.problems)
        except DataError as error:
            return str(error)
        return None

    def blame(self, row: Row) -> tuple[Row, str]:
        """The choices of a refused row that are to blame, and the reason.

        They are tried with every network and all data, too. What takes them becomes a base, and the row is cut down
        again: the fault lay in what they were beside.
        """
        while True:
            blamed = to_blame(row, self.refuses)
            if self._another_base(blamed) is None:
                return blamed, self._reason(blamed)

    def _another_base(self, choices: Row) -> Row | None:
        """A row with these choices that takes another network or other data, from then on a base; or `None`."""
        factors = self._space.factors
        others = [{**base, "model": model} for model, base in itertools.product(factors["model"], self._first_bases)]
        others += [{"data": data, "task": task} for data, task in itertools.product(factors["data"], factors["task"])]
        bases = {tuple(sorted({**base, **choices}.items())): base for base in others}
        for base in bases.values():
            row = {**self._space.defaults, **base, **choices}
            if self.refusal(self.put_together(row)) is None:
                self.bases.append(base)
                return row
        return None

    def beside_any_base(self, choices: Row) -> Row | None:
        """A row with these choices that the check accepts, or `None` where no network and no data help."""
        return self.beside_a_base(choices) or self._another_base(choices)

    def refuses(self, choices: Row) -> bool:
        """Whether the check refuses these choices beside each of the bases."""
        return self.beside_a_base(choices) is None

    def _taken(self, choices: Row) -> bool:
        return self.refusal(self.put_together({**self._space.defaults, **choices})) is None

    def beside_a_base(self, choices: Row) -> Row | None:
        """A row with these choices that the check accepts, or `None` where each base is refused beside them."""
        rows = self.beside_bases(choices)
        return next((row for row in rows if self.refusal(self.put_together(row)) is None), None)

    def _reason(self, choices: Row) -> str:
        """Beside the base that accepts most of the choices one by one: why it refuses them together."""
        found = []
        for base in self.bases:
            reason = self.refusal(self.put_together({**self._space.defaults, **base, **choices}))
            apart = sum(not self._taken({**base, factor: option}) for factor, option in choices.items())
            found.append((apart, len(str(reason)), str(reason)))
        return min(found)[-1]

    def beside_bases(self, choices: Row) -> list[Row]:
        """The choices with all else at its default, once for each base that this makes a difference to."""
        rows = [{**self._space.defaults, **base, **choices} for base in self.bases]
        return [row for n, row in enumerate(rows) if row not in rows[:n]]

    def fails_everywhere(self, choices: Row) -> str | None:
        """Why these choices do not train, beside each of the bases that the check accepts."""
        reasons = []
        for row in self.beside_bases(choices):
            composed = self.put_together(row)
            if self.refusal(composed) is not None:
                continue
            try:
                self.train(composed)
            except RowFailed as error:
                reasons.append(str(error))
                continue
            return None
        return min(reasons, key=len, default=None)

    def train(self, composed: Composed, rate: float = 1.0) -> Trained:
        """Builds and fits it, with the rate times `rate`. Raises `RowFailed`."""
        experiment = read(composed)
        slower = {"optim.lr": rate * experiment.node("optim").get("lr")}
        try:
            with warnings.catch_warnings(), time_limit(TIME_LIMIT):
                warnings.simplefilter("error")
                run = build(experiment.with_values(slower))
                before = [p.detach().clone() for p in run.step.parameters]
                metrics = fit(run)
        except InterruptedRun:
            raise
        except DivergedError as error:
            if rate < 1:
                return Trained(True, diverged=str(error))
            return replace(self.train(composed, SMALL_RATE), slowed=True)
        except Exception as error:
            raise RowFailed(f"{type(error).__name__}: {error}") from error
        infinite = [name for name, value in metrics.items() if not math.isfinite(value)]
        if infinite:
            raise RowFailed(f"not finite: {', '.join(infinite)}")
        return Trained(any(not torch.equal(old, new) for old, new in zip(before, run.step.parameters)))

    def put_together(self, row: Row) -> Composed:
        """The row as it would be composed, from the differences that each of its options makes: composing takes
        half a second, and to find the choices to blame takes a dozen trials."""
        config = copy.deepcopy(self._plain)
        for choice in row.items():
            if choice not in self._changes:
                composed = self._composer.compose(self._space.overrides(dict([choice])))
                self._changes[choice] = list(_changes(self._plain, composed.config))
            _apply(self._changes[choice], config)
        _apply(self._common, config)
        return Composed(config, Path(), {}, ())


_Change = tuple[tuple[str, ...], Any]


def _changes(old: Any, new: Any, path: tuple[str, ...] = ()) -> Iterator[_Change]:
    """The paths at which two configs differ; a part with another `_target_`, or other keys, differs as a whole."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        for key in old:
            yield from _changes(old[key], new[key], (*path, key))
    elif old != new:
        yield path, new


def _apply(changes: Sequence[_Change], config: dict[str, Any]) -> None:
    for (*parents, last), value in changes:
        node = config
        for key in parents:
            node = node[key]
        node[last] = copy.deepcopy(value)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


# ---- the whole set ----


def cover(lab: Lab, space: Space, *, seed: int = 0, limit: int | None = None, console: Console | None = None) -> Result:
    """Rows until every pair has trained or is refused for its own sake, or `limit` rows."""
    began = time.perf_counter()
    covering = Covering(space.factors, seed)
    result = Result({factor: len(options) for factor, options in space.factors.items()}, covering.total)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("pairs, {task.fields[rows]} rows, {task.fields[state]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=console is None) as progress:
        bar = progress.add_task("", total=covering.total, rows=0, state="")
        while covering.missing and (limit is None or result.rows < limit):
            learned = one_row(lab, space, covering, result)
            if learned:
                progress.console.print(learned, markup=False, highlight=False, soft_wrap=True)
            if progress.console.is_terminal is False and result.rows % 50 == 0:
                progress.console.print(f"{result.rows} rows, {len(covering.missing):,} pairs to go")
            state = f"{result.refused_rows} refused, {len(result.failed)} failed"
            progress.update(bar, completed=covering.total - len(covering.missing), rows=result.rows, state=state)
    result.missing = len(covering.missing)
    result.seconds = time.perf_counter() - began
    return result


def one_row(lab: Lab, space: Space, covering: Covering, result: Result) -> str | None:
    """Judges one more row; what was learned of choices that do not go together."""
    pair, row = covering.row()
    if row is None:
        row = lab.beside_any_base(dict(pair))
    if row is None:  # what each of the others allows, another one forbids
        return "\n".join(learn(lab, space, covering, result, dict(pair)))
    result.rows += 1
    composed = lab.compose(row)
    if lab.refusal(composed) is not None:
        result.refused_rows += 1
        return "\n".join(learn(lab, space, covering, result, row))
    try:
        trained = lab.train(composed)
    except RowFailed as error:
        blamed = to_blame(row, lambda choices: choices == row or lab.fails_everywhere(choices) is not None)
        combination = frozenset(blamed.items())
        result.failed[combination] = f"{error} [{' '.join(space.overrides(row))}]"
        covering.avoid(combination)
        covering.drop([pair])
        return f"FAILED: {words(combination)}: {result.failed[combination]}"
    line = " ".join(f"{factor}={option}" for factor, option in row.items())
    result.still += [] if trained.moved else [line]
    result.slowed += [line] if trained.slowed and not trained.diverged else []
    result.diverged += [f"{line}: {trained.diverged}"] if trained.diverged else []
    fresh = [pair for pair in pairs_of(row) if pair in covering.missing]
    result.trained_pairs += len(fresh)
    covering.drop(fresh)
    return None


def learn(lab: Lab, space: Space, covering: Covering, result: Result, row: Row) -> Iterator[str]:
    """Keeps apart what is to blame for a refused row, and what is like it: where two options do not go together,
    one of them often does not go with the other's neighbors either."""
    blamed, reason = lab.blame(row)
    combination = frozenset(blamed.items())
    if combination in result.refused:
        return
    result.refused[combination] = reason
    covering.avoid(combination)
    yield f"refused: {words(combination)}: {reason}"
    if len(blamed) != 2:
        return
    for factor in blamed:
        for option in space.factors[factor]:
            like = {**blamed, factor: option}
            if frozenset(like.items()) in covering.missing and lab.beside_any_base(like) is None:
                yield from learn(lab, space, covering, result, like)


# ---- telling ----


def words(combination: frozenset[Choice]) -> str:
    return " ".join(f"{factor}={option}" for factor, option in sorted(combination))


def refused_pairs(result: Result, space: Space) -> int:
    """Pairs that hold a refused choice or are a refused pair."""
    single = {choice for combination in result.refused if len(combination) == 1 for choice in combination}
    pairs = {combination for combination in result.refused if len(combination) == 2}
    choices = {factor: [(factor, o) for o in options] for factor, options in space.factors.items()}
    return sum(
        a in single or b in single or frozenset({a, b}) in pairs
        for one, other in itertools.combinations(choices, 2)
        for a, b in itertools.product(choices[one], choices[other])
    )


def as_json(result: Result, space: Space) -> dict[str, Any]:
    def told(found: Mapping[frozenset[Choice], str]) -> list[dict[str, Any]]:
        return [{"choices": dict(sorted(c)), "reason": reason} for c, reason in found.items()]

    return {
        "factors": result.factors,
        "pairs": result.pairs,
        "rows": result.rows,
        "pairs_trained": result.trained_pairs,
        "pairs_refused": refused_pairs(result, space),
        "pairs_missing": result.missing,
        "rows_refused": result.refused_rows,
        "refused": told(result.refused),
        "failed": told(result.failed),
        "rows_at_a_smaller_rate": result.slowed,
        "rows_that_diverged": result.diverged,
        "rows_without_a_moved_weight": result.still,
        "seconds": round(result.seconds, 1),
    }


def as_markdown(result: Result, space: Space, seed: int) -> str:
    trained = result.rows - result.refused_rows - len(result.failed)
    factors = ", ".join(f"`{factor}` {count}" for factor, count in result.factors.items())
    stand_ins = ", ".join(f"`{line} {' '.join(extra)}`" for line, extra in STAND_INS.items())
    lines = [
        "# Composition",
        "",
        f"Written by `tests/covering_set.py --seed {seed}`. Every option of every group beside every option of every "
        "other group: each pair trains (two epochs of one step, with evaluation, selection and statistics; losses and "
        "metrics finite, warnings are errors), or the check refuses it, before data or a device is touched, and says "
        "why.",
        "",
        "| | |",
        "|---|---|",
        f"| pairs | {result.pairs:,} |",
        f"| trained | {result.trained_pairs:,} |",
        f"| refused at the check | {refused_pairs(result, space):,} |",
        f"| failed | {len(result.failed)} |",
        f"| rows trained | {trained:,} |",
        f"| rows refused, from which the combinations below were learned | {result.refused_rows:,} |",
        f"| seconds (one CPU thread, torch {torch.__version__}) | {result.seconds:,.0f} |",
        "",
        f"Options a factor: {factors}.",
        "",
        f"In a smaller size than their name says: {stand_ins}. Data that comes in files is read from generated files "
        "of its own format.",
        "",
        f"Rows that diverged at their optimizer's default rate (and ended with exit code 4's message), and trained at "
        f"{SMALL_RATE:g} of it: {len(result.slowed)}. Rows that diverged even so, with the same message: "
        f"{len(result.diverged)}. Rows in which no weight moved: {len(result.still)}.",
        "",
        "## Refused",
        "",
        "Each combination is refused with all else at its default, and each of its choices is needed for that.",
        "",
        "| combinations | reason |",
        "|---|---|",
    ]
    by_reason: dict[str, list[str]] = defaultdict(list)
    for combination, reason in sorted(result.refused.items(), key=lambda item: words(item[0])):
        by_reason[reason].append(words(combination))
    for reason, combinations in by_reason.items():
        shown = "<br>".join(f"`{combination}`" for combination in combinations)
        lines.append(f"| {shown} | {reason.replace('|', '/')} |")
    if result.failed:
        lines += ["", "## Failed", ""] + [f"- `{words(c)}`: {reason}" for c, reason in result.failed.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the rows")
    parser.add_argument("--limit", type=int, help="rows at most; the report is then not written")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(stderr=True)
    with data_files() as files, composer() as open_composer:
        space = whole_space(open_composer, files)
        result = cover(Lab(open_composer, space), space, seed=arguments.seed, limit=arguments.limit, console=console)
    if arguments.limit is None:
        REPORT.parent.mkdir(parents=True, exist_ok=True)
        REPORT.write_text(as_markdown(result, space, arguments.seed))
    if arguments.json:
        print(json.dumps(as_json(result, space), indent=2))
    else:
        sizes = Counter(len(combination) for combination in result.refused)
        console.print(as_markdown(result, space, arguments.seed), markup=False)
        console.print(f"refused combinations by size: {dict(sizes)}; not covered: {result.missing}")
    return 1 if result.failed or (result.missing and arguments.limit is None) else 0


if __name__ == "__main__":
    sys.exit(main())
