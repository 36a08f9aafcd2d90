"""From a checked experiment to a run: makes its parts and wires what must know of each other."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cnnlab import rng
from cnnlab.augment import Pipeline, fitted
from cnnlab.building.assemble import (
    class_counts,
    make_data,
    make_finetune,
    make_interventions,
    make_network,
    make_optimizer,
    make_penalties,
    make_pipeline,
    make_task,
    placed,
    spec_for_task,
)
from cnnlab.building.cached import Fed, Keeping
from cnnlab.building.facts import facts, unseen_classes, weighed_classes
from cnnlab.building.feeding import make_loaders
from cnnlab.building.pretrained import Transferred, trained_before, transfer
from cnnlab.building.stepping import StepMaker, halving_refused
from cnnlab.building.wiring import data_of, make_observer, wire
from cnnlab.composing.experiment import Experiment
from cnnlab.composing.idle import idle
from cnnlab.composing.rates import RULE, STEPS
from cnnlab.data.choice import loaded, with_decoder, without_stream
from cnnlab.data.found import Findings
from cnnlab.data.loader import Loader
from cnnlab.data.pixels import Recipe
from cnnlab.data.places import cache_folder, known_cache
from cnnlab.errors import CheckpointError, UsageError
from cnnlab.init.prior import start_from
from cnnlab.machine.device import Placement, place, prepare_cpu, set_deterministic
from cnnlab.machine.ranks import Ranks
from cnnlab.machine.resolved import Resolved
from cnnlab.models.half import NARROW
from cnnlab.observe.taps import Taps
from cnnlab.optim.traits import Traits, accelerated
from cnnlab.protocols import Data, DataSpec, Schedule, Split
from cnnlab.runs.folder import RunDir
from cnnlab.schema import FeatureSource, Loading, StepKind
from cnnlab.tasks import Task
from cnnlab.train.checkpointer import Checkpointer
from cnnlab.train.forward import Forward
from cnnlab.train.interventions import Interventions
from cnnlab.train.origin import Origin, chosen, is_chosen, load_own
from cnnlab.train.range_test import range_test
from cnnlab.train.run import Run
from cnnlab.train.selection import Selection
from cnnlab.train.steps.eager import EagerStep
from cnnlab.weights import Trained

_log = logging.getLogger(__name__)


def build(
    experiment: Experiment,
    folder: RunDir | None = None,
    *,
    ranks: Ranks | None = None,
    resumed: bool = False,
    resolved: Resolved | None = None,
) -> Run:
    """Makes the run of a checked experiment: loads the data, initializes the network, chooses the step.

    Args:
        resumed: the run goes on from `folder`'s last checkpoint, with what `auto` became there; without a folder,
            weights are about to be loaded, and what only prepares fresh ones is left out.
        resolved: what `auto` became, as the checkpoint says that they are loaded from.

    Raises:
        CheckpointError: there is none to go on from, or it is damaged or another run's.
        DataError: the data is missing or unusable.
        TypeError: for what was not checked.
        UsageError: the parts do not go together on this machine.
    """
    if not isinstance(experiment, Experiment):
        raise TypeError(
            f"expected a checked experiment, as cnnlab.compose([...]) gives it, received {type(experiment).__name__}"
        )
    ranks = ranks or Ranks()
    state = best = None
    if resumed and folder is not None:
        last, best = _checkpoints(folder, experiment.config) if ranks.is_main else (None, None)
        state = ranks.share(last)
        resolved = None if state is None else Resolved.of(state["origin"]["choices"])
    run = _Builder(experiment, folder, ranks, resumed, resolved or Resolved()).run()
    if best is not None:  # now, and not after the training that ends with its evaluation
        run.checkpointer.require(run, best)
    if state is not None:
        run.restore(state)
    return run


def _checkpoints(folder: RunDir, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The last checkpoint, and the best one, where the run is to end with it.

    Raises `CheckpointError` where one is missing, damaged, another run's, or of another evaluation.
    """
    if not folder.last.exists():
        raise CheckpointError(
            f"{folder.path} has no checkpoint to go on from (it ended before the first one, or ran with "
            f"trainer.checkpoint=false); start it again without resume=: {folder.begin_again()}"
        )
    state = load_own(folder, "last", config)
    best = load_own(folder, "best", config) if folder.best.exists() else None
    if best is not None and best["clock"]["step"] > state["clock"]["step"]:
        return state, None  # of a version that wrote the best one first: this run will come to it
    if best is not None and is_chosen(best, state["selection"]):
        return state, best
    return state, chosen(folder, config, state["selection"], state, best)


