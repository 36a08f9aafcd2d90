"""The whole check of a composed config, before data or a device is touched: first every part against its
signature, then every part made for a trial, the network on the meta device."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cnnlab.building.assemble import make_network, make_optimizer, make_pipeline, spec_for_task, task_class
from cnnlab.building.blame import Attempts, settings_of
from cnnlab.building.dry import headed, passes, penalized, steps
from cnnlab.building.stepping import halving_refused
from cnnlab.composing.composer import Composed, Composer, composer
from cnnlab.composing.experiment import DEFAULTS, SECTIONS, VALUES, Experiment, Node
from cnnlab.composing.groups import GROUPS
from cnnlab.composing.kinds import is_part, lacking, public_name, root_of
from cnnlab.composing.overrides import key_of
from cnnlab.composing.rates import with_number
from cnnlab.composing.signature import check_part, check_section, locate
from cnnlab.composing.trust import Trust
from cnnlab.composing.values import check_value
from cnnlab.errors import ConfigError, did_you_mean, short
from cnnlab.inspect import meta
from cnnlab.machine.device import place
from cnnlab.machine.surroundings import torchrun
from cnnlab.optim.traits import Traits
from cnnlab.protocols import DataSpec, Intervention
from cnnlab.schema import DataPath, Decoder, Device, DropoutKind, Loading, OnNonFinite

MAX_NAME = 255
"""Bytes of a file's name that the usual file systems take."""
MAX_PATH = 2000
"""Bytes of an experiment's name: with the folders around it, a path has 4,096."""


def compose(
    overrides: Sequence[str] = (), config_dirs: Sequence[str | Path] = (), trusted: Sequence[str] = ()
) -> Experiment:
    """The checked experiment that `cnnlab train OVERRIDES...` would run.

    Args:
        config_dirs: as `--config-dir`.
        trusted: as `--trust`.

    Raises:
        ConfigError: with everything that is wrong with it.
        DataError: the config is sound, and its data is not there.
    """
    with composer(config_dirs, trusted=trusted) as open_composer:
        return checked(open_composer, overrides)


def checked(composer: Composer, overrides: Sequence[str], number: int | None = None) -> Experiment:
    """Composes and checks one experiment, or cell `number` of a sweep, and reports what is wrong all at once.

    Raises:
        ConfigError: with every problem.
        DataError: the config is sound, and its data is not there.
    """
    draft = composer.draft(overrides, number)
    problems = [*draft.problems, *(static_problems(draft.composed) if draft.composed is not None else [])]
    if problems:
        raise ConfigError(problems)
    assert draft.composed is not None
    return _tried(Experiment.of(draft.composed))


def check(composed: Composed) -> Experiment:
    """The experiment, checked.

    Raises `ConfigError` with every problem, else `DataError` where the data is not there.
    """
    return _tried(read(composed))


def read(composed: Composed) -> Experiment:
    """The experiment of a run that was checked when it began, to be looked at again: its parts are not made for a
    trial, and its data may be gone. Raises `ConfigError` with every problem that names, signatures and values tell."""
    if problems := static_problems(composed):
        raise ConfigError(problems)
    return Experiment.of(composed)


def _tried(experiment: Experiment) -> Experiment:
    """Makes every part of an experiment whose values are sound. Raises what `check` does."""
    trial = _Trial(experiment, [key_of(text) for text in experiment.overrides])
    trial.run()
    if trial.problems:
        raise ConfigError(trial.problems)
    if trial.data_error is not None:
        raise trial.data_error
    return experiment


def static_problems(composed: Composed) -> list[str]:
    """Every problem that names, signatures and values tell; nothing is called, so nothing that a config names runs."""
    typed = {key_of(text): text.partition("=")[2] for text in composed.overrides}
    return [_as_typed(problem, typed) for found in _static(composed.config, composed.trust) for problem in found]


