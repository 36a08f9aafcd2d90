"""One forward pass, followed operation by operation: what is measured of each value, and what theory says of it.

Works for whatever calls torch's functions, by modules or not, since it listens to the functions. Nothing is changed:
each operation is run as it was called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cnnlab.diagnose import theory
from cnnlab.diagnose.gaussian import Activation, Moments
from cnnlab.diagnose.theory import Subtracted, Value
from cnnlab.measure import effective_rank

_ACTIVATIONS = frozenset(
    "relu relu6 leaky_relu prelu rrelu elu celu selu gelu silu mish sigmoid logsigmoid tanh softplus softsign "
    "hardswish hardsigmoid hardtanh hardshrink softshrink tanhshrink threshold".split()
)
_SAME = frozenset("dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout contiguous clone to".split())
_WEIGHTED = frozenset("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split())
_SUMMING = _WEIGHTED | {"linear"}
"""What a network without activations is told by."""


@dataclass
class Site:
    """An activation as it was called, or what a network without them has in its place.

    `before` and `after` are the values as the theory has them; the others are measured.
    """

    name: str
    kind: str
    pre: Moments
    post: Moments
    before: Value | None = None
    after: Value | None = None
    rank: float = math.nan
    """The effective rank of the inputs' values (see `cnnlab.measure.effective_rank`)."""
    signal: float = math.nan
    """The part of the standard deviation that is between inputs: of each unit at each place, about its mean."""
    gradients: list[Tensor] = field(default_factory=list)

    def note_gradient(self, gradient: Tensor) -> None:
        self.gradients.append(gradient.detach().double().square().mean())

    @property
    def gradient(self) -> float:
        """The root mean square of the gradient of a sample's loss."""
        return math.sqrt(float(torch.stack(self.gradients).sum())) if self.gradients else math.nan