class _Builder:
    def __init__(
        self,
        experiment: Experiment,
        folder: RunDir | None,
        ranks: Ranks,
        resumed: bool,
        resolved: Resolved,
    ):
        self.experiment = experiment
        self.folder = folder
        self.ranks = ranks
        self.resumed = resumed
        self.seed = experiment.seed
        self.resolved = resolved
        self.trainer = resolved.applied(experiment.trainer)
        self.loading = experiment.loading
        self.traits = Traits.of(experiment.node("optim").target)
        self.stated = experiment.trainer.accumulate
        self.origin: Origin | None = None
        self.notices = idle(experiment)
        self.findings = Findings()
        self.rate: float | None = None
        """The base rate, where it was found and not typed."""
        self.recipe: Recipe | None = None
        self.counts: Tensor | None = None
        self.transferred: Transferred | None = None
        finetune = make_finetune(experiment)
        self.views = None if finetune is None else finetune.views
        self.features: FeatureSource | None = None
        """What became of `finetune.cache`."""

    def run(self) -> Run:
        placement = self.place()
        data = self.experiment.node("data").make()
        spec = spec_for_task(self.experiment, data.spec())
        self.recipe = getattr(data, "seen", None)
        trained = None if self.resumed else self.ranks.in_turn(lambda: trained_before(self.experiment))
        pipeline, splits = self.data(spec, placement)
        task = self.task(spec, splits["train"], placement)
        model, init = self.network(spec, task, placement)
        loaders, notices = make_loaders(
            splits, pipeline, task, model, self.trainer, self.loading, placement, self.ranks, self.seed, self.views
        )
        self.notices += notices
        train = loaders["train"]
        self.calibrate(model, init, train)
        self.start_from(trained, model, task, spec)
        self.ranks.share_([*model.parameters(), *model.buffers()])
        total_steps = self.total_steps(train)
        optimizer = self.optimizer(model, placement)
        interventions = make_interventions(self.experiment)
        interventions.attach(model, self.seed)
        forward = Forward(model, task, placement.device, placement.dtype)
        fed = self.fed(forward, loaders, interventions, pipeline, placement)
        schedule = self.schedule(train.steps, total_steps)
        observer = make_observer(self.experiment, model, placement, self.ranks, total_steps, fed.only)
        maker = self.maker(fed.forward, optimizer, interventions, placement, fed.loaders["train"])
        step, placement = self.step(maker, total_steps, observer.taps)
        run = Run(
            experiment=self.experiment,
            trainer=self.trainer,
            folder=self.folder,
            model=model,
            task=task,
            spec=spec,
            forward=maker.evaluator(),
            step=step,
            optimizer=optimizer,
            schedule=schedule,
            loaders=fed.loaders,
            observer=observer,
            device=placement.device,
            precision=placement.precision,
            ranks=self.ranks,
            selection=Selection(*task.monitor),
            total_steps=total_steps,
            interventions=interventions,
            nonfinite=maker.nonfinite,
            patience=self.experiment.regularization.patience,
            checkpointer=Checkpointer(enabled=self.trainer.checkpoint, minutes=self.trainer.checkpoint_minutes),
            resumed=self.resumed,
            left_out=self.findings.left_out,
            files=self.findings.files,
            weights=None if self.transferred is None else self.transferred.as_record(),
        )
        self.find_rate(run)
        wire(run, pipeline, self.became(run, placement), data_of(run, self.counts, self.recipe))
        self.origin = run.origin
        run.facts = facts(run, placement, pipeline, self.traits)
        self.notices += observer.drop_unsupported(run)
        run.notices = [*placement.notices, *self.notices]
        return run

    # ---- the parts, each with what it must know ----

    def place(self) -> Placement:
        if self.trainer.threads is not None:
            torch.set_num_threads(self.trainer.threads)
        set_deterministic(self.trainer.deterministic)
        placement = place(
            self.trainer,
            closure=self.traits.closure,
            local_rank=self.ranks.local_rank,
            world=self.ranks.world,
        )
        if placement.device.type == "cpu":
            prepare_cpu()
        if self.traits.create_graph and self.ranks.world > 1:
            raise UsageError(
                "this optimizer differentiates the loss twice, which needs the whole batch in one piece; run it on "
                "one process"
            )
        if refusal := halving_refused(self.trainer, self.traits, self.ranks.world):
            raise UsageError(refusal)
        return placement

    def find_rate(self, run: Run) -> None:
        """Takes the base rate that was recorded, or finds it by a range test, where the config leaves it open.

        Raises `UsageError` where the test suggests none.
        """
        if not self.experiment.finds_rate:
            return
        recorded = self.resolved.lr
        if recorded is None and not self.resumed:
            _log.warning("rate: optim.lr=auto, so a range test of up to %s updates runs first", STEPS)
            run.curve = range_test(run)
            recorded = float(self.ranks.share(run.curve.suggestion()))
            self.notices.append(
                f"rate: optim.lr={recorded:.3g}, by the rule `{RULE}` of a range test of {len(run.curve.losses)} "
                "updates"
            )
        if recorded is not None:  # what is only evaluated has no need of one
            self.rate = recorded
            for group in run.optimizer.param_groups:
                group["base_lr"] = recorded
            run.last_lr = run.lr()

    def fed(
        self,
        forward: Forward,
        loaders: dict[str, Loader],
        interventions: Interventions,
        pipeline: Pipeline,
        placement: Placement,
    ) -> Fed:
        """What the run is fed with: images, or a frozen backbone's features where these are kept."""
        kept = Keeping(
            self.experiment, forward, loaders, interventions, pipeline, placement, self.ranks, self.trainer.epochs,
            self.fitting(), self.resumed, self.resolved.features,
        )  # fmt: skip
        found = kept.settle()
        self.features = found.source
        self.notices += [] if found.notice is None else [found.notice]
        return found

    def data(self, spec: DataSpec, placement: Placement) -> tuple[Pipeline, dict[str, Split]]:
        """The splits, and the pipeline with what it learns of them."""
        pipeline = make_pipeline(self.experiment, spec)
        splits = self.splits(placement, pipeline)
        # In turn: the others find in the cache what took rank 0 long.
        settings, made = self.fitting(), partial(cache_folder, None)
        self.ranks.in_turn(lambda: fitted.fit(pipeline, splits["train"], settings, known_cache(), made=made))
        return pipeline, splits

    def task(self, spec: DataSpec, train: Split, placement: Placement) -> Task:
        """What is learned, with what its loss must know of the training set."""
        self.counts = class_counts(self.experiment, spec, train)
        task = make_task(self.experiment, spec, self.counts)
        task.to(placement.device)
        names, counted = task.class_names(spec), task.class_counts(spec, train.labels)
        self.notices += unseen_classes(names, counted)
        if self.counts is not None and counted is None:
            self.notices += weighed_classes(names, self.counts, len(train))
        return task

    def fitting(self) -> dict[str, dict[str, Any]]:
        """The settings of the parts that look at the training set, as `fitted.fit` knows them."""
        nodes = [*self.experiment.nodes("augment").values(), self.experiment.node("normalize")]
        return {node.where: dict(node.config or {}) for node in nodes}

    def splits(self, placement: Placement, pipeline: Pipeline) -> dict[str, Split]:
        """The data, stored as the augmentation needs it, and how its files are decoded."""

        def data(loading: Loading) -> Data:
            return make_data(self.experiment, pipeline, loading)

        splits, self.findings = loaded(data, self.loading, self.ranks, self.resolved.data_path)
        self.notices += [*self.findings.notices, *without_stream(self.loading, splits["train"])]
        chosen = with_decoder(self.loading, splits["train"], placement.device, self.resolved.decode)
        self.loading = self.ranks.share(chosen)
        return splits

    def network(self, spec: DataSpec, task: Task, placement: Placement) -> tuple[nn.Module, Any]:
        """The network with its initial weights, and what gave it them."""
        with rng.seeded(self.seed, "init", "construction"):
            model = make_network(self.experiment, spec, task)
        init = self.experiment.node("init").make()
        init(model, self.seed)
        self.notices += init.notices(model) if hasattr(init, "notices") else []
        self.start_from_prior(model, task, spec)
        if self.trainer.sync_batch_norm and self.ranks.world > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model, narrow = placed(model, placement, spec)
        if narrow:
            self.notices.append(f"precision: fp32 in {', '.join(narrow)}, which {NARROW}")
        return model, init

    def calibrate(self, model: nn.Module, init: Any, train: Loader) -> None:
        """Lets an init that looks at data (LSUV) see the first batch, whole."""
        if getattr(init, "needs_batch", False) and not self.resumed:
            batch, _ = train.alone().first()
            init.calibrate(model, batch["image"])

    def start_from(self, trained: Trained | None, model: nn.Module, task: Task, spec: DataSpec) -> None:
        """Puts weights that were trained before in the place of fresh ones."""
        if trained is not None:
            shape = (spec.channels, *spec.size)
            self.transferred = transfer(self.experiment, model, trained, task.class_names(spec), shape)
            self.notices += self.transferred.lines()
            if trained.normalized and not self.experiment.node("normalize").name.endswith(".Pretrained"):
                self.notices.append("weights: they were trained on images normalized by normalize=pretrained")
        elif self.experiment.node("finetune") and not self.resumed:
            self.notices.append("finetune: of weights that are as init made them, since weights=none")

    def start_from_prior(self, model: nn.Module, task: Task, spec: DataSpec) -> None:
        """Sets the classifiers' biases to what the loss wants to start from (focal loss: its prior)."""
        bias = task.initial_bias()
        if bias is not None and not start_from(model, bias, (spec.channels, *spec.size)):
            self.notices.append("loss: this network's logits do not end with a bias, so the loss's prior has no effect")

    def optimizer(self, model: nn.Module, placement: Placement) -> torch.optim.Optimizer:
        node = self.experiment.node("optim")
        captured = placement.step is StepKind.captured
        fast = accelerated(node.target, node.settings, placement.device, captured=captured)
        return make_optimizer(self.experiment, model, **fast)

    def schedule(self, steps_per_epoch: int, total_steps: int) -> Schedule:
        schedule: Schedule = self.experiment.node("schedule").make()
        schedule.resolve(steps_per_epoch, total_steps, self.trainer.batch_size)
        self.notices += schedule.notices(total_steps)
        return schedule

    def total_steps(self, train: Loader) -> int:
        whole = self.trainer.epochs * train.steps
        return whole if self.trainer.max_steps is None else min(whole, self.trainer.max_steps)

    def maker(
        self,
        forward: Forward,
        optimizer: torch.optim.Optimizer,
        interventions: Interventions,
        placement: Placement,
        train: Loader,
    ) -> StepMaker:
        return StepMaker(
            forward,
            optimizer,
            self.traits,
            placement,
            self.trainer,
            make_penalties(self.experiment),
            interventions,
            self.ranks,
            self.seed,
            train,
        )

    def step(self, maker: StepMaker, total_steps: int, taps: Taps | None) -> tuple[EagerStep, Placement]:
        """The step, and where it runs, with the kind that was settled on: a resumed run takes it unasked."""
        step, notice = maker.settle(total_steps, taps, self.cut)
        self.notices += [] if notice is None else [notice]
        if self.trainer.step is StepKind.auto and step.name in StepKind.__members__:
            return step, replace(maker.placement, step=StepKind(step.name))
        return step, maker.placement

    def cut(self, accumulate: int, words: str) -> None:
        """Out of memory has doubled the micro-batches: told, and recorded for whoever goes on."""
        _log.warning("out of memory: trainer.accumulate=%d from here on%s", accumulate, words)
        if self.origin is not None:
            self.origin.resolved = replace(self.origin.resolved, accumulate=accumulate)
        if self.folder is not None:
            self.folder.update(accumulate=accumulate)

    def became(self, run: Run, placement: Placement) -> Resolved:
        """What a resumed run takes up unasked."""
        return Resolved.placed(
            placement,
            data_path=run.loaders["train"].path,
            decode=self.loading.decode,
            accumulate=None if run.step.accumulate == self.stated else run.step.accumulate,
            lr=self.rate,
            features=self.features,
        )
