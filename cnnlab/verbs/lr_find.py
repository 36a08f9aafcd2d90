"""`cnnlab lr-find`: at which rate an experiment learns, from one sweep over all rates. Leaves nothing but a figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cnnlab.composing.composer import composer
from cnnlab.composing.rates import BEFORE, HIGHEST, LOWEST, RULE, RULES, STEPS, require_rule
from cnnlab.runs.folder import jsonable
from cnnlab.terminal import one_line, say
from cnnlab.verbs.arguments import Parser, answer, parse
from cnnlab.verbs.measured import MEASURED, draw, figure_path, measured, measuring_parser, progressing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cnnlab.train.range_test import RangeTest

HELP = """cnnlab lr-find: at which rate an experiment learns (a range test).

Usage: cnnlab lr-find [OVERRIDES | RUN] [--lowest A] [--highest B] [--steps N] [--rule NAME]

Makes real updates of the experiment (its optimizer, groups, augmentation, precision) at rates that grow by one factor
from each to the next, until the loss is 4 times its least. Nothing of it stays: no run folder, no weights. Every rule
reads a rate from the smoothed curve; `cnnlab train optim.lr=auto` does all this first and takes the rate of `valley`.

{rules}

  --lowest A, --highest B   rates of the first and the last update (default {lowest:g} and {highest:g})
  --steps N                 updates at most (default {steps})
  --rule NAME               whose rate is shown first; where it finds none, the exit code is 2 (default {rule})
{shared}
examples:
  cnnlab lr-find
  cnnlab lr-find model=vgg optim=adamw data=cifar10
  cnnlab lr-find optim=sgd --lowest 1e-4 --steps 50 --figure rates.png
  cnnlab lr-find outputs/NAME/RUN                  the rate at which a run would best go on
  cnnlab lr-find --json
"""


def parser() -> Parser:
    made = measuring_parser("lr-find")
    made.add_argument("--lowest", type=float, metavar="A")
    made.add_argument("--highest", type=float, metavar="B")
    made.add_argument("--steps", type=int, metavar="N")
    made.add_argument("--rule", metavar="NAME")
    return made


def main(arguments: Sequence[str]) -> int:
    args = parse(arguments, parser())
    if args.help and not args.overrides:
        say(help_text())
        return 0
    own = args.own
    rule = own.rule or RULE
    require_rule(rule, "--rule")
    with composer(args.config_dirs, args.config_name, args.trust) as open_composer:
        if args.help or args.show:
            return answer(open_composer, args)
        found = measured(open_composer, args, rate=BEFORE)
    from cnnlab.train.range_test import range_test

    path = figure_path(args, found.folder, "lr-find")
    asked = {"lowest": LOWEST, "highest": HIGHEST, "steps": STEPS}
    settings: dict[str, Any] = {k: v if getattr(own, k) is None else getattr(own, k) for k, v in asked.items()}
    with progressing() as tell:

        def progress(number: int, rate: float, loss: float) -> None:
            tell(f"loss {loss:.4g} at {rate:.2e}", number, settings["steps"])

        curve = range_test(found.run, **settings, progress=progress)
    suggested = curve.suggestions()
    if args.json:
        say(json.dumps(jsonable(_document(found.title, curve, rule))))
    else:
        _show(found.title, curve, suggested, rule)
    if path is not None:
        draw(figure(curve, found.title), path, quiet=args.json)
    curve.suggestion(rule)  # a curve that has none is told, after all that is known of it
    return 0


def help_text() -> str:
    rules = "\n".join(f"  {name:<10} {text}" for name, text in RULES.items())
    shared = MEASURED.format(verb="lr-find").rstrip()
    return HELP.format(rules=rules, lowest=LOWEST, highest=HIGHEST, steps=STEPS, rule=RULE, shared=shared).rstrip()


def _document(title: str, curve: RangeTest, rule: str) -> dict[str, Any]:
    return {"what": title, "rule": rule, "suggestion": curve.suggestions()[rule], **curve.described()}


def _show(title: str, curve: RangeTest, suggested: Mapping[str, float | None], rule: str) -> None:
    say(one_line(title))
    low = curve.lowest
    say(f"{'loss at the start':<24} {curve.start:.4g}")
    if low is not None:
        say(f"{'least loss':<24} {curve.smoothed[low]:.4g} at {curve.rates[low]:.2e}")
    end = f"after {len(curve.losses)} of {curve.planned} updates"
    last = "at no rate" if curve.limit is None else f"from {curve.limit:.2e} on"
    say(f"{'loss above its start':<24} {last}, {end}")
    for name in sorted(suggested, key=lambda name: name != rule):
        rate = suggested[name]
        say(f"{name:<24} {'-' if rate is None else f'optim.lr={rate:.3g}':<18} {RULES[name]}")


def figure(curve: RangeTest, title: str) -> Figure:
    """The losses, the smoothed curve and the rates of the rules, over log(rate)."""
    from cnnlab.sinks.figures import COLOURS, as_written, blank

    drawn, ax = blank(8, 4.8)
    ax.plot(curve.rates, curve.losses, ".", color="0.6", markersize=4, label="each update")
    ax.plot(curve.rates, curve.smoothed, color=COLOURS[0], linewidth=2, label="smoothed")
    ax.set_xscale("log")
    shown = [loss for loss in curve.smoothed if loss <= 2 * abs(curve.start)] or curve.smoothed or [0.0]
    spread = max(shown) - min(shown) or 1.0
    ax.set_ylim(min([*shown, *curve.losses]) - 0.05 * spread, max(max(shown), curve.start) + 0.15 * spread)
    for colour, (name, rate) in zip(COLOURS[1:], curve.suggestions().items()):
        if rate is not None:
            ax.axvline(rate, color=colour, linestyle="--", linewidth=1.3, label=f"{name}: {rate:.2g}")
    ax.set_xlabel("learning rate of the base group")
    ax.set_ylabel("training loss (with penalties)")
    ax.set_title(as_written(title), loc="left", fontsize=10)
    ax.legend(frameon=True, edgecolor="none", framealpha=0.85, fontsize=9)
    return drawn
