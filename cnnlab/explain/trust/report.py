"""How far each method's maps can be trusted on a set of images: scores, each beside its noise floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cnnlab.explain.maps import Map
from cnnlab.explain.methods import map_of, wanted
from cnnlab.explain.scores import Score
from cnnlab.explain.subject import Subject
from cnnlab.explain.trust.faithfulness import faithfulness
from cnnlab.explain.trust.floors import floors
from cnnlab.explain.trust.places import energy, overlap, pointing
from cnnlab.explain.trust.randomization import Randomized, randomized
from cnnlab.explain.trust.statistics import Estimate, estimate
from cnnlab.explain.trust.truth import agreement, claimed, effects

MEASURES = {
    "randomization": "part of the map that goes with the weights: 0 what knows only the image, 1 all of it",
    "faithfulness": "answer left without the least relevant cells, less that without the most relevant; infilled",
    "truth": "rank agreement with what taking each object out of the scene does to the score",
    "pointing": "part of the images whose maximum lies in the object",
    "energy": "part of the map that lies in the object",
    "overlap": "intersection over union of the object with where the map is above half its maximum",
}
"""Of all, more is better."""
Measure = Callable[[Tensor], Tensor]
"""Maps (N, H, W) to scores (N,)."""
Tell = Callable[[int, int, str], None]
"""(parts done, of how many, what comes next)."""


@dataclass
class Known:
    """What is known of the images beside their pixels, for the measures that need it."""

    without: Tensor | None = None
    """(N, P, C, H, W), as the network gets them: the images without each part."""
    visible: Tensor | None = None
    """(N, P, H, W) bool: where each part is seen."""
    parts: tuple[str, ...] = ()
    inside: Tensor | None = None
    """(N, H, W) bool: the object."""


@dataclass
class Measured:
    """A method's score by one measure, and whether it beats its floor."""

    score: Estimate
    floors: dict[str, Estimate]
    beats: bool

    @property
    def floor(self) -> float:
        """The highest."""
        return max((each.mean for each in self.floors.values() if each.known), default=0.0)

    def document(self) -> dict[str, Any]:
        return {
            "score": self.score.mean,
            "interval": [self.score.low, self.score.high],
            "images": self.score.count,
            "floor": self.floor,
            "floors": {name: each.mean for name, each in self.floors.items()},
            "beats_floor": self.beats,
        }


@dataclass
class Trusted:
    """One method (and layer) of a report."""

    method: str
    layer: str
    title: str
    without_evidence: int
    """Images whose map shows nothing."""
    measures: dict[str, Measured] = field(default_factory=dict)
    randomization: Randomized | None = None

    def verdict(self) -> str:
        """A line for each measure."""
        return "\n".join(_line(name, each) for name, each in self.measures.items())

    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "method": self.method,
            "layer": self.layer or None,
            "without_evidence": self.without_evidence,
            "measures": {name: each.document() for name, each in self.measures.items()},
        }
        if self.randomization is not None:
            found["randomization"] = self.randomization.document()
        return found


def _line(name: str, found: Measured) -> str:
    if not found.score.known:
        return f"{name}: not measurable"
    if name == "randomization":
        return f"{name} {found.score.mean:.2f} {'passed' if found.beats else 'FAILED'}"
    relation = "above" if found.beats else "NOT above"
    return f"{name} {found.score.mean:.2f} {relation} {found.floor:.2f}"


@dataclass
class Report:
    """Of N images and a score of each."""

    images: int
    target: str
    methods: list[Trusted]
    effects: dict[str, Estimate] = field(default_factory=dict)
    """What taking away each part does to the score, the mean over the images."""

    def verdicts(self) -> dict[str, str]:
        """What stands below a map, by its title."""
        return {each.title: each.verdict() for each in self.methods}

    def document(self) -> dict[str, Any]:
        measured = {name for each in self.methods for name in each.measures}
        return {
            "images": self.images,
            "target": self.target,
            "measures": {name: text for name, text in MEASURES.items() if name in measured},
            "effects": {name: each.mean for name, each in self.effects.items()},
            "methods": [each.document() for each in self.methods],
        }


