"""The collectives, on real processes and alone."""

from __future__ import annotations

import pytest
import torch
from rank_processes import run_ranks

from cnnlab.machine import ranks as module
from cnnlab.machine.ranks import Ranks

WORLD = 3


def collectives(ranks: Ranks, bucket: int) -> dict:
    module._BUCKET = bucket
    r = ranks.rank
    mixed = [torch.full((2, 3), float(r)), torch.tensor(r), torch.full((5,), r + 0.5, dtype=torch.float64)]
    last = torch.arange(16.0).view(1, 4, 2, 2).contiguous(memory_format=torch.channels_last) * (r + 1)
    summed = [t.clone() for t in (*mixed, last)]
    ranks.sum_(summed)
    shared = [t.clone() for t in (*mixed, last)]
    ranks.share_(shared)
    parameter = torch.nn.Parameter(torch.full((2,), float(r)))
    ranks.share_([parameter])
    ranks.sum_([])
    ranks.wait()
    return {
        "place": (ranks.rank, ranks.world, ranks.is_main),
        "summed": [t.tolist() for t in summed],
        "format": summed[-1].is_contiguous(memory_format=torch.channels_last),
        "shared": [t.tolist() for t in shared],
        "parameter": parameter.tolist(),
        "stack": ranks.stack(torch.tensor([r, 10 * r])).tolist(),
        "any": [ranks.any(5 if r == 1 else 0), ranks.any(0)],
        "share": ranks.share({"rank": r}),
        "collect": ranks.collect(f"rank {r}"),
    }


@pytest.mark.parametrize("bucket", [1 << 24, 4])
def test_collectives_on_three_processes(bucket: int):
    for rank, found in enumerate(run_ranks(collectives, bucket, world=WORLD)):
        assert found["place"] == (rank, WORLD, rank == 0)
        assert found["summed"] == [
            [[3.0] * 3] * 2,
            3,
            [4.5] * 5,
            (torch.arange(16.0).view(1, 4, 2, 2) * 6).tolist(),
        ]
        assert found["format"]
        assert found["shared"] == [[[0.0] * 3] * 2, 0, [0.5] * 5, torch.arange(16.0).view(1, 4, 2, 2).tolist()]
        assert found["parameter"] == [0, 0]
        assert found["stack"] == [[0, 0], [1, 10], [2, 20]]
        assert found["any"] == [5, 0]
        assert found["share"] == {"rank": 0}
        assert found["collect"] == ["rank 0", "rank 1", "rank 2"]


def test_alone_nothing_is_moved():
    alone = Ranks()
    tensor = torch.tensor([1.0, 2.0])
    alone.sum_([tensor])
    alone.share_([tensor])
    alone.wait()
    assert tensor.tolist() == [1, 2]
    assert alone.stack(tensor).tolist() == [[1, 2]]
    assert (alone.any(3), alone.share("x"), alone.collect("x")) == (3, "x", ["x"])
    assert alone.is_main
    assert module.join() == alone
