"""Receptive fields, followed through a network operation by operation.

For each axis of the image, position i of a tensor sees the pixels from `low + i·jump` to `high + i·jump`. An
operation with kernel k, dilation d, padding p and stride s maps this window (Araujo, Norris, Sim 2019,
"Computing Receptive Fields of Convolutional Neural Networks", eq. 2 to 6) to

    low - p·jump,   high + ((k - 1)·d - p)·jump,   jump·s

and where branches meet (sum, concatenation) the field is the union of theirs. What is followed are the
operators that run, not the modules, so that shortcuts, slices and functions count as layers do.

Conventions: fields are those of an unbounded image, so they may exceed the image and reach into the padding;
the statistics of normalization layers are not counted; whatever mixes all positions (global pooling, a dense
layer on a map, attention) sees the whole image. After upsampling a field is exact to within one stride of the
map before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """What position i of an axis sees of one axis of the image: pixels `low + i·jump` to `high + i·jump`.

    `axis` is the dimension of the tensor, `None` where it is gone (a single position that every element
    shares).
    """

    axis: int | None
    low: float = 0.0
    high: float = 0.0
    jump: float = 1.0

    @property
    def size(self) -> float:
        """Pixels; infinite when it is the whole image."""
        return self.high - self.low + 1

    def widened(self, before: float, after: float, stride: float = 1.0) -> Window:
        """Reaching `before` and `after` positions further, at every `stride`-th position."""
        step = self.jump
        return replace(self, low=self.low - before * step, high=self.high + after * step, jump=step * stride)


def _whole(axis: int | None) -> Window:
    return Window(axis, -math.inf, math.inf, 0.0)


@dataclass(frozen=True)
class Field:
    """The windows of a tensor on the image's height and width.

    `folded` remembers, after a view (N, H, W, C) -> (N·H·W, C) as dense layers make it, the shape and the
    axes to unfold to.
    """

    height: Window
    width: Window
    folded: tuple[tuple[int, ...], tuple[int | None, int | None]] | None = None

    @property
    def windows(self) -> tuple[Window, Window]:
        return self.height, self.width

    def size(self, image: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in pixels of the image, the image's own where the field is the whole of it."""
        sizes = [
            math.ceil(window.size - 1e-6) if math.isfinite(window.size) else pixels
            for window, pixels in zip(self.windows, image, strict=True)
        ]
        return sizes[0], sizes[1]

    def jump(self) -> tuple[float, float]:
        return self.height.jump, self.width.jump


Rule = Callable[[Field, Tensor, Sequence[Any], dict[str, Any], Tensor], Field]
"""(field of the input, the input, the operator's arguments, its keyword arguments, its output) -> field."""


