"""Which folder is which split, and what the classes are called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cnnlab.data.found import Findings, Walk, first_names, look_alike
from cnnlab.errors import DataError, did_you_mean

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""What a folder is called, in any case, and the split that it is."""
SPLITS = ("train", "val", "test")


def split_folders(
    root: Path, found: Mapping[str, Path], layout: str, findings: Findings, *, classes: bool = True
) -> dict[str, Path]:
    """The folder of each split among those `found` in `root`; none where `root` has no splits.

    Folders beside them that are no split are told in `findings`.

    Args:
        classes: whether a folder may be a class instead.

    Raises:
        DataError: two folders mean one split; there are some, and not train.
    """
    splits: dict[str, Path] = {}
    others = []
    for name, path in sorted(found.items()):
        split = SPLIT_NAMES.get(name.strip().lower())
        if split is None:
            others.append(name)
        elif split in splits:
            raise DataError(
                f"expected one folder for {split} in {root}, received {splits[split].name} and {name}; "
                "rename or remove one of them"
            )
        else:
            splits[split] = path
    if splits and "train" not in splits:
        if not classes or not others or len(splits) > 1:
            raise DataError(
                f"expected a folder `train` beside {', '.join(sorted(found))} in {root}; lay the images out as {layout}"
            )
        (taken,) = splits.values()
        findings.notices.append(
            f"data: {taken.name} in {root} is taken for a class, as there is no folder `train` beside it"
        )
        return {}
    if splits and others:
        findings.notices.append(
            f"data: {first_names(others)} beside {splits['train'].name} in {root}: not used, as no split is called so "
            f"({', '.join(SPLIT_NAMES)} are)"
        )
    return {split: splits[split] for split in SPLITS if split in splits}


Layout = dict[str, dict[str, Path]]
"""Class folders by class, by split."""


def class_folders(root: Path, walk: Walk, layout: str, val_as_test: bool, findings: Findings) -> Layout:
    """The class folders of each split; a folder without splits has `train` only. Raises `DataError`."""
    found = walk.subfolders(root, layout)
    splits = split_folders(root, found, layout, findings)
    if not splits:
        folders = {"train": found}
    else:
        if val_as_test:
            splits = _val_as_test(root, splits, findings)
        folders = {name: walk.subfolders(path, layout) for name, path in splits.items()}
    classes = _classes(folders["train"])
    named = {split: _named_as(classes, split, below, root) for split, below in folders.items()}
    if len(classes) == 1:
        raise _single(named, layout)
    return named


def _val_as_test(root: Path, splits: Mapping[str, Path], findings: Findings) -> dict[str, Path]:
    if "val" not in splits:
        has = ", ".join(path.name for path in splits.values())
        raise DataError(
            f"expected a folder `val` in {root} for data.val_as_test=true, received {has}; type data.val_as_test=false"
        )
    if "test" in splits:
        findings.notices.append(
            f"data: {splits['test'].name} in {root} is not used, as data.val_as_test=true makes "
            f"{splits['val'].name} the test split"
        )
    return {"train": splits["train"], "test": splits["val"]}


def _classes(train: Mapping[str, Path]) -> dict[str, str]:
    """The classes, as the folders of train are called, by what can be seen of the name."""
    classes: dict[str, str] = {}
    for name in sorted(train):
        other = classes.setdefault(look_alike(name), name)
        if other != name:
            raise DataError(
                f"expected classes whose names can be told apart in {train[name].parent}, received {other!a} and "
                f"{name!a}; rename or remove one of them"
            )
    return classes


def _named_as(classes: Mapping[str, str], split: str, folders: Mapping[str, Path], root: Path) -> dict[str, Path]:
    """The folders of a split under the classes' names."""
    unknown = sorted(name for name in folders if look_alike(name) not in classes)
    if unknown:
        raise DataError(
            f"expected the classes of train ({first_names(list(classes.values()))}) in {split} of {root}, "
            f"received {first_names(unknown)} besides{did_you_mean(unknown[0], classes)}; "
            "rename or remove those folders"
        )
    named: dict[str, Path] = {}
    for name, path in sorted(folders.items()):
        if named.setdefault(classes[look_alike(name)], path) != path:
            raise DataError(
                f"expected one folder a class in {split} of {root}, received {named[classes[look_alike(name)]].name!a} "
                f"and {name!a}; rename or remove one of them"
            )
    return named


def _single(folders: Layout, layout: str) -> DataError:
    (folder,) = folders["train"].values()
    below = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    hint = f"lay the images out as {layout}"
    if len(folders) == 1 and len(below) > 1:
        hint = f"type data.root={folder} if the classes are {first_names(below)}"
    return DataError(f"expected two classes at least in {folder.parent}, received {folder.name} alone; {hint}")
