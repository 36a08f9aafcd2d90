"""`cnnlab explain RUN [IMAGES...]`: what a run's network looks at, as pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnlab.composing.trust import Trust
from cnnlab.errors import CheckpointError, DataError, UsageError
from cnnlab.machine.surroundings import shown_path
from cnnlab.runs.folder import RunDir, jsonable, write_atomically
from cnnlab.terminal import one_line, say
from cnnlab.verbs import explain_inside
from cnnlab.verbs.arguments import TRUST, Parser, opening_options
from cnnlab.verbs.eval import with_data
from cnnlab.verbs.explain_trust import LEAST, measure, show

if TYPE_CHECKING:
    from cnnlab.building.evaluation import OpenedData
    from cnnlab.building.opened import Opened
    from cnnlab.explain import Subject
    from cnnlab.explain.examples import Examples

EXAMPLES = """examples:
  cnnlab explain outputs/shapes-resnet/2026-11-22_10-00-00-1a2b        eight images of the test split
  cnnlab explain RUN cat.jpg photos/ --targets top3                   one's own images, three classes each
  cnnlab explain RUN --methods gradcam,occlusion --targets ring,star  with pip install 'cnnlab[explain]'
  cnnlab explain RUN --layers stages.1,stages.2 --count 20
  cnnlab explain RUN --targets box:x1                                 of a localization; else a class
  cnnlab explain RUN --filters conv1                                  weights; --features layer2: maps of images
  cnnlab explain RUN --maximize layer3:0,5                            what units answer to most; logits:CLASS of a class
  cnnlab explain RUN cat.jpg --nearest                                training images that look alike to the network
  cnnlab explain RUN --page                                           the run on one page: curves, evaluation, pictures
  cnnlab explain RUN data.root=/new/place                             the run's data, where it has moved; or other data
  cnnlab explain RUN --trust                                          and how far each method can be trusted
"""
FOLDER = "explain"
ELSEWHERE = "type another --out"


def main(arguments: Sequence[str]) -> int:
    args = parser().parse_all(arguments)
    if not args.page:
        return _pictures(args)
    folder, refused = RunDir(args.run), None
    try:
        code = _pictures(args)
    except DataError as error:  # a page of a run whose data is gone has the pictures that were drawn before
        if args.images:
            raise
        say(f"no new pictures: {one_line(error)}", err=True)
        code = 0
    except CheckpointError as error:
        refused = error
    _page(folder, Path(args.out) if args.out else folder.path / FOLDER, quiet=args.json)
    if refused is not None:
        raise refused
    return code


def _page(folder: RunDir, out: Path, *, quiet: bool) -> None:
    from cnnlab.page.reading import contents_of
    from cnnlab.page.writing import write

    path = out / "index.html"
    write(contents_of(folder, out), path)
    say(f"{'page':<24} {one_line(shown_path(path))}", err=quiet)


def _pictures(args: Any) -> int:
    if args.count < 1:
        raise UsageError(f"--count {args.count}: expected 1 or more")
    named, measured = _trust(args)
    folder = RunDir(args.run)
    files, typed = _split(args.images)
    from cnnlab.building.known import batch_of, examples_of
    from cnnlab.building.opened import open_run
    from cnnlab.explain import USUAL, Subject
    from cnnlab.explain.examples import explained
    from cnnlab.explain.methods import METHODS, require_known

    methods = list(METHODS) if args.methods == "all" else _names(args.methods) or list(USUAL)
    require_known(methods)
    trust = Trust.of(named, args.config_dir)
    network = open_run(folder, args.checkpoint, device=args.device, trust=trust)
    subject = Subject(network.model, network.task, network.spec)
    if explain_inside.asked(args):
        return _inside(args, network, subject, files, typed, trust)
    bad, data = 0, None if files else _data(network, typed, trust)
    if data is None:
        examples, bad = _of_files(network, files)
    else:
        examples = examples_of(batch_of(network, args.split, data, args.count), args.split)
    for notice in _notices(network, subject):
        say(notice, err=True)
    out = Path(args.out) if args.out else folder.path / FOLDER
    from cnnlab.sinks.picture import png

    layers, targets = _names(args.layers), _names(args.targets) or ["predicted"]
    report = None
    if measured:
        on = examples if data is None else (args.split, data, args.trust_images)
        report = measure(network, subject, on, targets[0], methods, layers, args.region)
    verdicts = None if report is None else report.verdicts()
    records = []
    found = explained(subject, examples, targets, methods, layers, region=args.region, verdicts=verdicts)
    for number, each in enumerate(found):
        path = out / f"{number:03d}-{_plain(each.name)}.png"
        write_atomically(path, png(each.picture.permute(1, 2, 0).numpy()), ELSEWHERE)
        records.append({"image": each.name, "picture": path.name, "maps": each.records})
        if not args.json:
            _tell(path, each.records)
    about = {"checkpoint": network.checkpoint, "step": network.step, "images": records}
    if report is not None:
        about["trust"] = report.document()
    document = json.dumps(jsonable(about), indent=1)
    if args.json:
        say(document)
    elif report is not None:
        show(report)
    write_atomically(out / "maps.json", document.encode(), ELSEWHERE)
    if bad:
        raise DataError(f"{bad} of {len(files)} images could not be read, and are left out")
    return 0


def _inside(
    args: Any, network: Opened, subject: Subject, files: Sequence[Path], typed: Sequence[str], trust: Trust
) -> int:
    from cnnlab.building.known import batch_of, examples_of

    bad = 0

    @cache
    def data() -> OpenedData:
        return _data(network, typed, trust)

    def examples() -> Examples:
        nonlocal bad
        if not files:
            return examples_of(batch_of(network, args.split, data(), args.count), args.split)
        found, bad = _of_files(network, files)
        return found

    for notice in network.notices:
        say(one_line(notice), err=True)
    out = Path(args.out) if args.out else network.folder.path / FOLDER
    records = explain_inside.draw(args, network, subject, examples, data, out)
    if args.json:
        say(json.dumps(jsonable({"checkpoint": network.checkpoint, "step": network.step, "pictures": records})))
    if bad:
        raise DataError(f"{bad} of {len(files)} images could not be read, and are left out")
    return 0


def parser() -> Parser:
    made = Parser("explain", "Shows which pixels a run's network looks at; writes pictures to RUN/explain.", EXAMPLES)
    made.add_argument("run", help="a run folder")
    what = "image files or folders; none: images of the run's data, or of other data (data=OPTION, data.KEY=VALUE)"
    made.add_argument("images", nargs="*", metavar="IMAGE", help=what)
    made.add_argument("--methods", default="", metavar="NAME,...", help="`all`, or of those that --help ends with")
    made.add_argument(
        "--targets",
        default="predicted",
        metavar="NAME,...",
        help="predicted, true, top3, classes by name, box:x1 (y1, x2, y2)",
    )
    made.add_argument("--layers", default="", metavar="NAME,...", help="modules, as cnnlab summary names them")
    made.add_argument("--region", choices=["predicted", "all"], default="predicted", help="of a mask: what is scored")
    made.add_argument("--split", choices=["train", "val", "test"], default="test")
    made.add_argument("--count", type=int, default=8, help="images of the data, from all over the split")
    explain_inside.add_flags(made)
    page = "also write DIR/index.html: the whole run on one page, which needs no other file"
    made.add_argument("--page", action="store_true", help=page)
    made.add_argument("--out", metavar="DIR", help="where the pictures go")
    measured = "without NAME: measures how far each method can be trusted; with it: " + TRUST["help"]
    opening_options(made, trust={"nargs": "?", "const": "", "help": measured})
    made.add_argument("--trust-images", type=int, default=24, metavar="N", help="of the data, to measure trust on")
    made.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return made


def _trust(args: Any) -> tuple[list[str], bool]:
    """What `--trust NAME` vouches for, and whether `--trust` by itself was given.

    Raises `UsageError` for a NAME that is a file or an override, which the flag took for its own.
    """
    named = [name for name in args.trust if name]
    for name in named:
        if "=" in name or Path(name).exists():
            raise UsageError(
                f"--trust {name}: expected the name of a package or module; to measure trust, type --trust last"
            )
    if args.trust_images < LEAST:
        raise UsageError(f"--trust-images {args.trust_images}: expected {LEAST} or more")
    return named, len(named) < len(args.trust)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _split(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files, those of folders in their order, and overrides of the data.

    Raises `UsageError` for a file that is not there, and where both are given.
    """
    from cnnlab.data.formats import EXTENSIONS

    files: list[Path] = []
    typed = [word for word in words if "=" in word and not Path(word).exists()]
    for path in (Path(word) for word in words if word not in typed):
        if path.is_dir():
            inside = sorted(each for each in path.rglob("*") if each.suffix.lower() in EXTENSIONS)
            if not inside:
                raise UsageError(f"{path}: no images in this folder")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise UsageError(f"{path}: no such image; expected files, folders, or data=OPTION")
    if files and typed:
        raise UsageError(f"expected images or overrides of the data, received both: {files[0]} and {typed[0]}")
    return files, typed


