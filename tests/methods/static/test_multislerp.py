"""multislerp: the mean direction at the mean length; by hand, and where it cancels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mowmerge.methods import registry
from mowmerge.methods.contracts import MethodError
from mowmerge.methods.static.karcher import karcher
from mowmerge.methods.static.multislerp import multislerp
from mowmerge.methods.static.slerp import slerp


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand() -> None:
    models = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    # u = (1, 0), (0, 1) at 1/4 and 3/4: direction (1, 3)/sqrt 10, length 3/4 + 3/4
    out = multislerp(models, weight=[1.0, 3.0])
    assert out.tolist() == pytest.approx([1.5 / math.sqrt(10), 4.5 / math.sqrt(10)])
    # weights as they are: the direction again, length 3 + 3
    plain = multislerp(models, weight=[1.0, 3.0], normalize=False)
    assert plain.tolist() == pytest.approx([6 / math.sqrt(10), 18 / math.sqrt(10)])
    base = torch.tensor([5.0, -1.0])
    assert torch.allclose(multislerp(models + base, base, weight=[1.0, 3.0]), out + base)


def test_one_step_by_hand() -> None:
    # 60 and 30 degrees on either side of the mean direction of unit vectors weighed 1 : sqrt 3
    angle = torch.tensor([0.0, math.pi / 2])
    models = torch.stack([angle.cos(), angle.sin()], 1)
    out = multislerp(models, weight=[1.0, math.sqrt(3)], mode="one_step")
    at = math.pi / 3  # of the mean direction; the Karcher mean divides 90 degrees by the weights
    share = 1 / (1 + math.sqrt(3))
    at += share * (0 - at) + (1 - share) * (math.pi / 2 - at)
    assert out.tolist() == pytest.approx([math.cos(at), math.sin(at)], abs=1e-6)


def test_the_length_is_the_weighted_mean_of_the_lengths() -> None:
    models, base = normal(4, 5, 6), normal(5, 6, seed=1)
    weight = [0.1, 0.5, 0.2, 0.2]
    for b in (None, base):
        vectors = models if b is None else models - b
        out = multislerp(models, b, weight=weight) - (0 if b is None else b)
        want = sum(w * float(v.norm()) for w, v in zip(weight, vectors, strict=True))
        assert out.norm().item() == pytest.approx(want)


def test_slerp_for_two_of_equal_length_and_weight_only() -> None:
    a, b = normal(2, 30)
    pair = torch.stack([a / a.norm(), b / b.norm()])
    assert torch.allclose(multislerp(pair), slerp(pair), atol=1e-6)
    other = multislerp(pair, weight=[0.3, 0.7])
    assert not torch.allclose(other, slerp(pair, t=0.7), atol=1e-3)


def test_one_step_is_karchers_first() -> None:
    models = normal(3, 20)
    assert torch.allclose(
        multislerp(models, mode="one_step"), karcher(models, max_iter=1), atol=1e-6
    )
    assert torch.allclose(multislerp(models), karcher(models, max_iter=0), atol=1e-6)


def test_where_directions_cancel_it_is_the_weighted_mean() -> None:
    a = normal(7)
    assert torch.allclose(multislerp(torch.stack([a, -3 * a])), -a)
    three = torch.tensor([[1.0, 0.0], [-0.5, math.sqrt(0.75)], [-0.5, -math.sqrt(0.75)]])
    assert multislerp(three).abs().max() < 1e-6
    # models that left a tensor as it was: nothing to move along, whatever their number
    base = normal(3, 3)
    assert torch.equal(multislerp(base.expand(3, 3, 3).contiguous(), base), base)


def test_a_zero_vector_counts_in_the_length_only() -> None:
    a = torch.tensor([3.0, 4.0])
    assert torch.allclose(multislerp(torch.stack([a, torch.zeros(2)])), a / 2)


def test_eps_by_hand() -> None:
    models = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    # u = (3/3.25, 0) and (0, 1/1.25): direction (12/13, 4/5), length 2
    length = math.hypot(12 / 13, 4 / 5)
    out = multislerp(models, eps=0.25)
    assert out.tolist() == pytest.approx([24 / 13 / length, 8 / 5 / length])
    # u = (3/3.7, 0) and (0, 1/1.7): their mean has length 0.501, and cancels
    assert multislerp(models, eps=0.7).tolist() == pytest.approx([1.5, 0.5])
    assert multislerp(torch.zeros(3, 4), eps=0.25).tolist() == [0.0] * 4


def test_weights_that_sum_to_zero_are_refused() -> None:
    spec = registry.get("multislerp")
    with pytest.raises(MethodError, match="sum to zero"):
        spec.check(spec.complete({"weight": [1.0, -1.0]}), 2)
    spec.check(spec.complete({"weight": [1.0, -1.0], "normalize": False}), 2)
