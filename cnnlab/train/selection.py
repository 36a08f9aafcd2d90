"""The best evaluation so far: which weights are kept, and how long the run has waited for better ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass
class Selection:
    """The best value of the monitored metric so far, and how many evaluations went without a better one."""

    metric: str
    direction: Literal["max", "min"]
    value: float | None = None
    epoch: int | None = None
    waited: int = 0
    step: int | None = None
    """Updates done when the best value was found: which weights those were."""

    def offer(self, value: float, epoch: int, step: int | None = None) -> bool:
        """Whether `value` is the best so far (the first counts; a NaN never does).

        Of equal values the later one is kept: a small validation set gives many ties, and the network that has
        trained for longer is the better guess. For the patience a tie is no progress.
        """
        sign = 1 if self.direction == "max" else -1
        progress = value == value and (self.value is None or sign * value > sign * self.value)
        self.waited = 0 if progress else self.waited + 1
        if progress or value == self.value:
            self.value, self.epoch, self.step = value, epoch, step
            return True
        return False

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        require_selection(state)
        self.value, self.epoch, self.waited = state["value"], state["epoch"], state["waited"]
        self.step = state.get("step")  # older versions keep none

    def as_record(self) -> dict[str, Any] | None:
        if self.value is None:
            return None
        return {"metric": f"val/{self.metric}", "value": self.value, "epoch": self.epoch}


def require_selection(state: Mapping[str, Any]) -> None:
    """Raises `ValueError` for what no `Selection` has given."""
    value, counts = state["value"], {name: state.get(name) for name in ("epoch", "waited", "step")}
    for name, count in counts.items():
        if count is not None and (type(count) is not int or count < 0):
            raise ValueError(f"expected {name} to be 0 or more, received {count!r}")
    if value is not None and (type(value) not in (float, int) or value != value):
        raise ValueError(f"expected a number as the best value, received {value!r}")
    if counts["waited"] is None or (value is None) != (counts["epoch"] is None):
        raise ValueError("expected a best value, its epoch and the evaluations since, received a part of them")
