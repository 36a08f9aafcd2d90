"""Segmentation: heads, targets that move with their images, and learning."""

from __future__ import annotations

import pytest
import torch
from lab_runs import fitted, make_run, watched
from torch.nn import functional

from cnnlab.building.trial import check
from cnnlab.errors import ConfigError
from cnnlab.heads import NearestDecoder, UnpoolDecoder
from cnnlab.protocols import VOID, Features

SCENES = (
    "data=shapes", "data.limit=null", "data.train=48", "data.val=16", "data.test=16", "data.size=16",
    "task=segmentation", "trainer.batch_size=16", "data.noise=0.02", "data.clutter=0",
)  # fmt: skip
BACKBONES = {
    "vgg": ("model=vgg", "norm=batch"),
    "resnet": ("model=resnet", "model.width=8"),
    "cnn": ("model=cnn", "model.widths=[8,16]"),
}


@pytest.mark.parametrize(
    ("backbone", "head"), [("vgg", UnpoolDecoder), ("cnn", UnpoolDecoder), ("resnet", NearestDecoder)]
)
def test_each_backbone_gets_the_head_that_it_can_feed(backbone: str, head: type):
    run = make_run(*SCENES, *BACKBONES[backbone])
    assert type(run.model.head) is head
    batch, _ = next(run.batches())
    logits = run.model(batch["image"])["mask"]
    assert logits.shape == (16, 7, 16, 16)
    assert not any(name.startswith(("classifier", "fc")) for name, _ in run.model.named_parameters())


@pytest.mark.parametrize("backbone", ["vgg", "resnet"])
def test_it_learns_where_the_shapes_are(backbone: str):
    """The background alone has a mean IoU of .13 at most."""
    overrides = (*SCENES, *BACKBONES[backbone], "optim=adam", "optim.lr=0.003", "stats=off", "trainer.log_every=100")
    run, said = watched(*overrides, "trainer.epochs=30")
    trained = [record for record in said.records if record["split"] == "train"]
    assert trained[0]["mean_iou"] < 0.15
    assert trained[-1]["mean_iou"] > 0.3
    validated = [record for record in said.records if record["split"] == "val"]
    assert max(record["mean_iou"] for record in validated) == run.selection.value > validated[0]["mean_iou"] + 0.05


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_unpooling_head_runs_in_half_precision(precision: str):
    run = fitted(*SCENES, *BACKBONES["vgg"], f"trainer.precision={precision}", "trainer.max_steps=2")
    assert run.clock.step == 2


def test_unpooling_is_asked_for_where_there_is_nothing_to_unpool():
    from lab_runs import composed

    with pytest.raises(ConfigError, match="no max-pooling indices"):
        check(composed(*SCENES, *BACKBONES["resnet"], "head=unpool"))
    run = make_run(*SCENES, *BACKBONES["vgg"], "head=nearest")
    assert type(run.model.head) is NearestDecoder


def test_data_without_masks_is_refused():
    from lab_runs import composed

    with pytest.raises(ConfigError, match="mask"):
        check(composed("task=segmentation"))


def test_an_mlp_is_refused_for_it_has_no_maps():
    """Each of its stages is one position, which sees the whole image: a decoder could only paint all pixels alike."""
    from lab_runs import composed

    with pytest.raises(ConfigError, match="whose layers have no places left; type model=cnn, vgg or resnet"):
        check(composed(*SCENES, "model=mlp"))


def test_the_unpooling_decoder_puts_each_value_back_where_its_maximum_stood():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 7, 6, generator=generator)
    pooled, indices = functional.max_pool2d(x, 2, return_indices=True)
    decoder = UnpoolDecoder((3, 3), (3,), (7, 6), 5)
    seen = []
    decoder.blocks[0].register_forward_hook(lambda m, inputs, output: seen.append(inputs[0]))
    logits = decoder(Features((x, pooled), (indices,), ((7, 6),)))["mask"]
    assert logits.shape == (2, 5, 7, 6)
    (restored,) = seen
    assert torch.equal(restored, functional.max_unpool2d(pooled, indices, 2, output_size=(7, 6)))
    assert torch.equal(restored[restored != 0], x[restored != 0])
    assert (restored != 0).sum() == pooled.numel()


def test_unpooling_is_deterministic_where_that_is_asked_for():
    try:
        runs = [fitted(*SCENES, *BACKBONES["vgg"], "trainer.deterministic=true", "trainer.max_steps=2") for _ in "12"]
        assert runs[0].metrics == runs[1].metrics
    finally:
        torch.use_deterministic_algorithms(False)


def test_image_and_mask_are_augmented_together():
    """An image that is its own mask must still be, after any geometry; and void appears where nothing was."""
    run = make_run(
        *SCENES, *BACKBONES["resnet"], "augment=[flip,vertical_flip,rotate,translate,crop]", "normalize=none"
    )
    pipeline = run.loaders["train"].transform
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 2, (8, 16, 16), generator=generator).repeat_interleave(1, 0)
    mask = functional.max_pool2d(mask[:, None].float(), 5, 1, 2)[:, 0].long()
    batch = {
        "image": (mask * 255).to(torch.uint8)[:, None].expand(-1, 3, -1, -1).contiguous(),
        "mask": mask,
        "label": torch.zeros(8, dtype=torch.int64),
        "index": torch.arange(8),
    }
    moved = pipeline(batch, 1)
    assert not torch.equal(moved["mask"], mask)
    assert (moved["mask"] == VOID).any()
    clear = (moved["mask"] != VOID) & ((moved["image"][:, 0] - 0.5).abs() > 0.45)
    assert clear.float().mean() > 0.4
    assert torch.equal(moved["mask"][clear], (moved["image"][:, 0][clear] > 0.5).long())


def test_class_weights_that_count_labels_are_not_given_to_a_mask():
    """There are as many labels as shapes, and a mask has one class more: the background."""
    run = make_run(*SCENES, *BACKBONES["resnet"], "loss.class_weights=[1,2,2,2,2,2,2]")
    assert run.task.criterion.weight.tolist() == [1, 2, 2, 2, 2, 2, 2]
