"""What the console shows of a run, in plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

from cnnlab.sinks.health import Strip


@dataclass
class Snapshot:
    """What the console shows of a run, in plain numbers."""

    title: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    step: int = 0
    total_steps: int = 0
    epoch: int = 0
    """Counts from 1; 0 before the first step."""
    epochs: int = 0
    lr: float | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    splits: dict[str, dict[str, float]] = field(default_factory=dict)
    """The latest figures of each split."""
    health: list[Strip] = field(default_factory=list)
    stats_step: int = 0


def duration(seconds: float) -> str:
    """`0:07`, `12:34`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
