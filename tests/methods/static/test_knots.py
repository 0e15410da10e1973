"""knots: by hand, where it is task arithmetic or the mean, and with shares that are rounding."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import Zoo

from mowmerge.methods import ops
from mowmerge.methods.contracts import Draws
from mowmerge.methods.ops.spectral import left_basis
from mowmerge.methods.static.knots import _statistics, knots

home = sys.modules[_statistics.__module__]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand() -> None:
    # [D1 D2] has orthogonal rows of lengths 13 and 10: the basis is that of the outputs, X_i = D_i
    deltas = torch.tensor([[[3.0, 4.0], [8.0, -6.0]], [[12.0, 0.0], [0.0, 0.0]]])
    # everything agrees; means are over what is not 0
    assert torch.allclose(knots(deltas), torch.tensor([[7.5, 4.0], [8.0, -6.0]]), atol=1e-5)
    # the largest half of each: 8, -6 of the first; 12 and ties at 0 of the second
    half = knots(deltas, density=0.5, trim="tensor", scale=0.5)
    assert torch.allclose(half, torch.tensor([[6.0, 0.0], [4.0, -3.0]]), atol=1e-5)
    # 2 * 3 - 12 votes minus, and 12 alone is left: its weighted mean is itself
    turned = knots(deltas, weight=[2.0, -1.0])
    assert torch.allclose(turned, torch.tensor([[12.0, 4.0], [8.0, -6.0]]), atol=1e-5)
    plain = knots(deltas, elect="none", aggregate="sum", weight=[2.0, -1.0])
    assert torch.allclose(plain, 2 * deltas[0] - deltas[1], atol=1e-5)


@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (30, 4)])
def test_sums_and_means_are_those_of_the_task_vectors(
    direction: str, shape: tuple[int, int]
) -> None:
    deltas = normal(3, *shape)
    added = knots(deltas, elect="none", aggregate="sum", direction=direction, weight=[1, 2, -1])
    assert torch.allclose(added, deltas[0] + 2 * deltas[1] - deltas[2])
    mean = knots(deltas, elect="none", direction=direction)
    assert torch.allclose(mean, deltas.mean(0))


def test_equal_task_vectors() -> None:
    one = normal(1, 5, 6)
    assert torch.allclose(knots(one.expand(3, -1, -1).contiguous()), one[0])
    assert torch.allclose(knots(one), one[0])


def test_a_share_that_is_rounding_is_none() -> None:
    deltas = torch.zeros(2, 6, 8)
    turn = torch.linalg.qr(normal(6, 6)).Q.float()
    deltas[0] = turn[:, :3] @ normal(3, 8, seed=1).float()
    deltas[1] = turn[:, 3:] @ normal(3, 8, seed=2).float()
    assert torch.allclose(knots(deltas), deltas.sum(0), atol=1e-5)  # no direction is shared
    three = torch.cat([deltas, torch.zeros(1, 6, 8)])
    assert torch.allclose(knots(three), deltas.sum(0), atol=1e-5)


def test_turned_outputs_and_transposes() -> None:
    deltas = normal(3, 5, 7)
    turn = torch.linalg.qr(normal(5, 5, seed=1)).Q
    given = {"density": 0.5, "trim": "tensor"}
    assert torch.allclose(knots(turn @ deltas, **given), turn @ knots(deltas, **given))
    vertical = knots(deltas.mT.contiguous(), direction="vertical", **given)
    assert torch.allclose(vertical, knots(deltas, **given).T)


@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
def test_adapters_from_their_factors(direction: str) -> None:
    factors = [(normal(20, r, seed=r), normal(r, 14, seed=r + 1)) for r in (2, 3)]
    deltas = torch.stack([b @ a for b, a in factors])
    given = {"density": 0.4, "trim": "tensor", "direction": direction}
    left, right = knots(torch.zeros_like(deltas), factors=factors, **given)
    assert left.shape[1] == 5
    assert torch.allclose(left @ right, knots(deltas, **given))


def test_random_drops() -> None:
    deltas = normal(2, 8, 12)
    given = {"elect": "none", "aggregate": "sum", "drop": 0.5}
    runs = [knots(deltas, rng=Draws(seed, ["a", "b"], "t"), **given) for seed in range(400)]
    assert torch.equal(runs[0], knots(deltas, rng=Draws(0, ["a", "b"], "t"), **given))
    error = (torch.stack(runs).mean(0) - deltas.sum(0)).norm() / deltas.sum(0).norm()
    assert error < 0.15  # 1/sqrt(400) of a spread of the order of the thing itself
    assert torch.equal(knots(deltas, seed=3, **given), knots(deltas, seed=3, **given))
    assert not torch.equal(knots(deltas, seed=3, **given), knots(deltas, seed=4, **given))
    assert not knots(deltas, **{**given, "drop": 1.0}).any()


def test_the_state_is_that_of_the_matrix() -> None:
    deltas = normal(3, 6, 9)
    p = {"weight": (1.0,) * 3, "density": (0.3,) * 3, "drop": 0.0, "direction": "horizontal",
         "trim": "global", "elect": "mass", "zero_sign": "majority"}  # fmt: skip
    state = ops.settle(_statistics, deltas, p, matrix=True)
    basis = torch.linalg.svd(torch.cat(list(deltas), 1)).U
    for x, least in zip(basis.T @ deltas, state.threshold, strict=True):
        assert int((x.abs() >= least * (1 - 1e-9)).sum()) == int(0.3 * 54) + 1
    assert torch.allclose(knots(deltas, density=0.3, state=state), knots(deltas, density=0.3))
    # one more than with a threshold for each matrix: floor(0.3 * 54) = 16, floor(0.315 * 54) = 17
    tensor = knots(deltas, density=0.315, trim="tensor")
    assert torch.allclose(knots(deltas, density=0.3), tensor)
    assert not torch.allclose(knots(deltas, density=0.3, trim="tensor"), tensor)


def test_what_is_no_matrix() -> None:
    deltas = normal(3, 4)
    assert not knots(deltas).any()
    assert torch.equal(knots(deltas, rest="mean", scale=2.0), deltas.mean(0) * 2)


@pytest.mark.parametrize("given", [{"trim": "tensor", "density": 0.3}, {}])
def test_a_recipe_decomposes_each_matrix_once_as_a_notebook_does(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    """One thresholds and one majority a matrix: nothing is asked of the matrix before."""
    models, calls, one = zoo.family({"a.weight": (8, 6), "b.weight": (6, 9)}), [], left_basis

    def counted(*args: Any) -> tuple[Tensor, Tensor]:
        calls.append(args)
        return one(*args)

    monkeypatch.setattr(home, "left_basis", counted)
    found, _ = zoo.merge({"method": "knots", "parameters": given}, workers=1, stats=False)
    assert len(calls) == 2
    for name, base in models["base"].items():
        deltas = torch.stack([models[e][name] - base for e in "abc"])
        assert torch.allclose(found[name], base + knots(deltas, **given), atol=1e-6)


def test_weights_that_cancel_have_no_mean() -> None:
    given = {"weight": [-0.9, 0.1, 0.8], "elect": "none", "aggregate": "mean"}
    found = knots(normal(3, 6, 9).float(), **given)  # in fp32 their sum is 6e-8
    assert found.abs().max() < 10
