"""What a network costs and sees, layer by layer, told from one forward pass on the meta device.

Counted are multiply-adds (one multiplication and one addition: 1) of convolutions and matrix products;
biases, normalization, activations and pooling are not. A multiply-add is 2 FLOP, and a training step costs
about 3 forward passes (the backward pass multiplies once for the input's gradient and once for the weight's).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from cnnlab.inspect import meta
from cnnlab.inspect.flops import fused_attention_off, multiply_adds
from cnnlab.inspect.receptive_field import FieldTracker, tensors_in
from cnnlab.torch_private import TorchDispatchMode

if TYPE_CHECKING:
    from rich.table import Table

_TRAINING_BATCH = 2
"""Batch normalization refuses a single value a channel in training, which an auxiliary head's 1x1 map would
be."""


@dataclass
class Layer:
    """One call of a module.

    `output` is (C, H, W) or (features,), without the batch. `kernel`, `stride`, `padding`, `dilation` and
    `groups` are `None` for layers that have none. `parameters` counts those that are first used here.
    `multiply_adds` is for one image, and so is `activation_bytes`: what training keeps for the backward pass.
    `receptive_field` is (height, width) in pixels and `jump` the pixels from one position to the next; both
    are `None` for what does not see the image. `training_only` layers, such as an auxiliary head, do not run
    in evaluation. `reads` and `writes` are the elements, weights aside, that the operators of one image's forward
    pass read and write: the traffic of a program that fuses nothing.
    """

    name: str
    type: str
    output: tuple[int, ...] = ()
    kernel: tuple[int, ...] | None = None
    stride: tuple[int, ...] | None = None
    padding: tuple[int, ...] | str | None = None
    dilation: tuple[int, ...] | None = None
    groups: int | None = None
    parameters: int = 0
    multiply_adds: int = 0
    receptive_field: tuple[int, int] | None = None
    jump: tuple[float, float] | None = None
    activation_bytes: int = 0
    training_only: bool = False
    reads: int = 0
    writes: int = 0


@dataclass(frozen=True)
class Summary:
    """A network's layers and totals. `activation_bytes` is for a training batch of `batch`, all else for one
    image.

    `multiply_adds` is one forward pass in evaluation, `training_multiply_adds` one in training, auxiliary
    heads included. `unused_parameters` took part in neither.
    """

    model: str
    input: tuple[int, int, int]
    batch: int
    layers: list[Layer] = field(repr=False)
    parameters: int
    trainable_parameters: int
    unused_parameters: int
    parameter_bytes: int
    multiply_adds: int
    training_multiply_adds: int
    activation_bytes: int

    @property
    def flops(self) -> int:
        """Floating-point operations of one image's evaluation."""
        return 2 * self.multiply_adds

    @property
    def training_flops(self) -> int:
        """Floating-point operations of one image's forward and backward pass, about."""
        return 3 * 2 * self.training_multiply_adds


def summarize(model: nn.Module, input_shape: Sequence[int], batch: int = 1) -> Summary:
    """Runs a weightless copy of `model` on the meta device; the model itself stays as it is, whatever its
    device.

    A network that the meta device cannot run (it looks at values) is run on the CPU, on a copy.

    Args:
        input_shape: (C, H, W).
        batch: samples of the training batch whose activation memory is told.

    Raises whatever the network raises for an input that it refuses.
    """
    channels, height, width = input_shape
    shape = (int(channels), int(height), int(width))
    meter, evaluated = _metered(model, shape)
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    return Summary(
        model=type(model).__name__,
        input=shape,
        batch=batch,
        layers=[layer for layer in meter.layers if _is_shown(layer, meter)],
        parameters=total,
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        unused_parameters=total - sum(layer.parameters for layer in meter.layers),
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
        multiply_adds=sum(layer.multiply_adds for layer in evaluated.layers),
        training_multiply_adds=sum(layer.multiply_adds for layer in meter.layers),
        activation_bytes=batch * sum(layer.activation_bytes for layer in meter.layers),
    )


def calls(model: nn.Module, input_shape: Sequence[int]) -> list[Layer]:
    """Every call of a module in a training pass, with the containers' own work (additions, concatenations) too."""
    channels, height, width = input_shape
    return _metered(model, (int(channels), int(height), int(width)))[0].layers


def _metered(model: nn.Module, shape: tuple[int, int, int]) -> tuple[_Meter, _Meter]:
    """What a training pass and an evaluation do, an image."""
    training, evaluated = meta.run(model, lambda copied, device: _run(copied, shape, device))
    called = {layer.name for layer in evaluated.layers}
    for layer in training.layers:
        layer.training_only = layer.name not in called
        layer.multiply_adds //= _TRAINING_BATCH
        layer.activation_bytes //= _TRAINING_BATCH
        layer.reads //= _TRAINING_BATCH
        layer.writes //= _TRAINING_BATCH
    return training, evaluated


