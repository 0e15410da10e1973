"""slerp: the great arc between two tensors, by hand and at its edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mowmerge.methods import registry
from mowmerge.methods.contracts import MethodError
from mowmerge.methods.static.slerp import slerp


def pair(seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(2, *(shape or (6, 4)), generator=torch.Generator().manual_seed(seed))


def test_by_hand() -> None:
    models = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # a right angle: at t = 1/3 the arc has turned by 30 degrees: (cos 30, sin 30)
    out = slerp(models, t=1 / 3)
    assert out.tolist() == pytest.approx([math.sqrt(3) / 2, 0.5], abs=1e-6)
    # other lengths: sin 60 / sin 90 * 2 = 1.7321 and sin 30 / sin 90 * 4 = 2: not on a sphere
    out = slerp(models * torch.tensor([[2.0], [4.0]]), t=1 / 3)
    assert out.tolist() == pytest.approx([math.sqrt(3), 2.0], abs=1e-6)


def test_a_tensor_is_one_vector() -> None:
    models = pair()
    flat = slerp(models.reshape(2, -1), t=0.3)
    assert torch.equal(slerp(models, t=0.3), flat.view(6, 4))
    by_row = torch.stack([slerp(models[:, i], t=0.3) for i in range(6)])
    assert not torch.allclose(by_row, flat.view(6, 4), atol=1e-3)


@pytest.mark.parametrize("models", [pair(), pair()[:1] + 0.001 * pair(1)])  # an arc, a line
def test_the_ends_are_the_models(models: Tensor) -> None:
    assert torch.allclose(slerp(models, t=0.0), models[0], rtol=3e-7, atol=0)
    assert torch.allclose(slerp(models, t=1.0), models[1], rtol=3e-7, atol=0)
    assert torch.allclose(slerp(models, t=0.3), slerp(models.flip(0), t=0.7), atol=1e-6)


def test_equal_lengths_are_kept() -> None:
    a, b = pair()
    b = b * (a.norm() / b.norm())
    for t in (0.1, 0.5, 0.8, 1.5):
        assert slerp(torch.stack([a, b]), t=t).norm().item() == pytest.approx(a.norm().item())


def test_nearly_parallel_is_a_line() -> None:
    # cos = 1/sqrt(1 + 0.03^2) = 0.99955 > 0.9995: (1-t) a + t b; below the threshold an arc
    models = torch.tensor([[1.0, 0.0], [1.0, 0.03]])
    assert torch.equal(slerp(models, t=0.25), models[0] * 0.75 + models[1] * 0.25)
    arc = slerp(models, t=0.25, dot_threshold=0.9996)
    assert not torch.equal(arc, slerp(models, t=0.25))
    assert torch.allclose(arc, slerp(models, t=0.25), atol=1e-3)


def test_nearly_antipodal_is_a_line_too() -> None:
    models = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    assert slerp(models, t=0.5).tolist() == [0.0, 0.0]
    assert slerp(models, t=0.25).tolist() == [0.5, 1.0]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_no_division_by_zero_without_a_threshold(sign: float) -> None:
    models = torch.tensor([[1.0, 2.0], [sign, 2.0 * sign]])
    out = slerp(models, t=0.25, dot_threshold=1.0)
    assert torch.allclose(out, 0.75 * models[0] + 0.25 * models[1])


def test_a_zero_vector_is_at_a_right_angle_to_all() -> None:
    # <0,b> = 0, so O = 90 degrees: out = cos(t 90) * b, and not (1-t) b; 0.7071 b at the middle
    b = torch.tensor([3.0, -4.0])
    models = torch.stack([b, torch.zeros(2)])
    assert torch.allclose(slerp(models, t=0.5), b * math.sqrt(0.5))
    assert slerp(torch.zeros(2, 3)).tolist() == [0.0, 0.0, 0.0]


def test_a_norm_within_eps_is_not_divided_by() -> None:
    # |a| = 0.5 counts as 1: cos O = 3 / (1 * 10) = 0.3, and not 0.6
    # at the middle both ends weigh 1 / (2 cos(O/2)) = 1 / sqrt(2 + 2 * 0.3)
    models = torch.tensor([[0.3, 0.4], [10.0, 0.0]])
    by = 1 / math.sqrt(2.6)
    assert slerp(models, eps=1.0).tolist() == pytest.approx([10.3 * by, 0.4 * by])
    by = 1 / math.sqrt(3.2)
    assert slerp(models).tolist() == pytest.approx([10.3 * by, 0.4 * by])


def test_beyond_the_ends() -> None:
    # 90 degrees from a to b; t = 2 is 180 degrees: -a, and t = -1 is -90: -b
    models = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert slerp(models, t=2.0).tolist() == pytest.approx([-1.0, 0.0], abs=1e-6)
    assert slerp(models, t=-1.0).tolist() == pytest.approx([0.0, -1.0], abs=1e-6)


def test_two_models_only() -> None:
    with pytest.raises(MethodError, match="exactly 2"):
        registry.get("slerp").check({}, 3)
