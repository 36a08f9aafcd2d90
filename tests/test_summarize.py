"""Counts against the course's own figures, published ones, and sums done by hand."""

from __future__ import annotations

import io
import json
import time

import pytest
import torch
from rich.console import Console
from torch import nn

from cnnlab.inspect.summary import memory, quantity, summarize, to_json, to_table


def on_meta(build, *args, **options):
    with torch.device("meta"):
        return build(*args, **options)


def test_a_convolution_has_26_parameters_where_a_dense_layer_has_8_billion():
    """Course notes: 300x300 to 300x300, one channel, a 5x5 kernel."""
    layer = summarize(nn.Conv2d(1, 1, 5, padding=2), (1, 300, 300)).layers[0]
    assert (layer.parameters, layer.output) == (26, (1, 300, 300))
    assert layer.multiply_adds == 300**2 * 25
    dense = nn.Sequential(nn.Flatten(), on_meta(nn.Linear, 300**2, 300**2))
    assert summarize(dense, (1, 300, 300)).parameters == 300**4 + 300**2 == 8_100_090_000


def test_output_size_and_pooling_of_the_course_notes():
    """10x10, kernel 5, padding 1, stride 3 gives 3x3; pooling has no parameters."""
    net = nn.Sequential(nn.Conv2d(3, 4, 5, padding=1, stride=3), nn.MaxPool2d(2), nn.AvgPool2d(1))
    first, *pools = summarize(net, (3, 10, 10)).layers
    assert first.output == (4, 3, 3)
    assert (first.kernel, first.stride, first.padding, first.dilation, first.groups) == (
        (5, 5), (3, 3), (1, 1), (1, 1), 1,
    )  # fmt: skip
    assert [pool.parameters for pool in pools] == [0, 0]
    assert [pool.multiply_adds for pool in pools] == [0, 0]


@pytest.mark.parametrize(
    ("name", "size", "billions"),
    [("resnet18", 224, 1.814), ("vgg11", 224, 7.609), ("alexnet", 224, 0.714), ("inception_v3", 299, 5.713)],
)
def test_multiply_adds_and_parameters_of_torchvision(name, size, billions):
    import torchvision

    options = {"init_weights": False} if name == "inception_v3" else {}
    net = on_meta(getattr(torchvision.models, name), **options)
    summary = summarize(net, (3, size, size))
    assert summary.multiply_adds == by_layer(net.eval(), torch.empty(1, 3, size, size, device="meta"))
    assert summary.multiply_adds == pytest.approx(billions * 1e9, rel=1e-3)
    assert summary.parameters == sum(layer.parameters for layer in summary.layers)
    assert summary.activation_bytes == sum(layer.activation_bytes for layer in summary.layers)
    assert summary.unused_parameters == 0


def by_layer(net: nn.Module, image: torch.Tensor) -> int:
    """Of convolutions and dense layers alone: each output sums as many products as its filter has weights."""
    counts = []

    def count(module, args, output):
        counts.append(output.numel() * module.weight[0].numel())

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    net(image)
    return sum(counts)


class Sundry(nn.Module):
    """Transposed and grouped convolutions, attention, a bilinear product, a shared layer, a layer never
    used."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 4, 3, stride=2, groups=2)
        self.deep = nn.Conv2d(4, 8, 3, groups=4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.shared = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.unused = nn.Linear(10, 10)

    def forward(self, x):
        x = self.deep(self.up(x)).flatten(2).transpose(1, 2)
        x, _ = self.attention(x, x, x, need_weights=True)
        x = self.shared(self.shared(x)) * self.scale
        return {"logits": torch.bmm(x, x.transpose(1, 2)).mean(2)}


def test_an_arbitrary_network_by_hand():
    net, image = Sundry().train(), torch.zeros(1, 2, 6, 6)
    summary = summarize(net, image.shape[1:])
    positions = 11 * 11  # 6x6, transposed to 13x13, less the border
    convolutions = 2 * 6 * 6 * (2 * 3 * 3) + 8 * positions * (1 * 3 * 3)
    attention = positions * 8 * (4 * 8) + 2 * positions**2 * 8  # projections; scores and weighted values
    rest = 2 * positions * 8 * 8 + positions**2 * 8  # the shared layer, twice; the bilinear product
    assert summary.multiply_adds == convolutions + attention + rest
    assert summary.unused_parameters == 110
    assert summary.parameters == sum(p.numel() for p in net.parameters())
    by_name = {}
    for layer in summary.layers:
        by_name.setdefault(layer.name, []).append(layer)
    assert [layer.parameters for layer in by_name["shared"]] == [72, 0], "a shared layer counts once"
    assert by_name["Sundry"][0].parameters == 8, "what a container computes has a row"
    assert sum(layer.parameters for layer in by_name["attention"]) == 4 * (8 * 8 + 8)
    assert sum(layer.multiply_adds for layer in summary.layers) == summary.multiply_adds


def test_the_model_is_left_as_it_was():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5)).train()
    net[1].eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    generator = torch.get_rng_state()
    summarize(net, (1, 8, 8))
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in before.items())
    assert [module.training for module in net.modules()] == [True, True, False, True]
    assert torch.equal(generator, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert {p.device.type for p in net.parameters()} == {"cpu"}


def test_activation_memory_by_hand():
    """Convolution: its input; ReLU: its output, which is the pool's input too; pool: indices (int64); dense
    layer: the pool's output."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 8 * 8, 10)
    )
    summary = summarize(net, (3, 16, 16), batch=5)
    expected = {"0": 3 * 16 * 16 * 4, "1": 8 * 16 * 16 * 4, "2": 8 * 8 * 8 * 8, "3": 0, "4": 8 * 8 * 8 * 4}
    assert {layer.name: layer.activation_bytes for layer in summary.layers} == expected
    assert summary.activation_bytes == 5 * sum(expected.values())
    assert summary.parameter_bytes == 4 * summary.parameters


