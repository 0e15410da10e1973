"""linear: the weighted average, by hand and at its edges."""

from __future__ import annotations

import pytest
import torch

from mowmerge.methods import registry
from mowmerge.methods.contracts import MethodError
from mowmerge.methods.static.linear import linear
from mowmerge.methods.static.task_arithmetic import task_arithmetic


def test_by_hand() -> None:
    models = torch.tensor([[[4.0, 0.0], [2.0, -8.0]], [[0.0, 4.0], [2.0, 8.0]]])
    # weights 3 and 1 over their sum, 4:
    # (12 + 0)/4 = 3, (0 + 4)/4 = 1, (6 + 2)/4 = 2, (-24 + 8)/4 = -4
    assert linear(models, weight=[3.0, 1.0]).tolist() == [[3.0, 1.0], [2.0, -4.0]]
    # not normalized: four times as much
    plain = linear(models, weight=[3.0, 1.0], normalize=False)
    assert plain.tolist() == [[12.0, 4.0], [8.0, -16.0]]


def test_equal_weights_are_the_uniform_soup() -> None:
    models = torch.tensor([[3.0, 0.0], [0.0, 6.0], [0.0, 0.0]])
    assert torch.allclose(linear(models), torch.tensor([1.0, 2.0]))
    assert torch.equal(linear(models), linear(models, weight=[5.0, 5.0, 5.0]))


def test_negative_weights_extrapolate() -> None:
    # 2*a - 1*b over 2 - 1 = 1
    assert linear(torch.tensor([[1.0], [5.0]]), weight=[2.0, -1.0]).item() == -3.0


@pytest.mark.parametrize("weight", [[1.0, -1.0], [0.0, 0.0], 0.0, [0.5, -0.5 + 1e-13]])
def test_weights_that_sum_to_zero_are_refused(weight: float | list[float]) -> None:
    models = torch.ones(2, 3)
    with pytest.raises(MethodError, match="sum to zero"):
        linear(models, weight=weight)
    with pytest.raises(MethodError, match="sum to zero"):  # and before a tensor is read
        registry.get("linear").check({"weight": weight, "normalize": True}, 2)
    assert torch.isfinite(linear(models, weight=weight, normalize=False)).all()


def test_weights_are_not_rounded_to_the_models_dtype() -> None:
    # bf16(0.3) is 0.30078125: with that weight the first entry would be 300.78125 / 1.00078125
    models = torch.tensor([[1000.0], [0.0]])
    assert linear(models, weight=[0.3, 0.7]).item() == pytest.approx(300.0, rel=1e-6)


def test_one_weight_too_few_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 values for 3 models"):
        linear(torch.ones(3, 2), weight=[1.0, 2.0])


def test_moves_with_the_models() -> None:
    g = torch.Generator().manual_seed(0)
    models = torch.randn(3, 7, 5, generator=g)
    weight = [0.2, 0.5, 0.9]
    moved = linear(models * 2.0 + 3.0, weight=weight)
    assert torch.allclose(moved, linear(models, weight=weight) * 2.0 + 3.0, atol=1e-5)


def test_it_is_task_arithmetic_on_any_base() -> None:
    g = torch.Generator().manual_seed(0)
    models, base = torch.randn(3, 40, generator=g), torch.randn(40, generator=g)
    added = base + task_arithmetic(models - base, weight=[0.2, 0.3, 0.5])
    assert torch.allclose(linear(models, weight=[2.0, 3.0, 5.0]), added, atol=1e-6)
