"""Images with boxes in the layout of Pascal VOC (Everingham et al. 2010)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers.expat import ExpatError, ParserCreate

from cnnlab.data.formats import require_file
from cnnlab.data.found import Findings
from cnnlab.data.lists import Folder, kept, leave_out, listed, tell_shared
from cnnlab.data.objects import Box, Boxed, Taken, labels_of, largest
from cnnlab.errors import DataError
from cnnlab.protocols import Split

_LAYOUT = "ROOT/JPEGImages/<id>.jpg, ROOT/Annotations/<id>.xml, ROOT/ImageSets/Main/{train,val,test}.txt"


_SIDES = ("xmin", "ymin", "xmax", "ymax")
_MOST_BYTES = 16 << 20
"""Of an annotation; one of a thousand objects has a quarter of a million."""


@dataclass(eq=False)
class VocBoxes(Boxed):
    """Classification and localization: each image's largest object, its class and its box.

    The files' boxes are pixels counted from 1, both ends included, as VOC's are: a box over the whole of a W
    x H image is (1, 1, W, H) there and (0, 0, 1, 1) here. What of a box lies outside its image is cut off, and such
    boxes are counted. Of several objects, the one with the largest box inside the image is taken; how many images have
    several is told. Where the annotation states another size of the image, in the same proportions, its box is scaled.

    The lists are those of ImageSets/Main. Where nobody says, the classes are those that occur, by name.
    """

    def load(self) -> dict[str, Split]:
        folder = Folder.of(self._root, "JPEGImages")
        every = [*dict.fromkeys(name for names in self._lists.values() for name in names)]
        objects = self._objects
        self.findings = Findings([*self._told.notices])
        folder.tell_unlisted(every, self.findings)
        lacking = [*self._unusable.items(), *folder.lacking([name for name in every if name in objects])]
        out = leave_out(lacking, len(every), self.on_error, self.findings, "mend them")
        ids, given = kept(self._lists, out, folder, self.findings)
        taken = [objects[name] for name in ids]
        labels = labels_of(ids, taken, self._classes, {name: str(self._annotation(name)) for name in ids})
        parts = self.parted(given, labels, len(self._classes), val=self.val, test=self.test)
        return self.boxed(self._root, [folder.of_id(name) for name in ids], ids, parts, taken, labels, self._recipe)

    @cached_property
    def _lists(self) -> dict[str, list[str]]:
        """Image ids by split, from ImageSets/Main."""
        folder = self._root / "ImageSets" / "Main"
        lists: dict[str, list[str]] = {}
        for split in ("train", "val", "test"):
            path = folder / f"{split}.txt"
            if path.is_file():
                named = "test" if split == "val" and self.val_as_test else split
                if named in lists:
                    self._told.notices.append(
                        f"data: {path} is not used, as data.val_as_test=true takes val.txt for it"
                    )
                    continue
                lists[named] = [*listed(path, self._told)]
        if not lists.get("train"):
            what = "an empty list" if "train" in lists else "nothing"
            raise DataError(
                f"expected the ids of the training images in {folder / 'train.txt'}, received {what}; "
                f"type data.root=FOLDER, laid out as {_LAYOUT}"
            )
        tell_shared(lists, self._told)
        return lists

    @cached_property
    def _objects(self) -> dict[str, Taken]:
        """Each listed image's largest object.

        Raises `DataError` for an annotation that cannot be used, unless it is left out.
        """
        found = {}
        for name in dict.fromkeys(name for names in self._lists.values() for name in names):
            try:
                found[name] = annotated(self._annotation(name))
            except DataError as error:
                if self.on_error == "raise":
                    raise
                self._unusable[name] = str(error)
        return found

    def _annotation(self, name: str) -> Path:
        return self._root / "Annotations" / f"{name}.xml"

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        return self.classes or tuple(sorted({taken.kind for taken in self._objects.values()}))


def annotated(path: Path) -> Taken:
    """The largest object of an annotation. Raises `DataError` for one that cannot be used."""
    try:
        root = _parsed(path)
        size = tuple(int(float(root.findtext(f"size/{side}", "0"))) for side in ("height", "width"))
        objects = [(item.findtext("name", "").strip(), _box(item)) for item in root.findall("object")]
    except (OSError, ValueError, OverflowError, ExpatError, AssertionError) as error:
        raise DataError(f"expected a VOC annotation in {path}, received: {error}; repair it") from error
    try:
        return largest(objects, size if min(size) > 0 else None, str(path))  # type: ignore[arg-type]
    except DataError as error:
        raise DataError(f"{error}; remove the image from ImageSets/Main or repair the annotation") from error


def _box(item: Element) -> Box:
    xmin, ymin, xmax, ymax = (float(item.findtext(f"bndbox/{side}", "nan")) for side in _SIDES)
    return xmin - 1, ymin - 1, xmax, ymax


def _parsed(path: Path) -> Element:
    """The XML's root. Entities are refused, since few bytes of them become very many, or name other files.

    Raises:
        ValueError: entities, or more bytes than an annotation has.
        ExpatError: no XML.
        OSError: it cannot be read.
    """
    require_file(str(path))
    content = path.read_bytes() if path.stat().st_size <= _MOST_BYTES else None
    if content is None:
        raise ValueError(f"more than {_MOST_BYTES:,} bytes")

    def refuse(name: str, *rest: object) -> None:
        raise ValueError(f"the entity {name!r}, and entities are not expanded")

    builder, parser = TreeBuilder(), ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = refuse
    parser.Parse(content, True)
    return builder.close()
