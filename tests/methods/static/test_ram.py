"""ram: own changes added, shared ones averaged; by hand, and RAM+'s factors."""

from __future__ import annotations

import pytest
import torch

from mowmerge.methods import ops, registry
from mowmerge.methods.contracts import Extent, MethodError
from mowmerge.methods.static.ram import ram

# model 1 alone in the entries 0 and 1, 2 alone in 3, both in 2 and 5, none in 4
DELTAS = torch.tensor([[1.0, 2.0, 4.0, 0.0, 1e-6, 6.0], [0.0, 1e-6, -2.0, 5.0, 0.0, 2.0]])


def test_by_hand() -> None:
    assert ram(DELTAS).tolist() == [1.0, 2.0, 1.0, 5.0, 0.0, 4.0]
    # at 1.5 model 1 has touched the entries 1, 2, 5 and 2 the entries 2, 3, 5
    assert ram(DELTAS, eps=1.5).tolist() == [0.0, 2.0, 1.0, 5.0, 0.0, 4.0]
    assert ram(DELTAS, eps=4.0).tolist() == [0.0, 0.0, 0.0, 5.0, 0.0, 6.0]


def test_ram_plus_by_hand() -> None:
    # own 2 and 1, shared 2 and 2: ratios 1 and 2
    out = ram(DELTAS, boost=0.1, cap=1.5)
    assert out.tolist() == pytest.approx([1.1, 2.2, 1.0, 5 * 1.15, 0.0, 4.0])
    out = ram(DELTAS, boost=0.5, cap=0.2, counts="tensor")
    assert out.tolist() == pytest.approx([1.1, 2.2, 1.0, 5.5, 0.0, 4.0])


def test_factors_count_over_the_whole_model() -> None:
    reduce = registry.get("ram").reduce
    assert reduce is not None
    given = {"eps": 1e-5, "boost": 0.1}
    both = ops.settle(reduce, torch.cat([DELTAS, DELTAS[:, :1]], 1), given)
    assert both == [2 / 3, 2.0]
    assert ops.settle(reduce, DELTAS, given) == [1.0, 2.0]
    uneven = [Extent((6,), given), Extent((6,), {**given, "eps": 1e-3})]
    with pytest.raises(MethodError, match="eps must be the same"):
        next(reduce(uneven))


def test_a_model_without_changes_of_its_own() -> None:
    deltas = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 0.0]])
    out = ram(deltas, boost=1.0, cap=1.0)
    assert out.tolist() == [2.0, 4.0]  # ratio 1 of the first's one own entry: factor 2