def _as_typed(problem: str, typed: Mapping[str, str]) -> str:
    """The problem with the text to quote as it was typed: of `name=1e3`, the value is 1000.0."""

    def quoted(match: re.Match[str]) -> str:
        text = typed.get(match[1], "")
        return f"'{match[1]}=\"{text}\"'" if text and not set(text) & set("'\"\\") else match[0]

    return re.sub(r"'([\w.]+)=\"[^\"']*\"'", quoted, problem)


def _static(config: Mapping[str, Any], trust: Trust) -> Iterator[list[str]]:
    for name, section in SECTIONS.items():
        yield check_section(section, config.get(name), name)
    for name, hint in VALUES.items():
        empty = [f"`{name}=`: expected a text that is not empty"] if config.get(name) == "" else []
        yield empty or check_value(config.get(name, DEFAULTS.get(name)), hint, name)
    if isinstance(config.get("name"), str):
        yield _check_name(config["name"])
    for name, group in GROUPS.items():
        yield (_check_mapping if group.named else _check_group)(
            name, config.get(name, {} if group.later else None), trust
        )
    known = [*SECTIONS, *VALUES, *GROUPS]
    for key in config:
        if key not in known and not key.startswith("_"):
            hint = did_you_mean(key, known) or "; a name of your own, for interpolations, starts with _"
            yield [f"`{key}`: nothing reads this key{hint}"]


def _check_name(name: str) -> list[str]:
    """The problem of an experiment's name, which is a folder of `paths.outputs`."""
    parts = name.split("/")
    reason = None
    if (parts[0] == "" and name) or ".." in parts or "." in parts:
        reason = "expected a folder inside paths.outputs, without `..`; for another place, type paths.outputs=FOLDER"
    elif not name.isprintable():
        reason = "expected printable characters"
    elif (longest := max(len(os.fsencode(part)) for part in parts)) > MAX_NAME:
        reason = f"expected at most {MAX_NAME} bytes between two `/`, received {longest}; type a shorter one"
    elif len(os.fsencode(name)) > MAX_PATH:
        reason = f"expected at most {MAX_PATH} bytes, received {len(os.fsencode(name))}; type a shorter one"
    return [] if reason is None else [f"`name={short(name)}`: {reason}"]


def _check_group(name: str, node: Any, trust: Trust) -> list[str]:
    group = GROUPS[name]
    if group.later and not node:
        return []
    node = with_number(node) if name == "optim" else node
    if node is None or (is_part(node) and node["_target_"] is None):
        optional = node is not None and group.optional
        return [] if optional else [f"`{name}`: expected a part, received none; type {name}=OPTION"]
    if group.factory and is_part(node) and node.get("_partial_") is not True:
        return [f"`{name}`: expected `_partial_: true` in its YAML; the network makes a new one at each place"]
    return check_part(node, name, _wired(name, node, trust), group.kinds, trust)


def _check_mapping(name: str, node: Any, trust: Trust) -> list[str]:
    if not isinstance(node, Mapping) or is_part(node):
        return [f"`{name}`: expected parts by name, as in `{{my_part: {{_target_: package.module.Name}}}}`"]
    kinds = GROUPS[name].kinds
    return [found for own, part in node.items() for found in check_part(part, f"{name}.{own}", (), kinds, trust)]


def _wired(name: str, node: Any, trust: Trust) -> tuple[str, ...]:
    if name != "optim" or not is_part(node) or trust.refuses_name(str(node["_target_"])):
        return GROUPS[name].wired
    try:
        return tuple(list(inspect.signature(locate(str(node["_target_"]))).parameters)[:1])
    except (ValueError, TypeError):
        return ()


