"""Lists of images by their ids, a line each, as VOC's and Pet's splits are written."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cnnlab.data.formats import EXTENSIONS
from cnnlab.data.found import Findings, file_number, first_lines, first_names, require_one_place
from cnnlab.errors import DataError
from cnnlab.usertext import read_text


def listed(path: Path, findings: Findings) -> dict[str, list[str]]:
    """The ids in a list, in order, each with what follows it on its line.

    An id that is there twice counts once, which is told in `findings`. Raises `DataError` for what is no text.
    """
    found: dict[str, list[str]] = {}
    twice: Counter[str] = Counter()
    for line in read_text(path, DataError).split("\n"):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if words[0] in found:
            twice[words[0]] += 1
        found.setdefault(words[0], words[1:])
    if twice:
        findings.notices.append(f"data: {path} lists {first_names([*twice])} more than once; each counts once")
    return found


def tell_shared(lists: Mapping[str, Collection[str]], findings: Findings) -> None:
    """A notice for each two splits that list the same images."""
    names = list(lists)
    for number, one in enumerate(names):
        for other in names[number + 1 :]:
            shared = sorted(set(lists[one]) & set(lists[other]))
            if shared:
                findings.notices.append(
                    f"data: {len(shared):,} images are in {one} and in {other} ({shared[0]}); the figures of {other} "
                    "are not those of unseen images"
                )


@dataclass
class Folder:
    """The files of a folder by id: the name without its suffix."""

    path: Path
    below: str
    """The folder's name in its data set."""
    files: dict[str, list[str]]
    numbers: dict[str, int] = field(default_factory=dict)
    """Of the files that were found not to be lacking: equal for equal files, whatever their names."""

    @classmethod
    def of(cls, root: Path, below: str, suffixes: Collection[str] = EXTENSIONS) -> Folder:
        """Raises `DataError` where it cannot be read."""
        path = root / below
        files: dict[str, list[str]] = {}
        try:
            entries = sorted(entry.name for entry in path.iterdir())
        except OSError as error:
            raise DataError(f"expected a folder at {path}, received: {error}; type data.root=FOLDER") from error
        for name in entries:
            stem, dot, suffix = name.rpartition(".")
            if stem and f"{dot}{suffix}".lower() in suffixes and not name.startswith("."):
                files.setdefault(stem, []).append(f"{below}/{name}")
        return cls(path, below, files)

    def tell_unlisted(self, ids: Collection[str], findings: Findings) -> None:
        """A notice of the files that are in no list."""
        others = sorted(self.files.keys() - set(ids))
        if others:
            name = self.files[others[0]][0]
            findings.notices.append(f"data: {len(others):,} files of {self.path} are in no list ({name}); not used")

    def lacking(self, ids: Sequence[str]) -> list[tuple[str, str]]:
        """The ids without a file, with the reason.

        Raises `DataError` for one with two files: which is meant?
        """
        for name in ids:
            if len(self.files.get(name, ())) > 1:
                raise DataError(
                    f"expected one file for {name} in {self.path}, received {' and '.join(self.files[name])}; "
                    "remove one of them"
                )
        return [(name, why) for name in ids if (why := self._why_not(name)) is not None]

    def _why_not(self, name: str) -> str | None:
        if name not in self.files:
            return f"no file of its name in {self.below}"
        try:
            self.numbers[name] = file_number(os.stat(self.path / Path(self.files[name][0]).name))  # noqa: PTH116
        except OSError:
            return f"{self.files[name][0]} is a link that leads nowhere"
        return None

    def of_id(self, name: str) -> str:
        return self.files[name][0]


def leave_out(
    lacking: Sequence[tuple[str, str]], total: int, on_error: Literal["raise", "skip"], findings: Findings, remedy: str
) -> set[str]:
    """The ids that are to be left out, recorded in `findings`.

    Args:
        lacking: ids with the reason.
        total: how many are listed.

    Raises:
        DataError: with `raise`, where there are any.
    """
    if not lacking:
        return set()
    if on_error == "raise":
        lines = "\n".join(f"  {line}" for line in first_lines([f"{name}: {why}" for name, why in lacking]))
        raise DataError(
            f"expected all files of each listed image, received not all of them for {len(lacking)} of {total:,}:\n"
            f"{lines}\n{remedy}, or type data.on_error=skip to leave those images out"
        )
    findings.left_out += lacking
    name, why = lacking[0]
    findings.notices.append(f"data: {len(lacking):,} listed images are left out ({name}: {why})")
    return {name for name, _ in lacking}


def kept(
    lists: Mapping[str, Collection[str]], out: Collection[str], images: Folder, findings: Findings
) -> tuple[list[str], dict[str, Tensor]]:
    """The ids that are not left `out`, and the rows of each split among them. Images that two splits share by links are
    told."""
    own = {split: [name for name in names if name not in out] for split, names in lists.items()}
    ids: list[str] = []
    given = {}
    for split, names in own.items():
        given[split] = torch.arange(len(ids), len(ids) + len(names))
        ids += names
    places = {(split, ""): {name: images.numbers.get(name, 0) for name in names} for split, names in own.items()}
    findings.notices += require_one_place(places)
    return ids, given
