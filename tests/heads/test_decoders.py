"""Decoders: how each enlarges a map, against what torch computes and against closed forms; what backbones hand on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from lab_runs import fitted, make_run
from torch import Tensor, nn
from torch.nn import functional

from cnnlab.heads import BilinearDecoder, FullyConvolutional, NearestDecoder, TransposedDecoder, UNetDecoder
from cnnlab.heads.decoders import _unpool
from cnnlab.heads.upsampling import Doubling, doublings
from cnnlab.init import He
from cnnlab.inspect.layers import head_parameters
from cnnlab.models.alexnet import AlexNet
from cnnlab.models.inception import Inception
from cnnlab.models.resnet import CifarResNet, ResNet
from cnnlab.models.speednet import SpeedNet
from cnnlab.protocols import ConvNet, Features

SCENES = (
    "data=shapes", "data.limit=null", "data.train=8", "data.val=8", "data.test=8", "data.size=16", "data.clutter=0",
    "task=segmentation", "trainer.batch_size=8", "trainer.device=cpu", "trainer.threads=1", "stats=off",
)  # fmt: skip
HEADS = {
    "nearest": ("model=resnet", "model.width=8", "head.width=16"),
    "bilinear": ("model=resnet", "model.width=8", "head.width=16"),
    "transposed": ("model=resnet", "model.width=8", "head.width=16"),
    "unet": ("model=resnet", "model.width=8", "head.width=8"),
    "unpool": ("model=cnn", "model.widths=[16,32,32]", "model.depth=2"),
    "fcn": ("model=resnet", "model.width=16", "model.output_stride=2", "head.width=32"),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conv_is_identity(decoder: nn.Module) -> None:
    """Its convolutions, norms and activations do nothing, so that only its way to enlarge is left."""
    for number, block in enumerate(decoder.blocks):
        decoder.blocks[number] = nn.Identity()
        assert isinstance(block, nn.Sequential)
    for module in (*decoder.laterals, decoder.classifier):
        if isinstance(module, nn.Conv2d):
            nn.init.dirac_(module.weight)
            nn.init.zeros_(module.bias)


@pytest.mark.parametrize("head", HEADS)
def test_each_head_overfits_one_batch(head: str):
    run = fitted(
        *SCENES, *HEADS[head], f"head={head}", "optim=adam", "optim.lr=0.01", "schedule=constant",
        "trainer.max_steps=90", "trainer.epochs=90", "trainer.eval_every=90", "trainer.log_every=90",
    )  # fmt: skip
    assert {name.partition(".")[0] for name in head_parameters(run.model)} == {"head"}
    batch, _ = next(run.loaders["train"].batches(0))
    run.model.train()
    with torch.no_grad():
        outputs = run.model(batch["image"])
        sums = run.task.measure(outputs, batch)
    assert run.task.metrics(sums)["mean_iou"] > 0.8


# ---- ways to enlarge ----


@pytest.mark.parametrize(("kind", "mode"), [(NearestDecoder, "nearest"), (BilinearDecoder, "bilinear")])
def test_without_skips_a_mask_is_the_last_map_enlarged_step_by_step(kind: type, mode: str):
    decoder = kind((3, 5, 4), (45, 30), 4, width=4, skips=False)
    conv_is_identity(decoder)
    stages = (randn(2, 3, 23, 15), randn(2, 5, 12, 8), randn(2, 4, 6, 4, seed=1))
    x = stages[-1]
    for size in ((12, 8), (23, 15), (45, 30)):
        x = functional.interpolate(x, size=size, mode=mode)
    torch.testing.assert_close(decoder(Features(stages))["mask"], x)


def test_skips_add_each_stages_map():
    decoder = BilinearDecoder((4, 4), (8, 8), 4, width=4)
    conv_is_identity(decoder)
    high, low = randn(1, 4, 8, 8), randn(1, 4, 4, 4, seed=1)
    expected = high + functional.interpolate(low, size=(8, 8), mode="bilinear")
    torch.testing.assert_close(decoder(Features((high, low)))["mask"], expected)


@pytest.mark.parametrize(("before", "after"), [((6, 4), (12, 8)), ((6, 4), (11, 7)), ((5, 4), (11, 9))])
def test_a_transposed_convolution_starts_as_an_interpolation(before: tuple[int, int], after: tuple[int, int]):
    """Of twice the size, torch's bilinear one away from the border, where that repeats the last value."""
    up = Doubling(3, 4, "bilinear")
    He()(up, 0)
    x = randn(2, 3, *before)
    double = functional.interpolate(x, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(up(x)[..., 1:-1, 1:-1], double[..., 1:-1, 1:-1])
    assert up.enlarge(x, after).shape[-2:] == after
    if after[0] < 2 * before[0]:
        assert torch.equal(up.enlarge(x, after), up(x)[..., : after[0], : after[1]])


def checkers(up: Doubling, **options: float) -> float:
    """How much neighbours differ in the inside of what becomes of an even map."""
    inside = up(torch.ones(1, up.in_channels, 6, 6, **options))[..., 2:-2, 2:-2]
    return (inside[..., 1:] - inside[..., :-1]).abs().max().item()


def test_the_checkerboard_of_a_transposed_convolution_and_the_start_that_avoids_it():
    even = Doubling(1, 3, "random")
    nn.init.ones_(even.weight)
    inside = even(torch.ones(1, 1, 4, 4))[0, 0, 2:6, 2:6]
    counts = torch.tensor([[1.0, 2.0], [2.0, 4.0]])  # kernel entries that reach a pixel (Odena et al. 2016)
    torch.testing.assert_close(inside, counts.repeat(2, 2))
    nn.init.ones_((no_overlap := Doubling(1, 4, "random")).weight)
    assert checkers(no_overlap) == 0
    for kernel in (2, 3, 4):
        up = Doubling(5, kernel, "random")
        He()(up, 0)
        assert checkers(up) > 0.05, "random entries: neighbours see different ones"
        up = Doubling(5, kernel, "bilinear")
        He()(up, 0)
        assert checkers(up) < 1e-6
        torch.testing.assert_close(up(torch.ones(1, 5, 6, 6))[..., 2:-2, 2:-2], torch.ones(1, 5, 8, 8))


def test_the_experiments_init_fills_a_transposed_decoder_but_for_its_start():
    wide = (*SCENES, *HEADS["transposed"], "head=transposed", "init=normal")
    start, random = make_run(*wide).model.head, make_run(*wide, "head.start=random").model.head
    (up,), (other,) = start.ups[1], random.ups[1]
    assert torch.equal(up.weight, up.own_weight()) and not torch.equal(other.weight, up.weight)
    assert torch.equal(start.blocks[0][0].weight, random.blocks[0][0].weight)


@pytest.mark.parametrize(
    ("before", "after", "times"),
    [((23, 12), (45, 24), 1), ((55, 55), (224, 224), 2), ((8, 8), (8, 8), 0), ((35, 35), (71, 71), 1)],
)
def test_how_often_a_map_is_doubled(before: tuple[int, int], after: tuple[int, int], times: int):
    assert doublings(before, after) == times


def test_a_transposed_decoder_meets_every_size():
    sizes = ((8, 9), (4, 4), (4, 4), (1, 1))
    decoder = TransposedDecoder((3, 4, 5, 6), sizes, (31, 33), 7, width=8)
    assert [len(ups) for ups in decoder.ups] == [1, 0, 2] and len(decoder.up) == 2
    features = Features(tuple(randn(2, c, *size) for c, size in zip((3, 4, 5, 6), sizes, strict=True)))
    assert decoder(features)["mask"].shape == (2, 7, 31, 33)


def test_u_nets_blocks_see_the_stages_map_beside_the_enlarged_one():
    decoder = UNetDecoder((4, 8, 16), (16, 16), 3, width=4)
    assert [block[0][0].in_channels for block in decoder.blocks] == [4 + 8, 8 + 16]
    seen: list[Tensor] = []
    decoder.blocks[1].register_forward_hook(lambda m, inputs, output: seen.append(inputs[0]))
    stages = (randn(2, 4, 16, 16), randn(2, 8, 8, 8), randn(2, 16, 4, 4))
    assert decoder(Features(stages))["mask"].shape == (2, 3, 16, 16)
    assert torch.equal(seen[0][:, :8], stages[1])
    torch.testing.assert_close(seen[0][:, 8:], functional.interpolate(stages[2], scale_factor=2, mode="bilinear"))
    assert UNetDecoder((4,), (8, 8), 3)(Features((stages[0],)))["mask"].shape == (2, 3, 8, 8)


def test_the_fully_convolutional_head_is_torchvisions():
    from torchvision.models.segmentation.fcn import FCNHead

    ours, theirs = FullyConvolutional((4, 64), (24, 32), 5).eval(), FCNHead(64, 5).eval()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    last = randn(2, 64, 3, 4)
    expected = functional.interpolate(theirs(last), size=(24, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours(Features((randn(2, 4, 6, 8), last)))["mask"], expected)
    assert ours.dropout.p == theirs[3].p


# ---- pooling indices ----

POOLED = {
    "alexnet": (lambda size: AlexNet(num_classes=3, in_channels=3, image_size=size, width=0.1), 64, 3),
    "small alexnet": (lambda size: AlexNet(num_classes=3, in_channels=3, image_size=size, width=0.1), 32, 3),
    "resnet": (lambda size: ResNet(num_classes=3, in_channels=3, image_size=size, width=8), 64, 1),
    "speednet": (lambda size: SpeedNet(num_classes=3, in_channels=3, image_size=size, widths=(4, 6, 8)), 32, 3),
    "inception": (lambda size: Inception(num_classes=3, in_channels=3, image_size=size, width=0.1), 75, 2),
}


@pytest.mark.parametrize("name", POOLED)
def test_backbones_that_max_pool_hand_their_indices_on(name: str):
    made, side, poolings = POOLED[name]
    model: ConvNet = made((side, side)).eval()
    inputs: list[Tensor] = []
    for layer in model.modules():
        if isinstance(layer, nn.MaxPool2d) and layer.return_indices:
            layer.register_forward_hook(lambda m, given, output: inputs.append(given[0]))
    features = model.features(randn(2, 3, side, side))
    assert len(features.indices) == len(features.sizes) == len(model.pool_channels) == len(inputs) == poolings
    for x, indices, size, channels in zip(inputs, features.indices, features.sizes, model.pool_channels, strict=True):
        assert x.shape[1:] == (channels, *size)
        assert x.flatten(2).gather(2, indices.flatten(2)).min() >= x.min() and indices.shape[1] == channels


@pytest.mark.parametrize("model", ["alexnet", "speednet", "vgg11"])
def test_unpooling_reaches_the_images_size(model: str):
    run = make_run(*SCENES, f"model={model}", "head=unpool", "data.size=32")
    batch, _ = next(run.batches())
    assert run.model(batch["image"])["mask"].shape == (8, 7, 32, 32)


def test_values_of_windows_that_share_their_maximum_are_added():
    """As the gradient of the pooling adds them: unpooling is its transpose."""
    x = randn(1, 2, 9, 9).requires_grad_()
    pooled, indices = functional.max_pool2d(x, 3, 2, return_indices=True)
    assert len(indices[0, 0].unique()) < indices[0, 0].numel(), "no window shares its maximum; another seed does"
    values = randn(*pooled.shape, seed=1)
    (transposed,) = torch.autograd.grad(pooled, x, values)
    torch.testing.assert_close(_unpool(values, indices, (9, 9)), transposed)


# ---- dilated last stages ----


LARGE, SMALL = {"num_classes": 3, "in_channels": 3, "image_size": (70, 64)}, {"num_classes": 3, "in_channels": 3}


@pytest.mark.parametrize(
    "made",
    [
        partial(ResNet, **LARGE, width=8),
        partial(ResNet, **LARGE, width=8, depth=50, variant="paper"),
        partial(CifarResNet, **SMALL, image_size=(32, 30), width=4),
    ],
)
def test_a_dilated_network_is_the_strided_one_at_every_place(made: Callable[..., ConvNet]):
    """Holes in place of strides: each `step`-th pixel of its last map is the strided network's."""
    plain = made().eval()
    natural = 2 ** (len(plain.layers) - 1) * (4 if plain.stem == "imagenet" else 1)
    images = randn(2, 3, 70, 64) if plain.stem == "imagenet" else randn(2, 3, 32, 30)
    strided = plain.features(images).stages[-1]
    for step in (2, 4):
        dilated = made(output_stride=natural // step).eval()
        dilated.load_state_dict(plain.state_dict())
        last = dilated.features(images).stages[-1]
        torch.testing.assert_close(last[:, :, ::step, ::step], strided, rtol=1e-4, atol=1e-5)
        assert last.shape[-1] == -(-images.shape[-1] * step // natural)


def test_output_stride_is_torchvisions_dilation():
    from torchvision.models import resnet50

    with torch.random.fork_rng(devices=[]):
        theirs = resnet50(num_classes=3, replace_stride_with_dilation=[False, True, True]).eval()
    ours = ResNet(num_classes=3, in_channels=3, image_size=(64, 64), depth=50, output_stride=8).eval()
    ours.load_state_dict(theirs.state_dict())
    images = randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images)["logits"], theirs(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("stride", "words"), [(2, "between 4, the stem's, and 32"), (64, "between 4, the stem's, and 32")]
)
def test_an_output_stride_that_the_network_does_not_come_to_is_refused(stride: int, words: str):
    with pytest.raises(ValueError, match=words):
        ResNet(num_classes=3, in_channels=3, image_size=(64, 64), output_stride=stride)  # type: ignore[arg-type]


def test_torchvisions_bottlenecks_dilate_and_others_are_refused():
    from cnnlab.models.external import Torchvision

    with torch.device("meta"):
        model = Torchvision(num_classes=3, in_channels=3, image_size=(64, 64), name="resnet50", output_stride=8)
        last = model.features(torch.empty(1, 3, 64, 64, device="meta")).stages[-1]
        assert last.shape == (1, 2048, 8, 8)
        with pytest.raises(ValueError, match="cannot dilate its stages"):
            Torchvision(num_classes=3, in_channels=3, image_size=(64, 64), name="resnet18", output_stride=8)