def _run(model: nn.Module, shape: tuple[int, int, int], device: torch.device) -> tuple[_Meter, _Meter]:
    """A forward pass in training and one in evaluation."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    training, evaluated = _Meter(model), _Meter(model)
    with torch.random.fork_rng(devices=[]), fused_attention_off():
        torch.manual_seed(0)
        image = torch.zeros(_TRAINING_BATCH, *shape, dtype=dtype, device=device)
        with (
            torch.enable_grad(),
            training.watching(image),
            saved_tensors_hooks(training.keep, lambda kept: kept),
        ):
            model.train()(image)
        image = image[:1].clone()
        with torch.no_grad(), evaluated.watching(image):
            model.eval()(image)
    return training, evaluated


class _Meter(TorchDispatchMode):
    """Attributes to the module that runs what its operators multiply, use and keep."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler (1.3 s) to keep it out of a pass that is never compiled

    def __init__(self, model: nn.Module):
        super().__init__()
        self.layers: list[Layer] = []
        self.leaves: set[str] = set()
        self._model = model
        self._running: list[Layer] = []
        self._parameters = {id(parameter) for parameter in model.parameters()}
        self._state = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._kept: dict[int, Any] = {}
        self._image_size = (0, 0)
        self._fields: FieldTracker

    @contextmanager
    def watching(self, image: Tensor) -> Iterator[None]:
        self._fields = FieldTracker(image)
        self._image_size = (image.shape[-2], image.shape[-1])
        handles = []
        for name, module in self._model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name)))
            handles.append(module.register_forward_hook(self._leave))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if next(module.children(), None) is None:
                self.leaves.add(name)
            layer = Layer(name or type(module).__name__, type(module).__name__, **_geometry(module))
            self.layers.append(layer)
            self._running.append(layer)

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        layer = self._running.pop()
        tensor = _first_tensor(output)
        if tensor is None:
            return
        layer.output = tuple(tensor.shape[1:])
        seen = self._fields.of(tensor)
        if seen is not None:
            layer.receptive_field, layer.jump = seen.size(self._image_size), seen.jump()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        output = _by_shape(name, args)
        output = func(*args, **kwargs) if output is None else output
        if self._running:
            layer = self._running[-1]
            layer.multiply_adds += multiply_adds(name, args, output)
            if not func.is_view:
                layer.reads += sum(t.numel() for t in tensors_in(args) if _storage(t) not in self._state)
                layer.writes += sum(t.numel() for t in tensors_in([output]) if t.ndim > 1)  # not: a channel's moments
            for tensor in tensors_in(args):
                if id(tensor) in self._parameters:
                    self._parameters.discard(id(tensor))
                    layer.parameters += tensor.numel()
        self._fields.follow(name, args, kwargs, output)
        return output

    def keep(self, tensor: Tensor) -> Tensor:
        """Counts what autograd saves, once a storage; weights and running statistics are there anyway."""
        storage = _storage(tensor)
        if storage not in self._state and storage not in self._kept:
            self._kept[storage] = tensor.untyped_storage()  # held, or its address would be given to another
            if self._running:
                self._running[-1].activation_bytes += tensor.untyped_storage().nbytes()
        return tensor


_ELEMENTWISE = frozenset(["relu", "gelu", "silu", "mish", "elu", "leaky_relu", "hardswish"])


def _by_shape(name: str, args: Sequence[Any]) -> Any:
    """The empty results, on the meta device, of the operators that deep networks repeat most; `None` for
    others.

    torch derives these in Python, at 0.5 to 2 ms a call: half a minute for a thousand layers on a busy
    machine.
    """
    if not args or not isinstance(args[0], Tensor) or not args[0].is_meta:
        return None
    x = args[0]
    same = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    if name in _ELEMENTWISE:
        return same
    if name == "add" and isinstance(args[1], Tensor):
        y = args[1]
        return same if (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype) else None
    if name == "native_batch_norm":
        channels = x.shape[1] if args[5] else 0  # the batch's mean and deviation, in training
        return same, x.new_empty(channels), x.new_empty(channels)
    if name == "native_dropout":
        return same, torch.empty_strided(x.shape, x.stride(), dtype=torch.bool, device="meta")
    return None


def _storage(tensor: Tensor) -> int:
    """Identifies a storage; meta tensors have no data pointer to tell them apart."""
    return tensor.untyped_storage()._cdata


def _is_shown(layer: Layer, meter: _Meter) -> bool:
    """The leaves, and containers that cost something themselves; not `nn.Identity`."""
    if layer.parameters or layer.multiply_adds or layer.activation_bytes:
        return True
    return layer.name in meter.leaves and layer.type != "Identity"


