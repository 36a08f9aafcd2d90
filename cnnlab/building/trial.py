"""The whole check of a composed config, before data or a device is touched: first every part against its
signature, then every part made for a trial, the network on the meta device."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from cnnlab.building.assemble import make_network, make_optimizer, make_pipeline, spec_for_task, task_class
from cnnlab.building.blame import Attempts, settings_of
from cnnlab.building.dry import headed, on_cpu, on_meta, passes, penalized, steps
from cnnlab.composing.composer import Composed, Composer
from cnnlab.composing.groups import GROUPS
from cnnlab.composing.kinds import is_part, lacking, public_name, root_of
from cnnlab.composing.make import make
from cnnlab.composing.overrides import key_of
from cnnlab.composing.signature import accepts, bind_section, check_part, check_section, locate
from cnnlab.composing.trust import Trust
from cnnlab.composing.values import check_value
from cnnlab.errors import ConfigError, did_you_mean, short
from cnnlab.machine.device import place
from cnnlab.optim.traits import Traits
from cnnlab.protocols import DataSpec, Intervention
from cnnlab.schema import DataPath, Decoder, DropoutKind, Groups, Loading, Regularization, Stats, Trainer


@dataclass(frozen=True)
class Paths:
    """Where runs are written."""

    outputs: str = "outputs"


SECTIONS = {
    "trainer": Trainer,
    "loading": Loading,
    "groups": Groups,
    "regularization": Regularization,
    "stats": Stats,
    "paths": Paths,
}
VALUES: dict[str, Any] = {"seed": int, "name": str, "resume": str | None}

MAX_NAME = 255
"""Bytes of a file's name that the usual file systems take."""
MAX_PATH = 2000
"""Bytes of an experiment's name: with the folders around it, a path has 4,096."""


def checked(composer: Composer, overrides: Sequence[str], number: int | None = None) -> Composed:
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
    _try(draft.composed)
    return draft.composed


def check(composed: Composed) -> None:
    """Raises `ConfigError` with every problem, else `DataError` where the data is not there."""
    if problems := static_problems(composed):
        raise ConfigError(problems)
    _try(composed)


