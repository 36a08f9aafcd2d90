"""`cnnlab landscape`: curvature, slope and noise of the loss around an experiment's weights, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cnnlab.composing.composer import composer
from cnnlab.errors import UsageError, did_you_mean
from cnnlab.runs.folder import jsonable
from cnnlab.terminal import one_line, say
from cnnlab.verbs.arguments import Arguments, answer, parse
from cnnlab.verbs.measured import MEASURED, draw, figure_path, measured, measuring_parser, progressing, table

if TYPE_CHECKING:
    from cnnlab.diagnose.landscape import Settings

PARTS = ("eigenvalues", "density", "noise", "surface")
HELP = """cnnlab landscape: the loss around the weights, at initialization or at a run's checkpoint.

Usage: cnnlab landscape [OVERRIDES | RUN] [--parts LIST] [--samples N] [--mode MODE] [--precision P]

Of the loss that training minimizes (penalties included), on the samples that come next, as training gets them:
  eigenvalues   λmax and λmin of the Hessian with residuals, the condition, angles between gradient and eigenvectors,
                λmax against what the rate allows, the loss along the eigenvector of λmin
  density       spectral density by stochastic Lanczos quadrature, and the trace, with 95 % intervals
  noise         gradient noise scale (McCandlish et al. 2018) with its interval, the batch size that it suggests, and
                the gradient's variance against the batch size
  surface       the loss over a plane through the weights
and verdicts: minimum, saddle or slope, ill-conditioned, edge of stability. Nothing of the network is changed.

  --parts LIST        some of them, with commas (default: all)
  --samples N         of the training set (default 2000, or all)
  --mode MODE         of norm layers and dropout: train (moments of each micro-batch; the default), frozen (training,
                      with running moments), eval
  --precision P       fp32 (default) or fp64
  --top K             largest eigenvalues (default 3)
  --products N        Hessian-vector products for the eigenvalues, at most (default 60)
  --tolerance T       of their residuals, relative (default 1e-3)
  --probes N          random vectors of the density (default 4); --steps N, of Lanczos for each (default 20)
  --points N          a side of the surface (default 15)
  --directions WHICH  of the surface: eigen (λmax and λmin, the default) or random (filter-normalized, Li et al. 2018)
{shared}
examples:
  cnnlab landscape
  cnnlab landscape model=vgg norm=none init=xavier_normal --parts eigenvalues --samples 500
  cnnlab landscape outputs/NAME/RUN --checkpoint best
  cnnlab landscape outputs/NAME/RUN --mode frozen --precision fp64
  cnnlab landscape --parts noise --json