class Followed(TorchFunctionMode):
    """Within it, operations on what descends from `inputs` are followed.

    Args:
        model: whose modules give the sites their names.
        linear: whether the sites are the outputs of convolutions and linear layers, rather than the activations.
    """

    def __init__(self, model: nn.Module, *, linear: bool = False):
        super().__init__()
        self.model = model
        self.linear = linear
        self.sites: list[Site] = []
        self.values: list[Value] = []
        self._known: dict[int, tuple[Tensor, Value]] = {}
        self._running: list[str] = []
        self._used: dict[str, int] = {}
        self._whole: nn.Module | None = None
        self._size = 0

    @contextmanager
    def watching(self, inputs: Tensor) -> Iterator[None]:
        self._size = len(inputs)
        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(self._enter, name)))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            self._value(inputs)
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def end(self, outputs: Mapping[str, Tensor]) -> list[Site]:
        """The network's outputs by name, which a loss is about to read, as sites."""
        found = []
        for name, output in outputs.items():
            known = self._known.get(id(output), (output, _UNKNOWN))[1]
            value = None if known is _UNKNOWN else known
            with torch.no_grad():
                found.append(self._site("output", Moments.measured(output, _axis(output)), output, value, value))
            found[-1].name = name
            if value is not None:
                self._watch(output)
        self._known.clear()
        return found

    # ---- modules ----

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        self._running.append(name)
        if self._whole is None and getattr(module, "is_activation", False):
            self._whole = module

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._whole is module:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                self._activation(type(module).__name__, module.forward, args[0], output, None)
            self._whole = None  # until here what is computed is not followed
        self._running.pop()

    def _name(self, kind: str) -> str:
        name = self._running[-1] if self._running else ""
        name = name or kind
        self._used[name] = self._used.get(name, 0) + 1
        return name if self._used[name] == 1 else f"{name} #{self._used[name]}"

    # ---- functions ----

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").rstrip("_") if not _is_dunder(func) else func.__name__
        tensors = [t for t in _tensors((args, kwargs)) if id(t) in self._known]
        if self._whole is not None or not tensors:
            return func(*args, **kwargs)
        if name in _ACTIVATIONS:
            return self._called(name, func, args, kwargs)
        returned = func(*args, **kwargs)
        output = returned[0] if "_with_indices" in name else returned
        if not isinstance(output, Tensor):
            parts = [t for t in _tensors(output) if t.requires_grad]
            if parts:
                self._lose(tensors)
            for part in parts:
                self._descends(part)
            return returned
        if not output.requires_grad or not output.is_floating_point():
            return returned
        with torch.no_grad():
            value = _follow(self, name, func, args, kwargs, output)
            if self.linear and name in _SUMMING:
                self.sites.append(self._site(name, Moments.measured(output, _axis(output)), output, value, value))
        if value is None:
            self._lose([t for t in tensors if t is not output])
            self._descends(output)
        else:
            self._keep(output, value)
        return returned

    def _called(self, name: str, func: Any, args: Any, kwargs: Any) -> Tensor:
        """An activation, run as it was called; in place it would overwrite what is to be measured."""
        x = args[0] if args else kwargs["input"]
        pre, value = Moments.measured(x, _axis(x)), self._value(x)
        output = func(*args, **kwargs)
        others = {key: v for key, v in kwargs.items() if key not in ("inplace", "input")}
        rest = tuple(args[1:])
        if func.__name__ in ("relu", "relu6", "silu", "selu", "mish", "hardswish", "hardsigmoid"):
            rest = ()  # the only other argument is `inplace`
        plain = getattr(F, name, None) or getattr(torch, name)

        def activation(z: Tensor) -> Tensor:
            return plain(z, *(r.double() if isinstance(r, Tensor) else r for r in rest), **others)

        self._activation(name, activation, x, output, pre, value)
        return output

    def _activation(
        self,
        kind: str,
        activation: Activation,
        x: Tensor,
        output: Tensor,
        pre: Moments | None,
        before: Value | None = None,
    ) -> None:
        with torch.no_grad():
            axis = _axis(output)
            pre = Moments.measured(x, axis) if pre is None else pre
            before = before or self._value(x)
            after = theory.through_activation(activation, before)
            if not self.linear:
                self.sites.append(self._site(kind, pre, output, before, after))
        if after is None:
            self._lose([x])
            self._descends(output)
        else:
            self._keep(output, after)

    def _site(self, kind: str, pre: Moments, output: Tensor, before: Value | None, after: Value | None) -> Site:
        rows = output.detach().reshape(len(output), -1)
        site = Site(self._name(kind), kind, pre, Moments.measured(output, _axis(output)), before, after)
        if len(rows) == self._size:
            site.rank, site.signal = effective_rank(rows), float((rows - rows.mean(0)).double().square().mean().sqrt())
        if output.requires_grad:
            output.register_hook(site.note_gradient)
        return site

    # ---- what is known of tensors ----

    def _value(self, tensor: Tensor) -> Value:
        """What theory knows of a tensor; where that is nothing, it begins anew with what is measured."""
        if id(tensor) in self._known and self._known[id(tensor)][1] is not _UNKNOWN:
            return self._known[id(tensor)][1]
        axis = _axis(tensor)
        value = Value(Moments.measured(tensor, axis), False, axis)
        self._keep(tensor, value)
        return value

    def _keep(self, tensor: Tensor, value: Value) -> None:
        self._known[id(tensor)] = tensor, value  # held, or its id would be given to another
        self.values.append(value)

    def _descends(self, tensor: Tensor) -> None:
        self._known[id(tensor)] = tensor, _UNKNOWN

    def _lose(self, tensors: Sequence[Tensor]) -> None:
        """What an operation reads that the theory does not know: its gradient is measured."""
        for tensor in tensors:
            if self._known[id(tensor)][1] is not _UNKNOWN:
                self._watch(tensor)

    def _watch(self, tensor: Tensor) -> None:
        value = self._known[id(tensor)][1]
        if value is not _UNKNOWN and tensor.requires_grad and not value.watched:
            value.watched = True
            tensor.register_hook(value.note_gradient)


_UNKNOWN = Value(Moments(torch.zeros(0), torch.zeros(0), torch.zeros(0)), False)
"""Of a tensor that descends from the inputs, and of which the theory knows nothing until it is asked."""


def _axis(tensor: Tensor) -> int:
    """Along which the units of a layer lie: tokens (N, T, C) have them last."""
    return 2 if tensor.ndim == 3 else 1


