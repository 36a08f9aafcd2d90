"""What the tests of the networks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CIFAR: dict[str, Any] = {"num_classes": 10, "in_channels": 3, "image_size": (32, 32)}
DIGITS: dict[str, Any] = {"num_classes": 10, "in_channels": 1, "image_size": (8, 8)}


def drawn(make: Callable[[], nn.Module], *, fill: bool = True) -> nn.Module:
    """The network without the seconds that its constructor's draws take; `fill` gives it other weights."""
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    if not fill:
        return model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = max(1, parameter[0].numel()) ** -0.5
            parameter.uniform_(-scale, scale, generator=generator)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.fill_(1.0)
        for name, buffer in model.named_buffers():
            buffer.fill_(1.0 if name.endswith("var") else 0.0)
    return model


def images(size: int, *, channels: int = 3, count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def seeded_call(model: nn.Module, x: Tensor) -> Any:
    """The outputs with dropout drawn from the same numbers each time."""
    torch.manual_seed(7)
    return model(x)


def assert_same_network(ours: nn.Module, theirs: nn.Module, x: Tensor, evaluated: Tensor | None = None) -> None:
    """Loads their weights into ours; logits, running statistics and (in training) aux must agree.

    `x` are the images in training, `evaluated` (or the same) those in evaluation.
    """
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    with torch.no_grad():
        for training in (True, False):
            ours.train(training)
            theirs.train(training)
            batch = x if training or evaluated is None else evaluated
            found, expected = seeded_call(ours, batch), seeded_call(theirs, batch)
            if isinstance(expected, tuple):  # Inception's (logits, aux) in training
                torch.testing.assert_close(found["aux"], expected[1], rtol=1e-5, atol=1e-5)
                expected = expected[0]
            else:
                assert set(found) == {"logits"}
            torch.testing.assert_close(found["logits"], expected, rtol=1e-5, atol=1e-5)
    buffers = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=1e-5, atol=1e-5)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
