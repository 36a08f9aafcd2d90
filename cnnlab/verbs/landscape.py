"""`cnnlab landscape`: curvature, slope and noise of the loss around an experiment's weights, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cnnlab.composing.composer import composer
from cnnlab.errors import UsageError, did_you_mean
from cnnlab.runs.folder import jsonable
from cnnlab.terminal import one_line, say
from cnnlab.verbs.arguments import Arguments, Parser, answer, parse
from cnnlab.verbs.measured import MEASURED, Measured, draw, figure_path, measured, measuring_parser, progressing, table

if TYPE_CHECKING:
    from cnnlab.diagnose.landscape import Settings

PARTS = ("eigenvalues", "density", "noise", "surface")
MORE = ("layers",)
HELP = """cnnlab landscape: the loss around the weights, at initialization or at a run's checkpoint.

Usage: cnnlab landscape [OVERRIDES | RUN] [--parts LIST] [--samples N] [--mode MODE] [--precision P]

Of the loss that training minimizes (penalties included), on the samples that come next, as training gets them:
  eigenvalues   λmax and λmin of the Hessian with residuals, the condition, angles between gradient and eigenvectors,
                λmax against what the rate allows, the loss along the eigenvector of λmin
  density       spectral density by stochastic Lanczos quadrature, and the trace, with 95 % intervals
  noise         gradient noise scale (McCandlish et al. 2018) with its interval, the batch size that it suggests, and
                the gradient's variance against the batch size
  surface       the loss over a plane through the weights
  layers        (only where asked for) eigenvalues and trace of each layer's block of the Hessian
and verdicts: minimum, saddle or slope, ill-conditioned, edge of stability. Nothing of the network is changed.

  --parts LIST        some of them, with commas (default: all but layers)
  --towards WHERE     other weights of the network: a run folder, last or best (of the same run); the loss on the
                      straight line to them, its barrier, and the surface over the plane that holds the line
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
  cnnlab landscape outputs/NAME/RUN --parts layers
  cnnlab landscape outputs/NAME/RUN --checkpoint last --towards best --parts surface
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


def parser() -> Parser:
    made = measuring_parser("landscape")
    made.add_argument("--parts", metavar="LIST")
    made.add_argument("--towards", metavar="WHERE")
    made.add_argument("--mode", choices=["train", "frozen", "eval"], default="train")
    made.add_argument("--precision", choices=["fp32", "fp64"], default="fp32")
    made.add_argument("--directions", choices=["eigen", "random"], default="eigen")
    for name, (kind, _) in NUMBERS.items():
        made.add_argument(f"--{name}", type=kind, metavar="T" if kind is float else "N")
    return made


def main(arguments: Sequence[str]) -> int:
    args = parse(arguments, parser())
    if args.help and not args.overrides:
        say(HELP.format(shared=MEASURED.format(verb="landscape").rstrip()).rstrip())
        return 0
    numbers, parts = _numbers(args), _parts(args.own.parts)
    with composer(args.config_dirs, args.config_name, args.trust) as open_composer:
        if args.help or args.show:
            return answer(open_composer, args)
        found = measured(open_composer, args)
    towards = None if args.own.towards is None else _towards(args, found)
    from cnnlab.diagnose.landscape import landscape

    path = figure_path(args, found.folder, "landscape")
    with progressing() as tell:
        try:
            taken = landscape(found.run, _settings(args, numbers, parts), tell, towards)
        except ValueError as error:
            if towards is None:
                raise
            raise UsageError(f"--towards: {error}") from error
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
        if part not in (*PARTS, *MORE):
            known = (*PARTS, *MORE)
            raise UsageError(
                f"--parts: expected some of {','.join(known)}, received {part!r}{did_you_mean(part, known)}"
            )
    if not chosen:
        raise UsageError(f"--parts: expected some of {','.join(PARTS)}, received none")
    return chosen


def _towards(args: Arguments, found: Measured) -> dict[str, Any]:
    """The weights of `--towards`, by name. Nothing that another run folder names is imported.

    Raises:
        UsageError: without a run folder, or in a mode in which the weights between two runs have no moments.
        CheckpointError: there is no such checkpoint.
    """
    from cnnlab.building.opened import weights
    from cnnlab.runs.folder import RunDir
    from cnnlab.torch_private import NormBase

    where = args.own.towards
    if found.folder is None and where in ("last", "best"):
        raise UsageError(f"--towards {where}: there is no run folder whose it could be; type one")
    running = any(isinstance(m, NormBase) and m.track_running_stats for m in found.run.model.modules())
    if running and args.own.mode != "train":
        raise UsageError("--towards: weights between two checkpoints have no running moments; type --mode train")
    folder = RunDir(found.folder if where in ("last", "best") else where)  # type: ignore[arg-type]
    _, state = weights(folder, where if where in ("last", "best") else "last", folder.config())
    return dict(state["model"])


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
    if way := found.get("path"):
        rows.append(("barrier", f"{way['barrier']:.4g} on the way to the other weights, {way['distance']:.4g} apart"))
    rows += _by_layer(found.get("layers"))
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


def _by_layer(layers: Sequence[Mapping[str, Any]] | None) -> list[tuple[str, str]]:
    return [
        (
            row["layer"] or "(the network's own)",
            f"λ {row['smallest']:.4g} to {row['largest']:.4g} (residual {row['residual']:.1g}), trace "
            f"{row['trace']:.4g} ± {row['trace_error']:.1g}, {row['parameters']:,} weights",
        )
        for row in layers or ()
    ]


def _spectrum(spectrum: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if spectrum is None:
        return []
    trace, negative, outliers = (spectrum[name] for name in ("trace", "negative", "outliers"))
    return [
        ("trace", f"{trace['value']:.5g} ± {trace['error']:.2g}"),
        ("below -|λ|max/100", f"{negative['value']:.2%} ± {negative['error']:.1%}"),
        ("above |λ|max/10", f"{outliers['value']:.3%} ± {outliers['error']:.2%}"),
    ]
