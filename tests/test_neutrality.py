"""Statistics look and do not touch: a run with them is, bit for bit, the run without them."""

from __future__ import annotations

import pytest
import torch
from lab_runs import bits, watched

RUNS = {
    "plain": (),
    "dropout and augmentation": ("model=cnn", "model.widths=[4,8]", "regularization.dropout=0.4", "augment=standard"),
    "accumulation and clipping": ("trainer.accumulate=3", "trainer.clip_norm=0.5", "optim=momentum"),
    "stochastic depth": ("model.depth=14", "regularization.stochastic_depth=0.3", "regularization.l1=1e-4"),
    "fp16": ("trainer.precision=fp16", "trainer.accumulate=2"),
    "bf16": ("trainer.precision=bf16",),
    "lbfgs": ("optim=lbfgs", "optim.max_iter=3"),
    "newton": ("optim=newton_cg", "optim.max_iter=2"),
    "recomputed": ("model.checkpoint=true",),
    "foreign network": ("model=torchvision", "model.name=mobilenet_v3_small", "data.limit=40", "data.size=32"),
}
CADENCE = ("stats.every=1", "trainer.max_steps=5", "trainer.log_every=1")


@pytest.fixture(scope="module")
def without():
    made = {}

    def get(kind: str):
        if kind not in made:
            made[kind] = watched(*RUNS[kind], "stats=off", *CADENCE)
        return made[kind]

    return get


def equal(first: list, second: list) -> bool:
    return len(first) == len(second) and all(
        a is b is None or torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True)
    )


def assert_the_same(first, second) -> None:
    (run, said), (other, expected) = first, second
    assert equal(said.losses, expected.losses)
    assert equal(said.random, expected.random)
    for mine, theirs in zip(said.gradients, expected.gradients, strict=True):
        assert equal(mine, theirs)
    assert list(run.model.state_dict()) == list(other.model.state_dict())
    assert equal(list(run.model.state_dict().values()), list(other.model.state_dict().values()))
    assert said.records == expected.records


@pytest.mark.parametrize("kind", RUNS)
def test_full_statistics_change_no_bit(kind: str, without):
    run, said = watched(*RUNS[kind], "stats=full", *CADENCE)
    assert len(said.stats) == run.clock.step >= 4
    assert_the_same((run, said), without(kind))


@pytest.mark.parametrize("level", ["light", "default"])
def test_neither_do_fewer(level: str, without):
    kind = "dropout and augmentation"
    assert_the_same(watched(*RUNS[kind], f"stats={level}", *CADENCE), without(kind))


def test_sampled_and_unsampled_steps_alternate_without_a_trace(without):
    kind = "fp16"
    assert_the_same(watched(*RUNS[kind], "stats=full", *CADENCE, "stats.every=2"), without(kind))
