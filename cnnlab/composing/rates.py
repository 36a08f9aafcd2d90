"""`optim.lr=auto`: the rate that a range test suggests, and by which rules it does. Loads no torch.

What a config says stays `auto`, so that the run is known by it; the number is recorded among its choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cnnlab.errors import UsageError, did_you_mean

AUTO = "auto"
KEY = "optim.lr"
BEFORE = 1e-3
"""The rate with which an optimizer is made before its own is known."""

LOWEST, HIGHEST, STEPS = 1e-6, 10.0, 100
"""Of the range test: rates of the first and the last update, and updates at most."""
RULES = {
    "valley": "halfway, in log(rate), between where the loss has begun to fall and where it is least",
    "steep": "where the loss falls fastest in log(rate) (`steep` of fastai and Lightning)",
    "minimum": "a tenth of the rate of the least loss (`minimum` of fastai)",
    "limit": "a third of the rate from which the loss is above its start (Bengio 2012, section 3.1.1)",
}
"""The ways from a curve to a rate, by name."""
RULE = "valley"


def is_auto(optim: Any) -> bool:
    """Whether an optimizer's node leaves its rate to the range test."""
    return isinstance(optim, Mapping) and optim.get("lr") == AUTO


def with_number(optim: Any) -> Any:
    """The node with a number as its rate; one that has a number as it is."""
    return {**optim, "lr": BEFORE} if is_auto(optim) else optim


def require_rule(name: str, where: str = "rule") -> None:
    """Raises `UsageError` for a rule that there is not."""
    if name not in RULES:
        raise UsageError(f"{where}: expected one of {', '.join(RULES)}, received {name!r}{did_you_mean(name, RULES)}")
