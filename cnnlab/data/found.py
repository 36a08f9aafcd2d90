"""What lies in folders of images: which files are read, and what is found and not used."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from cnnlab.data.formats import EXTENSIONS
from cnnlab.data.sources import Sources
from cnnlab.errors import DataError
from cnnlab.runs.data_files import MOST_FILES
from cnnlab.usertext import read_text

SHOWN = 5
"""Names in a message before it counts the rest."""
_OF_SYSTEMS = ("__MACOSX", "@eaDir")
"""Folders that macOS and Synology's servers make beside a user's, with copies and thumbnails in them."""


@dataclass
class Findings:
    """What whoever starts a run should know of its data: `notices`, a sentence each; `left_out`, each file (or folder)
    that could not be read with the reason; and `files`, those of each split with their lengths (see
    `cnnlab.runs.data_files`)."""

    notices: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    files: dict[str, dict[str, int]] = field(default_factory=dict)

    def record(self, parts: Mapping[str, Tensor], sources: Sources, *more: Sources) -> None:
        """Keeps which files each split has, unless they are very many.

        Args:
            parts: rows by split.
            more: what belongs to each row of `sources`, as masks do; counts in its length.
        """
        if sum(map(len, parts.values())) > MOST_FILES:
            return
        for split, rows in parts.items():
            marks = [(sources.mark(row), sum(other.mark(row)[1] for other in more)) for row in rows.tolist()]
            self.files[split] = {name: length + besides for (name, length), besides in marks}

    def leave_out(self, sources: Sources, failures: Iterable[tuple[int, str]]) -> None:
        """Records rows of `sources` that failed, with the reason."""
        self.left_out += [(sources.name(row), reason) for row, reason in failures]


@dataclass
class Passed:
    """What was found and is not used: how many of each kind, and one name."""

    root: Path
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        self.counts[kind] += 1
        self.first[kind] = min(name, self.first.get(kind, name))

    def notices(self) -> list[str]:
        """One line, or none."""
        if not self.counts:
            return []
        kinds = [f"{count:,} {kind} ({self.first[kind]})" for kind, count in sorted(self.counts.items())]
        return [f"data: not used of {self.root}: {', '.join(kinds)}"]


class Walk:
    """Walks folders below `root`, each file once, by its real path.

    Links are followed, out of `root`, too. Nothing hidden is read, nor below a hidden folder; what is no file (a
    pipe, a device) is not opened. `passed` counts what is not used; `broken` lists folders that cannot be read and
    links that lead nowhere, with the reason.

    Args:
        root: what names are relative to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.passed = Passed(root)
        self.broken: list[tuple[str, str]] = []

    def subfolders(self, folder: Path, layout: str) -> dict[str, Path]:
        """The visible folders in `folder`, by name. Raises `DataError` where there is none."""
        found, images = {}, 0
        for entry in self._entries(folder, layout):
            name = (folder / entry.name).relative_to(self.root).as_posix()
            if _hidden(entry.name):
                self.passed.add("hidden", name)
            elif _is_folder(entry):
                found[entry.name] = folder / entry.name
            elif _suffix(entry.name) in EXTENSIONS:
                images += 1
                self.passed.add("in no class folder", name)
            else:
                self._pass_over(name)
        if not found:
            received = f"{images} image{'s' if images > 1 else ''} in none" if images else "none"
            raise DataError(
                f"expected one folder a class in {folder}, received {received}; lay the images out as {layout}"
            )
        return found

    def has_folder(self, folder: Path, names: Collection[str], layout: str) -> bool:
        """Whether a folder in `folder` has one of the `names` (in lower case)."""
        entries = self._entries(folder, layout)
        return any(entry.name.strip().lower() in names and _is_folder(entry) for entry in entries)

    def _entries(self, folder: Path, layout: str) -> list[os.DirEntry[str]]:
        if not folder.is_dir():
            what = "a file" if folder.exists() else "nothing"
            raise DataError(
                f"expected a folder at {folder}, received {what}; type data.root=FOLDER, laid out as {layout}"
            )
        try:
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"expected to read the folder {folder}, received: {error}; mend its permissions") from error

    def images(self, folder: Path, *, once: bool = True) -> dict[str, int]:
        """The image files below `folder`: their names relative to the root, sorted, each with a number that is equal
        for equal files, whatever the name (0: not known).

        Args:
            once: leaves out further names of a file.

        Raises:
            DataError: a link leads to a folder that it lies in, and so to other classes' images.
        """
        above, seen = _above(folder), set[int]()
        found: list[tuple[bool, str, int]] = []
        plain: list[tuple[str, str, bool]] = [(str(folder), os.path.relpath(folder, self.root), False)]
        links: list[tuple[str, str, bool]] = []
        while plain or links:  # links last: what can be reached without one keeps its own name
            path, relative, linked = plain.pop() if plain else links.pop(0)
            try:
                identity = file_number(Path(path).stat())
                if identity in above:
                    raise self._leads_up(relative, path)
                if identity in seen:
                    self.passed.add("linked again", relative)
                    continue
                with os.scandir(path) as scanned:
                    entries = sorted(scanned, key=lambda entry: entry.name)
            except OSError as error:
                self.broken.append((relative, str(error)))
                continue
            seen.add(identity)
            device = identity >> 64
            for entry in entries:
                name = f"{relative}/{entry.name}"
                if _hidden(entry.name):
                    self.passed.add("hidden", name)
                elif _is_folder(entry):
                    (links if entry.is_symlink() else plain).append((entry.path, name, linked or entry.is_symlink()))
                elif _suffix(entry.name) not in EXTENSIONS:
                    self._pass_over(name)
                else:
                    number = self._file(entry, name, device)
                    if number is not None:
                        found.append((linked or entry.is_symlink(), name, number))
        return self._once(found) if once else {name: number for _, name, number in sorted(found, key=lambda f: f[1])}

    def _file(self, entry: os.DirEntry[str], name: str, device: int) -> int | None:
        """Its number, or `None` for what is no file."""
        try:
            if not entry.is_symlink():
                if entry.is_file():
                    return device << 64 | entry.inode() if entry.inode() else 0
            elif stat.S_ISREG((status := entry.stat()).st_mode):
                return file_number(status)
        except OSError as error:
            self.broken.append((name, f"a link that leads nowhere: {error}" if entry.is_symlink() else str(error)))
            return None
        self.passed.add("pipe or device", name)
        return None

    def _once(self, found: Iterable[tuple[bool, str, int]]) -> dict[str, int]:
        seen, kept = set[int](), {}
        for _, name, number in sorted(found):
            if number in seen:
                self.passed.add("linked again", name)
                continue
            if number:
                seen.add(number)
            kept[name] = number
        return dict(sorted(kept.items()))

    def _pass_over(self, name: str) -> None:
        self.passed.add(_suffix(name) or "without a suffix", name)

    def _leads_up(self, relative: str, path: str) -> DataError:
        return DataError(
            f"expected no link that leads to a folder around it, received {relative} -> {os.path.realpath(path)} in "
            f"{self.root}; remove it"
        )

    def settle(self, on_error: Literal["raise", "skip"], findings: Findings) -> None:
        """Tells what was passed over and what could not be read.

        Raises:
            DataError: with `raise`, where something could not be read.
        """
        findings.notices += self.passed.notices()
        if not self.broken:
            return
        named = [f"{name}: {reason}" for name, reason in self.broken]
        if on_error == "raise":
            lines = "\n".join(f"  {line}" for line in first_lines(named))
            raise DataError(
                f"expected to read every file and folder of {self.root}, received {len(named)} that cannot be:\n"
                f"{lines}\n"
                "repair or remove them, or type data.on_error=skip to leave them out"
            )
        findings.left_out += self.broken
        findings.notices.append(
            f"data: {len(named)} of {self.root} cannot be read, and {'is' if len(named) == 1 else 'are'} left out: "
            f"{'; '.join(first_lines(named))}"
        )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is one, or a link that led to one: a link that leads nowhere, without a suffix, is no stray file."""
    try:
        return entry.is_dir() or (entry.is_symlink() and not _suffix(entry.name) and not Path(entry.path).exists())
    except OSError:
        return not _suffix(entry.name)


def _hidden(name: str) -> bool:
    return name.startswith((".", *_OF_SYSTEMS))


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower().rstrip()  # noqa: PTH122 (pathlib: 5x the time)


def file_number(status: os.stat_result) -> int:
    """Equal for what is one file; 0 where the file system does not say."""
    return status.st_dev << 64 | status.st_ino if status.st_ino else 0


def _above(folder: Path) -> set[int]:
    """The folders around `folder`, by its name and by what that really is."""
    parents = {*folder.absolute().parents, *Path(os.path.realpath(folder)).parents}
    return {file_number(parent.stat()) for parent in parents if parent.exists()} - {0}


def first_lines(lines: Sequence[str]) -> list[str]:
    """The first few, and how many there are besides."""
    return [*lines[:SHOWN], *([f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else [])]


def first_names(names: Collection[str]) -> str:
    """The first few names, and how many there are."""
    shown = ", ".join(list(names)[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown}, ... ({len(names)} in all)"


def look_alike(name: str) -> str:
    """The name without what cannot be seen of it: how its accents are composed, spaces around it."""
    return unicodedata.normalize("NFC", name).strip()


def require_one_place(places: Mapping[tuple[str, str], Mapping[str, int]]) -> list[str]:
    """A notice for each two splits that share files.

    Args:
        places: the files (name and number) of each (split, class).

    Raises:
        DataError: one file lies in two classes.
    """
    seen: dict[int, tuple[str, str, str]] = {}
    torn: list[tuple[str, str]] = []
    shared: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for (split, kind), files in places.items():
        for name, number in files.items():
            if not number:
                continue
            other_split, other_kind, other = seen.setdefault(number, (split, kind, name))
            if other_kind != kind:
                torn.append((other, name))
            elif other_split != split and other != name:  # else it is listed in both, and told elsewhere
                shared.setdefault((other_split, split), []).append((other, name))
    if torn:
        raise DataError(
            f"expected each image in one class, received {len(torn)} in two (by links), as {torn[0][0]} and "
            f"{torn[0][1]}; remove one of them"
        )
    return [
        f"data: {len(pairs):,} files are in {one} and in {other}, by links ({pairs[0][0]}, {pairs[0][1]}); "
        f"the figures of {other} are not those of unseen images"
        for (one, other), pairs in shared.items()
    ]


def class_names(path: Path) -> tuple[str, ...]:
    """The names in a text file, one a line. Raises `DataError`, also for one that is there twice."""
    names = tuple(line.strip() for line in read_text(path, DataError).split("\n") if line.strip())
    twice = [name for name, count in Counter(map(look_alike, names)).items() if count > 1]
    if twice:
        raise DataError(f"expected different class names in {path}, received {first_names(twice)} twice; mend the file")
    return names
