"""breadcrumbs: both tails dropped; by hand, against TIES' trim, and at its edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mowmerge.methods.static.breadcrumbs import breadcrumbs
from mowmerge.methods.static.task_arithmetic import task_arithmetic

TEN = torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0, 9.0, -10.0]])


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_by_hand() -> None:
    # of ten the 2 largest go, the next 3 stay: 8, 7, 6
    out = breadcrumbs(TEN, density=0.3, gamma=0.2)
    assert out.tolist() == [0, 0, 0, 0, 0, -6.0, 7.0, -8.0, 0, 0]
    assert breadcrumbs(TEN, density=0.3, gamma=0.2, scale=0.5, weight=3.0).tolist()[5:8] == [
        -9.0, 10.5, -12.0,
    ]  # fmt: skip


def test_elected_by_hand() -> None:
    deltas = torch.tensor([[9.0, 1.0, 4.0, 2.0], [-3.0, 9.0, 2.0, -0.1]])
    # a quarter dropped above, half kept: T1 = (0, 0, 4, 2), T2 = (-3, 0, 2, 0)
    given = {"density": 0.5, "gamma": 0.25}
    assert breadcrumbs(deltas, **given).tolist() == [-3.0, 0.0, 6.0, 2.0]
    mean = breadcrumbs(deltas, **given, elect="mass", aggregate="mean", weight=[1.0, 3.0])
    # weighted: (0, 0, 4, 2) and (-9, 0, 6, 0), over the weights that agree: 3, -, 4, 1
    assert mean.tolist() == [-3.0, 0.0, 2.5, 2.0]


def test_the_counts_kept() -> None:
    delta = normal(1, 1000)
    for density, gamma in ((0.2, 0.1), (0.857, 0.007), (0.001, 0.5), (0.5, 0.0)):
        out = breadcrumbs(delta, density=density, gamma=gamma)
        assert int((out != 0).sum()) == int(density * 1000)
        size = delta.abs().sort(descending=True).values[0]
        assert float(out.abs().max()) == float(size[int(gamma * 1000)])


def test_what_density_leaves_is_the_most_that_gamma_drops() -> None:
    # 9 of ten are kept, so one outlier goes, not five
    assert breadcrumbs(TEN, density=0.9, gamma=0.5).tolist() == [*TEN[0, :9].tolist(), 0.0]
    assert torch.equal(breadcrumbs(TEN, density=1.0, gamma=0.5), TEN[0])
    assert not breadcrumbs(TEN, density=0.0, gamma=0.1).any()
    two = normal(2, 30)
    every = breadcrumbs(two, density=1.0, gamma=0.3, weight=[0.3, 0.7])
    assert torch.equal(every, task_arithmetic(two, weight=[0.3, 0.7]))


def test_small_tensors() -> None:
    # floor(0.01 * 50) = 0 outliers: all that density says is kept
    out = breadcrumbs(normal(1, 50), density=0.9, gamma=0.01)
    assert int((out != 0).sum()) == 45
    # floor(0.2 * 3) = 0 of a row of a kernel, floor(0.2 * 27) = 5 less floor(0.1 * 27) of all
    kernel = normal(1, 3, 3, 3)
    assert not breadcrumbs(kernel, group="row").any()
    assert int((breadcrumbs(kernel) != 0).sum()) == 5
    assert breadcrumbs(torch.tensor([[2.0]])).tolist() == [2.0]  # a single number is not ranked
    assert breadcrumbs(torch.tensor([2.0])).item() == 2.0


@pytest.mark.parametrize("group", ["tensor", "row"])
def test_of_equal_entries_the_later_is_the_larger(group: str) -> None:
    delta = torch.tensor([[1.0, 2.0, -2.0, 2.0, 3.0, -3.0, 4.0, 5.0]])

    def merged(values: Tensor, **given: float) -> list[float]:
        return breadcrumbs(values, **given, group=group).tolist()

    # 2 go, 2 stay: 3 and 3; with 1 dropped and 4 kept: 4, 3, 3 and the last 2
    assert merged(delta, density=0.25, gamma=0.25) == [0, 0, 0, 0, 3.0, -3.0, 0, 0]
    assert merged(delta, density=0.5, gamma=0.125) == [0, 0, 0, 2.0, 3.0, -3.0, 4.0, 0]
    # of three 3s the last is dropped and the others stay; of nine 2s one stays
    assert merged(torch.tensor([[3.0, -3.0, 3.0, 1.0, 1.0]]), density=0.4, gamma=0.2) == [
        3.0, -3.0, 0, 0, 0,
    ]  # fmt: skip
    assert merged(torch.full((1, 9), 2.0), density=0.2, gamma=0.1) == [0] * 8 + [2.0]


def test_rows_have_a_band_each() -> None:
    deltas = torch.stack([TEN[0], 10 * TEN[0].flip(0)])[None]
    out = breadcrumbs(deltas, density=0.3, gamma=0.2, group="row")
    assert out[0].tolist() == [0, 0, 0, 0, 0, -6.0, 7.0, -8.0, 0, 0]
    assert out[1].tolist() == [0, 0, -80.0, 70.0, -60.0, 0, 0, 0, 0, 0]
    whole = breadcrumbs(deltas, density=0.3, gamma=0.2)
    # of all twenty 100, 90, 80 and 70 go and 60 to 10 stay: of the 10s that of the second row
    assert not whole[0].any()
    assert whole[1].tolist() == [0, 0, 0, 0, -60.0, 50.0, -40.0, 30.0, -20.0, 10.0]


@pytest.mark.parametrize("group", ["tensor", "row"])
def test_l1_is_restored(group: str) -> None:
    delta = normal(1, 20, 30)
    out = breadcrumbs(delta, density=0.4, group=group, rescale=True)
    assert int((out != 0).sum()) == 240
    assert out.abs().sum().item() == pytest.approx(delta.abs().sum().item(), rel=1e-6)
