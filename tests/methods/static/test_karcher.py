"""karcher: the mean on the sphere; by hand, by its defining condition, and at its edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mowmerge.methods import registry
from mowmerge.methods.contracts import MethodError
from mowmerge.methods.static.karcher import karcher
from mowmerge.methods.static.slerp import slerp


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_on_a_circle_it_is_the_mean_angle() -> None:
    angle = torch.tensor([0.0, 0.3, 1.2], dtype=torch.float64)
    models = torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor([[1.0], [2.0], [6.0]])
    out = karcher(models)  # at 0.5, with the mean length 3
    assert out.tolist() == pytest.approx([3 * math.cos(0.5), 3 * math.sin(0.5)])
    # weighed 1 : 0 : 3 at 0.9, with length (1 + 18) / 4
    out = karcher(models, weight=[1.0, 0.0, 3.0])
    assert out.tolist() == pytest.approx([4.75 * math.cos(0.9), 4.75 * math.sin(0.9)])


def test_two_of_equal_weight_meet_at_the_middle_of_the_arc() -> None:
    a, b = normal(2, 5, 6)
    out, middle = karcher(torch.stack([a, b])), slerp(torch.stack([a / a.norm(), b / b.norm()]))
    assert torch.allclose(out / out.norm(), middle)
    assert out.norm().item() == pytest.approx((a.norm() + b.norm()).item() / 2)


def test_the_logarithms_cancel_at_the_mean() -> None:
    models = normal(4, 30)
    out = karcher(models, max_iter=100, tol=1e-9)
    mean = out / out.norm()
    total = torch.zeros(30, dtype=torch.float64)
    for x in models:
        u = x / x.norm()
        c = float(u @ mean)
        total += math.acos(c) / math.sqrt(1 - c * c) * (u - c * mean)
    assert total.norm().item() < 1e-7
    first = karcher(models, max_iter=0)
    assert not torch.allclose(first / first.norm(), mean, atol=1e-4)


def test_near_models_have_the_plain_mean() -> None:
    models = normal(1, 50) + 1e-3 * normal(3, 50)
    assert torch.allclose(karcher(models), models.mean(0), atol=1e-5)


def test_zero_vectors_count_in_the_length_only() -> None:
    a = torch.tensor([3.0, 4.0])
    assert torch.allclose(karcher(torch.stack([a, torch.zeros(2)])), a / 2)
    assert torch.equal(karcher(torch.zeros(2, 3)), torch.zeros(3))
    tiny = karcher(torch.stack([a, 1e-7 * a.flip(0)]))  # a direction all the same
    assert tiny[1] / tiny[0] == pytest.approx(1.0, abs=1e-5)


def test_what_is_no_longer_than_eps_has_no_direction() -> None:
    a = torch.tensor([3.0, 4.0])
    pair = torch.stack([a, 1e-6 * a.flip(0)])
    assert torch.allclose(karcher(pair, eps=1e-5), a / 2)
    assert torch.allclose(karcher(pair, eps=10.0), pair.mean(0))  # nothing has one
    shortest = torch.stack([a, torch.tensor([1e-40, 0.0])])  # 5 over its length is no fp32 number
    assert torch.allclose(karcher(shortest), a / 2)


def test_opposite_models() -> None:
    a = torch.tensor([3.0, 4.0])
    # no mean is nearer than another: the direction of the first, the length of both
    assert torch.allclose(karcher(torch.stack([a, -a])), a)
    assert torch.allclose(karcher(torch.stack([a, -a]), weight=[1.0, 2.0], tol=0.0), -a)


def test_weights_of_zero_are_refused() -> None:
    spec = registry.get("karcher")
    with pytest.raises(MethodError, match="every weight is 0"):
        spec.check(spec.complete({"weight": [0.0, 0.0]}), 2)
    assert spec.parameters["weight"].fault(-0.5)
