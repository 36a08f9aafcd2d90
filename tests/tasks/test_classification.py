"""Classification: test-time augmentation."""

from __future__ import annotations

import pytest
import torch
from lab_runs import make_run
from torch.nn import functional

from cnnlab.tasks.classification import Classification
from cnnlab.train.loop import evaluate


def views(kind: str, image: torch.Tensor) -> list[tuple[float, torch.Tensor]]:
    return Classification(loss=None, spec=None, views=kind).views(image)  # type: ignore[arg-type]


def test_the_views_are_mirror_images_and_shifts_by_a_pixel():
    image = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    assert [weight for weight, _ in views("none", image)] == [1]
    (_, plain), (_, mirrored) = views("mirror", image)
    assert torch.equal(plain, image)
    assert torch.equal(mirrored[..., 0], image[..., -1])
    found = views("mirror_translate", image)
    assert sum(weight for weight, _ in found) == 1
    assert sum(weight for weight, _ in found[:2]) == 0.5
    down_right, _, up_left, _ = (view for _, view in found[2:])
    assert torch.equal(down_right[..., 1:, 1:], image[..., :-1, :-1])
    assert torch.equal(up_left[..., :-1, :-1], image[..., 1:, 1:])
    assert torch.equal(down_right[..., 0, 1:], image[..., 1, :-1]), "reflected at the border"


@pytest.mark.parametrize("kind", ["mirror", "mirror_translate"])
def test_an_evaluation_averages_the_logits_of_the_views_and_training_does_not(kind: str):
    run = make_run(f"task.views={kind}", "model=cnn")
    batch, _ = next(run.loaders["val"].batches(0))
    run.model.eval()
    with torch.no_grad():
        logits = sum(weight * run.model(view)["logits"] for weight, view in views(kind, batch["image"]))
        expected = functional.cross_entropy(logits, batch["label"], reduction="none")
        losses, sums = run.forward(batch)
    torch.testing.assert_close(losses, expected)
    right = (logits.argmax(1) == batch["label"]).sum()
    assert sums["confusion"].diagonal().sum() == right
    plain = make_run("task.views=none", "model=cnn")
    assert evaluate(run, "val")["val/loss"] != evaluate(plain, "val")["val/loss"]
    run.model.train()
    plain.model.train()
    assert torch.equal(run.forward(batch)[0], plain.forward(batch)[0])
