"""`cnnlab replay BUNDLE`: an update that was not finite, once more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cnnlab.composing.trust import Trust
from cnnlab.runs.folder import jsonable
from cnnlab.schema import Device
from cnnlab.terminal import one_line, say
from cnnlab.verbs.arguments import TRUST, Parser

EXAMPLES = """examples:
  cnnlab replay outputs/NAME/RUN/nonfinite/step-1234.pt
  cnnlab replay step-1234.pt --device cpu --json

A run whose loss or gradient is no longer finite leaves that update in its folder: batch, weights before it, random
streams and config. It is run again up to its gradients, eagerly and on any machine; neither the data nor the rest of
the run folder need to be there. What it names as its parts is looked at before it is imported, as a run folder's.
"""


def parser() -> Parser:
    made = Parser("replay", "Runs an update that was not finite once more, and names layer and samples.", EXAMPLES)
    made.add_argument("bundle", help="the file RUN/nonfinite/step-N.pt")
    made.add_argument("--device", choices=[device.value for device in Device], help="as trainer.device")
    made.add_argument("--config-dir", action="append", default=[], metavar="DIR", help="where your own parts are")
    made.add_argument("--trust", **TRUST)
    made.add_argument("--json", action="store_true", help="one JSON document on stdout, everything else on stderr")
    return made


def main(arguments: Sequence[str]) -> int:
    args = parser().parse_all(arguments)
    from cnnlab.building.replaying import replay

    done = replay(Path(args.bundle), device=args.device, trust=Trust.of(args.trust, args.config_dir))
    if args.json:
        document = {
            "step": done.step,
            "samples": done.samples,
            "device": done.device,
            "again": done.again,
            "same": done.same,
            "recorded": done.recorded.record(),
            "found": done.found.record(),
            "versions": done.versions,
        }
        say(json.dumps(jsonable(document)))
        return 0
    say(f"step {done.step:,}, {done.samples} samples, on {done.device}")
    say(one_line(f"found      {done.found.sentence()}"))
    if not done.same:
        say(one_line(f"in its run {done.recorded.sentence()}"))
    return 0