def report(
    subject: Subject,
    images: Tensor,
    score: Score,
    methods: Sequence[str],
    layers: Sequence[str] = (),
    *,
    known: Known | None = None,
    target: str = "predicted",
    tell: Tell | None = None,
) -> Report:
    """Measures the maps of each method, and of those that look at a layer, of each layer. Nothing is trained, and the
    network is left as it was.

    Args:
        images: (N, C, H, W) as the network gets them, N of `LEAST` or more.
        target: what the score is called.
        tell: is told of progress.

    Raises `UsageError` for methods and layers that this network does not have.
    """
    known = known or Known()
    with subject.undisturbed():
        images = images.to(next((p.dtype for p in subject.model.parameters()), images.dtype))
        asked = wanted(subject, images, methods, layers)
        effect = None
        if known.without is not None:
            effect = effects(subject, images, known.without.to(images), score)
        measuring = _Measuring(subject, images, score, known, effect)
        found: list[Trusted] = []
        for number, (name, layer) in enumerate(asked):
            title = f"{name} {layer}".strip()
            if tell is not None:
                tell(number, len(asked), title)
            found.append(measuring.trusted(name, layer))
        if tell is not None:
            tell(len(asked), len(asked), "")
    means = {} if effect is None else {name: estimate(effect[:, i]) for i, name in enumerate(known.parts)}
    return Report(len(images), target, found, means)


@dataclass
class _Measuring:
    """The measures that a map is enough for, on one set of images; what floors score is kept, for maps of one kind."""

    subject: Subject
    images: Tensor
    score: Score
    known: Known
    effect: Tensor | None
    kept: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def trusted(self, name: str, layer: str) -> Trusted:
        own = map_of(self.subject, self.images, self.score, name, layer)
        silent = torch.tensor([bool(each) for each in own.evidence])
        own.values[silent] = torch.nan  # no evidence, no score
        random = randomized(self.subject, self.images, self.score, name, layer)
        # by its definition: none of these reproducibly shows something of the image that goes with the weights
        nothing = {name: estimate(torch.zeros(2)) for name in ("random", "centre", "image alone")}
        measures = {"randomization": Measured(estimate(random.score), nothing, random.passes)}
        below = list(floors(own))
        for measure, of in self.measures(own).items():
            by_floor: dict[str, list[Tensor]] = {}
            for number, (floor, maps) in enumerate(below):
                by_floor.setdefault(floor, []).append(self.of_floor(own, measure, floor, number, maps, of))
            measures[measure] = _against(of(own.values), by_floor)
        return Trusted(name, layer, own.title, int(silent.sum()), measures, random)

    def measures(self, own: Map) -> dict[str, Measure]:
        """Each measure of maps of the kind of `own`."""
        found: dict[str, Measure] = {
            "faithfulness": lambda maps: faithfulness(self.subject, self.images, self.score, maps)
        }
        visible, inside = self.known.visible, self.known.inside
        if self.effect is not None and visible is not None:
            meant = claimed(own, self.effect)
            found["truth"] = lambda maps: agreement(maps, visible, meant)
        if inside is not None:
            found["pointing"] = lambda maps: pointing(maps, inside)
            found["energy"] = lambda maps: energy(maps, inside)
            found["overlap"] = lambda maps: overlap(maps, inside)
        return found

    def of_floor(self, own: Map, measure: str, floor: str, number: int, maps: Tensor, of: Measure) -> Tensor:
        if floor == "swapped":
            return of(maps)
        key = (measure, number, own.signed, own.coarse, own.grid)
        if key not in self.kept:
            self.kept[key] = of(maps)
        return self.kept[key]


def _against(score: Tensor, floors: dict[str, list[Tensor]]) -> Measured:
    """A score (N,) beside its floors, each the mean of some draws. It beats them where the 95 % interval of the
    difference, image by image, lies above 0, for each of them."""
    below = {name: torch.stack([each.double() for each in draws]).nanmean(0) for name, draws in floors.items()}
    beats = all(estimate(score.double() - values).low > 0 for values in below.values())
    return Measured(estimate(score), {name: estimate(values) for name, values in below.items()}, beats)