def test_activation_memory_is_what_the_graph_holds_on_the_cpu():
    """An independent count: the distinct storages that a real backward graph keeps."""
    import torchvision

    net = torchvision.models.resnet18(num_classes=10).train()
    kept, own = {}, {tensor.data_ptr() for tensor in (*net.parameters(), *net.buffers())}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = net(torch.zeros(2, 3, 32, 32))
    held = sum(storage.nbytes() for storage in kept.values())
    assert output.requires_grad
    assert summarize(net, (3, 32, 32), batch=2).activation_bytes == pytest.approx(held, rel=1e-3)


def test_frozen_layers_keep_nothing_and_do_not_count_as_trained():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    net[0].requires_grad_(False)
    summary = summarize(net, (1, 8, 8))
    assert summary.trainable_parameters == 4 * 36 * 2 + 2
    assert [layer.activation_bytes for layer in summary.layers] == [0, 0, 0, 4 * 36 * 4]


class Auxiliary(nn.Module):
    """A second head that runs in training only."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.aux = nn.Conv2d(1, 4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = self.body(x).mean((2, 3))
        return {"logits": self.head(x), "aux": self.aux(x)} if self.training else {"logits": self.head(x)}


def test_an_auxiliary_head_costs_in_training_only():
    summary = summarize(Auxiliary(), (1, 5, 5))
    assert summary.multiply_adds == 9 * 9 * 4 + 12
    assert summary.training_multiply_adds == summary.multiply_adds + 12
    assert summary.training_flops == 6 * summary.training_multiply_adds
    assert [layer.name for layer in summary.layers if layer.training_only] == ["aux"]
    assert summary.unused_parameters == 0


class LooksAtValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 3)

    def forward(self, x):
        return self.layer(x) if x.sum().item() >= 0 else x


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_network_that_looks_at_values_falls_back_to_the_cpu(device):
    summary = summarize(LooksAtValues().to(device), (1, 8, 8))
    assert summary.layers[0].multiply_adds == 36 * 2 * 9


def test_an_input_that_the_network_refuses_is_its_own_error():
    with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
        summarize(nn.Conv2d(1, 1, 5), (1, 3, 3))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def test_1202_layers_take_seconds_and_a_bounded_table():
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *(Block(16) for _ in range(600)), nn.Conv2d(16, 10, 1))
    start = time.process_time()
    summary = summarize(net, (3, 32, 32), batch=128)
    assert time.process_time() - start < 20, "a pass over all layers for each takes minutes"
    assert summary.layers[-1].receptive_field == (2403, 2403)
    assert to_table(summary, max_rows=40).row_count == 41


def printed(summary, **options):
    console = Console(file=io.StringIO(), width=140)
    console.print(to_table(summary, **options))
    return console.file.getvalue()


def test_the_table_says_which_convention_it_uses():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 7, stride=2, padding=3), nn.ReLU(),
        nn.Conv2d(8, 8, (1, 3), dilation=2, groups=8, padding="same"), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 1000),
    )  # fmt: skip
    text = printed(summarize(net, (3, 64, 64), batch=32))
    for words in (
        "7 s2 p3",
        "1x3 p=same d2 g8",
        "8x32x32",
        " all ",
        "multiply-adds an image",
        "FLOP",
        "batch 32",
    ):
        assert words in text


def test_the_json_document_is_plain():
    summary = summarize(Auxiliary(), (1, 5, 5), batch=4)
    document = json.loads(json.dumps(to_json(summary), allow_nan=False))
    assert document["flops"] == 2 * document["multiply_adds"]
    assert document["layers"][0]["receptive_field"] == [3, 3]
    assert document["layers"][0]["output"] == [4, 3, 3]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 "), (999, "999 "), (999_900_000, "1 G"), (1814073344, "1.81 G"), (2.5e6, "2.5 M")],
)
def test_quantities(value, text):
    assert quantity(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (5 * 2**30, "5 GiB")])
def test_memory(value, text):
    assert memory(value) == text
