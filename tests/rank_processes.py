"""Runs a function on several processes that form a group, as `torchrun` would start them."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")  # torch is imported once, in the server
_CONTEXT.set_forkserver_preload(["torch", "cnnlab.building.builder", "cnnlab.composing.composer", "lab_runs"])


def run_ranks(function: Callable[..., Any], *arguments: Any, world: int = 2, timeout: float = 120) -> list[Any]:
    """`function(ranks, *arguments)` of each rank, in their order. Raises `RuntimeError` with a rank's traceback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes, receivers = [], []
    for rank in range(world):
        receiver, sender = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_work, args=(sender, rank, world, port, function, arguments), daemon=True)
        process.start()
        processes.append(process)
        receivers.append(receiver)
    try:
        answers = [_answer(receiver, timeout) for receiver in receivers]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    for answer in answers:
        if isinstance(answer, str):
            raise RuntimeError(answer)
    return [value for (value,) in answers]


def _answer(receiver: Connection, timeout: float) -> Any:
    if not receiver.poll(timeout):
        return "no answer"
    import torch

    return torch.load(io.BytesIO(receiver.recv_bytes()), weights_only=True)


def _send(sender: Connection, answer: Any) -> None:
    """As bytes: tensors that are sent as such live in the memory of a process that ends."""
    import torch

    buffer = io.BytesIO()
    torch.save(answer, buffer)
    sender.send_bytes(buffer.getvalue())


def _work(
    sender: Connection, rank: int, world: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch

    from cnnlab.machine.ranks import join, leave

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        _send(sender, (function(join(), *arguments),))
    except BaseException:
        _send(sender, traceback.format_exc())
        raise
    finally:
        leave()
