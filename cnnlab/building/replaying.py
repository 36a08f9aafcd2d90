"""An update that was not finite, out of the file that its run has left, without its data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cnnlab.building.assemble import make_interventions, make_optimizer, make_penalties, placed
from cnnlab.building.opened import network_of
from cnnlab.building.reopen import stored_experiment
from cnnlab.composing.trust import TYPED, Trust
from cnnlab.errors import CheckpointError
from cnnlab.machine.device import place
from cnnlab.machine.ranks import Ranks
from cnnlab.machine.resolved import Resolved
from cnnlab.protocols import to_device
from cnnlab.runs import checkpoint
from cnnlab.runs.checkpoint import State
from cnnlab.schema import StepKind
from cnnlab.train.forward import Forward
from cnnlab.train.nonfinite import BUNDLE, BUNDLE_VERSION
from cnnlab.train.steps.eager import EagerStep
from cnnlab.train.steps.replay import Located, locate


@dataclass(frozen=True)
class Replayed:
    """`recorded` is what its run found, `found` what was found here; `step` counts from 1."""

    step: int
    samples: int
    device: str
    recorded: Located
    found: Located
    versions: dict[str, Any]
    """Of what the run computed with."""

    @property
    def again(self) -> bool:
        """Whether it is not finite here either."""
        return self.found.phase != "none"

    @property
    def same(self) -> bool:
        """Whether the same layer and the same samples are to blame."""
        one, other = self.recorded, self.found
        return (one.phase, one.layer, one.samples) == (other.phase, other.layer, other.samples)


def replay(path: Path, *, device: str | None = None, trust: Trust = TYPED) -> Replayed:
    """Runs the update of a bundle (`RUN/nonfinite/step-N.pt`) up to its gradients.

    Args:
        device: as `trainer.device`; `None` takes the kind that the run had.
        trust: what the command line vouches for: what a bundle names is looked at as what a run folder names.

    Raises:
        CheckpointError: the file is missing, damaged, or no such bundle.
        UsageError: it names code that nobody vouches for.
    """
    content = checkpoint.load(path)
    if content.get("kind") != BUNDLE:
        raise CheckpointError(f"{path}: expected an update that was not finite (RUN/nonfinite/step-N.pt)")
    if content.get("version") != BUNDLE_VERSION:
        raise CheckpointError(f"{path} is of another version of cnnlab ({content.get('version')!r})")
    try:
        return _replayed(path, content, device, trust)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is no bundle that a run has written: {error}") from error


def _replayed(path: Path, content: dict[str, Any], device: str | None, trust: Trust) -> Replayed:
    experiment = stored_experiment(
        content["config"],
        path,
        choices={},
        overrides=(),
        recorded=tuple(map(str, content["config_dirs"])),
        run_dir=path.parent,
        trust=trust,
    )
    values = {"trainer.step": StepKind.eager.value, **({} if device is None else {"trainer.device": device})}
    experiment = experiment.with_values(values)
    resolved = Resolved.of(content["origin"]["choices"]).eager()
    placement = place(resolved.applied(experiment.trainer), closure=False)
    spec, task, model = network_of(experiment, content["origin"], placement.device)
    interventions = make_interventions(experiment)
    interventions.attach(model, experiment.seed)
    parts = State()
    parts.register("model", model)
    for name, part in interventions.stateful().items():
        parts.register(name, part)
    parts.load_state_dict({"model": content["model"], **content["interventions"]}, path=path)
    model, _ = placed(model, placement, spec)
    optimizer = make_optimizer(experiment, model)  # which says what trains
    interventions.train(model, content["epoch"])
    scale = content["scale"]
    step = EagerStep(
        Forward(model, task, placement.device, placement.dtype),
        optimizer,
        [p for p in model.parameters() if p.requires_grad],
        seed=experiment.seed,
        ranks=Ranks(rank=content["rank"]),
        penalties=make_penalties(experiment),
        interventions=interventions,
        scaler=None if scale is None else torch.amp.GradScaler(placement.device.type, init_scale=scale),
        accumulate=content["accumulate"],
    )
    batch = to_device(content["batch"], placement.device)
    found = locate(step, batch, content["count"], content["number"])
    recorded = Located.of(content["located"])
    number, samples = content["number"] + 1, len(batch["index"])
    return Replayed(number, samples, str(placement.device), recorded, found, content["versions"])
