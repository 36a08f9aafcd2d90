"""Every option of every group composes, passes the check and is dry-built; every YAML says what it is and lists all
its knobs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from cnnlab.building.trial import checked
from cnnlab.composing.composer import Composer, config_root
from cnnlab.composing.groups import GROUPS
from cnnlab.composing.signature import is_part, locate, parameters_of
from cnnlab.errors import CnnlabError

ROOT = config_root()
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}"
    for path in ROOT.glob("*/*.yaml")
    if path.parent.name not in ("experiment", "data")
)
EXPERIMENTS = sorted(path.stem for path in ROOT.glob("experiment/*.yaml"))
DATA = sorted(path.stem for path in ROOT.glob("data/*.yaml"))
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/*.yaml"))

LARGE = ("data=shapes", "data.size=224")
"""Images that every network takes, with all the targets that there are."""
BASES = (LARGE, (), ("data=cifar10",), (*LARGE, "model=resnet18"), ("data=cifar10", "model=speednet"))
COMPANY = {
    "task=segmentation": ("data=shapes", "loss=dice"),
    "task=localization": ("data=shapes",),
    "head=box": ("data=shapes", "task=localization"),
    "head=box_points": ("data=shapes", "task=localization"),
    "head=bilinear": ("data=shapes", "task=segmentation"),
    "head=fcn": ("data=shapes", "task=segmentation"),
    "head=nearest": ("data=shapes", "task=segmentation"),
    "head=transposed": ("data=shapes", "task=segmentation"),
    "head=unet": ("data=shapes", "task=segmentation"),
    "head=unpool": ("data=shapes", "task=segmentation", "model=vgg"),
    "model=torchvision": ("model.name=resnet18", *LARGE),
    "finetune=partial": ("finetune.until=layer1",),
    "weights=run": ("weights.run=somewhere",),
    "weights=file": ("weights.file=some.pt",),
    "weights=torchvision": ("weights.network=resnet18",),
    "weights=timm": ("weights.network=resnet18",),
}
"""What an option cannot do without."""
EXTRAS = {
    "model=timm": "timm",
    "weights=timm": "timm",
    "optim=lion": "pytorch_optimizer",
    "optim=shampoo": "pytorch_optimizer",
}
EXTRAS |= {"optim=soap": "pytorch_optimizer", "optim=sophia": "pytorch_optimizer"}
"""Options that need a package which the core does not."""


def groups() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for option in OPTIONS:
        if option not in COMPANY and option not in EXTRAS:
            found.setdefault(option.partition("=")[0], []).append(option)
    return found


@pytest.fixture(scope="module")
def seen_sound(shared_composer: Composer) -> set[str]:
    """The options that passed together: in each round one of every group, until each had its turn."""
    sound: set[str] = set()
    turns = groups()
    for number in range(max(map(len, turns.values()))):
        together = [options[number % len(options)] for options in turns.values()]
        try:
            checked(shared_composer, [*LARGE, *together])
            sound.update(together)
        except CnnlabError:
            continue  # two that do not go together; each gets another chance, alone
    return sound


@pytest.mark.parametrize("option", OPTIONS)
def test_option(shared_composer: Composer, seen_sound: set[str], option: str):
    if option in EXTRAS:
        pytest.importorskip(EXTRAS[option])
    refusals = []
    for base in (COMPANY[option],) if option in COMPANY else BASES:
        if option in seen_sound:
            return
        try:
            checked(shared_composer, [*base, option])
            return
        except CnnlabError as error:
            refusals.append(str(error))
    pytest.fail("\n".join(refusals))


# ---- data and experiments, with folders that have just enough in them ----


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of two pictures in each layout."""
    root = tmp_path_factory.mktemp("data")
    for name in ("folder/a/1.png", "folder/b/1.png", "masks/images/train/1.png", "masks/masks/train/1.png"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path)
    (root / "masks" / "classes.txt").write_text("sky\nroad\n")
    voc = root / "voc"
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (voc / folder).mkdir(parents=True)
    (voc / "ImageSets" / "Main" / "train.txt").write_text("1\n2\n")
    for number, name in enumerate(("cat", "dog"), 1):
        box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox>"
        text = f"<size><width>8</width><height>8</height></size><object><name>{name}</name>{box}</object>"
        (voc / "Annotations" / f"{number}.xml").write_text(f"<annotation>{text}</annotation>")
        Image.new("RGB", (8, 8)).save(voc / "JPEGImages" / f"{number}.jpg")
    coco = {
        "images": [{"id": number, "file_name": f"{number}.jpg"} for number in (1, 2)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(("cat", "dog"), 1)],
        "annotations": [{"image_id": number, "category_id": number, "bbox": [0, 0, 5, 5]} for number in (1, 2)],
    }
    (voc / "train.json").write_text(json.dumps(coco))
    return {
        "cnnlab.data.coco.CocoBoxes": voc,
        "cnnlab.data.folder.ImageFolder": root / "folder",
        "cnnlab.data.masks.MaskFolder": root / "masks",
        "cnnlab.data.voc.VocBoxes": voc,
    }


def with_root(composer: Composer, roots: dict[str, Path], *overrides: str) -> list[str]:
    target = composer.compose(overrides).config["data"]["_target_"]
    return [*overrides, f"data.root={roots[target]}"] if target in roots else list(overrides)


@pytest.mark.parametrize("name", DATA)
def test_data(shared_composer: Composer, roots: dict[str, Path], name: str):
    task = {
        "masks": ["task=segmentation"],
        "voc2012_segmentation": ["task=segmentation"],
        "webdataset": ["data.shards=train.tar", "data.classes=2"],
    }.get(name, [])
    checked(shared_composer, [*with_root(shared_composer, roots, f"data={name}"), "model=cnn", *task])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment(shared_composer: Composer, roots: dict[str, Path], name: str):
    composed = checked(shared_composer, with_root(shared_composer, roots, f"experiment={name}"))
    assert composed.choices["experiment"] == name
    assert composed.config["name"] == name, "its runs are found under its name"


# ---- the files ----


@pytest.mark.parametrize("name", FILES)
def test_file_says_what_it_is(name: str):
    lines = (ROOT / name).read_text().splitlines()
    lines = [line for line in lines if not line.startswith("# @package")]
    assert lines[0].startswith("# "), "the first line is a comment: one line of what this is"


def nodes_of(node: object) -> Iterator[dict[str, object]]:
    if isinstance(node, dict):
        if is_part(node):
            yield node
        for child in node.values():
            yield from nodes_of(child)


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("experiment/")])
def test_file_lists_every_knob(name: str):
    """A key that the YAML omits could not be set without `+`."""
    group = name.partition("/")[0]
    for node in nodes_of(yaml.safe_load((ROOT / name).read_text())):
        target = str(node["_target_"])
        if node["_target_"] is None or not target.startswith("cnnlab."):
            continue
        parameters, _ = parameters_of(locate(target))
        first = {next(iter(parameters), "")} if group in ("optim", "norm") else set()  # parameters, channels
        wired = {*(GROUPS[group].wired if group in GROUPS else ()), *first}
        named = {key for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        assert named - wired - set(node) == set(), target
