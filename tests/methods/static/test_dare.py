"""dare: drop at random and rescale; by hand, in distribution and at its edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mowmerge.methods import ops
from mowmerge.methods.contracts import Draws
from mowmerge.methods.static.dare import dare
from mowmerge.methods.static.della import della
from mowmerge.methods.static.task_arithmetic import task_arithmetic

ONES = torch.ones(1, 100_000)


def draws(
    seed: int = 0, models: tuple[str, ...] = ("a",), tensor: str = "w", start: int = 0
) -> Draws:
    return Draws(seed, models, tensor, start)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Fixed(Draws):
    """Keeps the entries it is told to."""

    def __init__(self, kept: list[list[float]]) -> None:
        super().__init__()
        self.kept = torch.tensor(kept)

    def keep(self, density: object, like: Tensor) -> Tensor:
        return self.kept.clone()


def test_by_hand() -> None:
    deltas = torch.tensor([[1.0, 2.0, 3.0], [-4.0, 5.0, 6.0]])
    rng = Fixed([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    given = {"density": [0.5, 0.25], "weight": [2.0, 1.0], "rng": rng}
    # T1 = 2 * (1, 0, 3) / 0.5 = (4, 0, 12); T2 = (-4, 5, 0) / 0.25 = (-16, 20, 0)
    assert dare(deltas, **given).tolist() == [-12.0, 20.0, 12.0]
    assert dare(deltas, scale=0.5, **given).tolist() == [-6.0, 10.0, 6.0]
    assert dare(deltas, aggregate="mean", **given).tolist() == pytest.approx([-4.0, 20 / 3, 4.0])
    # elected: mass -12, 20, 12 -> (-16), (20), (12)
    assert dare(deltas, elect="mass", **given).tolist() == [-16.0, 20.0, 12.0]
    # as means by weight: -16/1, 20/1, 12/2
    mean = dare(deltas, elect="mass", aggregate="mean", **given)
    assert mean.tolist() == [-16.0, 20.0, 6.0]
    # by number one against one is even, and counts as plus: (4), (20), (12)
    assert dare(deltas, elect="count", **given).tolist() == [4.0, 20.0, 12.0]
    # L1: T1 = 2 * (1, 0, 3) * 6/4 = (3, 0, 9); T2 = (-4, 5, 0) * 15/9 = (-20/3, 25/3, 0)
    state = (), ops.restoring(ops.l1_norms(deltas), ops.l1_norms(deltas * rng.kept))
    l1 = dare(deltas, rescale="l1", state=state, **given)
    assert l1.tolist() == pytest.approx([3 - 20 / 3, 25 / 3, 9.0])
    assert dare(deltas, rescale="none", **given).tolist() == [-2.0, 5.0, 6.0]


@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 0.9])
def test_the_share_kept_is_the_density(density: float) -> None:
    kept = dare(ONES, density=density, rescale="none", rng=draws())
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    sigma = (density * (1 - density) / ONES.numel()) ** 0.5
    assert abs(kept.mean().item() - density) <= 5 * sigma


def test_kept_entries_are_divided_by_the_density() -> None:
    delta = normal(1, 1000)
    out = dare(delta, density=0.4, rng=draws())
    kept = out != 0
    assert 300 < int(kept.sum()) < 500
    assert torch.allclose(out[kept], delta[0][kept] / 0.4)


def test_unbiased_over_seeds() -> None:
    delta, density, seeds = normal(2, 500), [0.3, 0.7], 400
    runs = torch.stack(
        [dare(delta, density=density, rng=draws(s, ("a", "b"))) for s in range(seeds)]
    )
    spread = sum((delta[i] ** 2) * (1 - q) / q for i, q in enumerate(density))
    off = (runs.mean(0) - delta.sum(0)) / (spread / seeds).sqrt()
    assert off.abs().max() < 5
    assert 0.8 < float(off.std()) < 1.2  # and as noisy as it must be


def test_another_seed_model_or_tensor_is_another_draw() -> None:
    first = dare(ONES, rng=draws())
    for other in (draws(seed=1), draws(models=("b",)), draws(tensor="v"), draws(start=1)):
        agree = (dare(ONES, rng=other) == first).float().mean().item()
        assert agree == pytest.approx(0.5, abs=5 * 0.5 / ONES.numel() ** 0.5)


def test_equal_models_are_dropped_independently() -> None:
    both = dare(ONES.repeat(2, 1), rescale="none", rng=draws(models=("a", "b")))
    shares = [(both == k).float().mean().item() for k in (0, 1, 2)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.01)


def test_a_draw_follows_its_model() -> None:
    a = dare(ONES, rng=draws(models=("a",)))
    b = dare(ONES, rng=draws(models=("b",)))
    for names in (("a", "b"), ("b", "a"), ("x", "a", "b")):
        weight = [float(name != "x") for name in names]
        both = dare(ONES.repeat(len(names), 1), weight=weight, rng=draws(models=names))
        assert torch.equal(both, a + b)


@pytest.mark.parametrize("start", [1, 7, 8, 9, 63, 1000, 65_536, 99_999])
@pytest.mark.parametrize("length", [1, 2, 5, 100])
def test_a_block_drawn_alone_is_a_slice_of_the_whole(start: int, length: int) -> None:
    whole = dare(ONES, density=0.5, rng=draws())
    stop = min(start + length, ONES.shape[1])
    assert torch.equal(dare(ONES[:, start:stop], rng=draws(start=start)), whole[start:stop])


@pytest.mark.parametrize("mask", ["random", "magnitude"])
@pytest.mark.parametrize("rescale", ["density", "l1", "none"])
def test_density_at_its_ends(mask: str, rescale: str) -> None:
    deltas = normal(2, 100)
    every = dare(deltas, density=1.0, weight=[0.3, 0.7], scale=2.0, mask=mask, rescale=rescale)
    assert torch.allclose(every, task_arithmetic(deltas, weight=[0.3, 0.7], scale=2.0))
    assert not dare(deltas, density=0.0, mask=mask, rescale=rescale).any()
    one = dare(deltas, density=[0.0, 1.0], mask=mask, rescale=rescale)
    assert torch.equal(one, deltas[1])
    assert torch.isfinite(dare(deltas, density=1e-300, mask=mask, rescale=rescale)).all()


def test_drop_the_smallest() -> None:
    deltas = torch.tensor([[1.0, -4.0, 2.0, 3.0, -5.0]])
    # int(0.6 * 5) = 3 dropped: 1, 2, 3
    out = dare(deltas, density=0.4, mask="magnitude", rescale="none")
    assert out.tolist() == [0.0, -4.0, 0.0, 0.0, -5.0]
    # an entry equal to the last one dropped is dropped with it, as the reference does
    out = dare(torch.tensor([[1.0, 2.0, -2.0, 3.0]]), density=0.5, mask="magnitude", rescale="none")
    assert out.tolist() == [0.0, 0.0, 0.0, 3.0]


def test_l1_is_restored() -> None:
    delta = normal(1, 2000)
    out = dare(delta, density=0.2, rescale="l1", rng=draws())
    assert out.double().abs().sum().item() == pytest.approx(
        delta.double().abs().sum().item(), rel=1e-6
    )


@pytest.mark.parametrize("tenths", range(1, 10))
def test_as_many_are_dropped_as_the_share_says(tenths: int) -> None:
    """1 - 0.9 in floating point is less than 0.1: a floor of it times ten is one too few."""
    delta = torch.arange(1.0, 11.0)[None]
    out = dare(delta, density=tenths / 10, mask="magnitude", rescale="none")
    assert int((out != 0).sum()) == tenths


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_della_without_a_slope_drops_the_same(density: float) -> None:
    deltas, rng = normal(2, 300, 40), draws(1, ("a", "b"))
    out = dare(deltas, density=density, elect="mass", rng=rng)
    same = della(deltas, density=density, epsilon=0.0, elect="mass", aggregate="sum", rng=rng)
    assert torch.allclose(same, out)
