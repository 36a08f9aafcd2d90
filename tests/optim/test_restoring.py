"""What an optimizer will keep is known before its first update, and what is none of it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from cnnlab.optim import Muon, RMSPropInside
from cnnlab.optim.decay import decouple_decay
from cnnlab.optim.restoring import require_own_states, states_after_an_update

FORETOLD: list[Callable[..., torch.optim.Optimizer]] = [
    lambda p: torch.optim.SGD(p, lr=0.1),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    lambda p: torch.optim.AdamW(p, amsgrad=True, fused=True),
    torch.optim.Adagrad,
    torch.optim.NAdam,
    torch.optim.RAdam,
    lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    RMSPropInside,
    Muon,
]


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3))


def stepped(make: Callable[..., torch.optim.Optimizer]) -> torch.optim.Optimizer:
    model = network()
    optimizer = make(model.parameters())
    model(torch.ones(2, 1, 6, 6)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("make", FORETOLD)
def test_the_state_after_an_update_is_foretold_and_nothing_is_touched(make: Callable[..., torch.optim.Optimizer]):
    done, fresh = stepped(make), make(network().parameters())
    before, noise = repr(fresh.state_dict()), torch.get_rng_state()
    after = states_after_an_update(fresh)
    assert after is not None
    assert repr(fresh.state_dict()) == before
    assert torch.equal(torch.get_rng_state(), noise)

    def kinds(states: Any) -> list[Any]:
        return [
            {name: (v.shape, v.dtype) if isinstance(v, torch.Tensor) else type(v) for name, v in state.items()}
            for state in states
        ]

    assert sorted(map(str, kinds(after.values()))) == sorted(map(str, kinds(done.state.values())))
    require_own_states(fresh)
    fresh.load_state_dict(done.state_dict())
    assert len(fresh.state) == len(done.state)


def test_a_hook_of_the_update_is_not_called():
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    decouple_decay(optimizer)
    optimizer.register_step_post_hook(lambda *_: pytest.fail("a hook was called"))
    assert states_after_an_update(optimizer) is not None


def lbfgs() -> torch.optim.Optimizer:
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    images = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(images).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return optimizer


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"d": torch.zeros(5)}, r"shape \(5,\)"),
        ({"d": torch.zeros(119, dtype=torch.float64)}, "float64"),
        ({"d": None}, "lacks d"),
        ({"old_dirs": []}, "as many old_dirs"),
        ({"n_iter": "3"}, "lacks n_iter"),
    ],
)
def test_the_memory_of_lbfgs_is_looked_at(change: dict[str, Any], words: str):
    done = lbfgs()
    fresh = torch.optim.LBFGS(network().parameters(), max_iter=3)
    require_own_states(fresh)
    state = done.state_dict()
    fresh.load_state_dict(state)
    state["state"][0] = state["state"][0] | change
    with pytest.raises(ValueError, match=words):
        fresh.load_state_dict(state)
