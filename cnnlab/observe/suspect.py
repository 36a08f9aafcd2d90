"""Where values stop being finite: the first module, forward, or the first operation, backward, that makes them so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Suspect:
    """`layer`: the module's name (empty: the network itself); `kind`: its class. `what`: in words, what is not finite
    and what was. `values`: `NaN`, `inf` or both. `rows`: positions in the micro-batch, empty where the batch's axis
    cannot be told."""

    layer: str
    kind: str
    what: str
    values: str
    rows: tuple[int, ...] = ()


def values_of(tensors: Sequence[Tensor]) -> str:
    """Which values that are not finite there are, in words; the empty text for none."""
    nan = any(bool(t.isnan().any()) for t in tensors)
    infinite = any(bool(t.isinf().any()) for t in tensors)
    return " and ".join([*(["NaN"] if nan else []), *(["inf"] if infinite else [])])


def rows_of(tensors: Sequence[Tensor], batch: int) -> tuple[int, ...]:
    """Rows of (batch, ...) tensors that hold a value that is not finite."""
    bad: set[int] = set()
    for tensor in tensors:
        if tensor.ndim and tensor.shape[0] == batch:
            bad |= set((~tensor.isfinite()).reshape(batch, -1).any(1).nonzero().flatten().tolist())
    return tuple(sorted(bad))


def finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors)


def floats(value: Any) -> list[Tensor]:
    """The floating tensors in what a module takes or gives."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        return [t for item in value.values() for t in floats(item)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in floats(item)]
    return [t for item in vars(value).values() for t in floats(item)] if hasattr(value, "__dict__") else []


@dataclass
class _Call:
    """A module's call: the operations that made its inputs and its outputs."""

    name: str
    module: nn.Module
    before: tuple[Any, ...]
    after: tuple[Any, ...] = ()
    inner: int = 0
    """Calls inside it."""


class Trace:
    """Follows one forward and one backward pass of a network. Every check waits for the device.

        with Trace(model, batch=64) as trace:
            loss = ...
            if trace.found is None:
                trace.backward(loss)

    `found` is the first suspect, or `None`.
    """

    def __init__(self, model: nn.Module, batch: int):
        self._names = {id(module): name for name, module in model.named_modules()}
        self._model = model
        self._batch = batch
        self._calls: list[_Call] = []
        self._open: list[_Call] = []
        self._last: str | None = None
        self._handles: list[Any] = []
        self.found: Suspect | None = None

    def __enter__(self) -> Trace:
        for module in self._model.modules():
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    # ---- forward ----

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        tensors = floats(inputs)
        call = _Call(self._names[id(module)], module, tuple(t.grad_fn for t in tensors if t.grad_fn is not None))
        if self._open and not finite(tensors):
            outer = self._open[-1]
            after = f", between {self._last} and {call.name}" if self._last else f", before {call.name}"
            self._suspect(outer.name, outer.module, f"what its own code computes{after}", tensors)
        self._open.append(call)

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        call, tensors = self._open.pop(), floats(output)
        call.after = tuple(t.grad_fn for t in tensors if t.grad_fn is not None)
        self._calls.append(call)
        if self._open:
            self._open[-1].inner += 1
        if not finite(tensors):
            what = "its output; its input is finite"
            if call.inner:
                what = f"its output; that of {self._last}, the last layer in it, is finite"
            self._suspect(call.name, module, what, tensors)
        self._last = call.name

    def _suspect(self, name: str, module: nn.Module, what: str, tensors: Sequence[Tensor]) -> None:
        if self.found is None:
            kind = type(module).__name__
            self.found = Suspect(name, kind, what, values_of(tensors), rows_of(tensors, self._batch))

    # ---- backward ----

    def backward(self, total: Tensor) -> None:
        """The backward pass of a scalar, each of its operations looked at."""
        nodes = list(_nodes(total.grad_fn))
        first: list[tuple[Any, list[Tensor], list[Tensor]]] = []

        def watch(node: Any) -> Callable[..., None]:
            def hook(to_inputs: Sequence[Tensor | None], to_outputs: Sequence[Tensor | None]) -> None:
                given = [t for t in to_outputs if t is not None and t.is_floating_point()]
                made = [t for t in to_inputs if t is not None and t.is_floating_point()]
                if not first and finite(given) and not finite(made):
                    leaves = [type(after).__name__ == "AccumulateGrad" for after, _ in node.next_functions]
                    kept = zip(to_inputs, [*leaves, *[False] * (len(to_inputs) - len(leaves))])
                    first.append((node, made, [t for t, leaf in kept if t is not None and not leaf]))

            return hook

        handles = [node.register_hook(watch(node)) for node in nodes]
        try:
            total.backward()
        finally:
            for handle in handles:
                handle.remove()
        if first and self.found is None:
            node, made, along = first[0]
            name, module = self._owner(node)
            what = "its gradient" if not finite(along) else "the gradient of its weights"
            operation = node.name().rstrip("0123456789").removesuffix("Backward")
            what += f", in the backward pass of {operation}; the gradient that reaches it is finite"
            kind = "" if name == LOSS else type(module).__name__
            self.found = Suspect(name, kind, what, values_of(made), rows_of(along, self._batch))

    def _owner(self, node: Any) -> tuple[str, nn.Module]:
        """The innermost module in whose call an operation was made; the network for those outside of all."""
        for call in self._calls:  # inner ones end before the outer ones
            if any(node is inside for inside in _nodes(*call.after, until=call.before)):
                return call.name, call.module
        return LOSS, self._model


LOSS = "the loss"
"""In the place of a layer, for operations behind the network."""


def _nodes(*ends: Any, until: Sequence[Any] = ()) -> Iterator[Any]:
    """The operations of a graph from its ends down, without `until` and what is below."""
    stop, known = set(until), set()
    waiting = [end for end in ends if end is not None]
    while waiting:
        node = waiting.pop()
        if node in known or node in stop:
            continue
        known.add(node)
        yield node
        waiting += [below for below, _ in node.next_functions if below is not None]
