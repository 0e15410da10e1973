"""opcm: by hand, in steps as at once, and what its order and its directions change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import Zoo

from mowmerge.methods.static.opcm import _apart, opcm


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand() -> None:
    deltas = torch.tensor([[[6.0, 0.0], [0.0, 3.0]], [[1.0, 2.0], [2.0, 4.0]]])
    # 6/9 exceeds a half at once: nothing is closed. (7 2; 2 7), norm sqrt(106), mean norm of
    # sqrt(45) and 5
    factor = (45**0.5 + 5) / 2 / 106**0.5
    assert torch.allclose(opcm(deltas), torch.tensor([[7.0, 2.0], [2.0, 7.0]]) * factor)
    # 6/9 does not exceed .7: the first direction is closed, and of D2 its 1 is left out
    factor = (45**0.5 + 5) / 2 / 93**0.5
    out = opcm(deltas, density=0.7, scale=2.0)
    assert torch.allclose(out, torch.tensor([[6.0, 2.0], [2.0, 7.0]]) * factor * 2)
    # and with the diagonal, its 4 too: (6 2; 2 3), squares 36 + 4 + 4 + 9
    factor = (45**0.5 + 5) / 2 / 53**0.5
    out = opcm(deltas, density=0.7, zero_diagonal=True)
    assert torch.allclose(out, torch.tensor([[6.0, 2.0], [2.0, 3.0]]) * factor)


@pytest.mark.parametrize("shape", [(7, 7), (6, 9), (9, 6)])
@pytest.mark.parametrize("zero_diagonal", [False, True])
def test_what_is_left_is_outside_the_leading_block(
    shape: tuple[int, int], zero_diagonal: bool
) -> None:
    total, delta = normal(*shape), normal(*shape, seed=1)
    left = _apart(delta, total, 0.5, zero_diagonal)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    rank = int((s.cumsum(0) / s.sum() <= 0.5).sum())
    assert rank >= 1
    assert (u[:, :rank].T @ left @ vh[:rank].T).abs().max() < 1e-10
    inside = u.T @ left @ vh.T
    assert bool((inside.diagonal().abs().max() < 1e-10) == zero_diagonal)
    moved = u.T @ (delta - left) @ vh.T  # nothing but the block, and the diagonal, is taken
    moved[:rank, :rank] = 0
    assert (moved - torch.diag(moved.diagonal()) * zero_diagonal).abs().max() < 1e-10


def test_every_direction_can_be_closed() -> None:
    deltas = normal(2, 5, 5)
    out = opcm(deltas, density=1.0)  # of full rank: nothing of the second is left
    assert torch.allclose(out / out.norm(), deltas[0] / deltas[0].norm())
    thin = torch.zeros(2, 4, 4, dtype=torch.float64)
    thin[0, 0, 0], thin[1] = 2.0, normal(4, 4)
    out = opcm(thin, density=1.0)
    assert out[0, 0] / out[1, 1] == pytest.approx(2.0 / float(thin[1, 1, 1]))


def test_the_norm_is_the_mean_norm_and_the_order_counts() -> None:
    deltas = normal(3, 8, 6)
    out = opcm(deltas)
    assert float(out.norm()) == pytest.approx(float(deltas.flatten(1).norm(dim=1).mean()))
    assert not torch.allclose(opcm(deltas.flip(0)), out, atol=1e-3)


def test_a_single_model_zeros_and_what_is_no_matrix() -> None:
    one = normal(1, 5, 7)
    assert torch.allclose(opcm(one), one[0])
    assert not opcm(torch.zeros(3, 4, 4)).any()
    assert not opcm(torch.stack([one[0].flatten(), -one[0].flatten()])).any()
    first = torch.cat([torch.zeros(1, 5, 7, dtype=torch.float64), one])
    assert torch.allclose(opcm(first), one[0] / 2)  # a task vector of zeros lowers the mean norm
    vectors = normal(2, 6)
    out = opcm(vectors)
    assert torch.allclose(out / out.norm(), vectors.sum(0) / vectors.sum(0).norm())


def test_turned_inputs_and_outputs() -> None:
    deltas = normal(3, 6, 9)
    left, right = (torch.linalg.qr(normal(k, k, seed=k)).Q for k in (6, 9))
    assert torch.allclose(opcm(left @ deltas @ right), left @ opcm(deltas) @ right)


def test_a_recipe_goes_on_from_an_earlier_merge(zoo: Zoo) -> None:
    family = zoo.family("llama", 4)
    content: dict[str, Any] = {"method": "opcm", "base": "./base"}
    models = {name: f"./{name}" for name in "abcd"}
    once, _ = zoo.merge({**content, "models": models}, "once")
    first, report = zoo.merge({**content, "models": {n: models[n] for n in "ab"}}, "first")
    (state,) = report["statistics"]
    assert (state["method"], state["models"], state["merged"]) == ("opcm", ["a", "b"], 2)
    assert state["stretch"] > 1
    moved = sum(float((first[n] - v).double().square().sum()) for n, v in family["base"].items())
    norms = [
        sum(float((family[m][n] - v).double().square().sum()) for n, v in family["base"].items())
        for m in "ab"
    ]
    assert moved**0.5 == pytest.approx((norms[0] ** 0.5 + norms[1] ** 0.5) / 2, rel=1e-5)
    after = {"first": "./first", "c": models["c"], "d": models["d"]}
    given = {key: state[key] for key in ("merged", "stretch")}
    then, report = zoo.merge({**content, "models": after, "parameters": given}, "then")
    assert all(torch.allclose(then[name], value, atol=1e-5) for name, value in once.items())
    assert report["statistics"][0]["merged"] == 4
    plain, _ = zoo.merge({**content, "models": after}, "plain")
    assert not all(torch.allclose(plain[name], value, atol=1e-3) for name, value in once.items())


def test_what_was_merged_before_is_one_for_all_tensors(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    rules = [{"match": {"role": "mlp"}, "parameters": {"merged": 3}}]
    ran = zoo.here("merge", zoo.recipe({"method": "opcm", "rules": rules}), "--dry-run")
    assert ran.rc != 0
    assert "merged must be the same for all tensors" in ran.err


def test_with_nothing_closed_it_is_the_sum_at_the_mean_norm() -> None:
    deltas = normal(3, 6, 4)
    out, total = opcm(deltas, density=0.0), deltas.sum(0)
    mean = float(deltas.flatten(1).norm(dim=1).mean())
    assert torch.allclose(out, total / total.norm() * mean)