def _of_files(network: Opened, files: Sequence[Path]) -> tuple[Examples, int]:
    """The images that can be read, and how many cannot, each of which is named."""
    from cnnlab.explain.examples import Examples

    images, failures = network.read_all(files)
    for number, reason in failures.items():
        say(f"left out: {one_line(str(files[number]))}: {one_line(reason)}", err=True)
    read = [number for number in range(len(files)) if number not in failures]
    if not read:
        raise DataError(f"none of {len(files)} images could be read")
    images = images[read]
    return Examples([files[number].name for number in read], network.prepared(images), images), len(failures)


def _data(network: Opened, typed: Sequence[str], trust: Trust) -> OpenedData:
    from cnnlab.building.evaluation import data_for

    data = data_for(network, with_data(network, typed, trust) if typed else None)
    if data.changes:
        say(f"{'data':<24} other than the run had: {one_line(data.changes)}", err=True)
    return data


def _notices(network: Opened, subject: Subject) -> Iterator[str]:
    yield from network.notices
    views = subject.views()
    if views > 1:
        yield f"evaluation averages {views} views of an image; what is explained is the answer to the image alone"
    if network.forward.dtype.itemsize < 4:
        yield "maps and scores are computed in float32, whatever precision the run had"


def _plain(name: str) -> str:
    """For a file's name."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)[-80:]


def _tell(path: Path, records: Sequence[dict[str, Any]]) -> None:
    seen: dict[str, str] = {}
    for record in records:
        chance = "" if record["probability"] is None else f", p {record['probability']:.3f}"
        seen[record["target"]] = f"{one_line(record['target'])} {record['score']:.3g}{chance}"
    empty = [f"{r['method']} of {r['target']}: {r['evidence']}" for r in records if r["evidence"] != "some"]
    say(f"{one_line(str(path))}  {'; '.join(seen.values())}" + "".join(f"; {one_line(text)}" for text in empty))
