"""task_arithmetic: the scaled sum of task vectors, by hand and at its edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zoo import Zoo

from mowmerge.methods import registry
from mowmerge.methods.contracts import Extent, MethodError
from mowmerge.methods.static.linear import linear
from mowmerge.methods.static.task_arithmetic import task_arithmetic


def test_by_hand() -> None:
    deltas = torch.tensor([[1.0, -2.0], [4.0, 6.0]])
    # 0.5 * (1*1 + 0.25*4) = 1; 0.5 * (1*-2 + 0.25*6) = -0.25
    out = task_arithmetic(deltas, weight=[1.0, 0.25], scale=0.5)
    assert out.tolist() == [1.0, -0.25]
    # over the sum of the weights, 1.25
    out = task_arithmetic(deltas, weight=[1.0, 0.25], scale=0.5, normalize=True)
    assert out.tolist() == pytest.approx([0.8, -0.2])


def test_the_default_is_the_sum_and_not_the_mean() -> None:
    assert task_arithmetic(torch.tensor([[1.0], [2.0], [4.0]])).item() == 7.0


def test_forgetting_and_analogy() -> None:
    a, b, c = torch.tensor([1.0, 5.0]), torch.tensor([2.0, 5.0]), torch.tensor([0.0, 3.0])
    assert task_arithmetic(a[None], weight=-1.0).tolist() == [-1.0, -5.0]
    # a is to b as c is to: c + (b - a) = (1, 3)
    out = task_arithmetic(torch.stack([a, b, c]), weight=[-1.0, 1.0, 1.0])
    assert out.tolist() == [1.0, 3.0]


def test_scale_zero_is_the_base() -> None:
    assert not task_arithmetic(torch.ones(2, 3), scale=0.0).any()


def test_weights_that_sum_to_zero_are_not_divided_by() -> None:
    deltas = torch.tensor([[3.0], [1.0]])
    assert task_arithmetic(deltas, weight=[1.0, -1.0], normalize=True).item() == 2.0


def test_normalized_equal_weights_are_the_uniform_soup() -> None:
    g = torch.Generator().manual_seed(0)
    base, models = torch.randn(5, 3, generator=g), torch.randn(4, 5, 3, generator=g)
    soup = base + task_arithmetic(models - base, normalize=True)
    assert torch.allclose(soup, linear(models), atol=1e-6)


def test_is_linear_with_the_rest_of_the_weight_on_the_base() -> None:
    g = torch.Generator().manual_seed(1)
    base, models = torch.randn(8, generator=g), torch.randn(2, 8, generator=g)
    out = base + task_arithmetic(models - base, weight=[0.3, 0.5], scale=0.5)
    # 0.15 and 0.25 on the experts leave 0.6 for the base
    both = linear(torch.stack([base, *models]), weight=[0.6, 0.15, 0.25])
    assert torch.allclose(out, both, atol=1e-6)


def test_metagpt_coefficients_are_shares_of_the_squared_norms() -> None:
    deltas = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, -5.0], [10.0, 0.0, 0.0]])
    # 25, 25 and 100 of 150
    out = task_arithmetic(deltas, coefficients="metagpt")
    assert out.tolist() == pytest.approx([0.5 + 20 / 3, 2 / 3, -5 / 6])
    half = task_arithmetic(deltas, coefficients="metagpt", weight=[0.0, 1.0, 0.0], scale=3.0)
    assert half.tolist() == pytest.approx([0.0, 0.0, -2.5])
    assert not task_arithmetic(torch.zeros(2, 3), coefficients="metagpt").any()
    reduce = registry.get("task_arithmetic").reduce
    assert reduce is not None
    extents = [Extent((2,), {"coefficients": how}) for how in ("given", "metagpt")]
    with pytest.raises(MethodError, match="coefficients must be the same"):
        next(reduce(extents))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "adds up 2 task vectors"),
        ({"scale": 0.5}, ""),
        ({"normalize": True}, ""),
        ({"coefficients": "metagpt"}, ""),  # they sum to one
    ],
)
def test_a_sum_above_one_is_told(zoo: Zoo, given: dict[str, Any], told: str) -> None:
    zoo.family("llama", 2)
    _, report = zoo.merge({"method": "task_arithmetic", "parameters": given})
    assert len(report["warnings"]) == bool(told)
    assert told in "".join(report["warnings"])
