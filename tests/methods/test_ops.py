"""The shared pieces: order statistics against a sort, sums against block sizes, votes by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mowmerge.methods import ops
from mowmerge.methods.contracts import Block, Draws, Reduction
from mowmerge.methods.ops import selection
from mowmerge.plan import RUN

torch.set_num_threads(1)
quick = settings(max_examples=80, deadline=None, derandomize=True)
Feed = Callable[[Any, Tensor], Tensor]


def drive(
    rounds: Reduction, tensors: Sequence[Tensor], block: int = RUN, feed: Feed | None = None
) -> tuple[Any, int]:
    """Runs a reduction as the engine does, a fold a tensor; returns the state and the passes."""
    passes, fold = 0, next(rounds)
    while True:
        passes, total = passes + 1, fold.fresh()
        for values in tensors:
            part = fold.fresh()
            seen = feed(fold, values) if feed else values
            for start in range(0, seen.shape[1], block):
                part.observe(Block(seen[:, start : start + block], {}, Draws(start=start), 0))
            total.merge(part)
        try:
            fold = rounds.send(total)
        except StopIteration as done:
            return done.value, passes


def by_sort(values: Tensor, ranks: Sequence[int]) -> list[float]:
    order = values.abs().sort(dim=1, descending=True).values
    return [float(row[r - 1]) if r else math.inf for row, r in zip(order, ranks, strict=True)]


# --- blocks of whole rows


def test_runs_are_cut_at_the_same_places_whatever_the_block() -> None:
    """Of 20 rows of 10,000, six make a run of at most 65,536 elements."""
    values = torch.arange(2 * 20 * 10_000.0).view(2, 20, 10_000)
    whole = list(Block(values, {}, Draws(), 0, values[0]).runs())
    assert [len(run.values[0]) for run in whole] == [6, 6, 6, 2]
    assert [run.rng.start for run in whole] == [0, 60_000, 120_000, 180_000]
    parts = [
        run
        for at in (0, 12)
        for run in Block(
            values[:, at : at + 12], {}, Draws(start=at * 10_000), 0, values[0, at : at + 12]
        ).runs()
    ]
    for one, two in zip(whole, parts, strict=True):
        assert torch.equal(one.values, two.values)
        assert one.base is not None
        assert two.base is not None
        assert torch.equal(one.base, two.base)
        assert one.rng.start == two.rng.start
    assert [run.values.shape for run in Block(values[:, :2, :0], {}, Draws(), 0).runs()] == [
        (2, 2, 0)
    ]


def test_most_is_the_largest_over_blocks_and_tensors() -> None:
    fold = ops.Most(lambda block: block.values.amax(1))
    tensors = [torch.tensor([[1.0, 5.0], [-3.0, -2.0]]), torch.tensor([[2.0], [-1.0]])]
    for tensor in (*tensors, torch.ones(2, 0)):
        part = fold.fresh()
        part.observe(Block(tensor, {}, Draws(), 0))
        fold.merge(part)
    assert fold.total is not None
    assert fold.total.tolist() == [5.0, -1.0]


def test_keep_each_keeps_by_its_own_probability() -> None:
    chance = torch.tensor([0.0, 0.1, 0.5, 1.0]).repeat(2, 50_000).view(2, -1)
    kept = Draws(3, ("a", "b"), "w").keep_each(chance)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    for column, p in enumerate([0.0, 0.1, 0.5, 1.0]):
        share = kept.view(2, -1, 4)[..., column].mean(1)
        assert (share - p).abs().max() <= 5 * (p * (1 - p) / 50_000) ** 0.5
    part = Draws(3, ("a", "b"), "w", 777).keep_each(chance[:, 777:1000])
    assert torch.equal(part, kept[:, 777:1000])
    assert 0.4 < (kept[0] == kept[1]).float().mean() < 0.9  # and not the same for another model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_probabilities_keep_what_one_density_keeps(dtype: torch.dtype) -> None:
    draws, chance = Draws(3, ("a", "b"), "w", 5), torch.full((2, 600_000), 0.30001, dtype=dtype)
    density = [chance[0, 0].item()] * 2
    assert torch.equal(draws.keep_each(chance), draws.keep(density, chance))
    over = 0.30001 * 2**16 % 1  # a word that meets its limit is kept with what is left of it
    met = draws.keep([density[0] - over / 2**16] * 2, chance) != draws.keep_each(chance)
    assert 0 < int(met.sum()) < 40


@pytest.mark.parametrize("models", [(), ("a", "b", "c")])
def test_the_draws_of_one_model_are_those_it_has_among_others(models: Sequence[str]) -> None:
    values = torch.ones(3, 1000)
    draws = Draws(3, models, "w", 50)
    every = draws.keep([0.3, 0.5, 0.9], values)
    for i, density in enumerate((0.3, 0.5, 0.9)):
        assert torch.equal(draws.only(i).keep([density], values[:1])[0], every[i])
    assert not torch.equal(every[0], every[1])


# --- what works on runs


def test_mapped_gives_what_the_function_gives_of_all_at_once() -> None:
    values = torch.randn(3, 7, 30_000, generator=torch.Generator().manual_seed(0))
    lengths: list[int] = []

    def largest(block: Block) -> Tensor:
        lengths.append(block.values.shape[1])
        return block.values.amax(0) + block.rng.start

    found = ops.mapped(largest, values)
    runs = torch.arange(7 * 30_000).view(7, -1) // RUN * RUN
    assert torch.equal(found, values.amax(0) + runs)
    assert lengths == [RUN, RUN, RUN, 7 * 30_000 - 3 * RUN]


def test_square_norm_is_in_fp64_and_leaves_its_input() -> None:
    value = torch.full((3 * RUN,), 1e-3, dtype=torch.float64)
    assert float(ops.square_norm(value)) == pytest.approx(3 * RUN * 1e-6, rel=1e-12)
    assert torch.equal(value, torch.full_like(value, 1e-3))
    assert float(ops.square_norm(torch.full((2, 2), 1e30))) == pytest.approx(4e60)
    assert float(ops.square_norm(torch.zeros(0))) == 0.0


def test_stacked_makes_one_at_a_time() -> None:
    held: list[int] = []

    def each() -> Iterator[Tensor]:
        for i in range(3):
            held.append(i)
            yield torch.full((2,), float(i))

    assert ops.stacked(each(), 3).tolist() == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    assert held == [0, 1, 2]


# --- kth_largest


@st.composite
def hard_values(draw: Any) -> Tensor:
    """[N, D] with what order statistics stumble over: ties, zeros, coarse grain, tiny numbers."""
    n, size = draw(st.integers(1, 3)), draw(st.integers(1, 700))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    values = torch.randn(n, size, generator=g, dtype=dtype)
    kind = draw(st.sampled_from(["normal", "bf16", "ties", "zeros", "wide", "tiny", "constant"]))
    if kind == "bf16":
        values = values.bfloat16().to(dtype)
    elif kind == "ties":
        values = values.mul(2).round()
    elif kind == "zeros":
        values *= torch.rand(n, size, generator=g) < 0.05
    elif kind == "wide":
        values = values * torch.randn(n, size, generator=g, dtype=dtype).mul(20).exp()
    elif kind == "tiny":
        values *= 1e-40
    elif kind == "constant":
        values = torch.full_like(values, -1.5)
    return values


@quick
@given(hard_values(), st.data())
def test_kth_largest_is_that_of_a_sort(values: Tensor, data: st.DataObject) -> None:
    n, size = values.shape
    ranks = [data.draw(st.integers(0, size)) for _ in range(n)]
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=3)))
    tensors = [values[:, a:b] for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
    want = by_sort(values, ranks)
    for block in (RUN, 97):
        assert drive(ops.kth_largest(ranks, size), tensors, block)[0] == want
    assert ops.settle(lambda extents: ops.kth_largest(ranks, extents[0].numel), values, {}) == want


@quick
@given(hard_values(), st.data())
def test_kth_largest_of_signed_numbers_and_of_scores(values: Tensor, data: st.DataObject) -> None:
    n, size = values.shape
    ranks = [data.draw(st.integers(0, size)) for _ in range(n)]
    order = values.sort(dim=1, descending=True).values
    want = [float(row[r - 1]) if r else math.inf for row, r in zip(order, ranks, strict=True)]
    for block in (RUN, 97):
        assert drive(ops.kth_largest(ranks, size, signed=True), [values], block)[0] == want
    half = [size // 2 + 1]
    middle = ops.kth_largest(half, size, lambda b: b.values.amax(0, keepdim=True), signed=True)
    found = [float(values.amax(0).sort(descending=True).values[half[0] - 1])]
    assert drive(middle, [values], 97)[0] == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grain", [None, torch.bfloat16])
@pytest.mark.parametrize("share", [1e-5, 0.2, 0.5, 0.999])
def test_kth_largest_of_many(share: float, grain: torch.dtype | None, dtype: torch.dtype) -> None:
    size = 300_000
    values = torch.randn(2, size, generator=torch.Generator().manual_seed(1), dtype=dtype)
    values = values.to(grain).to(dtype) if grain else values
    ranks = [max(1, int(share * size))] * 2

    def sample(fold: Any, given: Tensor) -> Tensor:
        return given[:, :: round(1 / fold.share)] if fold.share < 1 else given

    found, passes = drive(ops.kth_largest(ranks, size), values.split(123_457, 1), feed=sample)
    assert found == by_sort(values, ranks)
    assert passes <= (3 if dtype == torch.float32 else 4)


@pytest.mark.parametrize("misleading", ["smallest", "largest", "nothing"])
@pytest.mark.parametrize("rank", [1, 1000, 100_000, 199_999, 200_000])
def test_a_misleading_sample_costs_passes_and_not_exactness(misleading: str, rank: int) -> None:
    size = 200_000
    values = torch.randn(1, size, generator=torch.Generator().manual_seed(2))
    order = values.abs().sort(dim=1).values
    wrong = {"smallest": order[:, :50], "largest": order[:, -50:], "nothing": order[:, :0]}

    def sample(fold: Any, given: Tensor) -> Tensor:
        return wrong[misleading] if fold.share < 1 else given

    found, passes = drive(ops.kth_largest([rank], size), [values], feed=sample)
    assert found == by_sort(values, [rank])
    assert passes <= 5


def test_up_to_65536_numbers_are_all_kept() -> None:
    values = torch.randn(2, 1000, generator=torch.Generator().manual_seed(5))
    values[0, 7] = values[0, 9] = 0.5
    for ranks in ([1, 1000], [0, 500], [137, 3]):
        found, passes = drive(ops.kth_largest(ranks, 1000), [values[:, :300], values[:, 300:]])
        assert found == by_sort(values, ranks) and passes == 1


def test_a_rank_at_either_end_of_the_bracket(monkeypatch: pytest.MonkeyPatch) -> None:
    # a sample from the middle brackets too near to it: where the true place crosses the ends of
    # the bracket, at about 420 and 580, the counts above and within it decide
    monkeypatch.setattr(selection, "SAMPLE_LEAST", 999)
    values = torch.randn(1, 1000, generator=torch.Generator().manual_seed(5))
    order = values.abs().sort(dim=1).values

    for rank in [*range(405, 440), *range(560, 595)]:
        first = iter([order[:, 300:700]])
        rounds = ops.kth_largest([rank], 1000)
        found, passes = drive(
            rounds, [values], feed=lambda _, given, first=first: next(first, given)
        )
        assert found == by_sort(values, [rank])
        assert passes <= 4


def test_tensors_of_two_dtypes_are_one_model() -> None:
    wide = torch.randn(2, 500, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    mixed, ranks = [wide[:, :200].float(), wide[:, 200:], wide[:, :50].float()], [60, 400]
    want = by_sort(torch.cat([m.double() for m in mixed], 1), ranks)
    for tensors in (mixed, mixed[::-1]):
        assert drive(ops.kth_largest(ranks, 550), tensors)[0] == want


# --- Sum


def test_a_sum_does_not_depend_on_the_block_size() -> None:
    values = torch.randn(2, 5 * RUN + 333, generator=torch.Generator().manual_seed(3)).exp_()
    for fn in (ops.gram, lambda block: ops.l1_norms(block.values)):
        whole = ops.Sum(fn)
        whole.observe(Block(values, {}, Draws(), 0))
        for block in (RUN, 2 * RUN, 3 * RUN):
            parts = ops.Sum(fn).fresh()
            for start in range(0, values.shape[1], block):
                parts.observe(Block(values[:, start : start + block], {}, Draws(start=start), 0))
            assert torch.equal(parts.total, whole.total)
            assert parts.total.dtype == torch.float64


def test_a_sum_tells_each_run_where_its_draws_start() -> None:
    starts: list[int] = []

    def note(block: Block) -> Tensor:
        starts.append(block.rng.start)
        return block.values.sum()

    ops.Sum(note).observe(Block(torch.ones(1, 2 * RUN + 1), {}, Draws(start=RUN), 0))
    assert starts == [RUN, 2 * RUN, 3 * RUN]


def test_settle_tells_each_run_where_its_draws_start() -> None:
    starts: list[int] = []

    def note(block: Block) -> Tensor:
        starts.append(block.rng.start)
        return block.values.sum()

    def reduce(extents: Any) -> Reduction:
        return (yield ops.Sum(note)).total

    total = ops.settle(reduce, torch.ones(1, 3, RUN), {}, Draws(start=7))
    assert float(total) == 3 * RUN
    assert starts == [7, 7 + RUN, 7 + 2 * RUN]


def test_gram_by_hand() -> None:
    # <(1, 2), (3, -1)> = 1
    block = Block(torch.tensor([[1.0, 2.0], [3.0, -1.0]]), {}, Draws(), 0)
    assert ops.gram(block).tolist() == [[5.0, 1.0], [1.0, 10.0]]


# --- elementwise pieces


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("edge", [0.1, 1.0, 1e-38, 1e-42, 3e38])
def test_keep_above_keeps_what_equals_the_threshold(edge: float, dtype: torch.dtype) -> None:
    at = torch.tensor(edge, dtype=dtype)
    below, above = at.nextafter(torch.zeros_like(at)), at.nextafter(at * 2)
    values = torch.stack([at, -at, below, -below, above, -above, torch.zeros_like(at)])
    out = ops.keep_above(values, float(at))
    assert out.tolist() == [*values[:2].tolist(), 0.0, 0.0, *values[4:6].tolist(), 0.0]


def test_keep_above_at_its_ends() -> None:
    values = torch.tensor([1.0, -1e-45, 0.0])
    assert torch.equal(ops.keep_above(values, 0.0), values)
    assert not ops.keep_above(values, math.inf).any()


COLUMNS = torch.tensor([[3.0, -1.0, 1.0, 0.0, 2.0], [-1.0, -1.0, -1.0, 0.0, -1.0]])
LAST = torch.tensor([-1.0, 3.0, 0.0, 0.0, -1.0])


@pytest.mark.parametrize(
    ("elect", "power", "votes"),
    [
        # sums: 1, 1, 0, 0, 0
        ("mass", (), [1, 1, 0, 0, 0]),
        # numbers: one against two, one against two, one each, none, one against two
        ("count", (), [-1, -1, 0, 0, -1]),
        # squares over 9, 1, 9: (1, 1, 1/9), (1/9, 1, 1), (1/9, 1, 0), none, (4/9, 1, 1/9):
        # + and - even; - and + even; -; even; -
        ("normfrac", (9.0, 1.0, 9.0), [0, 0, -1, 0, -1]),
        # signed sums: 1-1-1/9, -1/9-1+1, 1/9-1, 0, 4/9-1-1/9
        ("normmass", (9.0, 1.0, 9.0), [-1, -1, -1, 0, -1]),
    ],
)
def test_elect_sign_by_hand(elect: Any, power: Sequence[float], votes: list[int]) -> None:
    values = [*COLUMNS, LAST]
    for zero in (0.0, 1.0, -1.0):
        sign = ops.elect_sign([v.clone() for v in values], elect, zero, power)
        assert sign.tolist() == [float(v) or zero for v in votes]
    most = ops.elect_sign([v.clone() for v in values], elect, None, power)
    assert most.tolist() == [float(v) or (1.0 if sum(votes) > 0 else -1.0) for v in votes]
    again = ops.elect_sign(values[::-1], elect, 0.0, power[::-1])
    assert again.tolist() == [float(v) for v in votes]


@pytest.mark.parametrize("size", [1.0, 1e-18, 1e-30])
@pytest.mark.parametrize("elect", ["normfrac", "normmass"])
def test_small_task_vectors_vote_like_large_ones(elect: Any, size: float) -> None:
    values = [torch.tensor([1.0, -2.0, 3.0]) * size, torch.tensor([-1.0, 5.0, -4.0]) * size]
    power = [float(v.double().square().sum()) for v in values]  # 14 and 42
    # 1/14 > 1/42, 4/14 < 25/42, 9/14 > 16/42
    assert ops.elect_sign(values, elect, 0.0, power).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("aggregate", "weight", "result"),
    [
        # agreeing: (3), (-1, -1), (1), none, (-1, -1)
        ("sum", (1, 1, 1), [3, -2, 1, 0, -2]),
        ("mean", (1, 1, 1), [3, -1, 1, 0, -1]),
        ("max", (1, 1, 1), [3, -1, 1, 0, -1]),
        # over the weights that agree: 2, 2 + 4, 2, none, 4 + 4
        ("mean", (2, 4, 4), [1.5, -1 / 3, 0.5, 0, -0.25]),
        # 2, 2 - 2 = 0 (over 1 then), 2, none, -2 - 2
        ("mean", (2, -2, -2), [1.5, -2, 0.5, 0, 0.5]),
    ],
)
def test_agree_by_hand(aggregate: Any, weight: Sequence[float], result: list[float]) -> None:
    sign = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])
    values = [v.clone() for v in (*COLUMNS, LAST)]
    assert ops.agree(values, sign, aggregate, weight).tolist() == pytest.approx(result)


@pytest.mark.parametrize("weight", [(-0.9, 0.1, 0.8), (0.1, 0.2, -0.3), (0.7, -0.4, -0.3)])
def test_weights_that_cancel_are_no_divisor(weight: Sequence[float]) -> None:
    """The sum of all is 0, or in fp32 some 1e-8; that of the first two is neither."""
    values = [torch.tensor([1.0, 1.0]) for _ in weight]
    values[2][1] = -1.0
    out = ops.agree(values, torch.ones(2), "mean", weight)
    assert out.tolist() == pytest.approx([3.0, 2.0 / sum(weight[:2])])


def test_where_no_sign_is_elected_nothing_agrees() -> None:
    for aggregate in ("sum", "mean", "max"):
        values = [v.clone() for v in (*COLUMNS, LAST)]
        assert not ops.agree(values, torch.zeros(5), aggregate, (1, 1, 1)).any()


def test_restoring() -> None:
    before, after = torch.tensor([10.0, 3.0, 0.0]), torch.tensor([4.0, 0.0, 0.0])
    assert ops.restoring(before, after) == [2.5, 1.0, 1.0]


def test_spread() -> None:
    assert ops.spread(2.0, 3) == [2.0, 2.0, 2.0]
    assert ops.spread([1, 2], 2) == [1, 2]
    assert ops.spread("word", 2) == ["word", "word"]
    with pytest.raises(ValueError, match="1 values for 2 models"):
        ops.spread([1.0], 2)
