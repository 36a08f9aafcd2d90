"""How far `cnnlab explain --trust` can itself be trusted, measured on networks with planted shortcuts.

    python scripts/trust_figures.py OUT                 # all that is missing in OUT; goes on where it was stopped
    python scripts/trust_figures.py OUT --only agreement cost
    python scripts/trust_figures.py OUT --tables        # what there is, as Markdown

Parts, each a JSON file a cell in OUT:

    reports     trains the networks (two architectures, three seeds, scenes with a planted shortcut), and of each, on
                test scenes: the trust report of every method, and for comparison the plain insertion and deletion
                (pixels, the mean image as infill)
    places      pointing game and IoU of Grad-CAM on networks without shortcut, beside random weights
    agreement   largest difference from Captum, and from pytorch-grad-cam where it is installed
    cost        seconds and memory of each method on ResNet-18 at 224 pixels (an own process each)

Measured: docs/benchmarks/explanations.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cnnlab
from cnnlab import rng
from cnnlab.building.evaluation import data_for
from cnnlab.building.known import batch_of, known_of
from cnnlab.errors import UsageError
from cnnlab.explain import METHODS, Score, Subject, cam, explain, gradients, score_of
from cnnlab.explain.layers import usual_layers
from cnnlab.explain.maps import over_image
from cnnlab.explain.methods import map_of, wanted
from cnnlab.explain.trust import report
from cnnlab.explain.trust.faithfulness import answers
from cnnlab.explain.trust.statistics import estimate, spearman
from cnnlab.losses import PerSample
from cnnlab.protocols import DataSpec
from cnnlab.runs.folder import RunDir, jsonable, write_atomically
from cnnlab.tasks import Task

PARTS = ("agreement", "reports", "places", "cost")
SCENES = (
    *("data=shapes", "data.size=32", "data.objects=2", "data.clutter=2", "data.noise=0.05"),
    *("data.train=2000", "data.val=200", "data.test=600"),
)
NETS = {
    "cnn": ("model=cnn", "model.widths=[16,32,64]", "norm=batch", "optim.lr=0.006"),
    "resnet": ("model=resnet", "model.width=8", "optim.lr=0.006"),
}
TRAINING = (
    *("augment=none", "optim=adam", "stats=light", "trainer.epochs=6", "trainer.batch_size=64"),
    *("trainer.threads=1", "trainer.device=cpu", "trainer.progress=false"),
)
SHORTCUTS = (0.8, 0.0)
"""In this part of the scenes the mark goes with the class; 0: it says nothing."""
SEEDS = (0, 1, 2)
IMAGES = 16
PLACED = ("data=shapes", "data.size=32", "data.objects=2", "data.clutter=2", "data.noise=0.05", "data.train=6000")
STEPS = 16
"""Of the plain insertion and deletion curves."""
ARCHITECTURES = {
    **{name: ("torchvision", name) for name in ("resnet18", "vgg11_bn", "densenet121", "googlenet")},
    **{name: ("torchvision", name) for name in ("mobilenet_v3_small",)},
    **{f"timm {name}": ("timm", name) for name in ("convnext_atto", "efficientnet_b0", "resnet18")},
}


# ---- networks ----


def cells() -> Iterator[tuple[str, float, int]]:
    for shortcut in SHORTCUTS:
        for net in NETS:
            for seed in SEEDS:
                yield net, shortcut, seed


def trained(folder: Path, overrides: Sequence[str]) -> Path:
    """The run in `folder`, trained if it is not yet."""
    run = RunDir(folder)
    if folder.exists() and run.read().get("status") == "completed":
        return folder
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.broken-{time.time_ns()}"))
    experiment = cnnlab.compose([*overrides, *TRAINING])
    run.create(experiment.config, experiment.overrides)
    cnnlab.fit(cnnlab.build(experiment, run))
    return folder


# ---- reports ----


def reports(out: Path) -> None:
    for net, shortcut, seed in cells():
        folder = out / "nets" / f"{net}-{shortcut}-{seed}"

        def measure(
            net: str = net, shortcut: float = shortcut, seed: int = seed, folder: Path = folder
        ) -> dict[str, Any]:
            overrides = [*NETS[net], *SCENES, f"data.shortcut={shortcut}", f"seed={seed}"]
            return reported(trained(folder, overrides))

        cell(out / "reports" / f"{folder.name}.json", measure)


def reported(folder: Path) -> dict[str, Any]:
    network = cnnlab.open(folder)
    data, subject = data_for(network), Subject(network.model, network.task, network.spec)
    batch = batch_of(network, "test", data, IMAGES)
    images = batch["image"]
    with subject.undisturbed(), torch.no_grad():
        score = score_of(subject, subject.outputs(images), "predicted")
    known = known_of(network, "test", data, batch, score)
    found = report(subject, images, score, list(METHODS), known=known)
    document = found.document()
    with subject.undisturbed():
        for each, row in zip(found.methods, document["methods"], strict=True):
            own = map_of(subject, images, score, each.method, each.layer)
            row["plain"] = {name: estimate(curve(subject, images, score, own.values)).mean for name, curve in PLAIN}
            assert known.visible is not None
            row["on_mark"] = share_on(own.values, known.visible[:, known.parts.index("mark")])
    document["accuracy"] = {"test": RunDir(folder).read()["metrics"].get("test/accuracy")}
    document["mark_first"] = mark_first(subject, images, score, known)
    return document


def mark_first(subject: Subject, images: Tensor, score: Score, known: Any) -> float:
    """In how many images the mark does more for the score than any other part."""
    from cnnlab.explain.trust.truth import effects

    with subject.undisturbed():
        effect = effects(subject, images, known.without, score)
    return (effect.argmax(1) == known.parts.index("mark")).double().mean().item()


def share_on(maps: Tensor, visible: Tensor) -> float:
    """How much stronger the map is on the part than on average: 1 for a map that does not know it."""
    above = maps.double().clamp_min(0)
    inside = (above * visible).sum((1, 2)) / visible.sum((1, 2)).clamp_min(1)
    return (inside / above.mean((1, 2)).clamp_min(1e-12)).nanmean().item()


def deletion(subject: Subject, images: Tensor, score: Score, maps: Tensor) -> Tensor:
    """(N,), higher is better: 1 less the area under the probability while pixels turn to the mean image, the most
    relevant first (Petsiuk et al. 2018, RISE)."""
    return 1 - area(subject, images, torch.zeros_like(images), score, maps)


def insertion(subject: Subject, images: Tensor, score: Score, maps: Tensor) -> Tensor:
    """(N,), higher is better: the area while they appear on the mean image."""
    return area(subject, torch.zeros_like(images), images, score, maps)


PLAIN: tuple[tuple[str, Callable[..., Tensor]], ...] = (("deletion", deletion), ("insertion", insertion))


def area(subject: Subject, start: Tensor, end: Tensor, score: Score, maps: Tensor) -> Tensor:
    order = maps.flatten(1).argsort(dim=1, descending=True)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    curve = []
    for step in range(STEPS + 1):
        changed = place < round(step / STEPS * order.shape[1])
        mixed = torch.where(changed.view(len(maps), 1, *maps.shape[1:]), end, start)
        curve.append(answers(subject, mixed, score))
    return torch.trapezoid(torch.stack(curve, 1), dx=1 / STEPS, dim=1)


# ---- where maps lie ----


def places(out: Path) -> None:
    for net in NETS:
        for seed in SEEDS:
            folder = out / "places-nets" / f"{net}-{seed}"
            trained(folder, [*NETS[net], *PLACED, "data.val=300", "data.test=600", f"seed={seed}", "trainer.epochs=16"])
            cell(out / "places" / f"{folder.name}.json", lambda folder=folder: placed(folder))


def placed(folder: Path) -> dict[str, Any]:
    from cnnlab.explain.trust.floors import centre
    from cnnlab.explain.trust.places import overlap, pointing
    from cnnlab.explain.trust.randomization import shuffled

    network = cnnlab.open(folder)
    data, subject = data_for(network), Subject(network.model, network.task, network.spec)
    batch = batch_of(network, "test", data, 200)
    images = batch["image"]
    with subject.undisturbed(), torch.no_grad():
        score = score_of(subject, subject.outputs(images), "true", truth=batch)
    inside = known_of(network, "test", data, batch, score).inside
    assert inside is not None

    def both(maps: Tensor) -> dict[str, float]:
        return {"pointing": estimate(pointing(maps, inside)).mean, "iou": estimate(overlap(maps, inside)).mean}

    found: dict[str, Any] = {"accuracy": RunDir(folder).read()["metrics"].get("test/accuracy")}
    found["centre"] = both(centre((images.shape[-2], images.shape[-1])).expand(len(images), -1, -1))
    with subject.undisturbed():
        for method, layer in wanted(subject, images, ["gradcam"]):
            own = both(map_of(subject, images, score, method, layer).values)
            with shuffled(subject, images[:1]):
                own["random weights"] = both(map_of(subject, images, score, method, layer).values)
            found[f"{method} {layer}"] = own
    return found


# ---- agreement ----


class _Logits(Task):
    def __init__(self, side: int) -> None:
        names = tuple(map(str, range(1000)))
        super().__init__(PerSample(1000), DataSpec(3, (side, side), names))


def network_of(library: str, name: str) -> nn.Module:
    torch.manual_seed(0)
    if library == "timm":
        import timm

        return timm.create_model(name, pretrained=False).eval()
    import torchvision

    extra = {"init_weights": True, "aux_logits": False} if name == "googlenet" else {}
    return getattr(torchvision.models, name)(weights=None, **extra).eval()


def subject_for(model: nn.Module, side: int) -> Subject:
    return Subject(model, _Logits(side), DataSpec(3, (side, side), tuple(map(str, range(1000)))))


def agreement(out: Path) -> None:
    for name, (library, own) in ARCHITECTURES.items():
        cell(
            out / "agreement" / f"{name.replace(' ', '-')}.json", lambda own=own, library=library: agreed(library, own)
        )


def agreed(library: str, name: str, side: int = 64) -> dict[str, Any]:
    """Largest difference by method, relative to the map's largest magnitude."""
    from captum import attr

    model = network_of(library, name)
    subject = subject_for(model, side)
    x = torch.randn(2, 3, side, side, generator=rng.generator(0, "figures"))
    number = torch.tensor([3, 7])
    score = Score("logits", number, ("3", "7"))
    plain = copy.deepcopy(model)
    found: dict[str, Any] = {}
    with subject.undisturbed():
        layer = usual_layers(subject, x[:1])[0]
        maps, slopes = cam.maps_and_gradients(subject, x, score, layer)
        ours = {"saliency": gradients.gradient(subject, x, score), "gradcam": cam.gradcam(maps, slopes)}
        ours["integrated_gradients"] = explain(subject, x, score, ["integrated_gradients"])[0].values
        try:
            ours["guided"] = gradients.guided(subject, x, score)
        except UsageError as error:
            found["guided"] = str(error)
    found["layer"] = layer
    module = dict(plain.named_modules())[layer]
    leaf = x.clone().requires_grad_()
    found["saliency"] = apart(ours["saliency"], attr.Saliency(plain).attribute(leaf, number, abs=False))
    theirs = attr.LayerGradCam(plain, module).attribute(x, number)[:, 0].detach()
    found["gradcam"] = apart(ours["gradcam"], theirs)
    theirs = attr.IntegratedGradients(plain).attribute(leaf, 0.0, number, n_steps=50).sum(1).detach()
    found["integrated_gradients"] = apart(ours["integrated_gradients"], theirs)
    if "guided" in ours:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                guided = attr.GuidedBackprop(copy.deepcopy(plain)).attribute(leaf, number)
                found["guided"] = apart(ours["guided"], guided.detach())
            except (RuntimeError, AssertionError) as error:
                found["guided"] = f"Captum: {str(error).splitlines()[0]}"
    found |= independent(plain, layer, x, number, score)
    return found


