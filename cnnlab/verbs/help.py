"""`cnnlab help`: what a part, a group of parts or a setting is."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from cnnlab.composing.composer import composer
from cnnlab.terminal import say
from cnnlab.verbs.arguments import override_parser, parse
from cnnlab.verbs.table import VERBS
from cnnlab.verbs.words import explain

HELP = """cnnlab help: what a part is, and what each of its settings takes and means.

Usage: cnnlab help [VERB | GROUP | GROUP=OPTION | KEY]... [--json] [--config-dir DIR]

The same as `cnnlab train --help GROUP=OPTION`. A setting stands there as it is typed, with the value that it has
unasked.

examples:
  cnnlab help model=vgg            the settings of one option
  cnnlab help optim                the options of a group, and the settings of the one that is taken unasked
  cnnlab help augment=[crop,flip]
  cnnlab help trainer.clip_norm    one setting
  cnnlab help experiment=digits    what a recipe is, and what it sets
  cnnlab help bench                a verb
"""


def main(arguments: Sequence[str]) -> int:
    args = parse(arguments, override_parser("help"))
    if not args.overrides:
        say(HELP.rstrip())
        return 0
    if args.overrides[0] in VERBS:
        verb, *rest = args.overrides
        return import_module(f"cnnlab.verbs.{verb.replace('-', '_')}").main(["--help", *rest])
    with composer(args.config_dirs, args.config_name, args.trust) as open_composer:
        return explain(open_composer, args.overrides, as_json=args.json)