class _Trial(Attempts):
    """Makes each part, once the values of all are sound."""

    def run(self) -> None:
        for group in ("schedule", "init", "normalize"):
            self.attempt(group, lambda: self.part(group, self.experiment.node(group)), group)  # noqa: B023 (called at once)
        for group in (name for name in GROUPS if GROUPS[name].named and self.sound(name)):
            for name, node in self.experiment.nodes(group).items():
                self.attempt(node.where, lambda: self.part(group, self.experiment.nodes(group)[name]), group)  # noqa: B023
        self.attempt("finetune", lambda: self.part("finetune", self.experiment.node("finetune")), "finetune")
        network = self.experiment.node("model").get("name")
        self.attempt(
            "weights", lambda: self.part("weights", self.experiment.node("weights"), model_name=network), "weights"
        )
        optimizer = self.attempt("optim", self.dry_optimizer, "optim")
        self.placement()
        spec = self.spec()
        if spec is not None:
            self.together(spec, optimizer is not None)

    # ---- each part by itself ----

    def part(self, group: str, node: Node, **wired: Any) -> Any:
        """The part, which has what its group asks for."""
        made = node.make(**wired)
        if made is not None and (problem := lacking(made, GROUPS[group].kinds)):
            raise ValueError(f"{node.name} {problem}")
        return made

    def spec(self) -> DataSpec | None:
        loading = self.loading()
        data = self.attempt("data", lambda: self.part("data", self.experiment.node("data"), loading=loading), "data")
        return None if data is None else self.attempt("data", data.spec, "data")

    def loading(self) -> Loading | None:
        """The section, once it is one that this data set can follow."""
        if not self.sound("loading", "data"):
            return None
        loading, node = self.experiment.loading, self.experiment.node("data")
        if loading.path is DataPath.stream and not getattr(node.target, "streams", node.takes("loading")):
            self.refuse(
                f"`loading.path=stream`: {node.target.__name__} decodes its images once; type loading.path=auto",
                "loading",
            )
        device = self.experiment.trainer.device
        if loading.decode is Decoder.cuda and device not in (Device.auto, Device.cuda):
            self.refuse(
                f"`loading.decode=cuda`: this run is on trainer.device={device.value}; type loading.decode=auto",
                "loading",
            )
        return loading

    def dry_optimizer(self) -> torch.optim.Optimizer:
        node = self.experiment.node("optim")
        first = node.first_parameter
        if first is None:
            raise ValueError("expected the parameters to train as its first parameter, received one that takes none")
        weight = nn.Parameter(torch.ones(2, 2))
        made = node.make(**{first: [weight]})
        if not isinstance(made, torch.optim.Optimizer):
            raise ValueError(f"expected a torch.optim.Optimizer, received {type(made).__name__}")
        said, is_there = Traits.of(node.target), Traits.of(type(made))
        if replace(said, weight_decay=is_there.weight_decay) != is_there:
            name = public_name(type(made))
            raise ValueError(f"this function makes a {name}, which is run in another way; annotate it with -> {name}")
        steps(made, weight)
        return made

    def placement(self) -> None:
        if not self.sound("trainer", "optim"):
            return
        trainer = self.experiment.trainer
        traits = Traits.of(self.experiment.node("optim").target)
        self.attempt("trainer", lambda: place(trainer, closure=traits.closure), "trainer")
        if trainer.accumulate > trainer.batch_size:
            self.refuse(
                f"`trainer.accumulate={trainer.accumulate}`: expected at most trainer.batch_size="
                f"{trainer.batch_size}, the samples that it cuts into micro-batches"
            )
        if trainer.on_nonfinite is OnNonFinite.rollback and not trainer.checkpoint:
            self.refuse(
                "`trainer.on_nonfinite=rollback`: with trainer.checkpoint=false there is nothing to go back to; type "
                "trainer.checkpoint=true, or trainer.on_nonfinite=skip"
            )
        if traits.create_graph and trainer.accumulate > 1:
            self.refuse(
                f"`trainer.accumulate={trainer.accumulate}`: this optimizer differentiates the loss twice, "
                "and needs the whole batch in one piece for it; type trainer.accumulate=1"
            )
        if refusal := halving_refused(trainer, traits, torchrun().world):
            self.refuse(refusal)
        if (traits.closure or traits.create_graph) and trainer.clip_norm is not None:
            self.refuse(
                f"`trainer.clip_norm={trainer.clip_norm:g}`: this optimizer searches along the loss's own slope, and "
                "takes no clipped gradients; type trainer.clip_norm=null"
            )
        if (traits.closure or traits.create_graph) and self.sound("intervention"):
            self.searched_gradients()

    def searched_gradients(self) -> None:
        """An optimizer that searches along the loss's own slope takes no other gradients."""
        for node in [
            *self.experiment.nodes("intervention").values(),
            *filter(None, [self.experiment.node("finetune")]),
        ]:
            if getattr(node.target, "gradients", None) is not Intervention.gradients:
                self.refuse(
                    f"`{node.where}`: this optimizer searches along the loss's own slope, and takes no changed "
                    f"gradients; type another optim, or {node.where.partition('.')[0]}=none",
                    node.where.partition(".")[0],
                )

    # ---- what only the parts together can tell: targets, sizes, heads, parameter names ----

    def together(self, whole: DataSpec, optimizer: bool) -> None:
        spec: DataSpec | None = self.attempt("task", lambda: spec_for_task(self.experiment, whole), "task")
        if spec is None:
            return
        self.attempt("augment", lambda: make_pipeline(self.experiment, spec), "augment", "normalize")
        loss = self.attempt("loss", lambda: self.loss(spec), "loss", "task")
        task = self.attempt(
            "task", lambda: self.part("task", self.experiment.node("task"), loss=loss, spec=spec), "task", "loss"
        )
        if task is not None and self.sound("model", "activation", "norm", "regularization", "head"):
            self.network(spec, task, optimizer)

    def loss(self, spec: DataSpec) -> Any:
        """Made for a training set with one of each class."""
        classes, node = len(task_class(self.experiment).class_names(spec)), self.experiment.node("loss")
        return self.part("loss", node, num_classes=classes, class_counts=torch.ones(classes))

    def network(self, spec: DataSpec, task: Any, optimizer: bool) -> None:
        self.unused_choices()
        among = ("activation", "norm", "regularization", "head")

        def network() -> nn.Module:
            return make_network(self.experiment, spec, task)

        model = self.attempt("model", lambda: meta.made(network), "model", among=among)
        if model is None:
            return
        if self.is_own("activation") or self.is_own("norm"):
            self.attempt("model", lambda: passes(meta.made_on_cpu(network), spec), "model", among=among)
        self.attempt("head", lambda: headed(model, spec), "head")
        self.attempt("penalty", lambda: penalized(self.experiment, model), "penalty")
        if self.sound("init"):

            def validated() -> None:
                getattr(self.experiment.node("init").make(), "validate", lambda _: None)(model)

            self.attempt("init", validated, "init")
        if optimizer and self.sound("groups", "finetune"):
            others = ("optim", "finetune")
            self.attempt("groups", lambda: make_optimizer(self.experiment, model), "groups", among=others)

    def is_own(self, group: str) -> bool:
        """Whether a group's part, or a value of it, is the user's choice, which its constructor may let pass."""
        node = self.experiment.node(group)
        chosen = any(key.startswith(f"{group}.") for key in self.typed)
        chosen = chosen or root_of(node.name) not in ("cnnlab", "torch")
        return bool(node) and (chosen or any(settings_of(self.experiment.config, [group])))

    def unused_choices(self) -> None:
        """A setting that silently had no effect would be the worst answer."""
        model, regularization = self.experiment.node("model"), self.experiment.regularization
        for name in ("dropout", "stochastic_depth"):
            if name == "dropout" and regularization.dropout_kind is DropoutKind.spatial:
                continue  # acts between the network's features and what reads them
            if getattr(regularization, name) is not None and not model.takes(name):
                has_none = f"{model.target.__name__} has none; type regularization.{name}=null"
                self.refuse(f"`regularization.{name}`: {has_none}")
        for group in (name for name in GROUPS if GROUPS[name].factory):
            if self.experiment.node(group) and not model.takes(group):
                self.refuse(f"`{group}`: {model.target.__name__} does not let its {group} be chosen; type {group}=auto")