class FieldTracker:
    """Knows the field of every tensor that came out of the image, one operator at a time."""

    def __init__(self, image: Tensor):
        """`image`: (N, C, H, W)."""
        self._fields: dict[int, tuple[Tensor, Field]] = {}
        self._keep(image, Field(Window(2), Window(3)))

    def of(self, tensor: Tensor) -> Field | None:
        """`None` for what does not depend on the image."""
        entry = self._fields.get(id(tensor))
        return None if entry is None else entry[1]

    def _keep(self, tensor: Tensor, field: Field) -> None:
        self._fields[id(tensor)] = (
            tensor,
            field,
        )  # the tensor too: a freed one's id would be given to another

    def follow(self, name: str, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> None:
        """`name`: of an aten operator, such as `convolution`."""
        inputs = [(tensor, field) for tensor in tensors_in(args) if (field := self.of(tensor)) is not None]
        if not inputs:
            return
        tensor, field = inputs[0]
        plain = name if name.startswith("_") else name.rstrip("_")  # `relu_` acts like `relu`
        for position, out in enumerate(tensors_in([output])):
            if plain in _RULES:
                found = _RULES[plain](field, tensor, args, kwargs, out)
            elif plain in ("split", "split_with_sizes", "unbind"):
                found = _split(field, tensor, args, position, plain)
            elif plain in ("mm", "addmm"):
                found = field if field.folded else _mixed(field, tensor, out)
            elif plain in _MIXING or plain.startswith(("_scaled_dot_product", "_fft")):
                found = Field(_whole(None), _whole(None))
            else:
                found = _merged(inputs, out)
            self._keep(out, found)


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors of an operator's arguments or results, lists included."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(tensors_in(value))
    return found


_MIXING = frozenset(
    [
        "bmm",
        "baddbmm",
        "mv",
        "roll",
        "flip",
        "sort",
        "topk",
        "cumsum",
        "cumprod",
        "index",
        "gather",
        "scatter",
        "take",
        "grid_sampler_2d",
        "im2col",
        "col2im",
    ]
)


def _mixed(field: Field, tensor: Tensor, out: Tensor) -> Field:
    """A dense layer on (N, features): the windows of a single position stay, of more it is the whole
    image."""
    windows = [w if w.axis is None or tensor.shape[w.axis] == 1 else _whole(None) for w in field.windows]
    return Field(windows[0], windows[1])


def _merged(inputs: Sequence[tuple[Tensor, Field]], out: Tensor) -> Field:
    """Element by element, with broadcasting: the union of the windows."""
    merged = []
    for which in range(2):
        windows = []
        for tensor, field in inputs:
            window = field.windows[which]
            if window.axis is not None:
                axis = window.axis + out.ndim - tensor.ndim
                single = tensor.shape[window.axis] == 1
                same = 0 <= axis < out.ndim and (single or out.shape[axis] == tensor.shape[window.axis])
                window = replace(window, axis=None if single and out.shape[axis] != 1 else axis)
                if not same:
                    window = _whole(None)
            windows.append(window)
        along = {window.axis for window in windows if window.axis is not None}
        if len(along) > 1:
            merged.append(_whole(None))
            continue
        jump = max((window.jump for window in windows if window.axis is not None), default=windows[0].jump)
        low, high = min(window.low for window in windows), max(window.high for window in windows)
        merged.append(Window(next(iter(along), None), low, high, jump))
    folded = inputs[0][1].folded if out.shape[:1] == inputs[0][0].shape[:1] else None
    return Field(merged[0], merged[1], folded)


def _pair(value: Any) -> tuple[Any, Any]:
    values = list(value) if isinstance(value, list | tuple | torch.Size) else [value]
    return (values[0], values[0]) if len(values) == 1 else (values[-2], values[-1])


def _sliding(field: Field, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Field:
    windows = [
        window.widened(p, (k - 1) * d - p, s)
        for window, k, s, p, d in zip(
            field.windows, _pair(kernel), _pair(stride), _pair(padding), _pair(dilation), strict=True
        )
    ]
    return Field(windows[0], windows[1])


def _convolution(field: Field, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Field:
    weight, stride, padding, dilation, transposed = args[1], args[3], args[4], args[5], args[6]
    if tensor.ndim != 4:
        return Field(_whole(None), _whole(None))
    kernel = tuple(weight.shape[2:])
    if not transposed:
        return _sliding(field, kernel, stride, padding, dilation)
    windows = []
    for window, k, s, p, d in zip(field.windows, kernel, _pair(stride), _pair(padding), _pair(dilation), strict=True):
        reach = (k - 1) * d
        seen = math.ceil((reach + 1) / s) - 1  # further inputs that one output can get, around (p - reach / 2) / s
        center = (p - reach / 2) / s
        windows.append(window.widened(seen / 2 - center, seen / 2 + center, 1 / s))
    return Field(windows[0], windows[1])


def _pool(field: Field, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Field:
    return _pooling(field, args, dilation=1)


def _max_pool(field: Field, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Field:
    return _pooling(field, args, dilation=args[4] if len(args) > 4 else 1)


def _pooling(field: Field, args: Sequence[Any], dilation: Any) -> Field:
    kernel = args[1]
    stride = args[2] if len(args) > 2 and args[2] else kernel
    return _sliding(field, kernel, stride, args[3] if len(args) > 3 else 0, dilation)


def _adaptive(field: Field, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Field:
    """Cell i of m covers positions floor(i·n/m) to ceil((i + 1)·n/m) of n."""
    windows = []
    for window in field.windows:
        assert window.axis is not None
        n, m = tensor.shape[window.axis], out.shape[window.axis]
        if m == 1 and n > 1:
            windows.append(_whole(window.axis))
            continue
        widest = max(math.ceil((i + 1) * n / m) - i * n // m for i in range(m))
        windows.append(window.widened(0, widest - 1, n / m))
    return Field(windows[0], windows[1])


def _reduce(field: Field, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Field:
    """mean, sum, max, ... over dimensions, which go unless the result keeps them."""
    over = args[1] if len(args) > 1 and args[1] is not None else kwargs.get("dim")
    over = range(tensor.ndim) if over is None or over == [] else over if isinstance(over, list) else [over]
    gone = {dim % tensor.ndim for dim in over}
    windows = []
    for window in field.windows:
        if window.axis is None:
            windows.append(window)
            continue
        axis = window.axis
        if axis in gone:
            result = window if tensor.shape[axis] == 1 else _whole(axis)
            windows.append(replace(result, axis=axis if out.ndim == tensor.ndim else None))
        else:
            lost = 0 if out.ndim == tensor.ndim else sum(dim < window.axis for dim in gone)
            windows.append(replace(window, axis=window.axis - lost))
    return Field(windows[0], windows[1])


def _view(field: Field, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Field:
    """An axis survives where a dimension of its size keeps the same number of elements behind it."""
    if field.folded is not None and out.shape[:-1] == field.folded[0]:
        height, width = field.folded[1]
        return Field(replace(field.height, axis=height), replace(field.width, axis=width))
    axes = tuple(window.axis for window in field.windows)
    if out.ndim == 2 and tensor.ndim > 2 and out.shape[1] == tensor.shape[-1] and tensor.ndim - 1 not in axes:
        folded = (tuple(tensor.shape[:-1]), (axes[0], axes[1]))
        return Field(replace(field.height, axis=None), replace(field.width, axis=None), folded)
    behind = [math.prod(out.shape[dim + 1 :]) for dim in range(out.ndim)]
    windows = []
    for window in field.windows:
        if window.axis is None or tensor.shape[window.axis] == 1:
            windows.append(replace(window, axis=None))
            continue
        size, after = tensor.shape[window.axis], math.prod(tensor.shape[window.axis + 1 :])
        same = [dim for dim in range(out.ndim) if out.shape[dim] == size and behind[dim] == after]
        windows.append(replace(window, axis=same[0]) if same else _whole(None))
    return Field(windows[0], windows[1])


def _permute(field: Field, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Field:
    return _moved(field, [dim % tensor.ndim for dim in args[1]])


def _transpose(field: Field, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Field:
    first, second = (args[1] % tensor.ndim, args[2] % tensor.ndim) if len(args) > 2 else (0, tensor.ndim - 1)
    order = list(range(tensor.ndim))
    order[first], order[second] = order[second], order[first]
    return _moved(field, order)


def _moved(field: Field, order: Sequence[int]) -> Field:
    """`order[i]` is the dimension that comes to place i."""
    windows = [
        window if window.axis is None else replace(window, axis=order.index(window.axis)) for window in field.windows
    ]
    return Field(windows[0], windows[1])


def _slice(field: Field, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Field:
    dim = (args[1] if len(args) > 1 else 0) % tensor.ndim
    start = (args[2] if len(args) > 2 else None) or 0
    step = args[4] if len(args) > 4 else 1
    start = start + tensor.shape[dim] if start < 0 else start
    windows = [w.widened(-start, start, step) if w.axis == dim else w for w in field.windows]
    return Field(windows[0], windows[1], field.folded if dim else None)


def _select(field: Field, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Field:
    dim, index = args[1] % tensor.ndim, args[2]
    windows = []
    for window in field.windows:
        if window.axis == dim:
            at = index % tensor.shape[dim]
            windows.append(replace(window.widened(-at, at), axis=None))
        else:
            windows.append(replace(window, axis=_without(window.axis, dim)))
    return Field(windows[0], windows[1])


def _without(axis: int | None, dim: int) -> int | None:
    return axis if axis is None or axis < dim else axis - 1


def _split(field: Field, tensor: Tensor, args: Sequence[Any], position: int, name: str) -> Field:
    dim = (args[-1] if len(args) > (1 if name == "unbind" else 2) else 0) % tensor.ndim
    if name == "unbind":
        return _select(field, tensor, (tensor, dim, position), {}, tensor)
    sizes = args[1]
    start = sum(sizes[:position]) if isinstance(sizes, list | tuple) else sizes * position
    return _slice(field, tensor, (tensor, dim, start), {}, tensor)


def _pad(field: Field, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Field:
    """`args[1]`: (before, after) of the last dimension, then of the one before it, and so on."""
    windows = []
    for window in field.windows:
        place = -1 if window.axis is None else 2 * (tensor.ndim - 1 - window.axis)
        before = args[1][place] if 0 <= place < len(args[1]) else 0
        windows.append(window.widened(before, -before))
    return Field(windows[0], windows[1])


def _resized(taps: int) -> Rule:
    """Upsampling, each output from `taps` neighbors around its own place."""

    def rule(field: Field, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Field:
        windows = []
        for window, dim in zip(field.windows, (-2, -1), strict=True):
            scale = out.shape[dim] / tensor.shape[dim]
            further = 0 if scale == 1 else taps - 1
            center = (0.5 / scale) - 0.5
            windows.append(window.widened(further / 2 - center, further / 2 + center, 1 / scale))
        return Field(windows[0], windows[1])

    return rule


def _softmax(field: Field, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Field:
    dim = args[1] % tensor.ndim
    windows = [_whole(w.axis) if w.axis == dim and tensor.shape[dim] > 1 else w for w in field.windows]
    return Field(windows[0], windows[1], field.folded)


_RULES: dict[str, Rule] = {
    "convolution": _convolution,
    "max_pool2d_with_indices": _max_pool,
    "avg_pool2d": _pool,
    "_adaptive_avg_pool2d": _adaptive,
    "adaptive_max_pool2d": _adaptive,
    **dict.fromkeys(
        ["mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "linalg_vector_norm"], _reduce
    ),
    **dict.fromkeys(["view", "_unsafe_view", "reshape", "squeeze", "unsqueeze"], _view),
    "permute": _permute,
    **dict.fromkeys(("transpose", "t"), _transpose),
    "slice": _slice,
    "select": _select,
    **dict.fromkeys(["constant_pad_nd", "reflection_pad2d", "replication_pad2d"], _pad),
    **dict.fromkeys(["upsample_nearest2d", "_upsample_nearest_exact2d", "max_unpool2d"], _resized(1)),
    "upsample_bilinear2d": _resized(2),
    "upsample_bicubic2d": _resized(4),
    **dict.fromkeys(("_softmax", "_log_softmax"), _softmax),
}
"""How an operator on one image-dependent tensor maps its field; the others act element by element or mix
all."""
