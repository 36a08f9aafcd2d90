"""Receptive fields against brute force: which pixels have a gradient from one position of the output."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnnlab.inspect.receptive_field import FieldTracker
from cnnlab.inspect.summary import summarize


def conv(kernel, stride=1, padding=0, **options):
    return nn.Conv2d(1, 1, kernel, stride, padding, **options)


class Apply(nn.Module):
    """A function of the map, with layers of its own for it to use."""

    def __init__(self, function, *layers):
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return self.function(x, *self.layers)


def support(net, size):
    """(low, high) of the rows, then of the columns, that position (middle, middle) of the output depends on.

    All weights are positive and so is the image: nothing cancels, and no ReLU is closed.
    """
    net = net.double().eval()
    for parameter in net.parameters():
        nn.init.uniform_(parameter.data, 0.5, 1.5, generator=torch.Generator().manual_seed(0))
    image = torch.rand(1, 1, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    image.requires_grad_(True)
    output = net(image)
    middle = (output.shape[-2] // 2, output.shape[-1] // 2)
    output[..., middle[0], middle[1]].sum().backward()
    seen = image.grad[0, 0] != 0
    rows, columns = seen.any(1).nonzero(), seen.any(0).nonzero()
    return middle, [(int(found.min()), int(found.max())) for found in (rows, columns)]


def tracked(net, size):
    """The field of the output, by the tracker under a dispatch mode of its own."""
    from torch.utils._python_dispatch import TorchDispatchMode

    image = torch.zeros(1, 1, size, size, dtype=torch.float64)
    tracker = FieldTracker(image)

    class Follow(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tracker.follow(func._schema.name.removeprefix("aten::"), args, kwargs or {}, out)
            return out

    with torch.no_grad(), Follow():
        output = net(image)
    return tracker.of(output)


EXACT = {
    "3x3 three times": nn.Sequential(conv(3), conv(3), conv(3)),
    "strided, padded, even kernel": nn.Sequential(conv(7, stride=2, padding=3), conv(4, stride=3, padding=1), conv(2)),
    "dilated": nn.Sequential(conv(3, dilation=2), conv(3, dilation=4, padding=4), conv((1, 5), padding=(0, 2))),
    "asymmetric": nn.Sequential(conv((1, 7), padding=(0, 3)), conv((7, 1), padding=(3, 0)), conv((3, 1))),
    "pools": nn.Sequential(conv(3, padding=1), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), conv(3)),
    "norm and activations": nn.Sequential(conv(3), nn.BatchNorm2d(1), nn.ReLU(), nn.GELU(), nn.Dropout(), conv(3)),
    "residual": Apply(lambda x, a, b: F.relu(b(F.relu(a(x))) + x), conv(3, padding=1), conv(3, padding=1)),
    "residual in place": Apply(lambda x, a, b: (b(a(x)).add_(x)).relu_(), conv(3, padding=1), conv(5, padding=2)),
    "sliced and padded shortcut": Apply(
        lambda x, a: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 0)).sum(1, keepdim=True) + a(x), conv(3, 2, 1)
    ),
    "shifted shortcut": Apply(lambda x, a: x[:, :, 3:, 3:] + a(x), conv(4)),
    "inception": nn.Sequential(
        Apply(
            lambda x, a, b, c, pool: torch.cat([a(x), b(x), c(x), pool(x)], 1),
            conv(1),
            nn.Sequential(conv(1), conv(5, padding=2)),
            nn.Sequential(conv(3, padding=1), conv((1, 3), padding=(0, 1))),
            nn.AvgPool2d(3, 1, 1),
        ),
        nn.Conv2d(4, 1, 3),
    ),
    "channels last": Apply(
        lambda x, a, dense, b: b(dense(a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
        conv(3),
        nn.Linear(1, 4),
        nn.Conv2d(4, 1, 3),
    ),
    "channel shuffle": Apply(
        lambda x, a, b: b(a(x).unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)),
        nn.Conv2d(1, 4, 3),
        nn.Conv2d(4, 1, 3, stride=2),
    ),
    "split and concatenated": Apply(
        lambda x, a, b, c: torch.cat([b(a(x).chunk(2, 1)[0]), c(a(x).chunk(2, 1)[1])], 1),
        nn.Conv2d(1, 2, 3),
        conv(3, padding=1),
        conv(7, padding=3),
    ),
    "transposed, kernel = stride": nn.Sequential(conv(3, 2), nn.ConvTranspose2d(1, 1, 2, 2)),
    "transposed, stride 1": nn.Sequential(conv(3), nn.ConvTranspose2d(1, 1, 3, 1, padding=1)),
    "nearest": nn.Sequential(conv(3, 2, 1), nn.Upsample(scale_factor=2)),
    "reflection": nn.Sequential(nn.ReflectionPad2d(2), conv(5)),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_window_is_the_gradients_support(name):
    net, size = EXACT[name], 47
    middle, seen = support(net, size)
    field = tracked(net, size)
    for window, at, (low, high) in zip(field.windows, middle, seen, strict=True):
        assert window.size == high - low + 1
        if "transposed, kernel" not in name and name != "nearest":  # there the place depends on the phase
            assert (window.low + at * window.jump, window.high + at * window.jump) == (low, high)


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(conv(3, 2, 1), nn.ConvTranspose2d(1, 1, 4, 2, 1), conv(3)),
        nn.Sequential(conv(3, 2, 1), nn.Upsample(scale_factor=2, mode="bilinear"), conv(3)),
        nn.Sequential(nn.MaxPool2d(2), conv(3, padding=1), nn.Upsample(scale_factor=2), conv(3)),
    ],
)
def test_after_upsampling_the_field_is_right_to_within_one_stride(net):
    _, seen = support(net, 40)
    field = tracked(net, 40)
    for window, (low, high) in zip(field.windows, seen, strict=True):
        assert abs(window.size - (high - low + 1)) <= 2


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(conv(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 3)),
        nn.Sequential(conv(3), nn.Flatten(), nn.Linear(100, 3)),
        Apply(lambda x, a: a(x).mean((2, 3)), conv(3)),
        Apply(lambda x, a: a(x) * a(x).mean((2, 3), keepdim=True), conv(3)),
        Apply(lambda x: F.softmax(x, dim=-1).softmax(dim=-2)),
        Apply(lambda x: x.roll((3, 3), (2, 3))),
        Apply(lambda x: torch.matmul(x, x).transpose(-1, -2)),
    ],
)
def test_what_mixes_all_positions_sees_the_whole_image(net):
    assert tracked(net.double(), 12).size((12, 12)) == (12, 12)


def test_a_dense_layer_on_a_single_position_adds_nothing():
    net = nn.Sequential(conv(5), nn.Flatten(), nn.Linear(1, 3)).double()
    assert tracked(net, 5).size((5, 5)) == (5, 5)
    wide = nn.Sequential(nn.Conv2d(1, 2, 3, stride=9), nn.Flatten(), nn.Linear(2, 3)).double()
    assert tracked(wide, 9).size((9, 9)) == (3, 3)


@pytest.mark.parametrize("depth", [1, 2, 5, 9])
def test_the_nth_three_by_three_sees_2n_plus_1(depth):
    net = nn.Sequential(*(conv(3, padding=1) for _ in range(depth)))
    assert summarize(net, (1, 64, 64)).layers[-1].receptive_field == (2 * depth + 1, 2 * depth + 1)


@pytest.mark.parametrize(
    ("name", "layer", "size"),
    [("alexnet", "features.12", 195), ("vgg16", "features.30", 212), ("resnet50", "layer4.2.relu", 427)],
)
def test_published_receptive_fields(name, layer, size):
    """Araujo, Norris, Sim 2019, table 1, for AlexNet, VGG-16 and Inception v3. Their ResNet-50 has its stride
    in the first 1x1 (483); torchvision's has it in the 3x3: 11 after the stem, then 3·8, 8 + 3·16, 16 + 5·32,
    32 + 2·64 more."""
    import torchvision

    with torch.device("meta"):
        net = getattr(torchvision.models, name)()
    *_, found = [row.receptive_field for row in summarize(net, (3, 224, 224)).layers if row.name == layer]
    assert found == (size, size)