def _try(composed: Composed) -> None:
    """Makes every part of a config whose values are sound. Raises what `check` does."""
    trial = _Trial(composed.config, [key_of(text) for text in composed.overrides])
    trial.run()
    if trial.problems:
        raise ConfigError(trial.problems)
    if trial.data_error is not None:
        raise trial.data_error


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
        yield empty or check_value(config.get(name), hint, name)
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

    def __init__(self, config: Mapping[str, Any], typed: Collection[str] = ()):
        super().__init__(config, SECTIONS, typed)

    def run(self) -> None:
        for group in ("schedule", "init", "normalize"):
            self.attempt(group, partial(self.own, group), group)
        for group in (name for name in GROUPS if GROUPS[name].named and self.sound(name)):
            for name in self.config.get(group, {}):
                self.attempt(f"{group}.{name}", partial(self.own, group, name), group)
        optimizer = self.attempt("optim", self.dry_optimizer, "optim")
        self.placement()
        spec = self.spec()
        if spec is not None:
            self.together(spec, optimizer is not None)

    # ---- each part by itself ----

    def own(self, group: str, name: str | None = None) -> Any:
        """The part of a group, or the one with a name in it."""
        node = self.config.get(group)
        return self.part(group, node if name is None or node is None else node[name])

    def part(self, group: str, node: Any, **wired: Any) -> Any:
        """The part, which has what its group asks for."""
        made = make(node, **wired)
        if made is not None and (problem := lacking(made, GROUPS[group].kinds)):
            raise ValueError(f"{node['_target_']} {problem}")
        return made

    def spec(self) -> DataSpec | None:
        loading = self.loading()
        data = self.attempt("data", lambda: self.part("data", self.config["data"], loading=loading), "data")
        return None if data is None else self.attempt("data", data.spec, "data")

    def loading(self) -> Loading | None:
        """The section, once it is one that this data set can follow."""
        if not self.sound("loading", "data"):
            return None
        loading: Loading = bind_section(Loading, self.config["loading"])
        target = locate(self.config["data"]["_target_"])
        if loading.path is DataPath.stream and not getattr(target, "streams", accepts(target, "loading")):
            self.refuse(
                f"`loading.path=stream`: {target.__name__} decodes its images once; type loading.path=auto", "loading"
            )
        device = self.config["trainer"].get("device") if self.sound("trainer") else None
        if loading.decode is Decoder.cuda and device not in ("auto", "cuda", None):
            self.refuse(
                f"`loading.decode=cuda`: this run is on trainer.device={device}; type loading.decode=auto", "loading"
            )
        return loading

    def dry_optimizer(self) -> torch.optim.Optimizer:
        node = self.config["optim"]
        first = next(iter(inspect.signature(locate(node["_target_"])).parameters), None)
        if first is None:
            raise ValueError("expected the parameters to train as its first parameter, received one that takes none")
        weight = nn.Parameter(torch.ones(2, 2))
        made = make(node, **{first: [weight]})
        if not isinstance(made, torch.optim.Optimizer):
            raise ValueError(f"expected a torch.optim.Optimizer, received {type(made).__name__}")
        said, is_there = Traits.of(locate(node["_target_"])), Traits.of(type(made))
        if replace(said, weight_decay=is_there.weight_decay) != is_there:
            name = public_name(type(made))
            raise ValueError(f"this function makes a {name}, which is run in another way; annotate it with -> {name}")
        steps(made, weight)
        return made

    def placement(self) -> None:
        if not self.sound("trainer", "optim"):
            return
        trainer: Trainer = bind_section(Trainer, self.config["trainer"])
        traits = Traits.of(locate(self.config["optim"]["_target_"]))
        self.attempt("trainer", lambda: place(trainer, closure=traits.closure), "trainer")
        if trainer.accumulate > trainer.batch_size:
            self.refuse(
                f"`trainer.accumulate={trainer.accumulate}`: expected at most trainer.batch_size="
                f"{trainer.batch_size}, the samples that it cuts into micro-batches"
            )
        if traits.create_graph and trainer.accumulate > 1:
            self.refuse(
                f"`trainer.accumulate={trainer.accumulate}`: this optimizer differentiates the loss twice, "
                "and needs the whole batch in one piece for it; type trainer.accumulate=1"
            )
        if (traits.closure or traits.create_graph) and trainer.clip_norm is not None:
            self.refuse(
                f"`trainer.clip_norm={trainer.clip_norm:g}`: this optimizer searches along the loss's own slope, and "
                "takes no clipped gradients; type trainer.clip_norm=null"
            )
        if (traits.closure or traits.create_graph) and self.sound("intervention"):
            self.searched_gradients()

    def searched_gradients(self) -> None:
        """An optimizer that searches along the loss's own slope takes no other gradients."""
        for name, node in self.config.get("intervention", {}).items():
            target = None if node is None else locate(node["_target_"])
            if target is not None and getattr(target, "gradients", None) is not Intervention.gradients:
                self.refuse(
                    f"`intervention.{name}`: this optimizer searches along the loss's own slope, and takes no changed "
                    "gradients; type another optim, or intervention=none",
                    "intervention",
                )

    # ---- what only the parts together can tell: targets, sizes, heads, parameter names ----

    def together(self, whole: DataSpec, optimizer: bool) -> None:
        spec: DataSpec | None = self.attempt("task", lambda: spec_for_task(self.config, whole), "task")
        if spec is None:
            return
        self.attempt("augment", lambda: make_pipeline(self.config, spec, 0), "augment", "normalize")
        loss = self.attempt("loss", lambda: self.loss(spec), "loss", "task")
        task = self.attempt(
            "task", lambda: self.part("task", self.config["task"], loss=loss, spec=spec), "task", "loss"
        )
        if task is not None and self.sound("model", "activation", "norm", "regularization", "head"):
            self.network(spec, task, optimizer)

    def loss(self, spec: DataSpec) -> Any:
        """Made for a training set with one of each class."""
        classes = len(task_class(self.config).class_names(spec))
        return self.part("loss", self.config["loss"], num_classes=classes, class_counts=torch.ones(classes))

    def network(self, spec: DataSpec, task: Any, optimizer: bool) -> None:
        self.unused_choices(bind_section(Regularization, self.config["regularization"]))
        among = ("activation", "norm", "regularization", "head")

        def network() -> nn.Module:
            return make_network(self.config, spec, task, bind_section(Regularization, self.config["regularization"]))

        model = self.attempt("model", lambda: on_meta(network), "model", among=among)
        if model is None:
            return
        if self.is_own("activation") or self.is_own("norm"):
            self.attempt("model", lambda: passes(on_cpu(network), spec), "model", among=among)
        self.attempt("head", lambda: headed(model, spec), "head")

        def penalties() -> None:
            penalized(self.config, model, bind_section(Regularization, self.config["regularization"]))

        self.attempt("penalty", penalties, "penalty")
        if self.sound("init"):
            self.attempt("init", lambda: getattr(make(self.config["init"]), "validate", lambda _: None)(model), "init")
        if optimizer and self.sound("groups"):

            def grouped() -> torch.optim.Optimizer:
                return make_optimizer(self.config, model, bind_section(Groups, self.config["groups"]))

            self.attempt("groups", grouped, "groups", among=("optim",))

    def is_own(self, group: str) -> bool:
        """Whether a group's part, or a value of it, is the user's choice, which its constructor may let pass."""
        node = self.config[group]
        target = str(node.get("_target_") or "")
        chosen = any(key.startswith(f"{group}.") for key in self.typed) or root_of(target) not in ("cnnlab", "torch")
        return bool(target) and (chosen or any(settings_of(self.config, [group], SECTIONS)))

    def unused_choices(self, regularization: Regularization) -> None:
        """A setting that silently had no effect would be the worst answer."""
        target = locate(self.config["model"]["_target_"])
        for name in ("dropout", "stochastic_depth"):
            if name == "dropout" and regularization.dropout_kind is DropoutKind.spatial:
                continue  # acts between the network's features and what reads them
            if getattr(regularization, name) is not None and not accepts(target, name):
                self.refuse(f"`regularization.{name}`: {target.__name__} has none; type regularization.{name}=null")
        for group in (name for name in GROUPS if GROUPS[name].factory):
            if self.config[group].get("_target_") is not None and not accepts(target, group):
                self.refuse(f"`{group}`: {target.__name__} does not let its {group} be chosen; type {group}=auto")
