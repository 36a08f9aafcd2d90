"""What is wrong with a network's signals at initialization, if anything, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from cnnlab.diagnose.signal import Layer, Signals
from cnnlab.init.base import is_layer

FADED = 1e-3
"""Share of the first layer's signal (the last layer's gradient) below which nothing is learned from it: a plain
30-layer net under Xavier, which "completely stalls" (He et al. 2015, section 2.2), is left 3e-5."""
GROWN = 1e3
"""The same for a signal that grows."""
GRADIENT_GROWN = 1e5
"""For a gradient: batch norm alone makes it grow by 1.2 a layer of ReLU (√(π/(π - 1)), Yang et al. 2019, section 4);
56 plain layers of it train (He et al. 2015, arXiv 1512.03385, figure 6), while 110 do not."""


@dataclass(frozen=True)
class Fault:
    """`kind` is `fades`, `grows`, `gradient fades`, `gradient grows`, `alike` or `not finite`; `layer` where it is
    first seen, in the direction in which it runs; `factor` how it changes a layer."""

    kind: str
    layer: str
    text: str
    factor: float | None = None


def faults(signals: Signals, model: nn.Module | None = None) -> list[Fault]:
    """All that is wrong; empty for a network that can begin to learn.

    Args:
        model: to look for layers whose units are all the same.
    """
    layers = signals.layers
    if not layers:
        return []
    infinite = next((layer for layer in layers if not math.isfinite(layer.measured.std)), None)
    if infinite is not None:
        return [Fault("not finite", infinite.name, f"values are no longer finite from {infinite.name} on")]
    found = [finding for finding in (_forwards(layers), _backwards(layers)) if finding is not None]
    alike = None if model is None else _alike(model)
    if alike is not None:
        text = f"all units of {alike} have the same weights, so that they stay the same"
        found.append(Fault("alike", alike, text))
    return found


def _forwards(layers: Sequence[Layer]) -> Fault | None:
    """A signal is lost, or too large, where it stays so to the end: gates and the like beside the way do not count."""
    known = [layer for layer in layers if math.isfinite(layer.measured.signal)]
    if not known:
        return None
    first, last = known[0].measured.signal, known[-1].measured.signal
    if first == 0 or last < FADED * first:
        place = _since([layer.measured.signal < FADED * first or layer.measured.signal == 0 for layer in known])
        factor = _factor(first, last, len(known))
        text = f"the signal dies at {known[place].name} (layer {place + 1} of {len(known)}): "
        text += "no two images can be told apart there" if first == 0 or last == 0 else _share(first, last, factor)
        return Fault("fades", known[place].name, text, factor)
    if last > GROWN * first:
        place = _since([layer.measured.signal > GROWN * first for layer in known])
        factor = _factor(first, last, len(known))
        text = f"the signal explodes: from {known[place].name} on it is {GROWN:g} times the first layer's and more"
        return Fault("grows", known[place].name, f"{text} (by {factor:.3g} a layer)", factor)
    return None


def _backwards(layers: Sequence[Layer]) -> Fault | None:
    known = [layer for layer in layers if math.isfinite(layer.measured.gradient)][::-1]
    if not known or known[0].measured.gradient == 0:
        return None
    gradients = [layer.measured.gradient for layer in known]
    first, last = gradients[0], gradients[-1]
    factor = _factor(first, last, len(known))
    if last < FADED * first:
        layer = known[_since([g < FADED * first for g in gradients])].name
        text = f"the gradient vanishes: on its way back from the last layer, {FADED:g} of it is left at {layer}, "
        return Fault("gradient fades", layer, f"{text}{last / first:.1e} at {known[-1].name}", factor)
    if last > GRADIENT_GROWN * first:
        layer = known[_since([g > GRADIENT_GROWN * first for g in gradients])].name
        text = f"the gradient explodes: on its way back it is {GRADIENT_GROWN:g} times the last layer's at {layer}"
        return Fault("gradient grows", layer, f"{text} (by {factor:.3g} a layer)", factor)
    return None


def _since(lost: Sequence[bool]) -> int:
    """Where that began which lasts to the end."""
    return max((place + 1 for place, now in enumerate(lost) if not now), default=0) if lost[-1] else len(lost) - 1


def _factor(first: float, last: float, count: int) -> float | None:
    return (last / first) ** (1 / (count - 1)) if count > 1 and first > 0 and last > 0 else None


def _share(first: float, last: float, factor: float | None) -> str:
    by = "" if factor is None else f", {factor:.2f} a layer"
    return f"{last / first:.1e} of the first layer's is left at the last{by}"


def _alike(model: nn.Module) -> str | None:
    """The first layer of several units that all have the same weights; the last layer may begin with zeros."""
    layers = [(name, module) for name, module in model.named_modules() if is_layer(module)]
    for name, module in layers[:-1]:
        weight = module.weight.detach()
        if len(weight) > 1 and bool((weight == weight[:1]).all()):
            return name
    return None
