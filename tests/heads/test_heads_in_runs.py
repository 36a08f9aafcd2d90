"""All that surrounds a run goes with every decoder and box head: statistics, half precision, views, resume, compiled
steps, several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lab_runs import all_state, differences, fitted, interrupted_at, make_run, resume_run, watched
from rank_processes import run_ranks

from cnnlab.machine.ranks import Ranks
from cnnlab.tasks.boxes import mirrored
from cnnlab.train import fit

SCENES = (
    "data=shapes", "data.limit=null", "data.train=16", "data.val=8", "data.test=8", "data.size=16",
    "task=segmentation", "loss=weighted", "loss.parts.cross_entropy.class_weights=balanced", "optim=adam",
    "trainer.batch_size=8", "trainer.epochs=2", "trainer.device=cpu", "trainer.threads=1", "trainer.log_every=1",
)  # fmt: skip
BACKBONES = {
    "nearest": ("model=resnet", "model.width=4"),
    "bilinear": ("model=resnet", "model.width=4"),
    "transposed": ("model=resnet", "model.width=4"),
    "unet": ("model=resnet", "model.width=4"),
    "unpool": ("model=alexnet", "model.width=0.1"),
    "fcn": ("model=resnet", "model.width=4", "model.output_stride=2"),
}
DECODERS = pytest.mark.parametrize("head", BACKBONES)
BOXES = ("box", "box_points")
HEADS = pytest.mark.parametrize("head", [*BACKBONES, *BOXES])
LOCALIZES = ("task=localization", "task.mse=1", "model=resnet", "model.width=4")


def overrides(head: str, *more: str) -> tuple[str, ...]:
    scenes = [text for text in SCENES if not text.startswith("loss.parts")] if head in BOXES else SCENES
    return (*scenes, *(LOCALIZES if head in BOXES else BACKBONES[head]), f"head={head}", *more)


@HEADS
def test_a_resumed_run_is_the_unbroken_one_with_half_precision_augmentation_and_views(head: str, tmp_path: Path):
    told = overrides(head, "trainer.precision=bf16", "augment=[flip,rotate]", "task.views=mirror", "stats.every=1")
    whole = fitted(*told, folder=tmp_path / "whole")
    interrupted_at(3, *told, folder=tmp_path / "cut")
    run = resume_run(tmp_path / "cut")
    fit(run)
    assert not differences(all_state(whole), all_state(run))


@DECODERS
def test_mirrored_views_of_a_mirrored_image_give_the_mirrored_mask(head: str):
    run = make_run(*overrides(head, "task.views=mirror", "stats=off"))
    batch, _ = next(run.batches())
    model = run.model.eval()
    with torch.no_grad():
        plain, mirror = (
            run.task.merge([(weight, model(view)) for weight, view in run.task.views(image)])["mask"]
            for image in (batch["image"], batch["image"].flip(-1))
        )
    torch.testing.assert_close(plain, mirror.flip(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", BOXES)
def test_mirrored_views_of_a_mirrored_image_give_the_mirrored_box(head: str):
    run = make_run(*overrides(head, "task.views=mirror", "stats=off", "trainer.precision=fp32"))
    batch, _ = next(run.batches())
    model = run.model.eval()
    with torch.no_grad():
        plain, mirror = (
            run.task.merge([(weight, model(view)) for weight, view in run.task.views(image)])["box"]
            for image in (batch["image"], batch["image"].flip(-1))
        )
    torch.testing.assert_close(plain, mirrored(mirror), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@HEADS
def test_a_compiled_step_learns_what_an_eager_one_does(head: str, monkeypatch: pytest.MonkeyPatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, **{**options, "backend": "aot_eager"}))
    told = overrides(head, "trainer.precision=fp32", "trainer.max_steps=2", "stats=off", "trainer.layout=contiguous")
    (_, eager), (run, compiled) = watched(*told, "trainer.step=eager"), watched(*told, "trainer.step=compiled")
    assert run.step.name == "compiled"
    losses = [[record["loss"] for record in said.records if record["split"] == "train"] for said in (eager, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def _losses(ranks: Ranks, told: tuple[str, ...]) -> list[float]:
    from lab_runs import Recorded

    run, said = make_run(*told, ranks=ranks), Recorded()
    run.listeners.insert(0, said)
    fit(run)
    return [record["loss"] for record in said.records] + [said.records[-1]["mean_iou"]]


@pytest.mark.slow
@HEADS
def test_two_processes_learn_what_one_does(head: str):
    focal = () if head in BOXES else ("loss.weights.focal=1",)
    told = overrides(head, "trainer.precision=fp32", "norm=group", "stats=off", "regularization.dropout=0", *focal)
    both = run_ranks(_losses, told)
    alone = _losses(Ranks(), told)
    assert both[0] == pytest.approx(alone, rel=1e-3)
