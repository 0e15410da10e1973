"""arcee_fusion: what stands out is taken; by hand, selected and never added up, and its edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mowmerge.methods import registry
from mowmerge.methods.contracts import MethodError
from mowmerge.methods.static.arcee_fusion import _importance, arcee_fusion


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=g)
    return base + 0.3 * torch.randn(shape, generator=g), base


def test_importance_by_hand() -> None:
    base = torch.zeros(2, 2)
    model = torch.tensor([[math.log(3.0), 0.0], [1.0, 1.0]])
    # softmax (3/4, 1/4) against (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2); a shift changes nothing
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    found = _importance(model, base)
    assert found.tolist() == [
        pytest.approx([math.log(3.0) * divergence, 0.0]), pytest.approx([0.0, 0.0], abs=1e-7)
    ]  # fmt: skip


def test_by_hand() -> None:
    base = torch.zeros(1, 9)
    model = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 20.0]])
    # one row: importances go as 1..8, 20; quartiles 3 and 7, median 5: reached from 5 + 4 iqr on
    assert arcee_fusion(model[None], base).tolist() == [[0.0] * 8 + [20.0]]
    half = arcee_fusion(model[None], base, iqr=0.4)
    assert half.tolist() == [[0.0] * 6 + [7.0, 8.0, 20.0]]
    assert arcee_fusion(model[None], base, iqr=0.0).tolist() == [[0.0] * 4 + model[0, 4:].tolist()]


def test_every_weight_is_one_of_the_two() -> None:
    model, base = pair(40, 50)
    out = arcee_fusion(model[None], base)
    taken = out == model
    assert 0.01 < taken.float().mean() < 0.25
    assert torch.equal(out, model.where(taken, base))
    order = _importance(model, base).flatten().sort().values
    low, middle, high = (float(order[int(q * 1999)]) for q in (0.25, 0.5, 0.75))
    reached = _importance(model, base) >= middle + 1.5 * (high - low)
    assert torch.equal(reached, taken)


def test_equal_models_and_mostly_equal_ones() -> None:
    model, base = pair(8, 8)
    assert torch.equal(arcee_fusion(base[None], base), base)
    frozen = base.clone()
    frozen[0] = model[0]  # one row of eight moved: the quartiles are 0, and all is reached
    assert torch.equal(arcee_fusion(frozen[None], base), frozen)


def test_rows_and_columns_in_another_order() -> None:
    model, base = pair(30, 20)
    out = arcee_fusion(model[None], base)
    rows, columns = torch.randperm(30), torch.randperm(20)
    moved = arcee_fusion(model[rows][:, columns][None], base[rows][:, columns])
    assert torch.equal(moved, out[rows][:, columns])


def test_one_model_beside_the_base() -> None:
    spec = registry.get("arcee_fusion")
    with pytest.raises(MethodError, match="exactly 1"):
        spec.check({}, 2)
    assert spec.needs_base
    assert spec.parameters["iqr"].fault(-1.0)


def test_a_shift_of_a_row_in_both_changes_nothing() -> None:
    model, base = (value.double() for value in pair(12, 20))
    shift = torch.linspace(-3.0, 3.0, 12, dtype=torch.float64)[:, None]
    moved = arcee_fusion((model + shift)[None], base + shift)
    assert torch.allclose(moved, arcee_fusion(model[None], base) + shift)