LOUD = 1e5


class Louder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)

    def forward(self, x: Tensor) -> Tensor:
        return LOUD * self.model(x)


def independent(model: nn.Module, layer: str, x: Tensor, number: Tensor, score: Score) -> dict[str, Any]:
    """Largest difference from pytorch-grad-cam, whose maps are cut off at 0, stretched to [0, 1] and enlarged.

    The logits are `LOUD` times as large: it adds 1e-6 to what Grad-CAM++ divides by, squares of gradients, which those
    of a network that is not trained are far below.
    """
    try:
        from pytorch_grad_cam import GradCAM, GradCAMPlusPlus
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError:
        return {}
    found = {}
    model = Louder(model)
    layer = f"model.{layer}"
    subject = subject_for(model, x.shape[-1])
    for name, kind, formula in (
        ("gradcam", GradCAM, cam.gradcam),
        ("gradcam++", GradCAMPlusPlus, cam.gradcam_plus_plus),
    ):
        own = copy.deepcopy(model)
        targets = [ClassifierOutputTarget(int(each)) for each in number]
        with kind(own, [dict(own.named_modules())[layer]]) as theirs:
            scaled = torch.from_numpy(theirs(input_tensor=x.clone(), targets=targets)).double()
        with subject.undisturbed():
            maps = formula(*cam.maps_and_gradients(subject, x, score, layer)).clamp_min(0)
        maps = _stretched(over_image(_stretched(maps), x.shape[-2:])).double()
        found[f"{name}, pytorch-grad-cam"] = (maps - scaled).abs().amax().item()
    return found


