"""della: kept by rank; by hand, in distribution, replayed, and at its edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mowmerge.methods import registry
from mowmerge.methods.contracts import Draws, MethodError
from mowmerge.methods.static.della import _chances, _order, della
from mowmerge.methods.static.ties import ties


def draws(seed: int = 0, models: tuple[str, ...] = ("a",), start: int = 0) -> Draws:
    return Draws(seed, models, "w", start)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Fixed(Draws):
    """Keeps the entries it is told to."""

    def __init__(self, kept: list[list[float]]) -> None:
        super().__init__()
        self.kept = torch.tensor(kept)

    def keep_each(self, probability: Tensor) -> Tensor:
        return self.kept.clone()


def test_chances_by_hand() -> None:
    # ranks 2, 1, 3 of three: 0.5 - 0.2, 0.5, 0.5 + 0.2 in the order of magnitude
    rows = torch.tensor([[-2.0, 1.0, 3.0], [0.1, 0.3, -0.2]])

    def chances(delta: Tensor, density: float = 0.5, epsilon: float = 0.2) -> Tensor:
        return _chances(delta[None], [density], [epsilon])[0]

    assert chances(rows).tolist() == [
        pytest.approx([0.5, 0.3, 0.7]), pytest.approx([0.3, 0.7, 0.5])
    ]  # fmt: skip
    assert chances(torch.tensor([[5.0], [1.0]])).tolist() == [[0.5], [0.5]]
    assert chances(torch.tensor(3.0)).item() == 0.5
    # equal magnitudes rank by index; a kernel's rows are all its entries of one output
    assert chances(torch.ones(3)).tolist() == pytest.approx([0.3, 0.5, 0.7])
    kernel = chances(normal(4, 2, 3, 3), 0.6, 0.1).flatten(1)
    assert torch.allclose(kernel.sort(-1).values, torch.linspace(0.5, 0.7, 18).expand(4, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_magnitudes_stand_in_the_order_of_their_index(dtype: torch.dtype) -> None:
    size = (normal(7, 301) * 4).round().to(dtype).abs() / 3  # a dozen values, zeros among them
    size[:, 5], size[0, 9] = 1e30, 1e-42
    assert torch.equal(_order(size), size.sort(dim=-1, stable=True).indices)


def test_by_hand() -> None:
    deltas = torch.tensor([[2.0, 1.0, 3.0], [-6.0, 5.0, 4.0]])
    rng = Fixed([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    given: dict[str, Any] = {"density": [0.5, 0.6], "epsilon": [0.25, 0.2], "rng": rng}
    # p1 = (0.5, 0.25, 0.75): T1 = (4, 0, 4); p2 = (0.8, 0.6, 0.4): T2 = (-7.5, 25/3, 0)
    each = della(deltas, elect="none", aggregate="sum", **given)
    assert each.tolist() == pytest.approx([-3.5, 25 / 3, 4.0])
    elected = della(deltas, weight=[3.0, 1.0], **given)  # 12 against 7.5: plus
    assert elected.tolist() == pytest.approx([4.0, 25 / 3, 4.0])
    assert della(deltas, rescale="none", scale=2.0, **given).tolist() == [-12.0, 10.0, 6.0]


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.0), (0.7, 0.07), (0.3, 0.25)])
def test_the_share_kept_by_rank(density: float, epsilon: float) -> None:
    row = torch.arange(1.0, 101.0).repeat(2000, 1)[None]  # ranks are positions
    given = {"density": density, "epsilon": epsilon, "elect": "none", "aggregate": "sum"}
    kept = (della(row, rescale="none", rng=draws(), **given) != 0).double()
    for at in (0, 33, 99):
        p = density - epsilon + 2 * epsilon * at / 99
        assert abs(kept[:, at].mean().item() - p) <= 5 * (p * (1 - p) / 2000) ** 0.5
    sigma = (density * (1 - density) / kept.numel()) ** 0.5
    assert abs(kept.mean().item() - density) <= 5 * sigma


def test_unbiased_over_seeds() -> None:
    deltas, seeds = normal(2, 5, 100), 400
    given: dict[str, Any] = {"density": [0.3, 0.7], "epsilon": [0.2, 0.1]}
    given |= {"elect": "none", "aggregate": "sum"}
    runs = torch.stack([della(deltas, rng=draws(s, ("a", "b")), **given) for s in range(seeds)])
    chances = _chances(deltas, [0.3, 0.7], [0.2, 0.1])
    spread = sum(d**2 * (1 - p) / p for d, p in zip(deltas, chances, strict=True))
    off = (runs.mean(0) - deltas.sum(0)) / (spread / seeds).sqrt()
    assert off.abs().max() < 5
    assert 0.8 < float(off.std()) < 1.2


def test_rows_drawn_alone_are_those_of_the_whole() -> None:
    deltas = normal(2, 50, 40)
    names = ("a", "b")
    whole = della(deltas, rng=draws(3, names))
    for first, last in ((0, 1), (7, 20), (49, 50)):
        part = della(deltas[:, first:last], rng=draws(3, names, first * 40))
        assert torch.equal(part, whole[first:last])
    assert not torch.equal(della(deltas, rng=draws(4, names)), whole)
    swapped = della(deltas.flip(0), rng=draws(3, ("b", "a")))
    assert torch.allclose(swapped, whole)


def test_density_at_its_ends() -> None:
    deltas = normal(2, 6, 10)
    every = della(deltas, density=1.0, epsilon=0.3, weight=[0.3, 0.7])
    like = ties(deltas, density=1.0, weight=[0.3, 0.7], zero_sign="plus")
    assert torch.allclose(every, like)
    assert not della(deltas, density=0.0).any()


def test_l1_is_restored() -> None:
    delta = normal(1, 20, 100)
    out = della(delta, density=0.3, epsilon=0.1, rescale="l1", elect="none", rng=draws())
    assert out.abs().sum().item() == pytest.approx(delta.abs().sum().item(), rel=1e-6)


@pytest.mark.parametrize("given", [(0.7, 0.3), (0.1, 0.1), (0.9, 0.2), ([0.5, 0.95], 0.07)])
def test_probabilities_outside_their_range_are_refused(given: tuple[Any, float]) -> None:
    spec = registry.get("della")
    with pytest.raises(MethodError, match="between 0 and 1"):
        spec.check(spec.complete({"density": given[0], "epsilon": given[1]}), 2)
