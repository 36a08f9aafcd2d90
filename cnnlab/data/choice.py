"""What a run chooses of its data path when it is built, and takes up again when it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from cnnlab.data.found import Findings
from cnnlab.data.served import served
from cnnlab.errors import UsageError
from cnnlab.machine.ranks import Ranks
from cnnlab.protocols import Data, Split
from cnnlab.schema import DataPath, Decoder, Loading


def loaded(
    make: Callable[[Loading], Data], loading: Loading, ranks: Ranks, recorded: DataPath | None
) -> tuple[dict[str, Split], Findings]:
    """The splits, and what was found beside them. Rank 0 loads first, so that the others find decoded what it has
    decoded.

    A run that goes on streams if it did so before: a stream's fingerprint is of its files, a decoded set's of its
    pixels. Where decoded images lie is chosen anew, by what the machine has: it changes no batch.

    Args:
        make: the data set for these settings.
        recorded: the path with which the run began.

    Raises:
        DataError: the data is missing or unusable.
        UsageError: the processes chose differently.
    """
    if loading.path is DataPath.auto and recorded is not None:
        loading = replace(loading, path=DataPath.stream if recorded is DataPath.stream else DataPath.mapped)
    data = make(loading)
    splits = ranks.in_turn(data.load)
    chosen = ranks.collect(served(splits["train"]).streams)
    if len(set(chosen)) > 1:
        raise UsageError(
            "expected one data path on all processes, received machines that have room for the decoded images and "
            "others that have not; type loading.path=stream"
        )
    return splits, getattr(data, "findings", Findings())


def without_stream(loading: Loading, split: Split) -> list[str]:
    """Notices of settings that only a stream has a use for, where a split is none."""
    if served(split).streams:
        return []
    chosen = [f"loading.workers={loading.workers}"] * (loading.workers is not None)
    chosen += [f"loading.decode={loading.decode.value}"] * (loading.decode is Decoder.cuda)
    return [f"data: `{text}` has no effect, as no image is decoded anew each epoch" for text in chosen]


def with_decoder(loading: Loading, split: Split, device: torch.device, recorded: Decoder | None) -> Loading:
    """The settings with the decoder chosen: a GPU's for a stream, where it has one that works.

    Args:
        recorded: the decoder with which the run began, whose pixels are not those of the other.

    Raises:
        UsageError: it is not there.
    """
    wanted = loading.decode
    if not served(split).streams:
        return replace(loading, decode=Decoder.cpu)
    if wanted is Decoder.auto and recorded is not None:
        wanted = recorded
    if wanted is Decoder.cpu or (wanted is Decoder.auto and device.type != "cuda"):
        return replace(loading, decode=Decoder.cpu)
    from cnnlab.data.gpu_jpeg import works

    there = device.type == "cuda" and works(device)
    if wanted is Decoder.cuda and not there:
        raise UsageError(
            f"`loading.decode=cuda`: this run is on {device}, where torchvision decodes no JPEG files by GPU; "
            "type loading.decode=cpu"
        )
    return replace(loading, decode=Decoder.cuda if there else Decoder.cpu)