def _stretched(maps: Tensor) -> Tensor:
    """From the least value to the greatest, as pytorch-grad-cam shows maps."""
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (1e-7 + maps.amax((1, 2), keepdim=True))


def apart(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs.double()).abs().amax() / theirs.double().abs().amax()).item()


# ---- cost ----


def cost(out: Path) -> None:
    for method in METHODS:
        cell(out / "cost" / f"{method}.json", lambda method=method: apart_process(method))


def apart_process(method: str) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(spent, (method,))


def spent(method: str, count: int = 100) -> dict[str, Any]:
    """Seconds and peak memory for `count` images; of methods that take many passes from a part of them."""
    torch.set_num_threads(1)
    subject = subject_for(network_of("torchvision", "resnet18"), 224)
    measured = count if METHODS[method].passes < 10 else 4
    x = torch.randn(measured, 3, 224, 224, generator=rng.generator(0, "figures"))
    score = Score("logits", torch.zeros(measured, dtype=torch.int64), ("0",) * measured)
    before = peak()
    wall, processor = time.perf_counter(), time.process_time()
    explain(subject, x, score, [method])
    scale = count / measured
    return {
        "images_measured": measured,
        "seconds": (time.perf_counter() - wall) * scale,
        "cpu_seconds": (time.process_time() - processor) * scale,
        "mib_before": before,
        "mib_peak": peak(),
    }


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---- tables ----


