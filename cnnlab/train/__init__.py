"""The loop and what it drives. It knows protocols only, never a concrete part."""

from __future__ import annotations

from cnnlab.train.loop import fit, train_epoch

__all__ = ["fit", "train_epoch"]
