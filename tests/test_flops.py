"""The `flops` of `run.json`: the same count as the summary's, at no cost to the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runs import TINY, Answer, record_of, run_folders
from lab_runs import make_run
from torch import nn

from cnnlab.inspect.flops import forward_flops
from cnnlab.inspect.summary import summarize

SCENES = ("data=shapes", "data.limit=null", "data.train=16", "data.val=16", "data.test=16", "data.size=16")
NETWORKS = {
    "resnet": (),
    "vgg": ("model=vgg",),
    "inception, with an auxiliary head in training": (*SCENES, "model=inception"),
    "mlp": ("model=mlp",),
    "a decoder": (*SCENES, "task=segmentation", "model=vgg", "norm=batch"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_the_summarys_count(name: str):
    run = make_run(*NETWORKS[name])
    shape = (run.spec.channels, *run.spec.size)
    assert forward_flops(run.model, shape) == summarize(run.model, shape).flops > 0


def test_it_is_a_count_by_hand_of_a_network_with_attention():
    """torch's own counter is no oracle: whether it sees fused attention depends on its version."""
    width, tokens, hidden = 16, 4 * 4, 32
    layer = nn.TransformerEncoderLayer(width, 4, hidden, batch_first=True)
    net = nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.Flatten(2), layer, nn.ConvTranspose1d(tokens, 4, 2, 2))
    convolution = tokens * width * (3 * 4 * 4)
    projections = tokens * width * (3 * width) + tokens * width * width  # query, key and value; output
    attention = 2 * tokens * tokens * width  # scores, and the values that they weigh, over all heads
    feed_forward = 2 * tokens * width * hidden
    transposed = tokens * width * (4 * 2)
    expected = convolution + projections + attention + feed_forward + transposed
    assert forward_flops(net, (3, 16, 16)) == 2 * expected == 110_592


def test_counting_leaves_the_run_as_it_was():
    run = make_run("regularization=dropout")
    run.model.train()
    run.model.bn1.eval()  # a frozen norm layer keeps its mode
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    modes = [module.training for module in run.model.modules()]
    state = torch.get_rng_state()
    forward_flops(run.model, (1, 8, 8))
    assert [module.training for module in run.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_a_run_records_it(cli: Callable[..., Answer], tmp_path: Path):
    assert cli("train", *TINY).code == 0
    answer = cli("summary", *TINY, "--json")
    (folder,) = run_folders(tmp_path)
    assert record_of(folder)["flops"] == json.loads(answer.out)["network"]["flops"]
