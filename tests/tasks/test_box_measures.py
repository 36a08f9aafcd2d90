"""Boxes: overlap and losses against torchvision's operators, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torchvision import ops

from cnnlab.tasks.boxes import giou_loss, has_area, iou, mirrored, mse_loss, shifted, smooth_l1_loss


def boxes(count: int, seed: int) -> torch.Tensor:
    low, high = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)).sort(1).values.unbind(1)
    return torch.cat([low, high], 1)


def test_overlaps_and_losses_are_torchvisions():
    one, other = boxes(200, 0), boxes(200, 1)
    torch.testing.assert_close(iou(one, other), ops.box_iou(one, other).diagonal())
    torch.testing.assert_close(giou_loss(one, other), 1 - ops.generalized_box_iou(one, other).diagonal())
    torch.testing.assert_close(giou_loss(one, other), ops.generalized_box_iou_loss(one, other))
    torch.testing.assert_close(mse_loss(one, other), functional.mse_loss(one, other, reduction="none").mean(1))


def test_by_hand():
    one, other = torch.tensor([[0.0, 0.0, 0.4, 0.5]]), torch.tensor([[0.2, 0.0, 0.6, 0.5]])
    assert iou(one, other).item() == pytest.approx(1 / 3)
    assert giou_loss(one, other).item() == pytest.approx(2 / 3), "the box around both is covered"
    apart = torch.tensor([[0.6, 0.0, 1.0, 0.5]])
    assert iou(one, apart) == 0 and giou_loss(one, apart).item() == pytest.approx(1 + 0.2)
    assert smooth_l1_loss(one, other, 0.1).item() == pytest.approx((2 * 0.15) / 4)
    assert smooth_l1_loss(one, other, 0.4).item() == pytest.approx((2 * 0.2**2 / 0.8) / 4)
    assert shifted(one, 0.1, -0.2).tolist()[0] == pytest.approx([0.1, -0.2, 0.5, 0.3])
    assert mirrored(one).tolist()[0] == pytest.approx([0.6, 0.0, 1.0, 0.5])


def test_boxes_apart_have_a_slope_towards_each_other():
    box = torch.tensor([[0.0, 0.4, 0.2, 0.6]], requires_grad=True)
    giou_loss(box, torch.tensor([[0.7, 0.4, 0.9, 0.6]])).sum().backward()
    assert box.grad is not None and (box.grad[0, [0, 2]].sum() < 0).item(), "it moves to the right"


def test_boxes_without_area_have_finite_losses_and_slopes():
    box = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.4, 0.4]], requires_grad=True)
    empty = torch.zeros(2, 4)
    assert has_area(box).tolist() == [False, True]
    assert iou(empty, empty).tolist() == [0, 0]
    loss = giou_loss(box, empty) + smooth_l1_loss(box, empty, 0.1) + mse_loss(box, empty)
    loss.sum().backward()
    assert loss.isfinite().all() and box.grad is not None and box.grad.isfinite().all()


def test_half_precision_is_computed_in_single():
    one, other = boxes(20, 0).bfloat16(), boxes(20, 1)
    assert iou(one, other).dtype is giou_loss(one, other).dtype is mse_loss(one, other).dtype is torch.float32
