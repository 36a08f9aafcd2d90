"""The papers' recipes: each says how to run it and what to expect, and has the paper's optimizer and schedule."""

from __future__ import annotations

import pytest

from cnnlab.composing.composer import Composer, config_root

PAPERS = {
    "alexnet_2012": {"optim.momentum": 0.9, "optim.weight_decay": 5e-4, "trainer.batch_size": 128},
    "vgg_2014": {"optim.momentum": 0.9, "optim.weight_decay": 5e-4, "trainer.batch_size": 256},
    "inception_v3_2015": {"optim.eps": 1.0, "optim.decay": 0.9, "loss.label_smoothing": 0.1},
    "resnet_2015": {"optim.momentum": 0.9, "optim.weight_decay": 1e-4, "trainer.batch_size": 256},
    "resnet_cifar_2015": {"optim.momentum": 0.9, "optim.weight_decay": 1e-4, "trainer.batch_size": 128},
}
"""Krizhevsky et al. 2012, section 5; Simonyan & Zisserman 2014, section 3.1; Szegedy et al. 2015, section 8; He et al.
2015, sections 3.4 and 4.2."""


@pytest.mark.parametrize("name", [name + size for name in PAPERS for size in ("", "_small")])
def test_the_header_has_command_cost_and_result(name: str):
    text = (config_root() / "experiment" / f"{name}.yaml").read_text()
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    assert f"experiment={name}" in header and "cnnlab train" in header
    words = ("Cost", "paper") if not name.endswith("_small") else ("Measured",)
    assert all(word in header for word in words)


@pytest.mark.parametrize("name", PAPERS)
def test_the_optimizer_is_the_papers(name: str, shared_composer: Composer):
    overrides = [f"experiment={name}", "data=shapes"]
    config = shared_composer.compose(overrides).config
    for path, value in PAPERS[name].items():
        group, key = path.split(".")
        assert config[group][key] == value, path