def _is_dunder(func: Any) -> bool:
    return getattr(func, "__name__", "").startswith("__")


def _tensors(arguments: Any) -> Iterator[Tensor]:
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, list | tuple):
        for item in arguments:
            yield from _tensors(item)
    elif isinstance(arguments, dict):
        yield from _tensors(list(arguments.values()))


# ---- what each function does, by its name ----


def _follow(pass_: Followed, name: str, func: Any, args: Any, kwargs: Any, output: Tensor) -> Value | None:
    """What theory says of an operation's output; `None` where it says nothing."""
    rule = _RULES.get(name)
    if rule is None:
        return None
    try:
        return rule(_Call(pass_, func, tuple(args), dict(kwargs), output))
    except (TypeError, IndexError, KeyError, ValueError, RuntimeError):  # called in a way that this does not know
        return None


@dataclass(frozen=True)
class _Call:
    pass_: Followed
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    def get(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    @property
    def x(self) -> Tensor:
        return self.get(0, "input")

    @property
    def value(self) -> Value:
        return self.pass_._value(self.x)


def _weighted(call: _Call) -> Value | None:
    x, weight, bias = call.x, call.get(1, "weight"), call.get(2, "bias")
    transposed = "transpose" in call.func.__name__
    names: Sequence[str] = ("stride", "padding", "dilation", "groups")
    if transposed:
        names = ("stride", "padding", "output_padding", "groups", "dilation")
    fallback = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    geometry = {name: call.get(3 + place, name, fallback[name]) for place, name in enumerate(names)}
    if x.ndim != weight.ndim or _axis(x) != 1:
        return None
    return theory.through_weights(call.func, call.value, weight, bias, **geometry)


def _linear(call: _Call) -> Value | None:
    x = call.x
    if x.ndim > 3 or x.ndim < 2:
        return None
    return theory.through_linear(call.value, call.get(1, "weight"), call.get(2, "bias"))


def _batch_norm(call: _Call) -> Value | None:
    if not call.get(5, "training", False):
        return None
    eps, weight, bias = call.get(7, "eps", 1e-5), call.get(3, "weight"), call.get(4, "bias")
    return _normalized(call, lambda x: x.movedim(1, 0).flatten(1), eps, weight, bias, by_input=False)


def _normalized(
    call: _Call,
    groups: Callable[[Tensor], Tensor],
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    by_input: bool = True,
) -> Value | None:
    """Args: groups: a tensor in the groups that share moments, (groups, members)."""
    if _axis(call.x) != 1:
        return None
    subtracted = Subtracted(groups, call.x)
    call.output.register_hook(subtracted.note_gradient)
    return theory.through_norm(call.value, subtracted, eps, weight, bias, by_input=by_input)


def _group_norm(call: _Call) -> Value | None:
    count = call.get(1, "num_groups")
    weight, bias, eps = call.get(2, "weight"), call.get(3, "bias"), call.get(4, "eps", 1e-5)
    return _normalized(call, lambda x: x.reshape(len(x) * count, -1), eps, weight, bias)


def _instance_norm(call: _Call) -> Value | None:
    weight, bias, eps = call.get(3, "weight"), call.get(4, "bias"), call.get(7, "eps", 1e-5)
    return _normalized(call, lambda x: x.flatten(2).flatten(0, 1), eps, weight, bias)


_ADDING = ("__iadd__", "add_")  # in place


def _sum(call: _Call) -> Value | None:
    left, right = call.args[:2]
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)) or left.shape != right.shape or left is right:
        return None
    if call.kwargs.get("alpha", 1) != 1 or (call.output is left and call.func.__name__ not in _ADDING):
        return None
    return theory.through_sum([call.pass_._value(left), call.pass_._value(right)])


def _joined(call: _Call) -> Value | None:
    parts = call.args[0]
    if call.get(1, "dim", 0) not in (1, 1 - call.output.ndim) or _axis(call.output) != 1:
        return None
    return theory.through_joining([call.pass_._value(part) for part in parts], [part.shape[1] for part in parts])


def _same(call: _Call) -> Value | None:
    alike = call.output.shape == call.x.shape and torch.equal(call.output, call.x)
    return theory.through_scaling(call.value, 1.0) if alike else None


