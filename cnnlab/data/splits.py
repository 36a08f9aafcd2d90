"""Splits: parts of a data set reached by index, and the seeded ways to cut, thin and unbalance them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from cnnlab import rng
from cnnlab.data.served import Served, free_memory
from cnnlab.errors import DataError, UsageError
from cnnlab.protocols import VIEW, Batch, Split
from cnnlab.schema import DataPath, Loading, PositiveInt, Range

Fraction = Annotated[float, Range(above=0, below=1)]
Limit = PositiveInt | Annotated[float, Range(above=0, high=1)] | None
"""Training samples to keep: a count, a fraction, or `None` for all."""
Imbalance = Annotated[float, Range(low=1)] | None
"""Samples of the most frequent class for each one of the rarest; `None` leaves the classes as they are."""

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_COPY_BYTES = 64 << 20


class TensorSplit(Served):
    """A split whose samples are rows of tensors, which other splits may share.

    Args:
        images: (M, C, H, W) uint8, in memory, memory-mapped from a file, or on a device.
        targets: name to a tensor with M rows: `label` (M,), `mask` (M, H, W), `box` (M, 4); of whole photos, `view`.
        fingerprint: names the content, for the run's record.
        rows: (N,) int64, the rows that make up this split, in order; `None` takes all.
        mapped: the images are a memory-mapped file.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Mapping[str, Tensor],
        fingerprint: str,
        rows: Tensor | None = None,
        mapped: bool = False,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"expected images (N, C, H, W) uint8, received {tuple(images.shape)} {images.dtype}")
        for name, target in targets.items():
            if len(target) != len(images):
                raise ValueError(f"expected {len(images)} rows of `{name}`, received {len(target)}")
        self.images = images
        self.targets = dict(targets)
        self.fingerprint = fingerprint
        self.mapped = mapped
        self.rows = torch.arange(len(images)) if rows is None else rows
        label = self.targets.get("label")
        self.labels = None if label is None else label[self.rows.to(label.device)].long().cpu()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def device(self) -> torch.device:
        return self.images.device

    @property
    def stored(self) -> tuple[int, int] | None:
        height, width = self.images.shape[-2:]
        return (height, width) if VIEW in self.targets else None

    @property
    def nbytes(self) -> int:
        """Bytes of the split's own samples, without the rows that it does not reach."""
        tensors = [self.images, *self.targets.values()]
        return sum(t[:1].numel() * t.element_size() for t in tensors) * len(self)

    def fetch(self, index: Tensor) -> Batch:
        """The samples at `index` (n,) int64 (on any device), on the device of the storage."""
        index = index.to(self.device)
        rows = self.rows.index_select(0, index)
        return {"image": self.images.index_select(0, rows), "index": index, **self._targets_of(rows)}

    def begin(self, index: Tensor, pin: bool = False) -> Callable[[], Batch]:
        """`fetch` for another thread, of a split in the CPU's memory: what is returned gathers the samples.

        Args:
            pin: into memory from which a GPU copies without waiting.
        """

        def gather() -> Batch:
            rows = self.rows.index_select(0, index)
            image = torch.empty((len(rows), *self.images.shape[1:]), dtype=torch.uint8, pin_memory=pin)
            # numpy gathers in this one thread; torch would take the cores from the network's own threads.
            np.take(self.images.numpy(), rows.numpy(), axis=0, out=image.numpy(), mode="clip")
            return {"image": image, "index": index, **self._targets_of(rows)}

        return gather

    def _targets_of(self, rows: Tensor) -> Batch:
        parts = {name: target.index_select(0, rows) for name, target in self.targets.items()}
        return {name: part if part.is_floating_point() else part.long() for name, part in parts.items()}

    def path(self, device: torch.device, loading: Loading) -> DataPath:
        there = self.device == device and not self.mapped
        if loading.path is DataPath.mapped and not (there and device.type == "cpu"):
            return DataPath.mapped
        if there:
            return DataPath.resident
        if loading.path is DataPath.resident:
            available = free_memory(device)
            if self.nbytes > available:
                raise UsageError(
                    f"`loading.path=resident`: the images take {self.nbytes:,} bytes, and {device} has "
                    f"{available:,} free; type loading.path=mapped"
                )
            return DataPath.resident
        fits = device.type == "cuda" and self.nbytes <= loading.memory_share * free_memory(device)
        return DataPath.resident if fits else DataPath.mapped

    def placed(self, path: DataPath, device: torch.device, loading: Loading) -> TensorSplit:
        moves = path is DataPath.resident and (self.mapped or self.device != device)
        return self.to(device) if moves else self

    def waits(self, path: DataPath, device: torch.device) -> bool:
        # On the CPU, the system keeps files that fit in its memory there.
        return path is not DataPath.resident and (device.type != "cpu" or self.nbytes > free_memory(device))

    def about(self, path: DataPath, device: torch.device) -> str:
        place = f"on {device}" if path is DataPath.resident and device.type != "cpu" else "in memory"
        return f"{'decoded cache' if self.mapped else place}, {self.nbytes / 2**20:,.1f} MiB"

    def to(self, device: torch.device) -> TensorSplit:
        """The split with a copy of its own samples on `device`, where `fetch` then gathers them."""
        targets = {name: _gather_to(target, self.rows, device) for name, target in self.targets.items()}
        moved = TensorSplit(
            _gather_to(self.images, self.rows, device),
            targets,
            self.fingerprint,
            torch.arange(len(self), device=device),
        )
        moved.labels = self.labels
        return moved


