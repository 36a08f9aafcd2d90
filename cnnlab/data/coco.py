"""Images with boxes in the JSON format of COCO (Lin et al. 2014)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from cnnlab.data.formats import require_file
from cnnlab.data.found import Findings, file_number, first_names
from cnnlab.data.layout import SPLIT_NAMES
from cnnlab.data.lists import Folder, kept, leave_out, tell_shared
from cnnlab.data.objects import Box, Boxed, Taken, labels_of, largest
from cnnlab.errors import DataError
from cnnlab.protocols import Split
from cnnlab.usertext import read_text

_LAYOUT = (
    "ROOT/annotations/instances_{train,val,test}.json, or ROOT/{train,val,test}/_annotations.coco.json, and the images "
    "beside them, in ROOT, ROOT/images, or a folder of the split's name in one of the two"
)
_PREFERRED = "instances"
"""How the file of the objects is called, where others lie beside it (COCO's captions and keypoints)."""


@dataclass(eq=False)
class CocoBoxes(Boxed):
    """Classification and localization: each image's largest object, its category and its box.

    A box is [x, y, width, height] in pixels counted from 0, as COCO's are. What of it lies outside the image is cut
    off, and such boxes are counted. Regions of many objects (`iscrowd`) are none, and images without an object are not
    used; both are told, and how many images have several objects. Where nobody says, the classes are the categories
    that occur, by their numbers.

    Args:
        annotations: the files, relative to `root`, `{split}` standing for what the split is called there; `None` finds
            those that are named for a split, in `root`, in `root/annotations` or in the split's own folder.
    """

    annotations: str | None = None

    def load(self) -> dict[str, Split]:
        found = self._objects
        every = [*dict.fromkeys(name for names in found.values() for name in names)]
        self.findings = Findings([*self._told.notices])
        tell_shared(found, self.findings)
        numbers, lacking = self._there(every)
        lacking += [(name, why) for name, why in self._unusable.items() if name not in dict(lacking)]
        out = leave_out(lacking, len(every), self.on_error, self.findings, "mend them")
        ids, given = kept(found, out, Folder(self._root, "", {}, numbers), self.findings)
        objects = {name: taken for names in found.values() for name, taken in names.items() if taken is not None}
        taken = [objects[name] for name in ids]
        labels = labels_of(ids, taken, self._classes, {name: f"the annotation of {name}" for name in ids})
        parts = self.parted(given, labels, len(self._classes), val=self.val, test=self.test)
        return self.boxed(self._root, ids, ids, parts, taken, labels, self._recipe)

    def _there(self, names: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """The number of each image's file, and those without one, with the reason."""
        numbers, lacking = {}, []
        for name in names:
            try:
                numbers[name] = file_number(os.stat(os.path.join(self._root, name)))  # noqa: PTH116, PTH118 (3x the time)
            except (OSError, ValueError) as error:
                lacking.append((name, getattr(error, "strerror", None) or str(error)))
        return numbers, lacking

    @cached_property
    def _files(self) -> dict[str, Path]:
        """The annotation file of each split. Raises `DataError`."""
        files = self._named() if self.annotations is not None else self._found()
        if self.val_as_test and "val" in files:
            if "test" in files:
                self._told.notices.append(
                    f"data: {files['test']} is not used, as data.val_as_test=true takes {files['val'].name} for it"
                )
            files = {"train": files["train"], "test": files["val"]} if "train" in files else files
        if "train" not in files:
            received = ", ".join(str(path) for path in files.values()) or "none"
            raise DataError(
                f"expected a JSON file of training annotations in {self._root}, received {received}; type "
                "data.root=FOLDER and, where it has a name of its own, data.annotations='FILE_{split}.json'; lay them "
                f"out as {_LAYOUT}"
            )
        return files

    def _named(self) -> dict[str, Path]:
        assert self.annotations is not None
        if "{split}" not in self.annotations:
            return {"train": self._root / self.annotations}
        files: dict[str, Path] = {}
        for word, split in SPLIT_NAMES.items():
            path = self._root / self.annotations.replace("{split}", word)
            if split not in files and path.exists():
                files[split] = path
        return files

    def _found(self) -> dict[str, Path]:
        by_split: dict[str, list[Path]] = {}
        rest = []
        folders = [self._root, self._root / "annotations", *(self._root / word for word in SPLIT_NAMES)]
        for folder in folders:
            for path in sorted(folder.glob("*.json")):
                own = SPLIT_NAMES.get(folder.name) if folder != self._root else None
                named = {SPLIT_NAMES[word] for word in re.split(r"[^a-z]+", path.stem.lower()) if word in SPLIT_NAMES}
                split = own or (named.pop() if len(named) == 1 else None)
                rest += [path] if split is None else []
                if split is not None:
                    by_split.setdefault(split, []).append(path)
        if not by_split and len(rest) == 1:
            return {"train": rest[0]}
        files = {}
        for split, paths in by_split.items():
            wanted = [path for path in paths if path.stem.lower().startswith(_PREFERRED)] or paths
            if len(wanted) > 1:
                raise DataError(
                    f"expected one file of annotations for {split}, received {first_names([str(p) for p in wanted])}; "
                    "type data.annotations='FILE_{split}.json', relative to data.root"
                )
            files[split] = wanted[0]
        return files

    @cached_property
    def _read(self) -> tuple[dict[str, dict[str, Taken | None]], dict[int, str]]:
        """Of each split, the object of each image that has one, `None` where it cannot be used; and the categories."""
        found: dict[str, dict[str, Taken | None]] = {}
        categories: dict[int, str] = {}
        for split, path in self._files.items():
            document = _Document.of(path)
            for number, name in document.categories.items():
                if categories.setdefault(number, name) != name:
                    raise DataError(
                        f"expected one name for category {number}, received {categories[number]!r} and {name!r} in "
                        f"{path}; mend it"
                    )
            found[split] = self._of_split(split, document)
        return found, categories

    @property
    def _objects(self) -> dict[str, dict[str, Taken | None]]:
        return self._read[0]

    def _of_split(self, split: str, document: _Document) -> dict[str, Taken | None]:
        below = _base(self._root, split, document)
        found: dict[str, Taken | None] = {}
        empty = []
        for number, (file, size) in document.images.items():
            name = (below / file).as_posix()
            objects = document.objects.get(number, [])
            if not objects:
                empty.append(name)
                continue
            try:
                found[name] = largest(objects, size, f"{document.path}, image {file}")
            except DataError as error:
                if self.on_error == "raise":
                    raise DataError(f"{error}; mend it, or type data.on_error=skip to leave such images out") from error
                found[name] = None
                self._unusable[name] = str(error)
        tell = self._told.notices.append
        if empty:
            tell(f"data: {len(empty):,} images of {document.path} have no object, and are not used ({empty[0]})")
        if document.crowds:
            tell(f"data: {document.crowds:,} regions of many objects (iscrowd) in {document.path} are not used")
        if document.orphans:
            tell(f"data: {document.orphans:,} annotations of {document.path} are of no image in it; not used")
        if not found:
            raise DataError(f"expected images with objects in {document.path}, received none; see data.annotations")
        return found

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        if self.classes:
            return self.classes
        found, categories = self._read
        kinds = {taken.kind for names in found.values() for taken in names.values() if taken is not None}
        return tuple(dict.fromkeys(name for _, name in sorted(categories.items()) if name in kinds))


def _base(root: Path, split: str, document: _Document) -> Path:
    """The folder, relative to the root, that the images' names are relative to: the first one that has one of them."""
    beside = document.path.parent.relative_to(root) if document.path.is_relative_to(root) else Path()
    stem = document.path.stem
    words = [stem.removeprefix(f"{_PREFERRED}_"), *(word for word, meant in SPLIT_NAMES.items() if meant == split)]
    own = [Path(*parts, word) for parts in ((), ("images",)) for word in words]
    candidates = [beside, Path(), Path("images"), Path("JPEGImages"), *own]
    few = [file for file, _ in list(document.images.values())[:20]]
    for folder in candidates:
        if any((root / folder / file).exists() for file in few):
            return folder
    return candidates[0]


@dataclass
class _Document:
    """What a file says: `images` by their number, file and (height, width); the objects of each, class and box."""

    path: Path
    images: dict[int, tuple[str, tuple[int, int] | None]]
    categories: dict[int, str]
    objects: dict[int, list[tuple[str, Box]]]
    crowds: int = 0
    orphans: int = 0

    @classmethod
    def of(cls, path: Path) -> _Document:
        """Raises `DataError` for a file that is none of COCO's."""
        try:
            require_file(str(path))
            content = json.loads(read_text(path, DataError))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"expected COCO annotations in {path}, received: {error}; mend the file") from error
        lacking = [key for key in ("images", "annotations", "categories") if not _is_list(content, key)]
        if lacking:
            raise DataError(
                f"expected COCO annotations in {path}, a list each of images, annotations and categories, received no "
                f"list of {', '.join(lacking)}; type data.annotations=FILE"
            )
        images: dict[int, tuple[str, tuple[int, int] | None]] = {}
        for entry in content["images"]:
            number, file = _entry(entry, path, "image", ("id", int), ("file_name", str))
            if images.setdefault(number, (_inside(file, path), _size(entry)))[0] != file:
                raise DataError(f"expected one image of each id in {path}, received two of id {number}; mend the file")
        categories = {}
        for entry in content["categories"]:
            number, name = _entry(entry, path, "category", ("id", int), ("name", str))
            categories[number] = name.strip()
        document = cls(path, images, categories, {})
        for entry in content["annotations"]:
            document._add(entry)
        return document

    def _add(self, entry: Any) -> None:
        (number,) = _entry(entry, self.path, "annotation", ("image_id", int))
        if number not in self.images:
            self.orphans += 1
        elif entry.get("iscrowd"):
            self.crowds += 1
        else:
            kind = self.categories.get(entry.get("category_id"), "") if _hashable(entry.get("category_id")) else ""
            self.objects.setdefault(number, []).append((kind, _box(entry.get("bbox"))))


def _is_list(content: Any, key: str) -> bool:
    return isinstance(content, dict) and isinstance(content.get(key), list)


def _hashable(value: Any) -> bool:
    return isinstance(value, int | str)


def _entry(entry: Any, path: Path, kind: str, *wanted: tuple[str, type]) -> list[Any]:
    """The values under some keys. Raises `DataError` where they are not there, or of another type."""
    for key, expected in wanted:
        value = entry.get(key) if isinstance(entry, Mapping) else None
        if not isinstance(value, expected) or isinstance(value, bool):
            raise DataError(
                f"expected each {kind} in {path} to have `{key}`, {'a text' if expected is str else 'a whole number'}, "
                f"received {json.dumps(entry)[:200]}; mend the file"
            )
    return [entry[key] for key, _ in wanted]


def _inside(file: str, path: Path) -> str:
    """The name of an image. Raises `DataError` for one that leads out of the folder of the data."""
    if not file or "\0" in file or PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
        raise DataError(
            f"expected names of images below the data's folder in {path}, received {file[:200]!r}; mend the file"
        )
    return file


def _size(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    height, width = entry.get("height"), entry.get("width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) and height > 0 < width else None


def _box(bbox: Any) -> Box:
    """(x1, y1, x2, y2); not a number where it is no box."""
    numbers = isinstance(bbox, list) and len(bbox) == 4 and all(isinstance(side, int | float) for side in bbox)
    try:
        x, y, width, height = map(float, bbox if numbers else [float("nan")] * 4)
    except OverflowError:
        return (float("nan"),) * 4
    return x, y, x + width, y + height
