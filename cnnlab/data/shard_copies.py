"""Shards, and samples in them, that are there more than once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cnnlab.data.decode import contents
from cnnlab.data.found import Findings
from cnnlab.data.shard_index import ShardIndex
from cnnlab.errors import DataError

_COMPARED = 200
"""Samples of one name and length whose bytes are compared: some 20 MB of photos."""


def require_shards_once(shards: Mapping[str, Sequence[Path]], findings: Findings) -> None:
    """A notice for each two splits that share shards. Raises `DataError` for a split that has one twice."""
    owners: dict[tuple[int, int], tuple[str, Path]] = {}
    shared: dict[tuple[str, str], list[Path]] = {}
    for split, paths in shards.items():
        for path in paths:
            status = os.stat(path)  # noqa: PTH116 (hard links, too)
            owner, first = owners.setdefault((status.st_dev, status.st_ino), (split, path))
            if owner != split:
                shared.setdefault((owner, split), []).append(path)
            elif first is not path:
                raise DataError(
                    f"expected each shard of {split} once, received {first} and {path}, which are one file; mend the "
                    "pattern"
                )
    findings.notices += [
        f"data: {len(paths):,} shards of {one} are those of {other}, too ({paths[0].name}); {_seen(other)}"
        for (one, other), paths in shared.items()
    ]


def tell_copies(index: ShardIndex, parts: Mapping[str, Tensor], findings: Findings) -> None:
    """A notice of samples that lie in the shards several times: of one key and length, and the same bytes.

    Args:
        parts: rows by split.
    """
    if len(set(index.keys)) == len(index.keys):
        return
    owner = torch.full((len(index),), -1)
    for number, rows in enumerate(parts.values()):
        owner[rows] = number
    owners, splits = owner.tolist(), list(parts)
    first: dict[tuple[str, int], int] = {}
    pairs = []
    for row, (key, size) in enumerate(zip(index.keys, index.size.tolist())):
        other = first.setdefault((key, size), row)
        if other != row and owners[row] >= 0 and owners[other] >= 0:
            pairs.append((other, row))
    found: Counter[tuple[str, str]] = Counter()
    example: dict[tuple[str, str], str] = {}
    for one, other in pairs[:_COMPARED]:
        before, after = index.items([one, other])
        if before != after and contents(before) == contents(after):  # where it is not, the shard is that of both
            between = (splits[owners[one]], splits[owners[other]])
            between = between if splits.index(between[0]) <= splits.index(between[1]) else between[::-1]
            found[between] += 1
            example.setdefault(between, f"{index.name(one)}, and {index.name(other)}")
    least = "at least " if len(pairs) > _COMPARED else ""
    for (one_split, other_split), count in found.items():
        where = f"in {one_split} twice" if one_split == other_split else f"in {one_split} and in {other_split}"
        told = "" if one_split == other_split else f"; {_seen(other_split)}"
        findings.notices.append(f"data: {least}{count:,} samples are {where} ({example[one_split, other_split]}){told}")


def _seen(split: str) -> str:
    return f"the figures of {split} are not those of unseen images"
