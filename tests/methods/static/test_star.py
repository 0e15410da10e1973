"""star: by hand, the norm that stays, and its ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mowmerge.methods.ops.spectral import svd
from mowmerge.methods.static.star import _truncated, star


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand() -> None:
    # of 5 + 3 + 2 the first two reach 60 %: they become 8 * 10/8; of 4 + 4 + 0 the first is 50 %
    deltas = torch.diag_embed(torch.tensor([[5.0, 3.0, 2.0], [0.0, 8.0, 2.0]]))
    out = star(deltas, density=0.6)
    assert torch.allclose(out, torch.diag(torch.tensor([3.125, 1.875 + 5, 0.0])), atol=1e-5)
    out = star(deltas, density=0.6, weight=[2.0, 0.0], scale=3.0)
    assert torch.allclose(out, torch.diag(torch.tensor([18.75, 11.25, 0.0])), atol=1e-5)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.4, 0.75, 1.0])
def test_the_nuclear_norm_stays_and_the_rank_grows(density: float) -> None:
    found = svd(normal(12, 9))
    kept = _truncated(found, density)
    assert float(kept.values.sum()) == pytest.approx(float(found.values.sum()))
    assert len(kept.values) >= len(_truncated(found, density * 0.9).values) >= 1
    assert float(found.values[: len(kept.values)].sum()) >= density * float(found.values.sum()) * (
        1 - 1e-12
    )


def test_all_of_it_is_the_mean_and_the_least_is_one_direction() -> None:
    deltas = normal(3, 8, 6)
    assert torch.allclose(star(deltas, density=1.0), deltas.mean(0))
    assert int((torch.linalg.svdvals(star(deltas[:1], density=0.0)) > 1e-9).sum()) == 1


def test_zeros_stay_zeros() -> None:
    deltas = normal(2, 4, 5)
    deltas[1] = 0.0
    assert torch.allclose(star(deltas), star(deltas[:1]) / 2)


def test_turned_inputs_and_outputs_and_other_sizes() -> None:
    deltas = normal(3, 6, 9)
    left, right = (torch.linalg.qr(normal(k, k, seed=k)).Q for k in (6, 9))
    assert torch.allclose(star(left @ deltas @ right), left @ star(deltas) @ right)
    assert torch.allclose(star(deltas * 7), star(deltas) * 7)


def test_adapters_from_their_factors() -> None:
    factors = [(normal(20, r, seed=r), normal(r, 14, seed=r + 1)) for r in (4, 3)]
    deltas = torch.stack([b @ a for b, a in factors])
    left, right = star(torch.zeros_like(deltas), factors=factors, weight=[1.0, -0.5])
    assert left.shape[1] < 7  # cut
    assert torch.allclose(left @ right, star(deltas, weight=[1.0, -0.5]))


def test_what_is_no_matrix_has_the_mean() -> None:
    deltas = normal(3, 4)
    assert torch.allclose(star(deltas, weight=[1.0, 0.0, 2.0]), (deltas[0] + 2 * deltas[2]) / 3)