def tables(out: Path) -> None:
    found = {part: {p.stem: json.loads(p.read_text()) for p in sorted((out / part).glob("*.json"))} for part in PARTS}
    rows = [(name, row) for name, document in found["reports"].items() for row in document["methods"]]
    print(f"{len(found['reports'])} networks, {len(rows)} maps\n")
    titles = list(dict.fromkeys(row["method"] for _, row in rows))
    print("| method | " + " | ".join(MEASURED) + " | plain deletion | plain insertion | on mark |")
    for title in titles:
        own = [row for _, row in rows if row["method"] == title]
        told = [
            f"{mean(own, name):.2f} / {floor(own, name):.2f}, {beats(own, name)} of {len(own)}" for name in MEASURED
        ]
        plain = [sum(row["plain"][name] for row in own) / len(own) for name, _ in PLAIN]
        mark = sum(row["on_mark"] for row in own) / len(own)
        print(f"| {title} | " + " | ".join(told) + f" | {plain[0]:.2f} | {plain[1]:.2f} | {mark:.1f} |")
    print()
    truth = torch.tensor([number(row["measures"]["truth"]["score"]) for _, row in rows])
    above = truth - torch.tensor([number(row["measures"]["truth"]["floor"]) for _, row in rows])
    columns = {
        name: [number(row["measures"][name]["score"]) for _, row in rows] for name in ("faithfulness", "randomization")
    }
    columns |= {f"plain {name}": [row["plain"][name] for _, row in rows] for name, _ in PLAIN}
    for name, values in columns.items():
        told = torch.tensor(values)
        print(f"{name}: rank correlation with truth {correlation(told, truth):.2f}, ", end="")
        print(f"with truth above its floor {correlation(told, above):.2f}")
    for name, document in found["reports"].items():
        effects = ", ".join(f"{part} {value:+.2f}" for part, value in document["effects"].items())
        about = f"test accuracy {document['accuracy']['test']:.3f}; mark first in {document['mark_first']:.0%}"
        print(f"{name}: {about}; {effects}")
    for part in ("agreement", "places", "cost"):
        print(f"\n{part}")
        for name, document in found[part].items():
            print(f"  {name}: {json.dumps(document)}")


MEASURED = ("randomization", "faithfulness", "truth", "pointing", "energy", "overlap")


def number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return estimate(torch.tensor([number(row["measures"][name]["score"]) for row in rows])).mean


def floor(rows: Sequence[dict[str, Any]], name: str) -> float:
    return estimate(torch.tensor([number(row["measures"][name]["floor"]) for row in rows])).mean


def beats(rows: Sequence[dict[str, Any]], name: str) -> int:
    return sum(row["measures"][name]["beats_floor"] for row in rows)


def correlation(left: Tensor, right: Tensor) -> float:
    return spearman(left[None], right[None]).item()


# ---- the way through ----


def cell(path: Path, measure: Callable[[], dict[str, Any]]) -> None:
    """Measures what is not there yet."""
    if not path.exists():
        began = time.process_time()
        document = measure()
        write_atomically(path, json.dumps(jsonable(document), indent=1).encode())
        said(f"{path.parent.name} {path.stem}: {time.process_time() - began:.0f} s of CPU")


def said(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tables", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.tables:
        for part in args.only:
            globals()[part](args.out)
    tables(args.out)


if __name__ == "__main__":
    main()
