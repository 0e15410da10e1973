"""adamerging_pp: trimmed and elected task vectors, weighed after the vote; by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mowmerge.methods.contracts import Extent, MethodError
from mowmerge.methods.learned.adamerging import adamerging
from mowmerge.methods.learned.adamerging_pp import _statistics, adamerging_pp
from mowmerge.methods.static.ties import ties

BY_HAND = torch.tensor([[4.0, -1.0, 3.0, 0.5], [-2.0, -5.0, 1.0, 0.25], [3.0, 4.0, 0.5, -1.0]])


def test_by_hand() -> None:
    # density 0.5 of 4 entries over the whole model keeps 3:
    #   T1 =  4 -1  3  0     T2 = -2 -5  1  0     T3 =  3  4  0 -1
    # signs   +  -  +  -     agree: 4, 3; -1, -5; 3, 1; -1
    weight = [1.0, 0.5, 0.25]
    out = adamerging_pp(BY_HAND, weight=weight, density=0.5)
    assert out.tolist() == [4 + 0.25 * 3, -1 - 0.5 * 5, 3 + 0.5 * 1, -0.25]


def test_weights_have_no_vote() -> None:
    # at the second entry the sum is -2, whatever the weights: the third never has a say
    out = adamerging_pp(BY_HAND, weight=[0.0, 0.0, 1.0], density=1.0)
    assert out.tolist() == [3.0, 0.0, 0.5, -1.0]


def test_equal_weights_are_the_disjoint_sum_of_ties() -> None:
    draws = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    whole = ties(draws, density=0.2, aggregate="sum", scale=0.3)
    assert torch.allclose(adamerging_pp(draws), whole, atol=1e-6)


def test_all_kept_and_of_one_sign_it_is_adamerging() -> None:
    draws = torch.randn(4, 1000, generator=torch.Generator().manual_seed(1))
    alike = draws.abs() * draws[0].sign()
    weight: Any = [0.1, 0.9, 0.0, 0.4]
    plain = adamerging(alike, weight=weight)
    assert torch.allclose(adamerging_pp(alike, weight=weight, density=1.0), plain, atol=1e-6)


def test_one_density_for_the_model() -> None:
    extents = [Extent((4,), {"density": d, "weight": (0.3, 0.3)}) for d in (0.2, 0.4)]
    with pytest.raises(MethodError, match="density must be the same"):
        next(_statistics(extents))
