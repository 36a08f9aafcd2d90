"""Random numbers by stream: every draw is a function of (seed, stream, where), never of what ran before.

Two kinds of consumers:

- *whole-tensor draws* (init, dropout, the order of an epoch) seed a generator with `derive(seed, stream, ...)`;
- *per-sample draws* (augmentation, shares and boxes of mixup and CutMix) hash (seed, stream, epoch, sample index), so
  that neither the batch layout nor the number of workers or ranks changes what a sample gets. Whom a sample is mixed
  with follows from the order of the epoch: it is the one before it in the global batch.

The hash is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), in wrapping
int64 arithmetic, so that every device computes the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def derive(seed: int, stream: str, *where: int | str) -> int:
    """A 63-bit seed for `stream` at `where`; equal arguments give equal seeds on every machine."""
    text = "\x1f".join([str(int(seed)), stream, *map(str, where)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, stream: str, *where: int | str) -> torch.Generator:
    """A CPU generator at the start of the stream."""
    return torch.Generator().manual_seed(derive(seed, stream, *where))


@contextmanager
def seeded(seed: int, stream: str, *where: int | str) -> Iterator[None]:
    """Seeds torch's default CPU generator inside the block and restores its state after."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(derive(seed, stream, *where))
    try:
        yield
    finally:
        torch.set_rng_state(state)


def reseed(device: torch.device, seed: int, stream: str, *where: int | str) -> None:
    """Puts the default generators of the CPU and of `device` at the start of the stream.

    On the CPU this takes 1 µs; `torch.manual_seed`, which speaks to every kind of device, takes 110.
    """
    start = derive(seed, stream, *where)
    torch.default_generator.manual_seed(start)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(start)
    elif device.type != "cpu":
        torch.get_device_module(device).manual_seed(start)


@contextmanager
def restored(device: torch.device) -> Iterator[None]:
    """Lets torch's default generators of the CPU and of `device` be after the block what they were before."""
    before = torch.get_rng_state()
    elsewhere = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
    there = None if elsewhere is None else elsewhere.get_rng_state(device)
    try:
        yield
    finally:
        torch.set_rng_state(before)
        if elsewhere is not None:
            elsewhere.set_rng_state(there, device)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical (unsigned) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    return x ^ _shift(x, 31)


def uniform(seed: int, stream: str, epoch: int, index: Tensor, draws: int) -> Tensor:
    """Uniform numbers in [0, 1), one row a sample.

    Args:
        index: (N,) int64 sample indices, on any device.
        draws: how many numbers each sample gets.

    Returns:
        (N, draws) float32 on the device of `index`, a pure function of the arguments, row by row.
    """
    key = _signed(derive(seed, stream, epoch))
    offsets = torch.arange(1, draws + 1, device=index.device, dtype=torch.int64) * _signed(_GOLDEN)
    mixed = _mix(_mix(index.to(torch.int64) * _signed(_GOLDEN) + key)[:, None] + offsets)
    return _shift(mixed, 40).to(torch.float32) * 2.0**-24


def permutation(seed: int, epoch: int, length: int) -> Tensor:
    """The order in which epoch `epoch` visits `length` samples: (length,) int64 on the CPU."""
    return torch.randperm(length, generator=generator(seed, "order", epoch))
