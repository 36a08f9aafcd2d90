"""Hydra's own flags, taken apart from the overrides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cnnlab.errors import UsageError, did_you_mean

_FLAGS = (
    "--help -h --hydra-help --cfg -c --resolve --package -p --run -r --multirun -m --shell-completion -sc "
    "--config-path -cp --config-name -cn --config-dir -cd --experimental-rerun --info -i"
).split()


@dataclass
class Arguments:
    """A verb's arguments: overrides, the user's config folders, `--json`, and Hydra's flags."""

    overrides: list[str]
    config_dirs: list[str] = field(default_factory=list)
    multirun: bool = False
    help: bool = False
    json: bool = False
    show: bool = False
    """Whether Hydra itself answers: `--cfg`, `--info`, `--hydra-help`."""
    raw: list[str] = field(default_factory=list)


def parse(arguments: Sequence[str], *, own_flags: Sequence[str] = ("--json",)) -> Arguments:
    """Raises `UsageError` for a flag that there is not."""
    from hydra._internal.utils import get_args_parser

    known = {*_FLAGS, *own_flags}
    for argument in arguments:
        name = argument.partition("=")[0]
        if argument.startswith("-") and name not in known and not _is_number(argument):
            raise UsageError(f"no flag {name!r}{did_you_mean(name, known)}; flags are listed by --help")
    own = [argument for argument in arguments if argument in own_flags]
    rest = [argument for argument in arguments if argument not in own_flags]
    try:
        parsed: Any = get_args_parser().parse_intermixed_args(rest)
    except SystemExit as error:  # argparse has printed what it expected
        raise UsageError("the flags could not be read; see --help") from error
    directory = parsed.config_dir
    return Arguments(
        overrides=list(parsed.overrides),
        config_dirs=[directory] if directory else [],
        multirun=parsed.multirun,
        help=parsed.help,
        json="--json" in own,
        show=bool(parsed.cfg or parsed.info or parsed.hydra_help),
        raw=rest,
    )


def _is_number(text: str) -> bool:
    return text[1:2].isdigit()


def ask_hydra(raw: Sequence[str], config_dirs: Sequence[str]) -> int:
    """Lets Hydra answer `--help`, `--cfg job`, `--info`, as its users expect."""
    import sys

    import hydra

    from cnnlab.config import CONFIG_NAME, config_root, make_importable, register_resolvers

    register_resolvers()
    make_importable([])
    kept, sys.argv = sys.argv, ["cnnlab train", *raw]
    try:
        hydra.main(version_base="1.3", config_path=str(config_root()), config_name=CONFIG_NAME)(lambda _: None)()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    finally:
        sys.argv = kept
    return 0
