"""Shapes run through networks without memory; what reads values runs on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cnnlab.inspect import meta


class Reads(nn.Module):
    """Wants values, in its constructor (`at`) or in its forward pass."""

    def __init__(self, at: str, how: str = "item"):
        super().__init__()
        self.how = how
        self.linear = nn.Linear(3, 2)
        self.noise = nn.Parameter(torch.randn(2))
        if at == "constructor":
            self._read(torch.linspace(0, 1, 3))

    def _read(self, x: Tensor) -> None:
        if self.how == "item":
            x.sum().item()
        elif self.how == "numpy":
            x.detach().numpy()
        else:
            torch.nonzero(x)

    def forward(self, x: Tensor) -> Tensor:
        self._read(x)
        return self.linear(x) + torch.arange(2)  # made on the default device


@pytest.mark.parametrize("how", ["item", "numpy", "nonzero"])
def test_what_reads_values_is_made_and_run_on_the_cpu(how: str):
    draws = torch.get_rng_state()
    made = meta.made(lambda: Reads("constructor", how))
    assert not made.linear.weight.is_meta
    assert torch.equal(torch.get_rng_state(), draws)
    places = []

    def work(copied: nn.Module, device: torch.device) -> torch.Size:
        places.append(device.type)
        with torch.device(device):
            return copied(torch.ones(5, 3)).shape

    model = Reads("forward", how)
    with torch.device("meta"):  # as while a network is made without memory
        assert meta.run(model, work) == (5, 2)
    assert places == ["meta", "cpu"]
    assert not model.linear.weight.is_meta


def test_a_network_without_memory_that_reads_values_gets_zeros():
    with torch.device("meta"):
        model = Reads("forward")
    found = meta.run(model, lambda copied, device: copied(torch.ones(1, 3, device=device)).tolist())
    assert found == [[0.0, 1.0]], "weights of zeros, and its own arange"
    assert model.linear.weight.is_meta


def test_one_that_reads_none_takes_no_memory():
    model = meta.made(lambda: nn.Linear(10**6, 10**6))
    assert model.weight.is_meta
    seen = meta.run(model, lambda copied, device: (copied.weight.is_meta, device.type))
    assert seen == (True, "meta")


def test_what_is_wrong_otherwise_is_raised():
    def refuse() -> nn.Module:
        raise RuntimeError("no such layer")

    with pytest.raises(RuntimeError, match="no such layer"):
        meta.made(refuse)
    calls = []

    def work(copied: nn.Module, device: torch.device) -> None:
        calls.append(device.type)
        copied(torch.ones(1, 4, device=device))

    with pytest.raises(RuntimeError, match="reduction|shape"):
        meta.run(nn.Linear(3, 2), work)
    assert calls == ["meta"], "no second pass on the CPU"
