"""What decoders are made of: a convolution with its norm, and ways to enlarge a map."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnnlab.blocks import ActivationFactory, NormFactory, conv_norm

Size = tuple[int, int]


def refine(
    in_channels: int, out_channels: int, norm: NormFactory | None, activation: ActivationFactory | None
) -> nn.Sequential:
    """A 3x3 convolution with norm and activation; batch norm and ReLU where the experiment chooses none."""
    conv, normalizer = conv_norm(norm or nn.BatchNorm2d, in_channels, out_channels, 3, padding=1)
    return nn.Sequential(conv, normalizer, (activation or nn.ReLU)())


def repeated(x: Tensor, size: Size) -> Tensor:
    """(N, C, h, w) -> (N, C, *size): each value where its nearest neighbour is."""
    return x if x.shape[-2:] == size else functional.interpolate(x, size=size, mode="nearest")


def interpolated(x: Tensor, size: Size) -> Tensor:
    """(N, C, h, w) -> (N, C, *size), bilinearly; pixels are squares, and corners do not coincide."""
    return x if x.shape[-2:] == size else functional.interpolate(x, size=size, mode="bilinear", align_corners=False)


def doublings(before: Size, after: Size) -> int:
    """How often a map of `before` is doubled on its way to `after`: 23 to 45 once, 55 to 224 twice."""
    ratio = max(big / small for small, big in zip(before, after, strict=True))
    return max(0, round(torch.tensor(ratio).log2().item()))


class Doubling(nn.ConvTranspose2d):
    """A transposed convolution of stride 2: an upsampling that is learned (Long et al. 2015, "Fully Convolutional
    Networks", section 3.3).

    Where the kernel's side is no multiple of the stride, a pixel is reached by more or fewer entries of the kernel than
    its neighbour: a checkerboard, as long as training does not even it out (Odena et al. 2016, "Deconvolution and
    Checkerboard Artifacts"). A kernel of 2 or 4 is free of that, but not of what random entries make: there, too,
    neighbours see different ones. Started as the interpolation of each channel by itself, it has none.

    Args:
        in_channels, out_channels: of the maps; equal for an interpolation.
        kernel: its side.
        start: `bilinear` is that interpolation (with a kernel of 2: repetition), whatever the experiment's `init`;
            `random` leaves it to the `init`.
        bias: whether there is one.
    """

    def __init__(self, channels: int, kernel: int, start: Literal["bilinear", "random"], bias: bool = False) -> None:
        extra = kernel % 2
        super().__init__(channels, channels, kernel, 2, padding=(kernel - 1) // 2, output_padding=extra, bias=bias)
        self.start = start

    def own_weight(self) -> Tensor | None:
        """(channels, channels, kernel, kernel) to start from, on the CPU; `None` leaves it to the init."""
        if self.start == "random":
            return None
        side = self.kernel_size[0]
        half = (side + 1) // 2
        line = 1 - (torch.arange(side) - (side - 1) / 2).abs() / half
        line = 2 * line / line.sum()  # what reaches a pixel sums to 1 in each direction
        return torch.eye(self.in_channels)[:, :, None, None] * torch.outer(line, line)

    def enlarge(self, x: Tensor, size: Size | None = None) -> Tensor:
        """(N, C, h, w) -> (N, C, 2h, 2w), or what is left of it in `size`.

        A padded layer of stride 2 makes 23 of 45 as of 46: the last row and column go. One without padding makes 22 of
        45: it is interpolated.
        """
        x = self(x)
        if size is None or x.shape[-2:] == size:
            return x
        if all(0 <= have - want <= 1 for have, want in zip(x.shape[-2:], size, strict=True)):
            return x[..., : size[0], : size[1]]
        return interpolated(x, size)
