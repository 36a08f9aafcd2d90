"""The whole check of a composed config, before data or a device is touched: first every part against its
signature, then every part made for a trial, the network on the meta device."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from cnnlab.builder import make_network, make_optimizer, make_pipeline, make_task
from cnnlab.check import accepts, bind_section, check_part, check_section, is_part, locate
from cnnlab.config import Composed
from cnnlab.device import place
from cnnlab.errors import ConfigError, DataError, UsageError
from cnnlab.optim.traits import Traits
from cnnlab.parts import make
from cnnlab.protocols import DataSpec
from cnnlab.schema import Groups, Regularization, Stats, Trainer

SECTIONS = {"trainer": Trainer, "groups": Groups, "regularization": Regularization, "stats": Stats}

WIRED = {
    "task": ("loss", "spec"),
    "model": (
        "num_classes",
        "in_channels",
        "image_size",
        "activation",
        "norm",
        "dropout",
        "stochastic_depth",
    ),
    "loss": ("num_classes", "class_counts"),
}
"""Parameters that the builder passes by name to whichever part takes them."""

GROUPS = ("data", "task", "model", "activation", "norm", "init", "loss", "optim", "schedule", "normalize")
MAPPINGS = ("augment", "probe")
"""Groups whose node maps names to parts, in order."""


def check(composed: Composed) -> None:
    """Raises `ConfigError` with every problem, or `DataError` if the config is sound and its data is not there."""
    config = composed.config
    problems = [p for group in _groups(config) for p in group]
    broken = {p.split("`")[1].split(".")[0].split("=")[0] for p in problems if "`" in p}
    trial = _Trial(config, broken)
    problems += list(trial.problems())
    if problems:
        raise ConfigError(problems)
    if trial.data_error is not None:
        raise trial.data_error


def _groups(config: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, section in SECTIONS.items():
        yield check_section(section, config[name], name)
    if not isinstance(config["seed"], int) or isinstance(config["seed"], bool):
        yield [f"`seed={config['seed']}`: expected an integer"]
    for group in GROUPS:
        node = config[group]
        optional = is_part(node) and node["_target_"] is None
        if optional and group not in ("activation", "norm"):
            yield [f"`{group}`: expected a part, received none"]
        elif not optional:
            yield check_part(node, group, _wired(group, node))
    for group in MAPPINGS:
        for name, node in (config[group] or {}).items():
            yield check_part(node, f"{group}.{name}")


def _wired(group: str, node: Any) -> tuple[str, ...]:
    if group == "optim" and is_part(node):
        try:
            return tuple(list(inspect.signature(locate(str(node["_target_"]))).parameters)[:1])
        except (ValueError, TypeError):
            return ()
    return WIRED.get(group, ())


class _Trial:
    """Makes each part whose values are sound, and says what it refuses."""

    def __init__(self, config: Mapping[str, Any], broken: set[str]):
        self.config = config
        self.broken = broken
        self.data_error: DataError | None = None
        self._problems: list[str] = []

    def problems(self) -> list[str]:
        for group in ("schedule", "init", "normalize"):
            self.attempt(group, lambda g=group: make(self.config[g]), group)
        for group in MAPPINGS:
            for name, node in (self.config[group] or {}).items():
                self.attempt(f"{group}.{name}", lambda n=node: make(n), group)
        spec = self.spec()
        optimizer = self.sound("optim") and self.attempt("optim", self.dry_optimizer, "optim")
        self.placement()
        if spec is not None:
            self.together(spec, bool(optimizer))
        return self._problems

    def sound(self, *groups: str) -> bool:
        return not self.broken & set(groups)

    def attempt(self, where: str, action: Callable[[], Any], *groups: str) -> Any:
        """The action's result; `None` and a problem when a constructor refuses."""
        if not self.sound(*groups):
            return None
        try:
            return action()
        except DataError as error:
            self.data_error = error
        except Exception as error:  # a third party's constructor may raise anything; it is the user's value
            self.broken.update(groups[:1])
            text = " ".join(str(error).split())
            kind = "" if isinstance(error, ValueError | UsageError) else f"{type(error).__name__}: "
            self._problems.append(text if text.startswith("`") else f"`{where}`: {kind}{text}")
        return None

    def spec(self) -> DataSpec | None:
        data = self.attempt("data", lambda: make(self.config["data"]), "data")
        return None if data is None else self.attempt("data", data.spec, "data")

    def dry_optimizer(self) -> Any:
        node = self.config["optim"]
        target = locate(node["_target_"])
        first = next(iter(inspect.signature(target).parameters))
        return make(node, **{first: [nn.Parameter(torch.zeros(2, 2))]})

    def placement(self) -> None:
        if not self.sound("trainer", "optim"):
            return
        trainer: Trainer = bind_section(Trainer, self.config["trainer"])
        traits = Traits.of(locate(self.config["optim"]["_target_"]))
        self.attempt("trainer", lambda: place(trainer, closure=traits.closure), "trainer")
        if trainer.accumulate > trainer.batch_size:
            self._problems.append(
                f"`trainer.accumulate={trainer.accumulate}`: expected at most trainer.batch_size="
                f"{trainer.batch_size}, the samples that it cuts into micro-batches"
            )
        if traits.create_graph and trainer.accumulate > 1:
            self._problems.append(
                f"`trainer.accumulate={trainer.accumulate}`: this optimizer differentiates the loss twice, which "
                "needs the whole batch in one piece; type trainer.accumulate=1"
            )

    def together(self, spec: DataSpec, optimizer: bool) -> None:
        """What only the parts together can tell: targets, sizes, heads, parameter names."""
        self.attempt("augment", lambda: make_pipeline(self.config, spec, 0), "augment", "normalize")
        counts = torch.ones(spec.num_classes, dtype=torch.int64)
        task = self.attempt("loss", lambda: make_task(self.config, spec, counts), "task", "loss")
        if task is None:
            return
        missing = [target for target in task.needs if target not in spec.targets]
        if missing:
            has = ", ".join(sorted(spec.targets))
            self._problems.append(
                f"`task`: {type(task).__name__} needs {', '.join(missing)}, and this data has only {has}"
            )
            return
        if not self.sound("model", "activation", "norm", "regularization"):
            return
        regularization: Regularization = bind_section(Regularization, self.config["regularization"])
        self.unused_rates(regularization)
        with torch.device("meta"):
            model = self.attempt(
                "model", lambda: make_network(self.config, spec, task, regularization), "model", "activation", "norm"
            )
        if model is not None and optimizer and self.sound("groups"):
            groups: Groups = bind_section(Groups, self.config["groups"])
            self.attempt("groups", lambda: make_optimizer(self.config, model, groups), "groups")

    def unused_rates(self, regularization: Regularization) -> None:
        """A setting that silently had no effect would be the worst answer."""
        target = locate(self.config["model"]["_target_"])
        for name in ("dropout", "stochastic_depth"):
            if getattr(regularization, name) is not None and not accepts(target, name):
                self._problems.append(f"`regularization.{name}`: {target.__name__} has no {name}; type null")
        for group in ("activation", "norm"):
            if self.config[group].get("_target_") is not None and not accepts(target, group):
                self._problems.append(
                    f"`{group}`: {target.__name__} does not let its {group} be chosen; type {group}=auto"
                )


