"""Shell completion: verbs and flags by us, overrides by Hydra, which must not see the verb."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra.plugins.completion_plugin import CompletionPlugin, DefaultCompletionPlugin

from cnnlab.composing.composer import Composer
from cnnlab.composing.hydra_private import Hydra
from cnnlab.errors import CnnlabError, UsageError
from cnnlab.terminal import say
from cnnlab.verbs.arguments import override_parser, parse
from cnnlab.verbs.table import BUILDERS, VERBS

PROGRAM = "cnnlab"


def complete(arguments: Sequence[str]) -> int:
    """`cnnlab -sc install=SHELL` and `uninstall=SHELL` print a script; it calls `query=SHELL`, which prints
    what may stand in the place of the last word of `COMP_LINE`.

    Raises `UsageError` for another shell.
    """
    wishes = dict(argument.partition("=")[::2] for argument in arguments if "=" in argument)
    command = next((name for name in ("install", "uninstall", "query") if name in wishes), None)
    plugins = Hydra.get_shell_to_plugin_map(Composer().hydra.config_loader)
    if command is None or wishes[command] not in plugins:
        shells = "|".join(sorted(plugins))
        raise UsageError(f"expected -sc install={shells}, or uninstall=; received {' '.join(arguments)}")
    if command == "query":
        separator = "\n" if wishes[command] == "fish" else " "
        say(separator.join(candidates(os.environ.get("COMP_LINE", ""))))
        return 0
    plugin: CompletionPlugin = plugins[wishes[command]][0]
    kept, sys.argv = sys.argv, [PROGRAM]  # the script is for this name, however it is called now
    try:
        plugin.install() if command == "install" else plugin.uninstall()
    finally:
        sys.argv = kept
    return 0


def candidates(line: str) -> list[str]:
    """What may stand in the place of the last word of `line`, which begins with the program's name."""
    words = line.split()[1:]
    last = "" if not words or line.endswith(" ") else words.pop()
    if not words:
        return _starting(last, VERBS)
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        return []
    if last.startswith("-"):
        flags = [flag for action in override_parser(verb)._actions for flag in action.option_strings]
        return _starting(last, flags)
    if rest and rest[-1] in ("-cd", "--config-dir"):
        return []  # the shell completes folders
    if verb not in BUILDERS:
        return runs(last)
    if last.startswith("resume="):
        return [f"resume={run}" for run in runs(last.removeprefix("resume="))]
    try:
        args = parse(rest)
        # Of a list or a sweep, the last item is being typed: model=resnet,vg and augment=[crop,fl.
        key, equals, value = last.partition("=")
        done = max(value.rfind(","), value.rfind("[")) + 1
        loader = Composer(args.config_dirs, args.config_name).hydra.config_loader
        words = ["-m" if args.multirun else "", *args.overrides, f"{key}{equals}{value[done:]}"]
        found = DefaultCompletionPlugin(loader)._query(config_name=args.config_name, line=" ".join(words))
    except CnnlabError:  # what is typed so far is wrong; the run will say so
        return []
    return [f"{key}={value[:done]}{item.partition('=')[2]}" for item in found] if done else found


def runs(start: str) -> list[str]:
    """The run folders below `outputs/` whose path begins so, the newest first."""
    found = sorted(Path("outputs").glob("**/run.json"), key=lambda path: -path.stat().st_mtime)
    return _starting(start, (str(path.parent) for path in found))


def _starting(start: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(start)]
