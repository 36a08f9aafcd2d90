"""How a set's masks are to be read: what the user says of their values or colours, and what the files say."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cnnlab.data.found import first_names
from cnnlab.data.mask_pixels import Colour, Meaning, named
from cnnlab.errors import DataError
from cnnlab.protocols import VOID
from cnnlab.schema import Range
from cnnlab.usertext import read_text

Value = Annotated[int, Range(low=0, high=255)]
_SMEARED = 8
"""Values more than there are classes, from where on a mask was smeared rather than mislabelled."""
_LINE = "RED GREEN BLUE NAME or NAME,RED,GREEN,BLUE"


@dataclass(frozen=True)
class Reading:
    """`meaning` of the values, or colours, in the files (`None`: class numbers, if that fits), and a `notice` of it."""

    meaning: Meaning | None
    notices: tuple[str, ...] = ()


class MaskOptions:
    """The options `data.values`, `data.colours` and `data.ignore`.

    Args:
        values: the value in the files of each class, in the classes' order; a number is that of the first class, from
            which the others count on.
        colours: the colour of each class, in their order; or a file with a line for each colour.
        ignore: values, or colours, that are void.

    Raises:
        ValueError: they contradict each other.
    """

    def __init__(
        self,
        values: int | Sequence[int] | None,
        colours: str | Sequence[Sequence[int]] | None,
        ignore: Sequence[int | Sequence[int]] | None,
    ) -> None:
        if values is not None and colours is not None:
            raise ValueError("expected data.values or data.colours, received both; type data.values=null")
        self.values = values if values is None or isinstance(values, int) else tuple(values)
        self.file = Path(colours).expanduser() if isinstance(colours, str) else None
        self.colours = None if colours is None or isinstance(colours, str) else tuple(map(_colour, colours))
        coloured = colours is not None
        self.ignore: tuple[int | Colour, ...] = tuple(
            item if isinstance(item, int) else _colour(item) for item in ignore or ()
        )
        if any(isinstance(item, int) == coloured for item in self.ignore):
            what = "colours, as [[0,0,0]]," if coloured else "values, as [255],"
            raise ValueError(f"expected {what} in data.ignore, received {[*map(_shown, self.ignore)]}")
        listed = self.values if isinstance(self.values, tuple) else self.colours or ()
        for name, items in (("data.ignore", self.ignore), ("data.colours" if coloured else "data.values", listed)):
            if len(set(items)) < len(items) or (items is listed and set(listed) & set(self.ignore)):
                raise ValueError(
                    f"expected each of {name} once, and either as a class or as void, received {_list(items)}"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The classes that the file of colours names, in its order."""
        return () if self.file is None else tuple(dict.fromkeys(name for name, _ in _entries(self.file)))

    def reading(self, classes: Sequence[str]) -> Reading:
        """What the options say. Raises `DataError` for a file, `ValueError` for a list, that does not fit."""
        void: Meaning = tuple((item, VOID) for item in self.ignore)
        if self.file is not None:
            return self._by_file(self.file, classes, void)
        if self.colours is not None:
            self._require_count("data.colours", len(self.colours), classes)
            return Reading((*zip(self.colours, range(len(classes))), *void))
        values = self.values
        if values is None:
            taken = [item for item in self.ignore if isinstance(item, int) and item < len(classes)]
            if taken:
                raise ValueError(
                    f"data.ignore={[*self.ignore]} takes the number of a class ({classes[taken[0]]}); type data.values="
                    f"{taken[0] + 1} too, where the classes begin behind it, or the value of each: data.values=[...]"
                )
            values = 0 if self.ignore else None
        if values is None:
            return Reading(None)
        if isinstance(values, int):
            if values + len(classes) > 256:
                raise ValueError(f"expected values up to 255, received data.values={values} for {len(classes)} classes")
            values = tuple(range(values, values + len(classes)))
        self._require_count("data.values", len(values), classes)
        known = {*values, *self.ignore}
        return Reading((*zip(values, range(len(classes))), *void, *(() if VOID in known else ((VOID, VOID),))))

    def _require_count(self, name: str, count: int, classes: Sequence[str]) -> None:
        if count != len(classes):
            raise ValueError(
                f"expected one of {name} for each of the {len(classes)} classes ({first_names(classes)}), received "
                f"{count}; what is void goes into data.ignore"
            )

    def _by_file(self, path: Path, classes: Sequence[str], void: Meaning) -> Reading:
        numbers = {name: number for number, name in enumerate(classes)}
        entries = _entries(path)
        lacking = [name for name in classes if name not in {name for name, _ in entries}]
        if lacking:
            raise DataError(f"expected a colour of each class in {path}, received none of {first_names(lacking)}")
        others = list(dict.fromkeys(name for name, _ in entries if name not in numbers))
        told = (
            f"data: no class of this set, and so void, are these of {path}: {first_names(others)}" if others else None
        )
        table = dict(void) | {colour: numbers.get(name, VOID) for name, colour in entries}
        return Reading(tuple(table.items()), () if told is None else (told,))


