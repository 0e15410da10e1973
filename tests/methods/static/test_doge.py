"""doge: norm-balanced sums, what the change does to the rows' gaps, the subspace, its edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from zoo import Zoo

from mowmerge.methods.static.doge import _shared, doge


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaps(deltas: Tensor, change: Tensor, eta: float) -> Tensor:
    """V_j . (V_j - S - L change) for each model and row."""
    share = [eta / float(d.norm()) for d in deltas]
    rest = deltas - sum(w * d for w, d in zip(share, deltas, strict=True)) - sum(share) * change
    return (deltas * rest).sum(-1)


def change(deltas: Tensor, **given: object) -> Tensor:
    """The change that the method found: its result over that of none, without a mask."""
    share = sum(0.07 / float(d.norm()) for d in deltas)
    return (doge(deltas, density=1.0, **given) - doge(deltas, density=1.0, steps=0)) / share  # type: ignore[arg-type]


def test_without_steps_the_lengths_are_balanced() -> None:
    deltas = torch.tensor([[[3.0, 4.0]], [[0.0, 10.0]]])
    out = doge(deltas, density=1.0, steps=0)
    assert torch.allclose(out, 0.07 * torch.tensor([[0.6, 0.8 + 1.0]]))
    out = doge(deltas, density=1.0, steps=0, eta=1.0, weight=[1.0, 0.5])
    assert torch.allclose(out, torch.tensor([[0.6, 0.8 + 0.5]]))
    longer = doge(deltas * torch.tensor([1.0, 9.0])[:, None, None], density=1.0, steps=0)
    assert torch.allclose(longer, 0.07 * torch.tensor([[0.6, 0.8 + 1.0]]))


def test_a_step_by_hand() -> None:
    # one row, r = 1: U is the row's only direction unless the subspace is empty (1 // 6 = 0)
    deltas = torch.tensor([[[2.0, 0.0]]])
    # l = .07 / 2, S = (.07, 0), the gap 2 (2 - .07) > 0: the slope points down, the step is up
    out = doge(deltas, density=1.0, steps=1, rate=0.25)
    assert torch.allclose(out, 0.035 * torch.tensor([[2.25, 0.0]]), atol=1e-6)
    # a subspace that holds it leaves nothing to change
    assert torch.allclose(doge(deltas, density=1.0, steps=1, rate=0.25, subspace=1),
                          torch.tensor([[0.07, 0.0]]))  # fmt: skip


def test_the_gaps_shrink() -> None:
    deltas = normal(3, 8, 12)
    before = gaps(deltas, torch.zeros(8, 12), 0.07).square().sum()
    near = gaps(deltas, change(deltas, rate=1e-3), 0.07).square().sum()
    nearer = gaps(deltas, change(deltas, rate=1e-2), 0.07).square().sum()
    assert nearer < near < before


def test_what_is_shared_stays_where_it_is() -> None:
    deltas = normal(2, 12, 9)
    basis = _shared(deltas, 3)
    assert basis.shape == (12, 3)
    assert torch.allclose(basis.T @ basis, torch.eye(3, dtype=torch.float64))
    strict = change(deltas, subspace=3, project="step", rate=1e-2)
    assert float((basis.T @ strict).norm()) < 1e-9 * float(strict.norm()) + 1e-9
    loose = change(deltas, subspace=3, rate=1e-2)
    share = float((basis.T @ loose).norm() / loose.norm())
    assert 0.01 < share < 0.7  # Adam brings some of it back


def test_entries_that_are_small_are_left_out() -> None:
    deltas = normal(2, 6, 10)
    out = doge(deltas, density=0.3)
    mask = torch.stack([d.abs() >= d.abs().flatten().sort().values[-19] for d in deltas])
    assert torch.equal(out != 0, mask.any(0))  # floor(60 * 0.3) + 1 of each


def test_a_task_vector_of_zeros_has_no_part() -> None:
    deltas = normal(2, 6, 10)
    deltas[1] = 0
    out = doge(deltas, density=1.0)
    assert out.isfinite().all() and float(out.norm()) > 0
    assert torch.equal(doge(torch.zeros(2, 4, 4)), torch.zeros(4, 4))


@pytest.mark.parametrize("rest", ["base", "mean"])
def test_what_is_no_matrix(rest: str) -> None:
    deltas = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    wanted = torch.tensor([2.0, 3.0]) if rest == "mean" else torch.zeros(2)
    assert torch.equal(doge(deltas, rest=rest), wanted)  # type: ignore[arg-type]


def test_the_threshold_is_of_all_matrices(zoo: Zoo) -> None:
    """Of two matrices the one with the larger changes keeps more."""
    base = {"a.weight": torch.zeros(8, 8), "b.weight": torch.zeros(8, 8), "n": torch.zeros(8)}
    zoo.save("base", base)
    for i, name in enumerate("xy"):
        large, small = normal(8, 8, seed=i).float(), normal(8, 8, seed=i + 5).float()
        zoo.save(name, {"a.weight": large * 10, "b.weight": small, "n": torch.ones(8)})
    recipe = {"method": "doge", "parameters": {"density": 0.5, "steps": 0}}
    found, _ = zoo.merge(recipe)
    shares = [float((found[n] != 0).float().mean()) for n in ("a.weight", "b.weight")]
    assert shares[0] == 1.0 and shares[1] < 0.4
    assert torch.equal(found["n"], base["n"])
