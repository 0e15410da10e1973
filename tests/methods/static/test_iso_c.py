"""iso_c: by hand, its spectrum, and sums of low rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mowmerge.methods.static.iso_c import iso_c


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand() -> None:
    # the sum is [[0, 3], [-5, 0]]: singular values 5 and 3, mean 4, polar factor [[0, 1], [-1, 0]]
    deltas = torch.tensor([[[1.0, 3.0], [-2.0, 0.0]], [[-1.0, 0.0], [-3.0, 0.0]]])
    out = iso_c(deltas, scale=0.5)
    assert torch.allclose(out, torch.tensor([[0.0, 2.0], [-2.0, 0.0]]), atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5)])
def test_every_direction_is_as_strong_and_the_nuclear_norm_stays(shape: tuple[int, int]) -> None:
    deltas = normal(3, *shape)
    total, values = deltas.sum(0), torch.linalg.svdvals(iso_c(deltas))
    mean = torch.linalg.svdvals(total).mean()
    assert torch.allclose(values, mean.expand_as(values))
    assert torch.allclose(iso_c(deltas.mT.contiguous()), iso_c(deltas).T)


def test_only_the_sum_matters() -> None:
    deltas = normal(2, 4, 7)
    other = torch.stack([deltas.sum(0), torch.zeros(4, 7, dtype=torch.float64)])
    assert torch.allclose(iso_c(other), iso_c(deltas))


def test_a_sum_of_low_rank_stays_in_its_spaces() -> None:
    deltas = (normal(2, 40, 1) @ normal(2, 1, 30, seed=1)).float()
    out = iso_c(deltas).double()
    sizes, wanted = torch.linalg.svdvals(out), torch.linalg.svdvals(deltas.sum(0).double())[:2]
    assert torch.allclose(sizes[:2], wanted.mean().expand(2), rtol=1e-5)
    assert sizes[2:].max() < 1e-4
    assert not iso_c(torch.stack([deltas[0], -deltas[0]])).any()


def test_what_is_no_matrix_has_the_mean() -> None:
    for shape in ((4,), (2, 3, 2, 2)):
        deltas = normal(3, *shape)
        assert torch.allclose(iso_c(deltas, scale=2.0), deltas.mean(0) * 2)


def test_turned_inputs_and_outputs() -> None:
    deltas = normal(3, 6, 9)
    left, right = (torch.linalg.qr(normal(k, k, seed=k)).Q for k in (6, 9))
    assert torch.allclose(iso_c(left @ deltas @ right), left @ iso_c(deltas) @ right)