def _scaled(call: _Call) -> Value | None:
    numbers = [a for a in call.args[:2] if isinstance(a, int | float)]
    if len(numbers) != 1 or not isinstance(call.args[0], Tensor):
        return None
    divides = "div" in call.func.__name__
    return theory.through_scaling(call.value, 1 / numbers[0] if divides else numbers[0])


def _flattened(call: _Call) -> Value | None:
    x = call.x
    if call.output.ndim != 2 or len(call.output) != len(x) or x.ndim < 2 or _axis(x) != 1:
        return None
    return theory.through_flattening(call.value)


def _taken(call: _Call) -> Value | None:
    index = call.args[1]
    index = index if isinstance(index, tuple) else (index,)
    whole = slice(None)
    if len(index) < 2 or index[0] != whole or index[1] != whole or any(isinstance(i, Tensor) for i in index):
        return None
    return theory.through_places(call.value, lambda m: m[index])


def _padded(call: _Call) -> Value | None:
    pad, x = call.get(1, "pad"), call.x
    if x.ndim != 4 or any(pad[:4]) or len(pad) != 6 or call.get(3, "value", None):
        return None
    return theory.through_empty_channels(call.value, x.shape[1] / call.output.shape[1])


def _pooled(call: _Call, average: Callable[..., Tensor], **geometry: Any) -> Value | None:
    if _axis(call.x) != 1:
        return None
    size = geometry.get("kernel_size")
    if size is None:  # adaptive: the windows share the places out
        window = call.x[0, 0].numel() / call.output[0, 0].numel()
    else:
        window = math.prod(size) if isinstance(size, list | tuple) else size ** (call.x.ndim - 2)
    maximum = "max" in call.func.__name__
    return theory.through_pooling(call.value, call.output, partial(average, **geometry), window, maximum=maximum)


def _pool(call: _Call) -> Value | None:
    """Of `max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)` and `avg_pool2d(x, kernel, stride, padding,
    ceil_mode)`."""
    maximum = "max" in call.func.__name__
    if maximum and call.get(4, "dilation", 1) not in (1, (1, 1)):
        return None
    average = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}[call.x.ndim]
    size = call.get(1, "kernel_size")
    return _pooled(
        call,
        average,
        kernel_size=size,
        stride=call.get(2, "stride") or size,
        padding=call.get(3, "padding", 0),
        ceil_mode=call.get(5 if maximum else 4, "ceil_mode", False),
    )


def _adaptive(call: _Call) -> Value | None:
    average = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}[call.x.ndim]
    return _pooled(call, average, output_size=call.get(1, "output_size"))


def _mean(call: _Call) -> Value | None:
    x = call.x
    dims = call.get(1, "dim")
    dims = [d % x.ndim for d in (dims if isinstance(dims, list | tuple) else [dims])]
    if sorted(dims) != list(range(2, x.ndim)) or x.ndim < 3 or _axis(x) != 1:
        return None
    keep = call.get(2, "keepdim", False)
    run = partial(torch.mean, dim=dims, keepdim=keep)
    return theory.through_pooling(call.value, call.output, run, x[0, 0].numel(), maximum=False)


_RULES: dict[str, Callable[[_Call], Value | None]] = {
    **dict.fromkeys(_WEIGHTED, _weighted),
    **dict.fromkeys(_SAME, _same),
    "linear": _linear,
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    **dict.fromkeys(("add", "__add__", "__iadd__", "__radd__"), _sum),
    **dict.fromkeys(("cat", "concat", "concatenate"), _joined),
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "__imul__", "div", "__truediv__"), _scaled),
    **dict.fromkeys(("flatten", "view", "reshape"), _flattened),
    "__getitem__": _taken,
    "pad": _padded,
    **dict.fromkeys((f"{kind}_pool{n}d" for kind in ("avg", "max", "_max") for n in (1, 2, 3)), _pool),
    **dict.fromkeys((f"max_pool{n}d_with_indices" for n in (1, 2, 3)), _pool),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"), _adaptive),
    "mean": _mean,
}
"""The functions that the theory knows, by their names without the `_` of those that work in place."""
