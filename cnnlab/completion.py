"""Shell completion: verbs by us, overrides by Hydra, which must not see the verb."""

from __future__ import annotations

import os
from collections.abc import Sequence


def complete(arguments: Sequence[str]) -> int:
    """`cnnlab -sc query=bash`, as Hydra's completion script calls it, and `install=SHELL` / `uninstall=SHELL`."""
    from cnnlab.cli import VERBS
    from cnnlab.verbs.arguments import ask_hydra

    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if any(argument.startswith("query=") for argument in arguments):
        typing_verb = len(words) < 2 or (len(words) == 2 and not line.endswith(" "))
        if typing_verb:
            start = words[1] if len(words) == 2 else ""
            print(" ".join(verb for verb in VERBS if verb.startswith(start)))
            return 0
        if words[1] in VERBS:
            os.environ["COMP_LINE"] = line.replace(f" {words[1]}", "", 1)
    return ask_hydra(["-sc", *arguments[1:]], [])
