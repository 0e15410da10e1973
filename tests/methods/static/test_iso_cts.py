"""iso_cts: how directions are shared out, its spectrum, and where it is iso_c."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mowmerge.methods.static.iso_c import iso_c
from mowmerge.methods.static.iso_cts import _ranks, iso_cts


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("rank", "n", "common", "shared", "own"),
    [(768, 20, 0.8, 608, 8), (768, 8, 0.8, 616, 19), (10, 8, 0.8, 10, 0), (7, 8, 0.0, 7, 0),
     (12, 3, 0.0, 0, 4), (12, 3, 1.0, 12, 0)],
)  # fmt: skip
def test_directions_are_shared_out(rank: int, n: int, common: float, shared: int, own: int) -> None:
    assert _ranks(rank, n, common) == (shared, own)


def test_by_hand() -> None:
    # one shared direction: e1 e1' of the sum diag(10, 1, -2). What is left of D1 is 5 e2 e2', of D2
    # -6 e3 e3' - 4 e2 e2': one each. All orthogonal; the mean of 10, 5, 6 is 7
    deltas = torch.diag_embed(torch.tensor([[6.0, 5.0, 4.0], [4.0, -4.0, -6.0]]))
    out = iso_cts(deltas, common=0.34)
    assert torch.allclose(out, torch.diag(torch.tensor([7.0, 7.0, -7.0])), atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 12), (9, 15), (15, 9)])
def test_every_direction_is_as_strong(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(iso_cts(normal(3, *shape), common=0.5, scale=2.0))
    assert torch.allclose(values, values[0].expand_as(values))


def test_with_nothing_of_its_own_it_is_iso_c() -> None:
    deltas = normal(3, 8, 11)
    assert torch.allclose(iso_cts(deltas, common=1.0), iso_c(deltas))
    assert torch.allclose(iso_cts(normal(1, 8, 11)), iso_c(normal(1, 8, 11)))


def test_zeros_and_low_rank_bring_no_arbitrary_directions() -> None:
    thin = (normal(2, 20, 1) @ normal(2, 1, 16, seed=1)).float()
    out = iso_cts(thin, common=0.5)
    assert int((torch.linalg.svdvals(out) > 1e-4).sum()) == 2
    three = torch.cat([thin, torch.zeros(1, 20, 16)])
    assert torch.allclose(iso_cts(three, common=0.5), out, atol=1e-5)
    assert not iso_cts(torch.zeros(2, 3, 4)).any()


@pytest.mark.parametrize("longer", [1.0, 30.0])
def test_the_rounding_of_a_projection_is_no_direction(longer: float) -> None:
    """In fp32 a task vector within the shared directions leaves 1e-6 of itself beside them."""
    for seed in range(4):
        thin = (normal(2, 200, 10, seed=seed) @ normal(2, 10, 120, seed=seed + 10)).float()
        thin[1] *= longer
        values = torch.linalg.svdvals(iso_cts(thin, common=0.8).double())
        assert int((values > 1e-4 * values[0]).sum()) == 20
        assert torch.allclose(values[:20], values[:1].expand(20), rtol=1e-4)


@pytest.mark.parametrize("rank", [6, 2, 0])  # of the sum, of which three directions are shared
def test_turned_inputs_and_outputs(rank: int) -> None:
    deltas = normal(3, 6, 9)
    deltas[2] -= deltas.sum(0) * (rank < 6)
    deltas[2] += (normal(6, rank, seed=3) @ normal(rank, 9, seed=4)) * (rank < 6)
    left, right = (torch.linalg.qr(normal(k, k, seed=k)).Q for k in (6, 9))
    turned = iso_cts(left @ deltas @ right, common=0.5)
    assert torch.allclose(turned, left @ iso_cts(deltas, common=0.5) @ right)


def test_what_is_no_matrix_has_the_mean() -> None:
    deltas = normal(3, 4)
    assert torch.allclose(iso_cts(deltas, scale=2.0), deltas.mean(0) * 2)


def test_few_own_directions_are_those_of_the_whole_decomposition() -> None:
    deltas = normal(16, 320, 300).float()  # in a drawn basis: 0.3 away
    wanted = iso_cts(deltas.double())
    assert float((iso_cts(deltas) - wanted).norm() / wanted.norm()) < 1e-2
