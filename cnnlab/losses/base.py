"""The shape contract of every loss, so that a loss itself states only its formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from cnnlab.protocols import VOID

ClassWeights = Literal["balanced"] | tuple[float, ...] | None
"""`balanced` counts the training set; a sequence gives one weight a class; `None` weighs all classes
alike."""


class PerSample(nn.Module):
    """`loss(logits, target) -> (N,)`: the mean over a sample's positions that have a target.

    - `logits`: (N, C) or, dense, (N, C, ...).
    - `target`: int64 (N,) or (N, ...), class indices; or floating point, of the shape of `logits`, a
      distribution over the classes at each position (mixup, CutMix, soft labels).

    In a dense target the index `VOID` (255), or a distribution that is zero everywhere, marks a position that
    counts nowhere; a sample with no other position has loss 0. Without positions all 256 indices are classes.

    A subclass implements `per_position`. A weight tensor is a buffer: move the loss to the device with `.to`.

    Args:
        num_classes: C, at least 2.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"expected at least 2 classes, received {num_classes}")
        self.num_classes = num_classes

    def per_position(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss at every position.

        Args:
            logits: (M, C) floating point.
            target: (M,) int64 in [0, C), or (M, C) floating point.

        Returns:
            (M,)
        """
        raise NotImplementedError(f"{type(self).__name__} implements per_position")

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        # Half-precision logits lose most digits of a small loss; the sum over positions loses the rest.
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        if logits.ndim == 2:
            return self.per_position(logits, target)
        logits, target, valid = flatten_positions(logits, target)
        samples, positions = valid.shape
        losses = self.per_position(logits.flatten(0, 1), target.flatten(0, 1)).view(samples, positions)
        # `where`, not a product: an infinite loss at a void position must not become a NaN.
        total = torch.where(valid, losses, 0.0).sum(1)
        return total / valid.sum(1).clamp(min=1)

    def initial_bias(self, num_classes: int) -> Tensor | None:
        """(num_classes,) bias that the classifier should start with, or `None` for its usual one."""
        return None

    def expected_initial_loss(self) -> float | None:
        """The loss of a network whose logits are all equal to their initial bias, the classes equally
        frequent.

        `None` where it depends on more than the logits. A first loss far from it tells of a wrong
        initialization or normalization.
        """
        bias = self.initial_bias(self.num_classes)
        row = torch.zeros(self.num_classes) if bias is None else bias
        device = next((buffer.device for buffer in self.buffers()), row.device)
        labels = torch.arange(self.num_classes, device=device)
        with torch.no_grad():
            return float(self(row.to(device).expand(self.num_classes, -1), labels).mean())


def flatten_positions(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dense tensors with their positions in a row.

    Args:
        logits: (N, C, ...).
        target: (N, ...) int64, or (N, C, ...) floating point.

    Returns:
        logits (N, P, C); target (N, P) int64 with 0 at void positions, or (N, P, C); valid (N, P) bool.
    """
    logits = logits.flatten(2).transpose(1, 2)
    if target.is_floating_point():
        target = target.flatten(2).transpose(1, 2)
        return logits, target, target.sum(2) > 0
    target = target.flatten(1)
    valid = target != VOID
    return logits, torch.where(valid, target, 0), valid


def as_distribution(target: Tensor, num_classes: int, dtype: torch.dtype, smoothing: float = 0.0) -> Tensor:
    """(M,) int64 or (M, C) floating point -> (M, C): one-hot rows, mixed with the uniform one by
    `smoothing`."""
    if not target.is_floating_point():
        # Not `one_hot`: it reads the largest index back from the device.
        target = target[:, None] == torch.arange(num_classes, device=target.device)
    target = target.to(dtype)
    return target if smoothing == 0 else target * (1 - smoothing) + smoothing / num_classes


def class_weight_tensor(
    weights: Literal["balanced"] | Sequence[float] | None, num_classes: int, class_counts: Tensor | None
) -> Tensor | None:
    """(C,) float32 weights, or `None` for equal ones.

    Balanced weights are n/(C·n_c), so that every class has the same total weight and the mean over the
    training set is 1. A class without samples has no say in that mean; it gets weight 1.

    Raises:
        ValueError: a wrong number of weights, a negative one, or `balanced` without counts.
    """
    if weights is None:
        return None
    if isinstance(weights, str):
        if weights != "balanced":
            raise ValueError(f"expected null, `balanced` or {num_classes} numbers, received {weights!r}")
        if class_counts is None:
            raise ValueError(
                "expected class counts for class_weights=balanced, received data without labels; "
                "give one number a class instead"
            )
        counts = class_counts.detach().to("cpu", torch.float64)
        _expect_length(len(counts), num_classes, "class counts")
        present = counts > 0
        balanced = counts.sum() / (present.sum() * counts)
        return torch.where(present, balanced, 1.0).to(torch.float32)
    values = torch.tensor([float(weight) for weight in weights])
    _expect_length(len(values), num_classes, "class_weights")
    if (values < 0).any():
        raise ValueError(f"expected class_weights >= 0, received {min(weights)}")
    return values


def _expect_length(received: int, expected: int, what: str) -> None:
    if received != expected:
        raise ValueError(f"expected {expected} {what} (one a class), received {received}")
