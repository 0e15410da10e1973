"""pcb_merging: entries compete; by hand, what survives, and where there is no competition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mowmerge.methods import registry
from mowmerge.methods.contracts import Extent, MethodError
from mowmerge.methods.static.pcb_merging import pcb_merging


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-2


def test_by_hand() -> None:
    deltas = torch.tensor([[0.0, 1.0, 2.0, -1.0], [1.0, 0.0, 1.0, 2.0]])
    # sizes (0, 1/2, 1, 1/2) and (1/2, 0, 1/2, 1); the sum is (1, 1, 3, 1)
    half, one = math.exp(0.5), math.exp(2.0)
    first = [0.0, half * math.tanh(1), one * math.tanh(6), half * math.tanh(-1)]
    second = [half * math.tanh(1), 0.0, half * math.tanh(3), one * math.tanh(2)]
    # of four the upper half: above the third largest? index floor(4 * 0.5) = 2 of the ascending
    low1, low2 = sorted(first)[2], sorted(second)[2]
    share1 = [max(0.0, (b - low1) / (max(first) - low1)) for b in first]
    share2 = [max(0.0, (b - low2) / (max(second) - low2)) for b in second]
    want = [
        (a * x + b * y) / (a + b) if a + b else 0.0
        for a, b, x, y in zip(share1, share2, *deltas.tolist(), strict=True)
    ]
    out = pcb_merging(deltas, density=0.5, clamp=0.0)
    assert out.tolist() == pytest.approx(want)
    assert want == [0.0, 0.0, 2.0, 2.0]
    weighed = pcb_merging(deltas, density=0.5, clamp=0.0, weight=[3.0, 0.5], scale=2.0)
    assert weighed.tolist() == pytest.approx([0.0, 0.0, 12.0, 2.0])


def test_pairs_by_hand() -> None:
    deltas = torch.tensor([[0.0, 2.0, 4.0], [4.0, 0.0, 2.0]])
    # signed sizes (0, .5, 1), (1, 0, .5): everything kept but the least score
    out = pcb_merging(deltas, density=1.0, clamp=0.0, competition="pairs")
    n1, n2 = (0.0, 0.5, 1.0), (1.0, 0.0, 0.5)

    def shares(own: tuple[float, ...], other: tuple[float, ...]) -> list[float]:
        b = [
            math.exp(2 * x * x) * (math.tanh(x * x) + math.tanh(x * y))
            for x, y in zip(own, other, strict=True)
        ]
        return [(v - min(b)) / (max(b) - min(b)) for v in b]

    s1, s2 = shares(n1, n2), shares(n2, n1)
    want = [
        (a * x + b * y) / (a + b) if a + b else 0.0
        for a, b, x, y in zip(s1, s2, *deltas.tolist(), strict=True)
    ]
    assert out.tolist() == pytest.approx(want)
    assert want[0] == 4.0


def test_the_share_that_survives() -> None:
    one = normal(1, 10_000)
    for n in (1, 3):
        out = pcb_merging(one.expand(n, -1).contiguous(), density=0.1)
        # the entry at the quantile itself gets share 0
        assert int((out != 0).sum()) == 999
        kept = out != 0
        assert torch.allclose(out[kept], one[0][kept], rtol=0.2)
    assert not pcb_merging(normal(2, 100), density=0.0).any()


def test_magnitudes_are_clamped_at_both_ends() -> None:
    one = torch.arange(1.0, 11.0)[None] / 10
    out = pcb_merging(one, density=1.0, clamp=0.2)
    # floor(10 * 0.2) = 2 and floor(10 * 0.8 - 1) = 7 of the ascending: 0.3 and 0.8
    assert out.tolist() == pytest.approx([0.0, 0.3, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.8, 0.8])


def test_a_task_vector_of_zeros_takes_no_part() -> None:
    deltas = normal(2, 300)
    three = torch.cat([deltas, torch.zeros(1, 300)])
    out = pcb_merging(three, density=0.3)
    assert torch.isfinite(out).all()
    assert out.any()
    # the other two keep their own values where one of them alone survives
    values = torch.cat([deltas, torch.zeros(1, 300)])
    inside = (out >= values.amin(0) - 1e-3) & (out <= values.amax(0) + 1e-3)
    assert inside.all()
    assert not pcb_merging(torch.zeros(2, 10)).any()
    constant = torch.full((2, 10), 0.5)
    assert torch.allclose(pcb_merging(constant), constant[0])


def test_one_ranking_needs_one_density() -> None:
    reduce = registry.get("pcb_merging").reduce
    assert reduce is not None
    given = {"weight": (1.0,), "density": 0.1, "clamp": 1e-4, "competition": "sum"}
    for word, other in (("density", 0.2), ("clamp", 0.01), ("competition", "pairs")):
        with pytest.raises(MethodError, match=f"{word} must be the same"):
            next(reduce([Extent((4,), given), Extent((4,), {**given, word: other})]))


def test_outliers_compete_as_what_they_are_clamped_to() -> None:
    one = [0.1, 0.5, 0.2, 0.4, 0.3, 0.9, 0.6, 0.7, 5.0, 0.8]
    two = one[::-1]
    low, high = sorted(one)[2], sorted(one)[7]  # 0.3 and 0.8: floor(10 * 0.2), floor(10 * 0.8 - 1)

    def shares(own: list[float]) -> list[float]:
        sizes = [(min(max(x, low), high) - low) / (high - low) for x in own]
        b = [
            math.exp(2 * s * s) * math.tanh(x * (a + c))
            for s, x, a, c in zip(sizes, own, one, two, strict=True)
        ]
        floor = sorted(b)[4]
        return [max(0.0, v - floor) / (max(b) - floor) for v in b]

    clamped = [[min(max(x, low), high) for x in own] for own in (one, two)]
    want = [
        (a * x + b * y) / (a + b) if a + b else 0.0
        for a, b, x, y in zip(shares(one), shares(two), *clamped, strict=True)
    ]
    out = pcb_merging(torch.tensor([one, two]), density=0.6, clamp=0.2)
    assert out.tolist() == pytest.approx(want, rel=1e-5)


def test_every_entry_lies_between_the_clamped_task_vectors_and_few_are_left() -> None:
    deltas = normal(3, 2000)
    for competition in ("sum", "pairs"):
        out = pcb_merging(deltas, density=0.05, clamp=0.0, competition=competition)
        assert 0 < int((out != 0).sum()) <= 3 * 100
        kept = out != 0
        assert (out <= deltas.amax(0) * (1 + 1e-5) + 1e-7)[kept].all()
        assert (out >= deltas.amin(0) * (1 + 1e-5) - 1e-7)[kept].all()


def test_pairs_do_not_depend_on_the_size_and_the_sum_does() -> None:
    deltas = normal(3, 500).double() * 100
    for competition, same in (("pairs", True), ("sum", False)):
        one = pcb_merging(deltas, density=0.3, competition=competition)
        large = pcb_merging(deltas * 7, density=0.3, competition=competition)
        assert torch.allclose(large, one * 7) == same
