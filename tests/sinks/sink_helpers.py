"""A run as the sinks see it, and records as the loop hands them out."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cnnlab.train.selection import Selection


def fake_run(directory: Path | None = None, *, step: int = 0, resumed: bool = False, **changes: Any) -> Any:
    """10 steps an epoch, 3 epochs, batches of 32."""
    config = {
        "model": {
            "_target_": "cnnlab.models.resnet.ResNet",
            "depth": 20,
            "widths": [16, 32, 64],
            "zero_init": True,
        },
        "activation": {"_target_": "torch.nn.ReLU", "_partial_": True},
        "optim": {"_target_": "torch.optim.SGD", "lr": 0.1},
        "regularization": {"dropout": None, "l2": 0.0},
        "seed": 0,
        "name": "digits",
    }
    run = types.SimpleNamespace(
        config=config,
        dir=directory,
        is_main=True,
        clock=types.SimpleNamespace(step=step, epoch=step // 10),
        total_steps=30,
        finished=lambda: run.clock.step >= run.total_steps,
        steps_per_epoch=10,
        epochs=3,
        batch_size=32,
        task=types.SimpleNamespace(monitor=("accuracy", "max")),
        selection=Selection("accuracy", "max"),
        model=nn.Linear(2, 2),
        device=torch.device("cpu"),
        facts={"device": "cpu", "step": "eager", "precision": "fp32", "data": "digits [1,257 train]"},
        lr=lambda: 0.1,
        val_size=270,
        resumed=resumed,
    )
    for name, value in changes.items():
        setattr(run, name, value)
    return run


def metric_record(step: int, split: str, **figures: Any) -> dict[str, Any]:
    record = {
        "step": step,
        "epoch": step // 10,
        "split": split,
        "loss": 1.0,
        "data_loss": 0.9,
        "penalty": 0.1,
    }
    return {**record, "lr": 0.1 if split == "train" else None, **figures}


def stats_record(step: int, layers: int = 3, **changes: Any) -> dict[str, Any]:
    """A healthy network of `layers` layers, with two tensors a layer."""
    names = [f"layer{position}.relu" for position in range(layers)]
    tensors = [f"layer{position}.{kind}" for position in range(layers) for kind in ("weight", "bias")]
    record = {
        "step": step,
        "epoch": step // 10,
        "layers": names,
        "tensors": tensors,
        "activation/mean": [0.1] * layers,
        "activation/std": [1.0 + 0.1 * (position % 2) for position in range(layers)],
        "activation/zeros": [0.5] * layers,
        "activation/dead": [0.0] * layers,
        "activation/saturated": [0.0] * layers,
        "activation_gradient/std": [1e-3] * layers,
        "gradient/norm": [0.1] * len(tensors),
        "weight/norm": [1.0] * len(tensors),
        "update/ratio": [1e-3, None] * layers,
        "gradient/global_norm": 1.23,
    }
    return {**record, **changes}
