"""Shell completion: verbs and flags by us, overrides by Hydra, which must not see the verb."""

from __future__ import annotations

import os
import sys
from argparse import SUPPRESS
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path

from hydra.plugins.completion_plugin import CompletionPlugin, DefaultCompletionPlugin

from cnnlab.composing.composer import Composer
from cnnlab.composing.hydra_private import Hydra
from cnnlab.errors import CnnlabError, UsageError
from cnnlab.terminal import say
from cnnlab.verbs.arguments import Parser, override_parser, parse
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
    parser = parser_of(verb)
    shown = [action for action in parser._actions if action.help != SUPPRESS]
    if last.startswith("-"):
        return _starting(last, [flag for action in shown for flag in action.option_strings])
    awaited = next((action for action in shown if rest and rest[-1] in action.option_strings), None)
    if awaited is not None and awaited.nargs is None:
        return _starting(last, map(str, awaited.choices or ()))  # of a file or folder, the shell knows what there is
    if verb not in BUILDERS:
        return [] if _has_run(parser, rest) else runs(last)
    if last.startswith("resume="):
        return [f"resume={run}" for run in runs(last.removeprefix("resume="))]
    try:
        args = parse(rest, parser)
        # Of a list or a sweep, the last item is being typed: model=resnet,vg and augment=[crop,fl.
        key, equals, value = last.partition("=")
        done = max(value.rfind(","), value.rfind("[")) + 1
        loader = Composer(args.config_dirs, args.config_name).hydra.config_loader
        words = ["-m" if args.multirun else "", *args.overrides, f"{key}{equals}{value[done:]}"]
        found = DefaultCompletionPlugin(loader)._query(config_name=args.config_name, line=" ".join(words))
    except CnnlabError:  # what is typed so far is wrong; the run will say so
        return []
    return [f"{key}={value[:done]}{item.partition('=')[2]}" for item in found] if done else found


def parser_of(verb: str) -> Parser:
    """The parser of a verb: its module's `parser`, or that of all verbs that take overrides."""
    module = import_module(f"cnnlab.verbs.{verb.replace('-', '_')}")
    made: Parser = module.parser() if hasattr(module, "parser") else override_parser(verb)
    return made


def _has_run(parser: Parser, words: Sequence[str]) -> bool:
    """Whether the run folder is typed already; what follows are files, or overrides."""
    takes_value = {flag for action in parser._actions if action.nargs is None for flag in action.option_strings}
    before = ["", *words]
    return any(not word.startswith("-") and before[at] not in takes_value for at, word in enumerate(words))


def runs(start: str) -> list[str]:
    """The run folders below `outputs/` whose path begins so, the newest first."""
    found = sorted(Path("outputs").glob("**/run.json"), key=lambda path: -path.stat().st_mtime)
    return _starting(start, (str(path.parent) for path in found))


def _starting(start: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(start)]
