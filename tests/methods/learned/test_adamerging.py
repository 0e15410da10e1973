"""adamerging: the sum of task vectors by coefficients, by hand; the fit has its own tests."""

from __future__ import annotations

import pytest
import torch

from mowmerge.methods import registry
from mowmerge.methods.learned.adamerging import adamerging
from mowmerge.methods.registry import merge_method
from mowmerge.methods.static.task_arithmetic import task_arithmetic

DELTAS = torch.tensor([[1.0, -2.0], [4.0, 6.0]])


def test_by_hand() -> None:
    # 0.5 * 1 + 0.25 * 4 = 1.5; 0.5 * -2 + 0.25 * 6 = 0.5
    assert adamerging(DELTAS, weight=[0.5, 0.25]).tolist() == [1.5, 0.5]


def test_unfitted_it_is_task_arithmetic_at_three_tenths_bit_for_bit() -> None:
    draws = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(adamerging(draws), task_arithmetic(draws, scale=0.3))


def test_its_bounds_are_those_of_the_parameter() -> None:
    spec = registry.get("adamerging")
    weight = spec.parameters[str(spec.fit)]
    assert (weight.low, weight.high, weight.per_model) == (0.0, 1.0, True)


def test_a_fitted_method_says_how_it_is_fitted() -> None:
    def bare(deltas: torch.Tensor, *, weight: float = 1.0) -> torch.Tensor:
        return deltas[0]

    with pytest.raises(TypeError, match=r"has the parameters weight, granularity, steps"):
        merge_method(paper="none", fit="weight")(bare)