"""
NUMBERS: dict[str, tuple[type, float]] = {
    "samples": (int, 2),
    "top": (int, 1),
    "products": (int, 2),
    "probes": (int, 1),
    "steps": (int, 2),
    "points": (int, 3),
    "tolerance": (float, 1e-12),
}
"""Flags with a number, its kind, and the least one."""


def main(arguments: Sequence[str]) -> int:
    parser = measuring_parser("landscape")
    parser.add_argument("--parts", metavar="LIST")
    parser.add_argument("--mode", choices=["train", "frozen", "eval"], default="train")
    parser.add_argument("--precision", choices=["fp32", "fp64"], default="fp32")
    parser.add_argument("--directions", choices=["eigen", "random"], default="eigen")
    for name, (kind, _) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=kind, metavar="T" if kind is float else "N")
    args = parse(arguments, parser)
    if args.help and not args.overrides:
        say(HELP.format(shared=MEASURED.format(verb="landscape").rstrip()).rstrip())
        return 0
    numbers, parts = _numbers(args), _parts(args.own.parts)
    with composer(args.config_dirs, args.config_name, args.trust) as open_composer:
        if args.help or args.show:
            return answer(open_composer, args)
        found = measured(open_composer, args)
    from cnnlab.diagnose.landscape import landscape

    path = figure_path(args, found.folder, "landscape")
    with progressing() as tell:
        taken = landscape(found.run, _settings(args, numbers, parts), tell)
    document = {"what": found.title, **taken.document()}
    if args.json:
        say(json.dumps(jsonable(document)))
    else:
        _show(document)
    if path is not None:
        from cnnlab.diagnose.landscape_figure import drawn

        draw(drawn(document), path, quiet=args.json)
    return 0


def _numbers(args: Arguments) -> dict[str, Any]:
    """The numbers that were given. Raises `UsageError` for one that is too small."""
    given = {name: getattr(args.own, name) for name in NUMBERS if getattr(args.own, name) is not None}
    for name, value in given.items():
        least = NUMBERS[name][1]
        if not least <= value < float("inf"):
            raise UsageError(f"--{name}: expected {least:g} or more, received {value:g}")
    return given


def _parts(text: str | None) -> tuple[str, ...]:
    if text is None:
        return PARTS
    chosen = tuple(part.strip() for part in text.split(",") if part.strip())
    for part in chosen:
        if part not in PARTS:
            raise UsageError(
                f"--parts: expected some of {','.join(PARTS)}, received {part!r}{did_you_mean(part, PARTS)}"
            )
    if not chosen:
        raise UsageError(f"--parts: expected some of {','.join(PARTS)}, received none")
    return chosen


def _settings(args: Arguments, numbers: Mapping[str, Any], parts: tuple[str, ...]) -> Settings:
    import torch

    from cnnlab.diagnose.landscape import Settings
    from cnnlab.train.objective import Mode

    dtype = torch.float64 if args.own.precision == "fp64" else torch.float32
    return Settings(mode=Mode(args.own.mode), dtype=dtype, parts=parts, directions=args.own.directions, **numbers)


def _show(found: Mapping[str, Any]) -> None:
    say(one_line(found["what"]))
    rows = [
        ("on", f"{found['samples']:,} training samples, {found['parameters']:,} weights, {found['dtype']}"),
        ("mode", f"{found['mode']}: {found['norms']}"),
        ("loss", f"{found['loss']:.6g}"),
        ("gradient", f"‖g‖ = {found['gradient_norm']:.4g}, ‖θ‖ = {found['weight_norm']:.4g}"),
    ]
    rows += _eigenvalues(found.get("eigenvalues")) + _spectrum(found.get("spectrum"))
    if scale := found.get("noise_scale"):
        high = "no bound" if scale["high"] == float("inf") else f"{scale['high']:.3g}"
        rows.append(("noise scale", f"{scale['scale']:.4g} samples (95 %: {scale['low']:.3g} to {high})"))
        rows.append(("batch size suggested", str(scale["suggestion"] or "unknown")))
    if variance := found.get("variance"):
        each = ", ".join(f"{row['batch']}: {row['variance']:.3g} ± {row['error']:.1g}" for row in variance)
        rows.append(("gradient's variance", f"by batch size {each}"))
        if (slope := found["variance_exponent"]) is not None:
            rows.append(("", f"falls as batch^{slope:.2f} (independent samples: -1)"))
    table(rows)
    for verdict in found["verdicts"]:
        say(f"{'-> ' + verdict['name']:<24} {one_line(verdict['text'])}")


def _eigenvalues(eigen: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if eigen is None:
        return []
    names = [f"λ{i + 1}" if i else "λmax" for i in range(len(eigen["largest"]))]
    values = list(eigen["largest"])
    if len(eigen["residuals"]) > len(values):
        names, values = [*names, "λmin"], [*values, eigen["smallest"]]
    rows = [
        (name, f"{value:.6g}, residual {residual:.1g}, {degrees:.1f}° from the gradient")
        for name, value, residual, degrees in zip(names, values, eigen["residuals"], eigen["angles_to_gradient"])
    ]
    state = "" if eigen["converged"] else ", not converged (--products)"
    rows.append(("products", f"{eigen['products']}{state}"))
    number, mass = eigen["condition"]["number"], eigen["condition"]["mass"]
    if number is not None:
        rows.append(("condition λmax/λmin", f"{number:.3g}"))
    if mass is not None:
        rows.append(("condition by mass", f"{mass:.3g} (λmax over the |λ| that 90 % of the eigenvalues do not exceed)"))
    return rows


def _spectrum(spectrum: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if spectrum is None:
        return []
    trace, negative, outliers = (spectrum[name] for name in ("trace", "negative", "outliers"))
    return [
        ("trace", f"{trace['value']:.5g} ± {trace['error']:.2g}"),
        ("below -|λ|max/100", f"{negative['value']:.2%} ± {negative['error']:.1%}"),
        ("above |λ|max/10", f"{outliers['value']:.3%} ± {outliers['error']:.2%}"),
    ]