def decided(root: Path, classes: Sequence[str], first: Mapping[int, str]) -> Reading:
    """What masks mean whose values nobody explained.

    Class numbers, and 255 for void, where they are nothing else. As many other values as there are classes stand for
    them in their order, which is told. All else is refused.

    Args:
        first: the values that occur, each with the first file that has it.

    Raises:
        DataError: they may be read in several ways, or in none; says what to type.
    """
    found = sorted(first)
    count, others = len(classes), [value for value in found if value != VOID]
    received = f"the masks of {root} hold {named(found)}"
    if VOID in first and len(found) == count and (others == [0] or others[-1:] > [count - 1]):
        raise DataError(
            f"expected class numbers 0..{count - 1} in the masks, or {VOID} where a pixel is void; {received}: with "
            f"{VOID} void, no pixel would be `{classes[-1]}`; type data.values={_list(found)} if they stand for "
            f"{first_names(classes)}"
        )
    if all(value < count for value in others):
        return Reading(None)
    if len(others) == count:
        told = ", ".join(f"{value} {name}" for value, name in list(zip(others, classes))[:8])
        more = f", ... ({count} in all)" if count > 8 else ""
        void = f", {VOID} void" if VOID in first else ""
        meaning = (*zip(others, range(count)), (VOID, VOID))
        typed = f"data.values={_list(others)}" if count <= 8 else "data.values"
        return Reading(meaning, (f"data: masks are read as {told}{more}{void}; {typed} says so for certain",))
    odd = min(value for value in others if value >= count)
    raise DataError(
        f"expected class numbers 0..{count - 1} or {VOID} (void) in the masks, or {count} other values, received {odd} "
        f"in {first[odd]}; {received}; {_remedy(others, count)}"
    )


def _remedy(others: Collection[int], count: int) -> str:
    if len(others) > count + _SMEARED:
        return (
            "so many are those of masks that were smeared, as JPEG and resizing do, or of numbered objects; make them "
            "anew from what they were made of"
        )
    if list(others) == list(range(count + 1)):
        return f"type data.values=1 data.ignore=[0] if 0 is void, or data.ignore=[{count}] if {count} is"
    return (
        "type the value of each class, data.values=[...], and data.ignore=[...] for what is void, or complete the list "
        "of classes, or repair the masks"
    )


def _entries(path: Path) -> list[tuple[str, Colour]]:
    """Name and colour of each line, in order; a heading is passed over. Raises `DataError`."""
    found: dict[Colour, str] = {}
    for number, line in enumerate(read_text(path, DataError).split("\n"), 1):
        words = [word for word in re.split(r"[,;\t ]+", line.strip()) if word]
        if not words or words[0].startswith("#"):
            continue
        for colour, name in ((words[:3], words[3:]), (words[-3:], words[:-3])):
            if name and all(word.isdecimal() and int(word) < 256 for word in colour):
                break
        else:
            if not found and number == 1:
                continue
            raise DataError(f"{path}, line {number}: expected a colour, {_LINE}, received {line.strip()!r}")
        key = (int(colour[0]), int(colour[1]), int(colour[2]))
        text = " ".join(name)
        if found.setdefault(key, text) != text:
            raise DataError(
                f"{path}, line {number}: expected a colour once, received {key} for {found[key]} and {text}"
            )
    if not found:
        raise DataError(f"{path}: expected a line for each colour, {_LINE}, received none")
    return [(name, colour) for colour, name in found.items()]


def _colour(item: int | Sequence[int]) -> Colour:
    if isinstance(item, int) or len(item) != 3:
        raise ValueError(f"expected colours of three values, as [[255,0,0],[0,0,0]], received {_shown(item)}")
    return (item[0], item[1], item[2])


def _shown(item: int | Sequence[int]) -> str:
    return str(item) if isinstance(item, int) else _list(item)


def _list(items: Sequence[int | Sequence[int]]) -> str:
    """As it is typed."""
    return f"[{','.join(map(_shown, items))}]"
