"""wudi: least interference; by its minimum, where there is none to lose, and at its edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mowmerge.methods.static.wudi import wudi


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def interference(merged: Tensor, deltas: Tensor) -> float:
    return sum(float(((merged - d) @ d.T).square().sum() / d.square().sum()) for d in deltas)


def test_by_hand() -> None:
    # G1 = [[1, 0], [0, 0]], G2 = [[.5, .5], [.5, .5]]: A = [[1.5, .5], [.5, .5]], B = [2 + 1, 1]
    deltas = torch.tensor([[[2.0, 0.0]], [[1.0, 1.0]]])
    # T A = B: T = (2, 0), on which both agree: T . D1 = 4 = |D1|^2, T . D2 = 2 = |D2|^2
    assert torch.allclose(wudi(deltas, solver="closed"), torch.tensor([[2.0, 0.0]]))
    assert torch.allclose(wudi(deltas, solver="closed", scale=0.5), torch.tensor([[1.0, 0.0]]))
    assert torch.equal(wudi(deltas, steps=0), torch.tensor([[3.0, 1.0]]))
    # the slope 2 (T A - B) at (3, 1) is (4, 2): the first step is the rate, against its sign
    one = wudi(deltas, steps=1, rate=0.25)
    assert torch.allclose(one, torch.tensor([[2.75, 0.75]]), atol=1e-6)


def test_the_closed_form_is_the_minimum() -> None:
    deltas = normal(3, 6, 10)
    best = wudi(deltas, solver="closed")
    least = interference(best, deltas)
    for seed in range(20):
        assert interference(best + 1e-3 * normal(6, 10, seed=seed), deltas) >= least
    adam = wudi(deltas, steps=3000, rate=1e-2)
    assert least * (1 - 1e-12) <= interference(adam, deltas) < least * 1.001
    assert interference(wudi(deltas, rate=1e-3), deltas) < interference(deltas.sum(0), deltas)


def test_task_vectors_of_disjoint_row_spaces_are_added_up() -> None:
    deltas = torch.zeros(2, 4, 6, dtype=torch.float64)
    deltas[0, :, :3], deltas[1, :, 3:] = normal(4, 3), normal(4, 3, seed=1)
    assert torch.allclose(wudi(deltas, solver="closed"), deltas.sum(0))
    assert torch.allclose(wudi(deltas), deltas.sum(0))


def test_equal_task_vectors_and_a_single_one() -> None:
    one = normal(1, 5, 7)
    assert torch.allclose(wudi(one.expand(3, -1, -1).contiguous(), solver="closed"), one[0])
    assert torch.allclose(wudi(one), one[0])  # without interference Adam stays


def test_task_vectors_of_low_rank_get_nothing_outside_their_rows() -> None:
    rows = torch.linalg.qr(normal(9, 3)).Q.T
    deltas = normal(2, 5, 3, seed=1) @ rows
    for solver in ("closed", "adam"):
        out = wudi(deltas, solver=solver)
        assert torch.allclose(out @ rows.T @ rows, out, atol=5e-3)
    assert torch.allclose(
        wudi(deltas, solver="closed") @ rows.T @ rows, wudi(deltas, solver="closed")
    )


def test_a_task_vector_of_zeros_is_left_out() -> None:
    deltas = normal(2, 4, 5)
    three = torch.cat([deltas, torch.zeros(1, 4, 5, dtype=torch.float64)])
    for solver in ("closed", "adam"):
        assert torch.allclose(wudi(three, solver=solver), wudi(deltas, solver=solver))


def test_what_is_no_matrix() -> None:
    for shape in ((4,), (2, 3, 2, 2)):
        deltas = normal(3, *shape)
        assert not wudi(deltas).any()
        assert torch.equal(wudi(deltas, rest="mean", scale=2.0), deltas.mean(0) * 2)


def test_leading_triplets_by_hand() -> None:
    # of two models the first of two triplets counts. R1 = (4, 0), R2 = (0, 6);
    # the mean is diag(3, 4), D1 - M = diag(1, -2) = -(D2 - M), whose first triplet is the 2
    deltas = torch.stack(
        [torch.diag(torch.tensor([4.0, 2.0])), torch.diag(torch.tensor([2.0, 6.0]))]
    )
    # so E1 = diag(3, 2), E2 = diag(3, 6), and T is E1 on the first axis and E2 on the second
    out = wudi(deltas, solver="closed", interference="leading")
    assert torch.allclose(out, torch.diag(torch.tensor([3.0, 6.0])), atol=1e-5)
    # G1 = diag(16, 0) / 20, G2 = diag(0, 36) / 40, B = diag(2.4, 5.4): at diag(6, 8) the slope is
    # 2 (T A - B) = diag(4.8, 3.6), so that the first step takes the rate from both
    one = wudi(deltas, interference="leading", steps=1, rate=0.25)
    assert torch.allclose(one, torch.diag(torch.tensor([5.75, 7.75])), atol=1e-5)


def test_leading_triplets_of_one_model_and_of_equal_ones() -> None:
    one = normal(1, 5, 7)
    assert torch.allclose(wudi(one, interference="leading", solver="closed"), one[0])
    thin = normal(1, 6, 2) @ normal(1, 2, 8, seed=1)  # all its triplets are among the first third
    three = thin.expand(3, -1, -1).contiguous()
    assert torch.allclose(wudi(three, interference="leading", solver="closed"), thin[0])


def test_leading_triplets_by_autograd() -> None:
    deltas, rank = normal(3, 7, 10), 2
    merged = deltas.sum(0).clone().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for delta in deltas:
        u, s, vh = torch.linalg.svd(delta - deltas.mean(0), full_matrices=False)
        wanted = deltas.mean(0) + (u[:, :rank] * s[:rank]) @ vh[:rank]
        _, s, vh = torch.linalg.svd(delta, full_matrices=False)
        part = (merged - wanted) @ (s[:rank, None] * vh[:rank]).T
        loss = loss + part.square().sum() / delta.square().sum()
    (slope,) = torch.autograd.grad(loss, merged)
    step = wudi(deltas, interference="leading", steps=1, rate=0.5) - merged.detach()
    assert torch.allclose(step, -0.5 * slope / (slope.abs() + 1e-8))


def test_the_minimum_turns_with_inputs_and_outputs() -> None:
    deltas = normal(3, 6, 9)
    left, right = (torch.linalg.qr(normal(k, k, seed=k)).Q for k in (6, 9))
    for interference in ("full", "leading"):
        given = {"solver": "closed", "interference": interference}
        assert torch.allclose(
            wudi(left @ deltas @ right, **given), left @ wudi(deltas, **given) @ right
        )


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e25])
def test_sizes_whose_squares_no_float_holds(size: float) -> None:
    deltas = (normal(2, 4, 5) * size).float()
    want = wudi(deltas.double(), solver="closed")
    assert torch.allclose(wudi(deltas, solver="closed").double(), want, rtol=1e-4, atol=1e-5 * size)
    assert torch.isfinite(wudi(deltas, steps=3)).all()


def test_a_ridge_shrinks_the_minimum() -> None:
    deltas = torch.tensor([[[2.0, 0.0]], [[1.0, 1.0]]])
    # A = [[1.5, .5], [.5, .5]], its mean eigenvalue 1, B = (3, 1): T (A + I/2) = B, T = (10, 2) / 7
    out = wudi(deltas, solver="closed", ridge=0.5)
    assert torch.allclose(out, torch.tensor([[10.0, 2.0]]) / 7)
    thin = torch.cat([deltas, torch.zeros(2, 1, 3)], 2)  # what no expert has stays out
    assert torch.allclose(wudi(thin, solver="closed", ridge=0.2)[:, 2:], torch.zeros(1, 3))
