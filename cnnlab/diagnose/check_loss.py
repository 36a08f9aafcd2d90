"""Checks of the loss and of its gradients, before the first update."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cnnlab import measure, rng
from cnnlab.diagnose.check_findings import Finding, Subject, Verdict, named
from cnnlab.protocols import Batch, as_outputs
from cnnlab.torch_private import BatchNorm
from cnnlab.train.objective import Mode
from cnnlab.train.run import Run

LOSS_FACTOR = 3.0
"""Times the expected loss at initialization, from where on the logits are too large (CS231n: check the first loss)."""
DIRECTIONS = 3
LENGTHS = (1e-4, 1e-5, 1e-6, 1e-7)
"""Of the finite differences, relative to the weights: kinks of ReLUs ask for short ones, rounding for long ones."""
LATER = 3
"""Small steps until every parameter has to have had a gradient."""
NEARBY = 0.02
GRADIENT_ERROR = 1e-3
"""Relative. In float64 a right gradient is within 1e-6, but for the kinks between two points: with a thousand maps of
ReLUs up to 2e-4 were seen; a wrong backward pass is off by tenths."""


def initial_loss(subject: Subject) -> Finding:
    """The loss at initialization against that of a network which tells nothing apart (of C classes, ln C)."""
    found = float(_data_loss(subject))
    expected = _undecided(subject)
    if not math.isfinite(found):
        return Finding(
            "loss at the start",
            Verdict.bad,
            f"{found} before the first update",
            "the forward pass overflows: try init=he, a norm layer (norm=batch), or normalize=standardize",
        )
    if expected is None:
        return Finding("loss at the start", Verdict.unknown, f"{found:.4g}; this task states no expectation")
    told = f"{found:.4g}; a network that tells nothing apart has {expected:.4g}"
    prior = _of_frequencies(subject)
    if prior is not None and prior < 0.95 * expected:
        told += f", one that knows how frequent the classes are {prior:.4g}"
    if found > LOSS_FACTOR * max(expected, 1e-3):
        return Finding(
            "loss at the start",
            Verdict.bad if found > 3 * LOSS_FACTOR * expected else Verdict.watch,
            told,
            "the first outputs are too large: try init=he or init=lsuv, a norm layer, or normalize=standardize",
        )
    return Finding("loss at the start", Verdict.good, told)


def _data_loss(subject: Subject) -> Tensor:
    run = subject.run
    return replace(run.objective(subject.batch, mode=Mode.train), penalties=type(run.step.penalties)()).value()


def _undecided(subject: Subject) -> float | None:
    """The loss of outputs that are all the same (those of the loss's own prior, where it has one)."""
    run = subject.run
    with torch.no_grad(), rng.restored(run.device):
        outputs = run.forward.outputs(subject.batch["image"])
    if not outputs.keys() <= {"logits", "mask", "aux"}:
        return None
    bias = run.task.initial_bias()
    flat = {}
    for name, output in outputs.items():
        zeros = torch.zeros_like(output)
        flat[name] = zeros if bias is None else zeros + bias.to(output).view(1, -1, *[1] * (output.ndim - 2))
    with torch.no_grad():
        return float(run.task.loss(flat, subject.batch)["loss"].mean())


def _of_frequencies(subject: Subject) -> float | None:
    """The entropy (nats) of the training set's classes, where images have labels and the loss is measured alike."""
    run = subject.run
    labels = run.loaders["train"].split.labels
    if labels is None or run.task.needs != ("label",):
        return None
    shares = torch.bincount(labels).double()
    shares = shares[shares > 0] / shares.sum()
    return float(-(shares * shares.log()).sum())


def penalties(subject: Subject) -> Finding | None:
    """Every explicit penalty raises the loss."""
    run = subject.run
    if not run.step.penalties:
        return None
    with torch.no_grad():
        terms = {name: float(penalty(run.step.weights)) for name, penalty in run.step.penalties.named.items()}
    wrong = [name for name, value in terms.items() if not value > 0 or not math.isfinite(value)]
    told = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
    if wrong:
        return Finding(
            "penalties",
            Verdict.bad,
            told,
            f"{', '.join(wrong)} adds nothing to the loss; see its strength and its sign",
        )
    loss = float(_data_loss(subject))
    if sum(terms.values()) > 10 * max(loss, 1e-6):
        return Finding(
            "penalties",
            Verdict.watch,
            f"{told}, beside a data loss of {loss:.4g}",
            "the weights shrink first: smaller ones",
        )
    return Finding("penalties", Verdict.good, f"{told}, beside a data loss of {loss:.4g}")


def gradients_arrive(subject: Subject) -> Finding:
    """Every parameter that trains receives a gradient."""
    objective = replace(subject.objective, penalties=type(subject.run.step.penalties)())
    found = dict(zip(objective.names, objective.gradient(), strict=True))
    bad = [name for name, gradient in found.items() if not bool(gradient.isfinite().all())]
    silent = [name for name, gradient in found.items() if not bool(gradient.count_nonzero())]
    if bad:
        return Finding(
            "gradients arrive", Verdict.bad, f"not finite: {named(bad)}", "try trainer.precision=fp32, or init=he"
        )
    if standing := _unasked(subject.run):
        return Finding(
            "gradients arrive",
            Verdict.watch,
            f"{named(standing)} {'does' if len(standing) == 1 else 'do'} not train (requires_grad is false), though "
            "neither groups.freeze nor finetune says so",
            "see where the network switches it off; groups.freeze says it so that all can read it",
        )
    if len(silent) == len(found):
        return Finding(
            "gradients arrive", Verdict.bad, "no parameter has one", "the loss does not depend on the network"
        )
    late = _silent_later(objective, list(found.values())) if silent else set()
    lasting = [name for name in silent if name in late]
    if lasting:
        few = len(lasting) > len(found) // 2
        return Finding(
            "gradients arrive",
            Verdict.bad if few else Verdict.watch,
            f"none for {named(lasting)} of {len(found)} parameters, nor after {LATER} small steps",
            "units that are dead from the start (try init=he, activation=leaky_relu), or a part that nothing reads",
        )
    more = f"; {len(silent)} behind layers that begin at zero have theirs a step later" if silent else ""
    return Finding("gradients arrive", Verdict.good, f"for all {len(found)} parameters{more}")


def _unasked(run: Run) -> list[str]:
    """Parameters that stand still of their own."""
    if run.experiment.groups.freeze or run.experiment.node("finetune"):
        return []
    return [name for name, p in run.model.named_parameters() if not p.requires_grad]


def _silent_later(objective: Any, gradient: list[Tensor]) -> set[str]:
    """Names of the parameters that have no gradient after a few small steps down either: a scale that begins at zero
    (Goyal et al. 2017, 5.1) hides those before it for one step."""
    silent = set(objective.names)
    for _ in range(LATER):
        size = measure.total_norm([p.detach() for p in objective.parameters])
        steepness = measure.total_norm(gradient)
        objective = objective.moved(gradient, -0.01 * size.clamp_min(1.0) / steepness.clamp_min(1e-12))
        gradient = objective.gradient()
        silent &= {name for name, part in zip(objective.names, gradient) if not bool(part.count_nonzero())}
    return silent


def samples_stay_apart(subject: Subject) -> Finding | None:
    """A sample's loss depends on no other sample's image; batch norm's own mixing is told apart."""
    run = subject.run
    if len(subject.few["index"]) < 2:
        return None
    apart = _leak(run, subject.few, frozen=True)
    together = _leak(run, subject.few, frozen=False)
    mixing = any(isinstance(module, BatchNorm) for module in run.model.modules())
    if apart > 0:
        return Finding(
            "samples stay apart",
            Verdict.bad,
            f"the first sample's loss moves with the others' images (gradient {apart:.2g}), with norm layers frozen",
            "a layer of the network or the loss mixes the batch: see reshapes that take the batch's dimension along",
        )
    if together > 0 and not mixing:
        return Finding(
            "samples stay apart",
            Verdict.watch,
            f"they are mixed in training alone (gradient {together:.2g}), and not by batch norm",
            "see which layer differs between training and evaluation",
        )
    return Finding(
        "samples stay apart", Verdict.good, "but for batch norm's own moments" if together > 0 else "they do"
    )


def _leak(run: Run, batch: Batch, *, frozen: bool) -> float:
    """The largest gradient of the first sample's loss with respect to another one's image."""
    image = batch["image"].detach().clone().float().requires_grad_(True)
    with torch.enable_grad(), rng.restored(run.device):
        run.model.train()
        if frozen:
            run.model.eval()
        rng.reseed(run.device, run.experiment.seed, "dropout", 0)
        outputs = as_outputs(run.model(image.to(batch["image"].dtype)))
        outputs = {name: output.float() for name, output in outputs.items()}
        losses = run.task.loss(outputs, batch)["loss"]
        (slope,) = torch.autograd.grad(losses[0], image, materialize_grads=True)
    return float(slope[1:].abs().max())


def input_matters(subject: Subject) -> Finding:
    """The outputs depend on the image: they differ between images, and from those of an empty one."""
    run = subject.run
    image = subject.batch["image"]
    with torch.no_grad(), rng.restored(run.device):
        run.model.eval()
        outputs = run.forward.outputs(image)
        name, output = next(iter(outputs.items()))
        spread = float(output.std(0, unbiased=False).mean()) if len(image) > 1 else math.nan
        empty = run.forward.outputs(torch.zeros_like(image))[name]
    size = float(output.abs().mean())
    moved = float((output - empty).abs().mean())
    told = f"outputs of size {size:.3g} differ by {spread:.2g} between images and by {moved:.2g} from an empty one"
    floor = 1e-6 * max(size, 1e-6)
    if moved <= floor or spread <= floor:
        if not bool(output.count_nonzero()):
            return Finding(
                "the image matters", Verdict.good, "the classifier begins at zero: nothing is told apart yet"
            )
        return Finding(
            "the image matters",
            Verdict.bad,
            told,
            "the signal dies on its way: `cnnlab probe` names the layer; try init=he, or a norm layer",
        )
    return Finding("the image matters", Verdict.good, told)


def finite_differences(subject: Subject) -> Finding:
    """The gradient that training follows is that of the loss: along random directions, in float64."""
    run = subject.run
    objective = run.objective(subject.few, mode=Mode.frozen, dtype=torch.float64)
    size = float(measure.total_norm([p.double() for p in objective.parameters]))
    generator = torch.Generator().manual_seed(rng.derive(run.experiment.seed, "check") % 2**63)
    # Beside the weights themselves: where scales begin at zero, ReLUs stand on their kinks.
    nearby = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in objective.parameters]
    objective = objective.moved(measure.normalized([part.to(run.device) for part in nearby]), NEARBY * max(size, 1e-3))
    gradient = objective.gradient()
    worst = 0.0
    for _ in range(DIRECTIONS):
        random = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in objective.parameters]
        aside = measure.normalized([part.to(run.device) for part in random])
        # Half downhill, so that the slope stands out of what kinks between the two points add.
        direction = measure.normalized(measure.moved(measure.normalized(gradient), aside, 1.0))
        along = float(measure.dot(gradient, direction))
        errors = []
        for length in LENGTHS:
            step = length * max(size, 1e-3)
            difference = float(objective.moved(direction, step).value() - objective.moved(direction, -step).value())
            errors.append(abs(difference / (2 * step) - along) / max(abs(along), 1e-8 * max(size, 1.0)))
        worst = max(worst, min(errors))
    if worst > GRADIENT_ERROR:
        return Finding(
            "gradient against differences",
            Verdict.watch if worst < 100 * GRADIENT_ERROR else Verdict.bad,
            f"relative error {worst:.1e} along {DIRECTIONS} directions (float64)",
            "a part's backward pass is not that of its forward pass: see custom autograd functions, rounding, detach()",
        )
    return Finding("gradient against differences", Verdict.good, f"relative error {worst:.1e} (float64)")