def _geometry(module: nn.Module) -> dict[str, Any]:
    """Kernel, stride, padding, dilation and groups, of layers that slide over a map."""
    if not hasattr(module, "kernel_size"):
        return {}
    found: dict[str, Any] = {"kernel": _pair(module.kernel_size)}
    for name in ("stride", "padding", "dilation"):
        value = getattr(module, name, None)
        found[name] = value if value is None or isinstance(value, str) else _pair(value)
    if hasattr(module, "groups"):
        found["groups"] = int(module.groups)  # type: ignore[arg-type]
    return found


def _pair(value: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in value) if isinstance(value, list | tuple) else (int(value), int(value))


def _first_tensor(output: Any) -> Tensor | None:
    """Of a tensor, a mapping (`logits` comes first) or a sequence."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return next((tensor for value in values if (tensor := _first_tensor(value)) is not None), None)


def to_json(summary: Summary) -> dict[str, Any]:
    """The summary as one JSON document."""
    totals = {"flops": summary.flops, "training_flops": summary.training_flops}
    return {**asdict(summary), **totals}


def to_table(summary: Summary, max_rows: int | None = None) -> Table:
    """The summary for a terminal. With `max_rows` the middle of a longer list is left out."""
    from rich import box
    from rich.table import Table

    from cnnlab.sinks.drawing import plain

    title = plain(f"{summary.model}, input {_times(summary.input)}", "bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.caption, table.caption_style, table.caption_justify = _totals(summary), "", "left"
    for name in ("layer", "type", "output", "kernel"):
        table.add_column(name, overflow="fold")
    for name in ("parameters", "multiply-adds", "sees", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    layers = summary.layers
    head = tail = len(layers)
    if max_rows is not None and len(layers) > max_rows:
        head, tail = max_rows // 2, len(layers) - (max_rows - max_rows // 2)
    for layer in layers[:head]:
        table.add_row(*map(plain, _cells(layer, summary)))
    if tail > head:
        table.add_row(plain(f"... {tail - head:,} more"))
    for layer in layers[tail:]:
        table.add_row(*map(plain, _cells(layer, summary)))
    return table


def _cells(layer: Layer, summary: Summary) -> list[str]:
    field = layer.receptive_field
    return [
        layer.name,
        layer.type + (" (training only)" if layer.training_only else ""),
        _times(layer.output),
        _kernel(layer),
        f"{layer.parameters:,}" if layer.parameters else "",
        quantity(layer.multiply_adds) if layer.multiply_adds else "",
        "" if field is None else "all" if field == summary.input[1:] else _square(field),
        memory(layer.activation_bytes) if layer.activation_bytes else "",
    ]


def _kernel(layer: Layer) -> str:
    """`3 s2 p1`, and dilation and groups where they are not 1."""
    if layer.kernel is None:
        return ""
    words = [_square(layer.kernel)]
    for letter, value, silent in (("s", layer.stride, 1), ("p", layer.padding, 0), ("d", layer.dilation, 1)):
        if isinstance(value, str):
            words.append(f"{letter}={value}")
        elif value is not None and any(v != silent for v in value):
            words.append(f"{letter}{_square(value)}")
    if layer.groups not in (None, 1):
        words.append(f"g{layer.groups}")
    return " ".join(words)


def _totals(summary: Summary) -> str:
    unused = f", {summary.unused_parameters:,} of them unused" if summary.unused_parameters else ""
    trained = f" ({summary.trainable_parameters:,} trained{unused})"
    return (
        f"{summary.parameters:,} parameters{trained}, {memory(summary.parameter_bytes)}\n"
        f"{quantity(summary.multiply_adds)} multiply-adds an image = {quantity(summary.flops)}FLOP; "
        f"training {quantity(summary.training_flops)}FLOP an image (3 x forward)\n"
        f"{memory(summary.activation_bytes)} kept for the backward pass with batch {summary.batch}\n"
        "kernel: s stride, p padding, d dilation, g groups; memory: kept for the backward pass, an image\n"
        "sees: receptive field in pixels of an unbounded image, normalization statistics aside"
    )


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _square(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else _times(sizes)


def quantity(value: float) -> str:
    """1814073344 -> `1.81 G`."""
    scaled, unit = _scaled(value, 1000, ("", "K", "M", "G", "T", "P"))
    return f"{scaled:.3g} {unit}"


def memory(value: float) -> str:
    """Bytes in powers of 1024: 1536 -> `1.5 KiB`."""
    scaled, unit = _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
    return f"{scaled:.4g} {unit}"


def _scaled(value: float, base: int, units: Sequence[str]) -> tuple[float, str]:
    steps = 0
    while abs(value) >= 0.9995 * base and steps < len(units) - 1:
        value, steps = value / base, steps + 1
    return value, units[steps]
