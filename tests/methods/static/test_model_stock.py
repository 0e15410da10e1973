"""model_stock: how far to go towards the mean, from the angle between the task vectors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mowmerge.methods import registry
from mowmerge.methods.contracts import MethodError
from mowmerge.methods.static.model_stock import model_stock


def at(*degrees: float) -> Tensor:
    """Unit vectors in the plane."""
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def share(deltas: Tensor, **given: object) -> float:
    """t: the result over the mean."""
    out, mean = model_stock(deltas, **given), deltas.mean(0)
    return float((out * mean).sum() / (mean * mean).sum())


def test_by_hand() -> None:
    deltas = torch.tensor([[2.0, 0.0], [1.0, math.sqrt(3.0)]])
    # both of length 2, <,> = 2, c = 2/4 = 0.5: t = 2 * 0.5 / (1 + 0.5) = 2/3
    # the mean is (1.5, 0.866): two thirds of it are (1, 0.57735)
    assert model_stock(deltas).tolist() == pytest.approx([1.0, math.sqrt(3.0) / 3.0])


def test_three_models_by_hand() -> None:
    deltas = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    # each pair: 1 / (sqrt 2 sqrt 2) = 0.5; t = 3 * 0.5 / (1 + 2 * 0.5) = 0.75; the mean is 2/3
    assert model_stock(deltas).tolist() == pytest.approx([0.5, 0.5, 0.5])


def test_identical_experts_are_the_expert_and_orthogonal_ones_the_base() -> None:
    expert = torch.tensor([[3.0, -1.0], [0.5, 2.0]])
    assert torch.allclose(model_stock(torch.stack([expert] * 4)), expert)
    assert not model_stock(torch.diag(torch.tensor([1.0, 20.0, 0.3]))).any()


def test_small_updates_are_no_smaller_a_share() -> None:
    deltas = torch.stack([torch.tensor([1.0, 2.0, 3.0])] * 2)
    assert share(deltas * 1e-12) == pytest.approx(1.0)


def test_a_zero_task_vector_is_orthogonal_to_all() -> None:
    # cosines 0.5, 0, 0: their mean is 1/6; t = 3/6 / (1 + 2/6) = 0.375
    deltas = torch.cat([at(0, 60), torch.zeros(1, 2)])
    assert share(deltas) == pytest.approx(0.375)
    assert not model_stock(torch.zeros(3, 4)).any()


def test_negative_cosines() -> None:
    # 120 degrees, c = -0.5: t = 2 * -0.5 / (1 - 0.5) = -2: away from the experts, or not at all
    assert share(at(0, 120), clamp=False) == pytest.approx(-2.0)
    assert not model_stock(at(0, 120)).any()


@pytest.mark.parametrize("lengths", [(1.0, 1.0, 1.0), (1.0, 3.0, 7.0), (5.0, 0.1, 2.0)])
@pytest.mark.parametrize("turn", [0.0, 10.0, 77.0])
def test_at_the_pole(lengths: tuple[float, ...], turn: float) -> None:
    # 0, 120, 240 degrees: c = -1/2 = -1/(N-1), where t has its pole; rounding falls on either side
    deltas = at(turn, turn + 120, turn + 240) * torch.tensor(lengths)[:, None]
    assert not model_stock(deltas).any()
    assert not model_stock(deltas, clamp=False).any()
    opposite = torch.stack([deltas[0], -3.0 * deltas[0]])
    assert not model_stock(opposite, clamp=False).any()


def test_mean_of_cosines_or_of_angles() -> None:
    # in space: b at 10 degrees from a, and c at 80 from both
    a, b = [1.0, 0.0, 0.0], [math.cos(math.radians(10)), math.sin(math.radians(10)), 0.0]
    x = math.cos(math.radians(80))
    y = (x - x * b[0]) / b[1]
    deltas = torch.tensor([a, b, [x, y, math.sqrt(1.0 - x * x - y * y)]], dtype=torch.float64)
    # the mean cosine is (0.9848 + 2 * 0.1736) / 3 = 0.4441; the mean angle 170/3, of cosine 0.5495
    for average, c in (("cosine", 0.44405), ("angle", 0.54951)):
        assert share(deltas, average=average) == pytest.approx(3 * c / (1 + 2 * c), abs=1e-4)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_a_floor_under_the_product_of_two_lengths(filter_wise: bool) -> None:
    deltas = torch.tensor([[[3e-4, 4e-4]], [[6e-4, 0.0]]])  # of 5e-4 and 6e-4: 3e-7; <,> = 1.8e-7
    for floor, c in ((0.0, 0.6), (2e-7, 0.6), (1e-6, 0.18)):
        out = model_stock(deltas, floor=floor, filter_wise=filter_wise)
        assert float(out[0, 0]) == pytest.approx(4.5e-4 * 2 * c / (1 + c), rel=1e-5)


def test_one_share_a_row() -> None:
    deltas = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    # the first rows agree (t = 1), the second are orthogonal (t = 0)
    assert model_stock(deltas, filter_wise=True).tolist() == [[1.0, 0.0], [0.0, 0.0]]
    g = torch.Generator().manual_seed(0)
    deltas = torch.randn(3, 4, 2, 5, generator=g) + 1.0
    rows = torch.stack([model_stock(deltas[:, i]) for i in range(4)])
    assert torch.allclose(model_stock(deltas, filter_wise=True), rows, atol=1e-6)
    vector = deltas[:, 0, 0]  # is one row
    assert torch.allclose(model_stock(vector, filter_wise=True), model_stock(vector))


def test_one_model_has_no_angle() -> None:
    with pytest.raises(MethodError, match="at least 2"):
        registry.get("model_stock").check({}, 1)


@pytest.mark.parametrize("degrees", [20.0, 60.0, 85.0])
def test_the_share_is_at_least_the_cosine_and_grows_with_the_models(degrees: float) -> None:
    """N vectors with one cosine between each two: a common part, and one part of its own each."""
    c, shares = math.cos(math.radians(degrees)), []
    for n in (2, 3, 5, 9):
        common = torch.full((n, 1), math.sqrt(c))
        shares.append(share(torch.cat([common, math.sqrt(1 - c) * torch.eye(n)], 1)))
        assert shares[-1] == pytest.approx(n * c / (1 + (n - 1) * c), rel=1e-5)
    assert c < shares[0] < shares[1] < shares[2] < shares[3] < 1
