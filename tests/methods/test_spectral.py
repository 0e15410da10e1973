"""ops.spectral: by hand, against LAPACK, where the driver fails, and on matrices of low rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mowmerge.methods.ops import spectral
from mowmerge.methods.ops.spectral import (
    leading_svd,
    polar,
    product_svd,
    spectrum,
    svd,
    svds,
    truncated,
)

torch.set_num_threads(1)
SHAPES = [(5, 5), (7, 5), (5, 7), (40, 6), (6, 40), (1, 9), (9, 1)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def of_rank(rank: int, rows: int, columns: int, seed: int = 0) -> Tensor:
    return normal(rows, rank, seed=seed) @ normal(rank, columns, seed=seed + 1)


def orthonormal(value: Tensor) -> bool:
    return torch.allclose(value @ value.T, torch.eye(len(value), dtype=value.dtype), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_thin_svd_of_any_shape(shape: tuple[int, int]) -> None:
    matrix, least = normal(*shape), min(shape)
    found = svd(matrix)
    assert found.left.shape == (shape[0], least)
    assert found.right.shape == (least, shape[1])
    assert torch.allclose(found.matrix, matrix, atol=1e-5)
    assert orthonormal(found.left.T)
    assert orthonormal(found.right)
    assert torch.allclose(found.values, torch.linalg.svdvals(matrix), rtol=1e-5)
    assert found.rank == least


@pytest.mark.parametrize("rank", [1, 2, 40])
def test_the_rounding_of_a_large_matrix_is_no_rank(rank: int) -> None:
    """Of whole numbers, whose products fp32 has exactly."""
    g = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-3, 4, (512, rank), generator=g).float() for _ in range(2))
    found = svd(left @ right.T)
    assert found.rank == rank
    assert product_svd(left, right.T).rank == rank
    assert rank > 1 or found.values[1] > 1e-6 * found.values[0]  # so that the size has to count


def test_by_hand() -> None:
    matrix = torch.tensor([[0.0, 3.0], [-4.0, 0.0], [0.0, 0.0]])
    assert svd(matrix).values.tolist() == pytest.approx([4.0, 3.0])
    assert torch.allclose(svd(matrix).cut(1).matrix, torch.tensor([[0, 0], [-4.0, 0], [0, 0]]))
    factor, values = polar(matrix)
    assert torch.allclose(factor, torch.tensor([[0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]]))
    assert values.tolist() == pytest.approx([4.0, 3.0])


@pytest.mark.parametrize("fault", ["raises", "gives nan"])
def test_a_driver_that_fails_is_followed_by_fp64(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    real, matrix = torch.linalg.svd, normal(6, 5)

    def failing(value: Tensor, **given: Any) -> Any:
        if value.dtype == torch.float64:
            return real(value, **given)
        if fault == "raises":
            raise torch.linalg.LinAlgError("did not converge")
        return [part * torch.nan for part in real(value, **given)]

    monkeypatch.setattr(torch.linalg, "svd", failing)
    found = svd(matrix)
    assert found.values.dtype == torch.float32
    assert torch.allclose(found.matrix, matrix, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_factor_of_full_rank(shape: tuple[int, int]) -> None:
    matrix = normal(*shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    factor, found = polar(matrix)
    assert torch.allclose(factor, left @ right)
    assert torch.allclose(found, values)


@pytest.mark.parametrize(("rows", "columns"), [(30, 20), (20, 30), (24, 24)])
def test_polar_factor_of_low_rank_stays_in_its_spaces(rows: int, columns: int) -> None:
    matrix = of_rank(3, rows, columns)
    factor, values = polar(matrix)
    assert len(values) == 3
    sizes = torch.linalg.svdvals(factor)
    assert torch.allclose(sizes[:3], torch.ones(3), atol=1e-5)
    assert sizes[3:].max() < 1e-5
    basis = svd(matrix).cut(3)
    assert torch.allclose(basis.left @ basis.left.T @ factor, factor, atol=1e-4)
    assert not polar(torch.zeros(4, 3))[0].any()


@pytest.mark.parametrize("shape", [(600, 1300), (1300, 530)])
def test_a_spectrum_in_many_pieces(shape: tuple[int, int]) -> None:
    matrix = normal(*shape)
    found = spectrum(matrix)
    wanted = torch.linalg.svdvals(matrix.double())
    assert torch.allclose(found.values, wanted, rtol=1e-10)
    assert orthonormal(found.vectors.T)
    side = matrix if shape[0] < shape[1] else matrix.T
    moved = found.vectors.T @ side.double()
    assert torch.allclose(moved.norm(dim=1), wanted, rtol=1e-8)


def test_the_gram_matrix_in_fp64_knows_more_than_lapack_in_fp32() -> None:
    left, right = (torch.linalg.qr(normal(40, 40, seed=i, dtype=torch.float64))[0] for i in (1, 2))
    values = torch.logspace(0, -5, 40, dtype=torch.float64)
    matrix = ((left * values) @ right).float()
    found = spectrum(matrix).values
    assert len(found) == 40
    lapack = torch.linalg.svdvals(matrix).double()
    assert (found / values - 1).abs().max() <= (lapack / values - 1).abs().max()


@given(st.integers(1, 6), st.integers(1, 30), st.integers(1, 30), st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_product_is_decomposed_without_being_formed(
    rank: int, rows: int, columns: int, seed: int
) -> None:
    left, right = normal(rows, rank, seed=seed), normal(rank, columns, seed=seed + 1)
    found, dense = product_svd(left, right), left @ right
    assert torch.allclose(found.matrix, dense, atol=1e-4)
    wanted = torch.linalg.svdvals(dense)
    least = min(len(found.values), len(wanted))
    assert torch.allclose(found.values[:least], wanted[:least], atol=1e-4)


def test_each_from_its_factors() -> None:
    factors = [(normal(9, r, seed=r), normal(r, 7, seed=r + 1)) for r in (2, 3)]
    deltas = torch.stack([b @ a for b, a in factors])
    for dense, thin in zip(svds(deltas), svds(deltas, factors), strict=True):
        assert torch.allclose(dense.matrix, thin.matrix, atol=1e-5)
    nothing = next(svds(deltas[:1], [(normal(9, 0), normal(0, 7))]))
    assert torch.equal(nothing.matrix, torch.zeros(9, 7))


def test_few_triplets_are_drawn_and_what_they_lose_is_known() -> None:
    matrix = of_rank(12, 300, 260) + 0.01 * normal(300, 260, seed=5)
    assert spectral.few(12, matrix.shape)
    assert not spectral.few(20, matrix.shape)
    drawn, exact = leading_svd(matrix, 12), svd(matrix).cut(12)
    assert torch.allclose(drawn.values, exact.values, rtol=1e-5)
    lost = float((matrix - drawn.matrix).square().sum())
    whole, kept = (float(v.double().square().sum()) for v in (matrix, drawn.values))
    assert lost == pytest.approx(whole - kept, abs=1e-5 * whole)  # values are of fp32
    assert lost <= 1.0001 * float((matrix - exact.matrix).square().sum())
    assert torch.equal(leading_svd(matrix, 12).matrix, drawn.matrix)
    assert torch.equal(leading_svd(matrix, 40).matrix, svd(matrix).cut(40).matrix)


def test_what_is_cut_holds_no_memory_of_the_rest() -> None:
    found = svd(normal(30, 30)).cut(2)
    assert found.left.untyped_storage().nbytes() == 4 * 60
    assert found.right.untyped_storage().nbytes() == 4 * 60


def falling(rows: int, columns: int, power: float) -> Tensor:
    """Of singular values j^-power."""
    least = min(rows, columns)
    left, right = (torch.linalg.qr(normal(k, least, seed=k)).Q for k in (rows, columns))
    return (left * torch.arange(1, least + 1).pow(-power)) @ right.T


@pytest.mark.parametrize("shape", [(400, 320), (320, 900)])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_what_a_drawn_basis_loses_is_told_and_hardly_more_than_the_least(
    shape: tuple[int, int], power: float
) -> None:
    deltas = torch.stack([falling(*shape, power), normal(*shape), torch.zeros(shape)])
    for rank, drawn in ((12, True), (24, False)):
        pairs, told = truncated(deltas, rank)
        assert bool(told["drawn"]) == drawn == spectral.few(rank, shape)
        assert [(len(b.T), len(a)) for b, a in pairs] == [(rank, rank)] * 3
        for delta, (b, a), lost in zip(deltas[:2], pairs, told["lost"].tolist(), strict=False):
            apart = (delta - b @ a).double().norm() / delta.double().norm()
            assert lost == pytest.approx(float(apart), rel=1e-6)
            values = torch.linalg.svdvals(delta.double())
            least = float(values[rank:].norm() / values.norm())
            assert least * (1 - 1e-5) <= lost <= least * (1.01 if drawn else 1 + 1e-5)
            assert torch.allclose(b.norm(dim=0), a.norm(dim=1), rtol=1e-4)
        assert told["lost"][2] == 0
        assert not (pairs[2][0] @ pairs[2][1]).any()
