"""What the verbs' command lines share: Hydra's flags, the overrides, and errors as one message."""

from __future__ import annotations

import argparse
import io
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from cnnlab.composing.composer import CONFIG_NAME, Composer
from cnnlab.composing.experiment import Experiment
from cnnlab.composing.hydra_private import get_args_parser
from cnnlab.errors import UsageError, did_you_mean
from cnnlab.schema import Device
from cnnlab.terminal import one_line, say
from cnnlab.verbs.words import explain


def is_run_folder(text: str) -> bool:
    """Whether an argument is a run folder's path and no override: it has no `=` (nor takes anything away), or is the
    path of a folder in whose name one occurs, as sweeps over `lr=0.1` make them."""
    if "=" not in text:
        return not text.startswith("~")
    return "/" in text.partition("=")[0] and os.path.isdir(os.path.join(text, ".hydra"))  # noqa: PTH112, PTH118


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UsageError`, and shows its examples as they are typed."""

    def __init__(self, verb: str, description: str, examples: str = "", **settings: Any):
        super().__init__(
            prog=f"cnnlab {verb}",
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **settings,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help shows examples")

    def parse_all(self, arguments: Sequence[str]) -> argparse.Namespace:
        """`parse_intermixed_args`, with a hint at the flag that was meant."""
        parsed, unknown = self.parse_known_intermixed_args(list(arguments))
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            name = unknown[0].partition("=")[0]
            self.error(f"no flag {name!r}{did_you_mean(name, flags)}")
        return parsed


@dataclass
class Arguments:
    """A verb's arguments: overrides, the user's config folders, `--json`, and Hydra's flags."""

    overrides: list[str]
    config_dirs: list[str] = field(default_factory=list)
    trust: list[str] = field(default_factory=list)
    config_name: str = CONFIG_NAME
    multirun: bool = False
    help: bool = False
    json: bool = False
    cfg: str | None = None
    package: str | None = None
    resolve: bool = False
    info: str | None = None
    hydra_help: bool = False
    own: argparse.Namespace = field(default_factory=argparse.Namespace)
    """Values of the flags that the verb itself added."""
    raw: list[str] = field(default_factory=list)

    @property
    def show(self) -> bool:
        """Whether the answer is Hydra's: `--cfg`, `--info`, `--hydra-help`."""
        return self.cfg is not None or self.info is not None or self.hydra_help


def opening_options(parser: Parser, *, device: bool = True, trust: Mapping[str, Any] | None = None) -> None:
    """Adds what the verbs take that open a run folder: which checkpoint, where, and whose code may run.

    Args:
        trust: settings of the flag `--trust`, where it means more than that.
    """
    parser.add_argument("--checkpoint", choices=["best", "last"], default="best")
    if device:
        parser.add_argument("--device", choices=[kind.value for kind in Device], help="as trainer.device")
    parser.add_argument("--config-dir", action="append", default=[], metavar="DIR", help="where your own parts are")
    parser.add_argument("--trust", **{**TRUST, **(trust or {})})


def override_parser(verb: str = "train", description: str = "", examples: str = "") -> Parser:
    """The parser of a verb that takes overrides and Hydra's flags; the verb may add flags of its own."""
    parser = Parser(verb, description, examples, add_help=False)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="GROUP=OPTION or KEY=VALUE")
    flag = parser.add_argument
    flag("-h", "--help", action="store_true", help="show this")
    flag("-m", "--multirun", action="store_true", help="run every combination of comma-separated values")
    flag("-r", "--run", action="store_true", help=argparse.SUPPRESS)  # Hydra's name for the default
    flag("-c", "--cfg", choices=["job", "hydra", "all"], help="print the composed config and stop")
    flag("-p", "--package", help="the part of it to print")
    flag("--resolve", action="store_true", help="resolve its interpolations")
    flag("-cd", "--config-dir", action="append", default=[], metavar="DIR", help="a folder of your own configs")
    flag("--trust", **TRUST)
    flag("-cn", "--config-name", default=CONFIG_NAME, metavar="NAME", help="another primary config")
    flag("-i", "--info", nargs="?", const="all", choices=list(_INFO), help="print Hydra's view of the config")
    flag("--hydra-help", action="store_true", help="Hydra's own settings")
    flag("--json", action="store_true", help="one JSON document on stdout, everything else on stderr")
    return parser


TRUST: dict[str, Any] = {
    "action": "append",
    "default": [],
    "metavar": "NAME",
    "help": "a package or module of which parts may be taken whatever they say of themselves, and which a run folder "
    "may name; may be given again",
}
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def parse(arguments: Sequence[str], parser: Parser | None = None) -> Arguments:
    """Raises `UsageError` for a flag that there is not."""
    values = vars((parser or override_parser()).parse_all(arguments))
    values.pop("run")
    config_dirs = values.pop("config_dir")
    shared = {name: values.pop(name) for name in list(values) if name in Arguments.__dataclass_fields__}
    own = argparse.Namespace(**values)
    return Arguments(**shared, config_dirs=config_dirs, own=own, raw=list(arguments))


def checked_experiment(open_composer: Composer, args: Arguments) -> Experiment:
    """The one checked experiment that the overrides ask for. Raises `ConfigError` with every problem."""
    from cnnlab.building.trial import checked

    if args.multirun:
        raise UsageError("--multirun: this verb takes one experiment; sweeps are for cnnlab train")
    return checked(open_composer, args.overrides)


def answer(open_composer: Composer, args: Arguments) -> int:
    """Answers `--cfg job`, `--info` as Hydra's users expect, and `--help`, which explains what the overrides name; with
    `-m`, `--cfg` prints one document a cell.

    Raises what a run would.
    """
    if args.help and args.overrides:
        return explain(open_composer, args.overrides, as_json=args.json)
    if args.multirun and args.cfg is not None:
        for number, cell in enumerate(open_composer.cells(args.overrides)):
            open_composer.compose(cell, number)
            say(f"--- # cell {number}: {one_line(' '.join(cell))}")
            _show_config(open_composer, args, cell)
        return 0
    open_composer.compose(args.overrides)
    hydra, name = open_composer.hydra, open_composer.config_name
    if args.cfg is not None:
        _show_config(open_composer, args, args.overrides)
    elif args.info is not None:
        root = logging.getLogger()  # by which Hydra tells its view, from a handler that it would leave behind
        kept, level = root.handlers[:], root.level
        hydra.show_info(args.info, config_name=name, overrides=open_composer.lines(args.overrides))
        root.handlers[:], root.level = kept, level
    else:
        show = hydra.hydra_help if args.hydra_help else hydra.app_help
        args = replace(args, overrides=open_composer.lines(args.overrides))
        show(config_name=name, args_parser=get_args_parser(), args=args)
    return 0


def _show_config(open_composer: Composer, args: Arguments, overrides: Sequence[str]) -> None:
    shown = io.StringIO()
    try:
        with redirect_stdout(shown), redirect_stderr(io.StringIO()):
            open_composer.hydra.show_cfg(
                config_name=open_composer.config_name,
                overrides=open_composer.lines(overrides),
                cfg_type=args.cfg or "job",
                package=args.package,
                resolve=args.resolve,
            )
    except SystemExit as error:
        raise UsageError(f"--package: the config has no {args.package!r}") from error
    say(shown.getvalue().rstrip("\n"))
