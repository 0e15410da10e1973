"""tsv_m: by hand, where directions are orthogonal already, and with nothing, little or too much."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mowmerge.methods.ops.spectral import svd
from mowmerge.methods.static.tsv_m import tsv_m


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand() -> None:
    # U = [e1 (3e1 + 4e2)/5], polar factor [(3, -1), (1, 3)]/sqrt(10): turned evenly
    deltas = torch.tensor([[[10.0, 0.0], [0.0, 0.0]], [[0.0, 3.0], [0.0, 4.0]]])
    out = tsv_m(deltas, scale=0.5)
    root = 10**0.5
    # 10 (3, -1)/sqrt(10) e1' + 5 (1, 3)/sqrt(10) e2', halved
    wanted = torch.tensor([[30.0, 5.0], [-10.0, 15.0]]) / root / 2
    assert torch.allclose(out, wanted, atol=1e-5)
    doubled = tsv_m(deltas, weight=[2.0, -1.0])
    assert torch.allclose(doubled, torch.tensor([[60.0, -5.0], [-20.0, -15.0]]) / root, atol=1e-5)


def test_orthogonal_tasks_are_added_up() -> None:
    deltas = torch.zeros(2, 8, 6, dtype=torch.float64)
    deltas[0, :4, :3], deltas[1, 4:, 3:] = normal(4, 3), normal(4, 3, seed=1)
    assert torch.allclose(tsv_m(deltas), deltas.sum(0))
    kept = sum(svd(delta).cut(2).matrix for delta in deltas)
    assert torch.allclose(tsv_m(deltas, density=0.34), kept)  # int(6 * .34) = 2 triplets of each


def test_the_nuclear_norm_is_that_of_all_that_is_kept() -> None:
    deltas = normal(3, 12, 15)
    kept = sum(float(svd(delta).values[:4].sum()) for delta in deltas)
    assert float(torch.linalg.svdvals(tsv_m(deltas)).sum()) == pytest.approx(kept)


def test_a_single_model_comes_back_and_equal_ones_are_cut() -> None:
    one = normal(1, 9, 12)
    assert torch.allclose(tsv_m(one), one[0])
    twice = tsv_m(one.expand(3, -1, -1).contiguous())
    assert torch.allclose(twice, svd(one[0]).cut(3).matrix)  # polar of [U U U]: U/sqrt(3) thrice


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_task_vector_of_zeros_bends_nothing(dtype: torch.dtype) -> None:
    deltas = normal(2, 8, 10).to(dtype)
    three = torch.cat([deltas, torch.zeros(1, 8, 10, dtype=dtype)])
    assert torch.allclose(tsv_m(three, density=0.5), tsv_m(deltas, density=0.5), atol=1e-5)
    assert torch.allclose(tsv_m(three), tsv_m(deltas, density=0.25), atol=1e-5)


def test_rounding_is_no_direction() -> None:
    thin = normal(2, 20, 2) @ normal(2, 2, 16, seed=1)
    out = tsv_m(thin.float())  # eight triplets of each asked for, two there
    assert torch.allclose(out.double(), tsv_m(thin, density=0.125), atol=1e-5)
    assert int((torch.linalg.svdvals(out) > 1e-4).sum()) == 4


def test_the_rounding_of_a_large_matrix_is_no_direction() -> None:
    draws = torch.Generator().manual_seed(0)
    rows = torch.randint(-3, 4, (2, 512, 1), generator=draws).float()
    deltas = rows @ torch.randint(-3, 4, (2, 1, 512), generator=draws).float()
    values = torch.linalg.svdvals(tsv_m(deltas).double())
    assert values[1] > 0.5 * values[0]
    assert values[2] < 1e-7 * values[0]


def test_turned_inputs_and_outputs() -> None:
    deltas = normal(3, 6, 9)
    left, right = (torch.linalg.qr(normal(k, k, seed=k)).Q for k in (6, 9))
    assert torch.allclose(tsv_m(left @ deltas @ right), left @ tsv_m(deltas) @ right)


def test_more_models_than_triplets() -> None:
    deltas = normal(5, 2, 3)
    out = tsv_m(deltas)
    assert torch.isfinite(out).all()
    assert out.any()


def test_adapters_from_their_factors() -> None:
    factors = [(normal(20, r, seed=r), normal(r, 14, seed=r + 1)) for r in (2, 3)]
    deltas = torch.stack([b @ a for b, a in factors])
    left, right = tsv_m(torch.zeros_like(deltas), factors=factors, scale=0.5)
    assert left.shape[1] == 5  # a product of the ranks' sum
    assert torch.allclose(left @ right, tsv_m(deltas, scale=0.5))


def test_what_is_no_matrix_has_the_mean() -> None:
    for shape in ((4,), (2, 3, 2, 2)):
        deltas = normal(3, *shape)
        out = tsv_m(deltas, weight=[1.0, 2.0, -1.0], scale=0.5)
        assert torch.allclose(out, (deltas[0] + 2 * deltas[1] - deltas[2]) / 6)


def test_few_triplets_are_those_of_the_whole_decomposition() -> None:
    deltas = normal(16, 320, 300).float()  # in a drawn basis: 0.8 away
    wanted = tsv_m(deltas.double())
    assert float((tsv_m(deltas) - wanted).norm() / wanted.norm()) < 1e-2
