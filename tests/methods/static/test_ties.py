"""ties: trim, elect, merge; by hand and at its edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mowmerge.methods import ops, registry
from mowmerge.methods.contracts import Extent, MethodError
from mowmerge.methods.static.linear import linear
from mowmerge.methods.static.task_arithmetic import task_arithmetic
from mowmerge.methods.static.ties import ties

BY_HAND = torch.tensor([[4.0, -1.0, 3.0, 0.5], [-2.0, -5.0, 1.0, 0.25], [3.0, 4.0, 0.5, -1.0]])


def rows(value: Tensor) -> list[Any]:
    return value.tolist()


def test_by_hand() -> None:
    # density 0.5 of 4 entries, each tensor: the two largest.
    #   T1 =  4  0  3  0
    #   T2 = -2 -5  0  0
    #   T3 =  3  4  0  0
    # mass    5 -1  3  0  -> +, -, +, even
    # agree: (4, 3) -> 3.5; (-5) -> -5; (3) -> 3; none -> 0
    out = ties(BY_HAND, density=0.5, trim="tensor", zero_sign="plus")
    assert rows(out) == [3.5, -5.0, 3.0, 0.0]
    assert rows(ties(BY_HAND, density=0.5, trim="tensor", scale=0.5)) == [1.75, -2.5, 1.5, 0.0]
    assert rows(ties(BY_HAND, density=0.5, trim="tensor", aggregate="sum")) == [7.0, -5.0, 3.0, 0.0]
    assert rows(ties(BY_HAND, density=0.5, trim="tensor", aggregate="max")) == [4.0, -5.0, 3.0, 0.0]


def test_the_whole_model_keeps_one_more() -> None:
    # floor(0.5 * 4) + 1 = 3 entries, as the released code does:
    #   T1 =  4 -1  3  0     T2 = -2 -5  1  0     T3 =  3  4  0 -1
    # mass    5 -2  4 -1  -> (4, 3) 3.5; (-1, -5) -3; (3, 1) 2; (-1) -1
    assert rows(ties(BY_HAND, density=0.5)) == [3.5, -3.0, 2.0, -1.0]


def test_weights_vote_and_divide() -> None:
    # weights 1, 3, 1 on the trimmed: mass 4-6+3 = 1, -15+4 = -11, 3: +, -, +
    #   (1*4 + 1*3) / (1 + 1) = 3.5; (3*-5) / 3 = -5; 3/1
    out = ties(BY_HAND, weight=[1.0, 3.0, 1.0], density=0.5, trim="tensor")
    assert rows(out) == [3.5, -5.0, 3.0, 0.0]
    # weights 1, 4, 1: 4-8+3 = -1, so the second alone is taken at the first entry: 4*-2 / 4
    out = ties(BY_HAND, weight=[1.0, 4.0, 1.0], density=0.5, trim="tensor")
    assert rows(out)[0] == -2.0
    # a common factor changes nothing
    again = ties(BY_HAND, weight=[0.5, 2.0, 0.5], density=0.5, trim="tensor")
    assert rows(again) == rows(out)


def test_a_negative_weight_turns_the_vote() -> None:
    # T = 4, -1*3 = -3 and 4, -1*-2 = 2: mass 1 and 6
    # +: (4) / 1 = 4; and (4 + 2) / (1 - 1): agreeing weights that sum to zero divide by 1 -> 6
    deltas = torch.tensor([[4.0, 4.0], [3.0, -2.0]])
    assert rows(ties(deltas, weight=[1.0, -1.0], density=1.0)) == [4.0, 6.0]


@pytest.mark.parametrize("trim", ["tensor", "global"])
def test_density_at_its_ends(trim: str) -> None:
    same_sign = torch.tensor([[1.0, -2.0, 3.0], [3.0, -4.0, 0.0]])
    # all kept; the mean of those that are not zero: 2, -3, 3
    assert rows(ties(same_sign, density=1.0, trim=trim)) == [2.0, -3.0, 3.0]
    assert not ties(same_sign, density=0.0, trim=trim).any()
    # each model its own: the second keeps nothing
    assert rows(ties(same_sign, density=[1.0, 0.0], trim=trim)) == [1.0, -2.0, 3.0]
    # a tensor keeps one entry at least
    assert rows(ties(same_sign[:1], density=0.01, trim=trim)) == [0.0, 0.0, 3.0]


def test_entries_equal_to_the_last_that_is_kept() -> None:
    deltas = torch.tensor([[1.0, -2.0, 2.0, 2.0, 0.0, 3.0]])
    # of a tensor the two largest, 3 and the first 2
    assert rows(ties(deltas, density=0.34, trim="tensor")) == [0.0, -2.0, 0.0, 0.0, 0.0, 3.0]
    # over the model all that are as large as the second, and the one kept above that is among them
    assert rows(ties(deltas, density=0.17)) == [0.0, -2.0, 2.0, 2.0, 0.0, 3.0]


def test_mostly_zero_task_vectors() -> None:
    # the 60th largest of 100 is 0: keeping zeros does no harm, they never vote or divide
    sparse = torch.zeros(2, 100)
    sparse[0, :10], sparse[1, 5:15] = 2.0, 4.0
    for trim in ("tensor", "global"):
        out = ties(sparse, density=0.6, trim=trim)
        assert rows(out[:15]) == [2.0] * 5 + [3.0] * 5 + [4.0] * 5
        assert not out[15:].any()


def test_even_votes() -> None:
    # mass: 0, -3, -2, 0: the elected signs sum to -2, so the majority is minus
    deltas = torch.tensor([[1.0, -1.0, -2.0, 3.0], [-1.0, -2.0, 0.0, -3.0]])
    assert rows(ties(deltas, density=1.0)) == [-1.0, -1.5, -2.0, -3.0]
    assert rows(ties(deltas, density=1.0, zero_sign="plus")) == [1.0, -1.5, -2.0, 3.0]
    assert rows(ties(deltas, density=1.0, zero_sign="drop")) == [0.0, -1.5, -2.0, 0.0]
    assert rows(ties(-deltas, density=1.0)) == [1.0, 1.5, 2.0, 3.0]
    # a majority that is even itself selects negatives, as the released code does
    even = torch.tensor([[1.0, 2.0, -2.0], [-1.0, 0.0, 0.0]])
    assert rows(ties(even, density=1.0)) == [-1.0, 2.0, -2.0]


def test_electors() -> None:
    deltas = torch.tensor([[1.0, 1.0], [1.0, 0.0], [-5.0, 2.0]])
    options = {"density": 1.0, "aggregate": "sum"}
    assert rows(ties(deltas, elect="mass", **options))[0] == -5.0  # -3
    assert rows(ties(deltas, elect="count", **options))[0] == 2.0  # two against one
    # squares over squared norms: 1/2, 1/1, 25/29: the second is largest
    assert rows(ties(deltas, elect="normfrac", **options))[0] == 2.0
    # 1/2 + 1 - 25/29 > 0
    assert rows(ties(deltas, elect="normmass", **options))[0] == 2.0
    # and with a fourth entry that makes the second's 1/10: 1/2 + 1/10 - 25/29 < 0
    longer = torch.tensor([[1.0, 1.0], [1.0, 3.0], [-5.0, 2.0]])
    assert rows(ties(longer, elect="normmass", **options))[0] == -5.0
    assert rows(ties(longer, elect="normfrac", **options))[0] == -5.0


def test_rescale_restores_the_l1_norm() -> None:
    deltas = torch.tensor([[6.0, -2.0, 1.0, -1.0]])
    # kept 6 and -2 of L1 10: times 10/8
    assert rows(ties(deltas, density=0.5, trim="tensor", rescale=True)) == [7.5, -2.5, 0.0, 0.0]


def test_limits() -> None:
    deltas = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) + 0.1
    assert torch.allclose(ties(deltas, density=1.0), linear(deltas))
    total = ties(deltas, density=1.0, aggregate="sum")
    assert torch.allclose(total, task_arithmetic(deltas))
    equal = deltas[:1].repeat(3, 1)
    assert torch.allclose(ties(equal, density=0.3), ties(equal[:1], density=0.3))


def test_one_model_is_trimmed() -> None:
    g = torch.Generator().manual_seed(1)
    delta = torch.randn(1, 1000, generator=g)
    out = ties(delta, density=0.2, scale=2.0)
    edge = delta.abs().flatten().sort(descending=True).values[200]
    assert torch.equal(out, 2.0 * delta[0] * (delta[0].abs() >= edge))


def spread(tensors: Sequence[dict[str, Any]]) -> list[Extent]:
    full = registry.get("ties").complete({})
    return [Extent((10,), {**full, "density": [0.2], "weight": [1.0], **t}) for t in tensors]


@pytest.mark.parametrize(
    "change", [{"density": [0.3]}, {"elect": "count"}, {"rescale": True}, {"zero_sign": "plus"}]
)
def test_one_statistic_over_the_model_has_one_set_of_options(change: dict[str, Any]) -> None:
    reduce = registry.get("ties").reduce
    with pytest.raises(MethodError, match="same for all tensors"):
        next(reduce(spread([{}, change])))
    assert next(reduce(spread([{}, {"weight": [3.0], "scale": 0.5}])))


def test_the_threshold_is_over_the_model_or_over_each_tensor() -> None:
    big, small = torch.tensor([[10.0, 20.0, 30.0, 40.0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    # floor(0.5 * 8) + 1 = 5 of the eight: 40, 30, 20, 10 and 4
    options = {**registry.get("ties").complete({}), "weight": [1.0], "density": [0.5]}
    state = ops.settle(registry.get("ties").reduce, torch.cat([big, small], 1), options)
    assert rows(ties(big, density=0.5, state=state)) == [10.0, 20.0, 30.0, 40.0]
    assert rows(ties(small, density=0.5, state=state)) == [0.0, 0.0, 0.0, 4.0]
    assert rows(ties(small, density=0.5, trim="tensor")) == [0.0, 0.0, 3.0, 4.0]
