"""`cnnlab explain --filters`, `--features`, `--maximize`, `--nearest`: what is inside a network, as pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnlab.errors import UsageError
from cnnlab.runs.folder import write_atomically
from cnnlab.terminal import one_line, say
from cnnlab.verbs.arguments import Parser

if TYPE_CHECKING:
    from torch import Tensor

    from cnnlab.building.evaluation import OpenedData
    from cnnlab.building.opened import Opened
    from cnnlab.explain import Subject
    from cnnlab.explain.examples import Examples

NEAREST = 5
MOST_TRAINED = 10_000
"""Training images among which the nearest are looked for; of more, as many from all over the split."""


def add_flags(parser: Parser) -> None:
    flag = parser.add_argument
    flag("--filters", metavar="LAYER", help="instead of maps: the weights of a convolution")
    flag("--features", metavar="LAYER", help="instead of maps: what a layer gives for each image, channel by channel")
    maximize = "instead of maps: images that make units of a layer large (logits:CLASS of a class)"
    flag("--maximize", metavar="LAYER:UNIT,...", help=maximize)
    nearest = f"instead of maps: the {NEAREST} training images that the network takes for most alike (--layers: where)"
    flag("--nearest", action="store_true", help=nearest)


def asked(args: Any) -> bool:
    return bool(args.filters or args.features or args.maximize or args.nearest)


def draw(
    args: Any,
    network: Opened,
    subject: Subject,
    examples: Callable[[], Examples],
    data: Callable[[], OpenedData],
    out: Path,
) -> list[dict[str, Any]]:
    """Writes the pictures that are asked for, and says what is on them: a record each.

    Args:
        examples: gives the images; not called for filters, which need none.
        data: gives the run's, whose training images are the nearest ones.

    Raises `UsageError` for layers and units that are not there.
    """
    from cnnlab.sinks.picture import png

    records = []
    for name, picture, about in _drawn(args, network, subject, examples, data):
        path = out / f"{_plain(name)}.png"
        write_atomically(path, png(picture.permute(1, 2, 0).numpy()), "type another --out")
        records.append({"picture": path.name, **about})
        if not args.json:
            say(f"{one_line(str(path))}  {one_line(_told(about))}")
    return records


def _drawn(
    args: Any, network: Opened, subject: Subject, examples: Callable[[], Examples], data: Callable[[], OpenedData]
) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    from cnnlab.explain import inside, inside_pictures

    if args.filters:
        weights = inside.filters(subject, args.filters)
        about = {"filters": args.filters, "shape": list(weights.shape)}
        yield f"filters-{args.filters}", inside_pictures.filters_picture(weights, args.filters), about
    if not (args.features or args.maximize or args.nearest):
        return
    shown = examples()
    if args.features:
        maps = inside.feature_maps(subject, shown.prepared, args.features)
        for number, name in enumerate(shown.names):
            silent = int((~maps[number].flatten(1).any(1)).sum())
            about = {"features": args.features, "image": name, "shape": list(maps.shape[1:]), "silent": silent}
            picture = inside_pictures.features_picture(shown.shown[number], maps[number], args.features)
            yield f"features-{args.features}-{number:03d}-{name}", picture, about
    if args.maximize:
        layer, colon, units = args.maximize.partition(":")
        if not colon or not units:
            raise UsageError(f"--maximize {args.maximize}: expected LAYER:UNIT, as in layer3:0,5 or logits:CLASS")
        found = inside.maximized(subject, shown.prepared, layer, [unit.strip() for unit in units.split(",")])
        about = {
            "maximize": layer,
            "units": [{"unit": one.unit, "reached": one.reached, "of_images": one.of_images} for one in found],
        }
        yield f"maximize-{args.maximize}", inside_pictures.maximized_picture(found, layer), about
    if args.nearest:
        yield from _nearest(args, network, subject, shown, data())


def _nearest(
    args: Any, network: Opened, subject: Subject, shown: Examples, data: OpenedData
) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    from cnnlab.building.evaluation import loader_of
    from cnnlab.data.loader import spread
    from cnnlab.explain.inside import nearest
    from cnnlab.explain.inside_pictures import nearest_picture
    from cnnlab.explain.layers import usual_layers

    layer = args.layers.split(",")[0].strip() if args.layers else ""
    if not layer:
        with subject.undisturbed():
            layer = usual_layers(subject, shown.prepared[:1])[0]
    loader = loader_of(network, "train", data)
    index = spread(loader.length, MOST_TRAINED)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for part in index.split(loader.batch_size):
            yield loader.at(part)["image"], part

    likeness, at = nearest(subject, shown.prepared, batches(), layer, NEAREST)
    classes = subject.spec.classes
    for number, name in enumerate(shown.names):
        batch = loader.at(at[number])
        rows = []
        for place, position in enumerate(at[number].tolist()):
            row: dict[str, Any] = {"sample": data.name("train", position), "cosine": likeness[number, place].item()}
            if "label" in batch:
                row["class"] = classes[int(batch["label"][place])]
            rows.append(row)
        own = [name]
        if "label" in shown.truth:
            own.append(f"is {classes[int(shown.truth['label'][number])]}")
        captions = [own, *([f"{r['cosine']:.4f}", r.get("class", ""), Path(r["sample"]).name] for r in rows)]
        captions = [[one_line(line) for line in lines] for lines in captions]
        picture = nearest_picture(shown.prepared[number].cpu(), list(batch["image"].cpu()), captions, layer)
        about = {"nearest": layer, "image": name, "among": len(index), "samples": rows}
        yield f"nearest-{number:03d}-{name}", picture, about


def _told(about: dict[str, Any]) -> str:
    if "filters" in about:
        return "x".join(map(str, about["shape"]))
    if "features" in about:
        return f"{'x'.join(map(str, about['shape']))}, {about['silent']} maps are 0 everywhere"
    if "units" in about:
        return "; ".join(f"{u['unit']}: {u['reached']:.3g} (images: {u['of_images']:.3g})" for u in about["units"])
    return "; ".join(f"{r['cosine']:.3f} {r.get('class', '')} {r['sample']}" for r in about["samples"])


def _plain(name: str) -> str:
    """For a file's name."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)[:100]
