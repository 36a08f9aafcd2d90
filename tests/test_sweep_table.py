"""Means over the seeds of a sweep."""

from __future__ import annotations

from typing import Any

from cnnlab.verbs.sweep_table import over_seeds


def cell(status: str, accuracy: float | None, *overrides: str) -> dict[str, Any]:
    metrics = {} if status != "completed" else {"test/accuracy": accuracy}
    return {"overrides": list(overrides), "status": status, "metrics": metrics}


def test_cells_that_did_not_complete_are_left_out():
    found = over_seeds(
        [
            cell("completed", 0.5, "model=vgg", "seed=0"),
            cell("diverged", None, "model=vgg", "seed=1"),
            cell("failed", None, "model=cnn", "seed=0"),
            cell("completed", None, "model=cnn", "seed=1"),
        ]
    )
    assert found == [
        {"overrides": {"model": "vgg"}, "runs": 1, "metrics": {"test/accuracy": {"mean": 0.5, "std": None}}},
        {"overrides": {"model": "cnn"}, "runs": 1, "metrics": {}},
    ]


def test_without_several_seeds_there_is_nothing_to_tell():
    assert over_seeds([cell("completed", 0.5, "model=vgg"), cell("completed", 0.6, "model=cnn")]) == []
    assert over_seeds([cell("completed", 0.5, "seed=0")]) == []
