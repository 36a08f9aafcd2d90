"""Box heads: what they compute, where they fit, and that each learns a batch by heart."""

from __future__ import annotations

import pytest
import torch
from lab_runs import make_run
from torch import nn
from torch.nn import functional

from cnnlab.heads import BoxHead, PointsHead
from cnnlab.heads.boxes import averaged, boxes_from, mean_places
from cnnlab.inspect.layers import head_parameters
from cnnlab.protocols import Features

HEADS = {"box": BoxHead, "box_points": PointsHead}
SCENES = (
    "data=shapes", "data.limit=null", "data.train=16", "data.val=8", "data.test=8", "data.size=32",
    "trainer.batch_size=16", "task=localization",
)  # fmt: skip
SMALL_CNN = ("model=cnn", "model.widths=[8,16]")


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 7), (2, 9)])
def test_parts_are_averaged_as_adaptive_pooling_does(size: tuple[int, int]):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(averaged(x, 4), functional.adaptive_avg_pool2d(x, 4))


def test_a_point_is_where_its_map_is_high():
    maps = torch.zeros(1, 2, 4, 8)
    maps[0, 0, 1, 6] = 100
    places = mean_places(maps)
    assert places[0, 0].tolist() == pytest.approx([6.5 / 8, 1.5 / 4])
    assert places[0, 1].tolist() == pytest.approx([0.5, 0.5]), "nowhere in particular: the middle"


def test_any_values_are_a_box():
    z = 20 * torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    box = boxes_from(z)
    assert (box[:, 2:] >= box[:, :2]).all()
    assert boxes_from(torch.zeros(1, 4)).tolist() == [[0.25, 0.25, 0.75, 0.75]]
    assert boxes_from(z.bfloat16()).dtype is torch.float32


@pytest.mark.parametrize("head", HEADS)
def test_a_box_head_has_the_experiments_own_norm_and_activation(head: str):
    run = make_run(*SCENES, *SMALL_CNN, f"head={head}", "norm=group", "activation=gelu")
    assert type(run.model.head) is HEADS[head]
    kinds = {type(module) for module in run.model.head.modules()}
    assert {nn.GroupNorm, nn.GELU} <= kinds and not {nn.BatchNorm2d, nn.ReLU} & kinds
    plain = make_run(*SCENES, *SMALL_CNN, f"head={head}")
    assert {nn.BatchNorm2d, nn.ReLU} <= {type(module) for module in plain.model.head.modules()}
    assert {name.partition(".")[0] for name in head_parameters(plain.model)} == {"head", "classifier"}


@pytest.mark.parametrize("head", HEADS)
def test_it_overfits_one_batch(head: str):
    """Sixteen images by heart: their classes, and their boxes to an IoU beyond what the constant box has."""
    run = make_run(*SCENES, "model=cnn", "norm=batch", f"head={head}", "optim=adam", "optim.lr=0.002")
    batch, _ = next(run.batches())
    optimizer = run.step.optimizer
    run.model.train()
    for _ in range(60):
        outputs = run.model(batch["image"])
        optimizer.zero_grad()
        run.task.loss(outputs, batch)["loss"].mean().backward()
        optimizer.step()
    figures = run.task.metrics(run.task.measure(outputs, batch))
    assert figures["accuracy"] == 1 and figures["mean_iou"] > 0.75, figures


def test_features_of_one_place_are_read_by_the_grid_and_refused_for_points():
    run = make_run(*SCENES, "model=mlp")
    assert type(run.model.head) is BoxHead
    head = BoxHead((3, 5), width=8, cells=2, hidden=6).eval()
    assert head(Features((torch.zeros(2, 5, 1, 1),)))["box"].shape == (2, 4)
