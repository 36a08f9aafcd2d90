"""Whom does a config pass on its way from the command line to the first update? Watched, not read.

    python scripts/way_of_config.py data.limit=64 trainer.max_steps=1 hydra.run.dir=/tmp/way

Runs `cnnlab train` with these overrides under `sys.setprofile`, until the first step is called. Whenever a function of
the package gets the overrides or what becomes of them (`Composed`, `Experiment`, `Node`, `Run`), its unit has the
config in hand. Printed are the ways by which the config was handed on, from unit to unit, in the order of their first
time, with the floors of `tests/test_cli_floors.py`; a way to a higher floor goes back up.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parent.parent
CARRIERS = {"Composed", "Experiment", "Node", "Run", "_Builder", "_Trial"}
"""Classes of what becomes of a command line."""


class Arrived(BaseException):
    """The first step."""


def floors() -> dict[str, int]:
    """Each unit's floor, as the tests enforce them."""
    tree = ast.parse((ROOT / "tests" / "test_cli_floors.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "FLOORS" and node.value is not None:
            return {unit: number for number, floor in enumerate(ast.literal_eval(node.value)) for unit in floor}
    raise SystemExit("tests/test_cli_floors.py has no FLOORS")


def unit_of(frame: FrameType) -> str | None:
    """The unit of the package that a frame runs in."""
    name = str(frame.f_globals.get("__name__", ""))
    return name.split(".")[1] if name.startswith("cnnlab.") else None


class Watch:
    """Notes each call between two units by which the config is handed on."""

    def __init__(self, overrides: list[str]) -> None:
        self.overrides = overrides
        self.ways: dict[tuple[str, str], tuple[str, int]] = {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        unit = unit_of(frame)
        if unit is None:
            return
        code = frame.f_code
        if code.co_qualname == "EagerStep.__call__":
            raise Arrived
        if code.co_name.startswith("<"):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if not any(self.carries(frame.f_locals.get(name)) for name in names):
            return
        caller = frame.f_back
        while caller is not None and unit_of(caller) is None:  # torch, Hydra, contextlib between them
            caller = caller.f_back
        before = None if caller is None else unit_of(caller)
        if before is not None and before != unit:
            where = f"{frame.f_globals['__name__']}.{code.co_qualname}".removeprefix("cnnlab.")
            first, times = self.ways.get((before, unit), (where, 0))
            self.ways[before, unit] = (first, times + 1)

    def carries(self, value: Any) -> bool:
        if type(value).__name__ in CARRIERS and type(value).__module__.startswith("cnnlab."):
            return True
        return isinstance(value, list) and len(value) > 0 and value[-1] == self.overrides[-1]


def main() -> None:
    overrides = sys.argv[1:]
    if not overrides:
        raise SystemExit(__doc__)
    from cnnlab.cli import main as cli

    floor, watch = floors(), Watch(overrides)
    sys.setprofile(watch)
    try:
        cli(["train", *overrides])
    except Arrived:
        pass
    finally:
        sys.setprofile(None)
    up = 0
    for (before, unit), (first, times) in watch.ways.items():
        up += floor[unit] > floor[before]
        arrow = "UP" if floor[unit] > floor[before] else "down"
        print(f"{before:<14} {floor[before]:>2} -> {unit:<14} {floor[unit]:>2} {arrow:<5} {times:>5} x, first {first}")
    units = dict.fromkeys(unit for way in watch.ways for unit in way)
    print(f"{len(units)} units have it in hand: {', '.join(units)}; {up} of {len(watch.ways)} ways go up a floor")


if __name__ == "__main__":
    main()
