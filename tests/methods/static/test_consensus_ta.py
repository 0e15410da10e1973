"""consensus_ta: entries that matter to several tasks; by hand, and its sharp limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mowmerge.methods import registry
from mowmerge.methods.contracts import Extent, MethodError
from mowmerge.methods.static.consensus_ta import consensus_ta
from mowmerge.methods.static.task_arithmetic import task_arithmetic
from mowmerge.methods.static.ties import ties


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_by_hand() -> None:
    deltas = torch.tensor([[4.0, 1.0, 0.0, -3.0], [2.0, -9.0, 5.0, 2.0]])
    # for two, m1 = |D1| > 0.4 |D2|: yes, no, no, yes; m2 = |D2| > 0.4 |D1|: yes, yes, yes, yes
    assert consensus_ta(deltas, scale=1.0).tolist() == [6.0, 0.0, 0.0, -1.0]
    assert consensus_ta(deltas, agreement=1, scale=0.5).tolist() == [3.0, -4.0, 2.5, -0.5]
    # a threshold each: m1 against 0.9: 1.8, 8.1, 4.5, 1.8; m2 against 0.8: 3.2, 0.8, 0, 2.4
    mixed = consensus_ta(deltas, threshold=[0.9, 0.8], scale=1.0)
    assert mixed.tolist() == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(("n", "kept"), [(2, True), (3, True), (4, False), (5, False)])
def test_equal_task_vectors_matter_while_they_outweigh_the_rest(n: int, kept: bool) -> None:
    one = normal(1, 50)
    out = consensus_ta(one.expand(n, -1).contiguous(), scale=1.0)
    assert torch.allclose(out, n * one[0] * kept, rtol=1e-6)  # 1 > 0.4 (n - 1)


def test_limits() -> None:
    deltas = normal(3, 200)
    every = consensus_ta(deltas, agreement=0, scale=0.4)
    assert torch.allclose(every, task_arithmetic(deltas, scale=0.4))
    assert not consensus_ta(deltas, agreement=4).any()
    assert not consensus_ta(deltas[:2], threshold=1.0).any()
    counts = [int((consensus_ta(deltas, agreement=k) != 0).sum()) for k in range(5)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 200
    assert counts[2] > counts[3] > 0
    counts = [int((consensus_ta(deltas, threshold=t / 5) != 0).sum()) for t in range(8)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 200 > counts[7]
    one = torch.tensor([[3.0, 0.0, -1.0]])  # stands out against nothing, where it is not 0
    assert consensus_ta(one, agreement=1, scale=1.0).tolist() == one[0].tolist()
    assert not consensus_ta(one).any()


def test_more_tasks_than_there_are() -> None:
    caution = registry.get("consensus_ta").caution
    assert caution is not None
    assert "the result is the base" in caution({"agreement": 2}, 1)
    assert caution({"agreement": 2}, 2) == ""


def test_beside_ties() -> None:
    deltas = normal(3, 200)
    merged = ties(deltas, aggregate="sum", density=0.3)
    every = consensus_ta(deltas, merge="ties", density=0.3, agreement=0, scale=1.0)
    assert torch.equal(every, merged)
    some = consensus_ta(deltas, merge="ties", density=0.3, agreement=2, scale=1.0)
    assert torch.equal(some, merged.where(some != 0, 0.0))
    assert 0 < int((some != 0).sum()) < int((merged != 0).sum())


def test_one_density_for_the_whole_model() -> None:
    reduce = registry.get("consensus_ta").reduce
    assert reduce is not None
    extents = [Extent((4,), {"merge": "ties", "density": d, "threshold": (0.4,)}) for d in (0.2, 1)]
    with pytest.raises(MethodError, match="density must be the same"):
        next(reduce(extents))
