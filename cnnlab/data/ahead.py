"""Batches fetched while the device computes, and brought to a GPU without anybody waiting for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

import torch
from torch import Tensor

from cnnlab.data.threads import Threads
from cnnlab.machine.copies import pinned
from cnnlab.protocols import Batch

Fetched = TypeVar("Fetched")
_GRACE = 0.5
"""Seconds that a batch which is no longer wanted is waited for."""


_LOOK = 0.1
_LAST_CHANCE = 0.5
"""Seconds that the next batch still has when nobody wants to wait for it any more."""


class NotAwaited(Exception):
    """The batch that is due has not come, and whoever iterates has asked not to wait for it."""


def ahead(
    begin: Callable[[Tensor], Callable[[], Fetched]],
    parts: Iterable[Tensor],
    count: int,
    stopping: Callable[[], object] | None = None,
) -> Iterator[Fetched]:
    """`begin(part)()` of each part, in order, at most `count` parts ahead of the one that the caller has.

    `begin` runs in the caller's thread and must not wait; what it returns runs in a thread of its own. When the
    caller stops early, what has not begun is dropped, and what has is waited for a moment, not longer: it may be at
    a disk that does not answer.

    Args:
        stopping: whether the caller would rather end than wait; looked at while it waits.

    Raises:
        NotAwaited: it would.
    """
    thread = Threads(1, "cnnlab-fetch")
    waiting: deque[Future[Fetched]] = deque()
    try:
        for part in parts:
            waiting.append(thread.submit(begin(part)))
            if len(waiting) > count:
                yield _awaited(waiting.popleft(), stopping)
        while waiting:
            yield _awaited(waiting.popleft(), stopping)
    finally:
        for future in waiting:
            future.cancel()
        thread.close(_GRACE)


def _awaited(future: Future[Fetched], stopping: Callable[[], object] | None) -> Fetched:
    while stopping is not None and not future.done():
        wait([future], _LOOK)
        if stopping() and not wait([future], _LAST_CHANCE).done:
            raise NotAwaited
    return future.result()


class Copier:
    """Copies batches to a GPU on a stream of its own, so that copies and kernels overlap.

    `copy` runs in the fetching thread and `receive` in the one that computes. Neither waits for the device: the
    computing stream waits for the copy's event, and the memory is told that the computing stream uses it, so that
    it is not given to a later copy while kernels still read it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Of high priority, from a pool of its own: torch hands out its 32 ordinary streams in turn, and a copy on the
        # stream that a CUDA graph is captured on would become a part of the graph.
        self._stream = torch.cuda.Stream(device, priority=-1)

    def copy(self, fetch: Callable[[], Batch]) -> tuple[Batch, torch.cuda.Event]:
        """The batch that `fetch` makes, on its way to the device, and the event of its arrival."""
        # A new thread has device 0 and its default stream, whichever rank this is.
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            batch = {name: pinned(tensor).to(self.device, non_blocking=True) for name, tensor in fetch().items()}
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return batch, arrived

    def receive(self, copied: tuple[Batch, torch.cuda.Event]) -> Batch:
        batch, arrived = copied
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(arrived)
        for tensor in batch.values():
            tensor.record_stream(stream)
        return batch