def _gather_to(source: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """`source[rows]` on `device`, by pieces: the source may be a file that is larger than the memory."""
    out = torch.empty((len(rows), *source.shape[1:]), dtype=source.dtype, device=device)
    row_bytes = max(1, source[:1].numel() * source.element_size())
    step = max(1, _COPY_BYTES // row_bytes)
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        out[start : start + step] = source.index_select(0, piece)
    return out


def stratified(labels: Tensor, fractions: Sequence[float], seed: int) -> list[Tensor]:
    """Cuts samples into parts that each keep the class proportions.

    A class of n samples gives part k either the floor or the ceiling of n times its fraction. Which one is
    decided by an offset that walks the golden-ratio sequence over the classes, so that the roundings cancel:
    a thousand classes of four samples at 0.1 give a validation set of about 400, not of none.

    Args:
        labels: (N,) int64.
        fractions: one a part, summing to 1.
        seed: equal seeds give equal parts.

    Returns:
        The indices of each part, (n_k,) int64, ascending; together each of 0..N-1 once.
    """
    if not math.isclose(sum(fractions), 1, abs_tol=1e-6) or min(fractions) < 0:
        raise ValueError(f"expected fractions >= 0 that sum to 1, received {tuple(fractions)}")
    bounds = [sum(fractions[: k + 1]) for k in range(len(fractions) - 1)]
    parts: list[list[Tensor]] = [[] for _ in fractions]
    for rank, (label, members) in enumerate(_by_class(labels)):
        members = members[torch.randperm(len(members), generator=rng.generator(seed, "split", label))]
        # 1e-9: a product such as 500 * 0.3 may fall just short of its integer.
        offset = rank * _GOLDEN_RATIO % 1 + 1e-9
        cuts = [0, *(math.floor(len(members) * bound + offset) for bound in bounds), len(members)]
        for k, part in enumerate(parts):
            part.append(members[cuts[k] : cuts[k + 1]])
    empty = torch.empty(0, dtype=torch.int64)
    return [torch.cat([empty, *part]).sort().values for part in parts]


def _by_class(labels: Tensor) -> list[tuple[int, Tensor]]:
    """Each label that occurs, with the indices (ascending) of its samples."""
    found, counts = labels.unique(return_counts=True)
    members = labels.argsort(stable=True).split(counts.tolist())
    return list(zip(found.tolist(), members))


def limited(labels: Tensor, limit: int | float, seed: int) -> Tensor:
    """The indices (ascending) of a stratified subset: `limit` samples (an int) or that fraction (a float).

    Subsets of one seed are nested: a larger limit keeps what a smaller one kept, up to the rounding of a
    class.
    """
    fraction = limit if isinstance(limit, float) else limit / max(1, len(labels))
    if fraction >= 1:
        return torch.arange(len(labels))
    kept = stratified(labels, (fraction, 1 - fraction), seed)[0]
    if isinstance(limit, int) and len(kept) != limit:
        # The rounding of classes may miss the count by a few; the difference is drawn from the whole set.
        chosen = torch.zeros(len(labels), dtype=torch.bool)
        chosen[kept] = True
        order = torch.randperm(len(labels), generator=rng.generator(seed, "limit"))
        pool = order[chosen[order] == (len(kept) > limit)][: abs(limit - len(kept))]
        chosen[pool] = len(kept) < limit
        kept = chosen.nonzero().flatten()
    return kept


def long_tailed(labels: Tensor, ratio: float, num_classes: int, seed: int) -> Tensor:
    """The indices (ascending) of a long-tailed subset: class 0 is `ratio` times as frequent as the last.

    Class c keeps n_max * ratio^(-c/(C-1)) samples, rounded down as the field's CIFAR-LT sets are, where n_max
    is the largest class; at least one, at most what it has (Cui et al. 2019, "Class-Balanced Loss", section
    5.1).
    """
    largest = int(torch.bincount(labels).max())
    kept = []
    for label, members in _by_class(labels):
        share = ratio ** (-label / max(1, num_classes - 1))
        order = torch.randperm(len(members), generator=rng.generator(seed, "imbalance", label))
        kept.append(members[order[: max(1, math.floor(largest * share + 1e-9))]])
    return torch.cat(kept).sort().values


def thinned(
    rows: Tensor, labels: Tensor | None, num_classes: int, *, limit: Limit, imbalance: Imbalance, seed: int
) -> Tensor:
    """The training rows that `imbalance`, then `limit`, leave; `labels` (N,) are those of `rows` (N,)."""
    if imbalance is not None:
        if labels is None:
            raise ValueError(f"expected data with labels for data.imbalance={imbalance:g}; type data.imbalance=null")
        kept = long_tailed(labels, imbalance, num_classes, seed)
        rows, labels = rows[kept], labels[kept]
    if limit is not None:
        strata = torch.zeros(len(rows), dtype=torch.int64) if labels is None else labels
        rows = rows[limited(strata, limit, seed)]
    return rows


def require_fractions(val: float, test: float) -> None:
    """Raises `ValueError` where val and test leave nothing to train on."""
    if val + test >= 1:
        raise ValueError(f"expected data.val + data.test < 1, received {val:g} + {test:g}; type smaller fractions")


def partitioned(
    given: Mapping[str, Tensor],
    labels: Tensor | None,
    num_classes: int,
    *,
    val: float,
    test: float,
    limit: Limit,
    imbalance: Imbalance,
    seed: int,
) -> dict[str, Tensor]:
    """The rows of `train`, `val` and `test`: missing ones are cut out of `train`, which is then thinned.

    Args:
        given: rows by split; `train` at least.
        labels: (M,) labels of all rows; `None` for plain random cuts.
        val, test: the fractions of `train` that go to a split that is missing.
        limit, imbalance: see `thinned`.
    """
    wanted = {name: part for name, part in (("val", val), ("test", test)) if name not in given}
    whole = given["train"]
    strata = torch.zeros(len(whole), dtype=torch.int64) if labels is None else labels[whole]
    cut = [whole[part] for part in stratified(strata, (1 - sum(wanted.values()), *wanted.values()), seed)]
    train = thinned(
        cut[0],
        None if labels is None else labels[cut[0]],
        num_classes,
        limit=limit,
        imbalance=imbalance,
        seed=seed,
    )
    parts = {**given, **dict(zip(wanted, cut[1:]))}
    return {"train": train, "val": parts["val"], "test": parts["test"]}


def assemble(
    images: Tensor, targets: Mapping[str, Tensor], source: str, parts: Mapping[str, Tensor], mapped: bool = False
) -> dict[str, Split]:
    """Splits that share one storage.

    Args:
        source: fingerprint of the storage.
        parts: rows by split.
        mapped: the images are a memory-mapped file.

    Raises:
        DataError: where a split would be empty.
    """
    require_samples(parts)
    return {
        name: TensorSplit(images, targets, digest(source, name, rows), rows, mapped) for name, rows in parts.items()
    }


def require_samples(parts: Mapping[str, Tensor]) -> None:
    """Raises `DataError` where a split has no rows."""
    for name, rows in parts.items():
        if len(rows) == 0:
            sizes = ", ".join(f"{part} {len(r)}" for part, r in parts.items())
            raise DataError(
                f"expected samples in every split, received none in {name} ({sizes}); "
                f"give more data or a larger fraction (data.val, data.test)"
            )


def digest(*content: Any) -> str:
    """Sixteen hexadecimal digits that name the content: tensors by shape and bytes, all else by its text."""
    hasher = hashlib.blake2b(digest_size=8)
    for item in content:
        if isinstance(item, Tensor):
            hasher.update(f"{item.dtype}{tuple(item.shape)}".encode())
            hasher.update(item.contiguous().numpy().data)
        else:
            hasher.update(str(item).encode(errors="surrogateescape"))
        hasher.update(b"\x1f")
    return hasher.hexdigest()
