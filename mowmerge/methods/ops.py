"""The pieces that methods share: pure functions on blocks, and folds over tensors and models.

Blocks are contiguous and cut at multiples of 65,536 elements, so a fused multiply-add gives each
element the same bits however a tensor is cut. Arithmetic stays in floating point, in place where
the temporary is ours: comparisons that make boolean tensors cost several times as much.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from mowmerge.methods.contracts import Block, Draws, Extent, Reduction
from mowmerge.plan import RUN
from mowmerge.tensors import Tensor, torch

Elect = Literal["none", "mass", "count", "normfrac", "normmass"]
SAMPLE_SHARE = 1 / 1024  # of a large tensor or model; SAMPLE_LEAST elements of a small one
SAMPLE_LEAST = 65_536
BIN_BITS = 18


def spread(value: Any, n: int) -> list[Any]:
    """One value a model: a scalar n times, or the sequence itself."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != n:
            raise ValueError(f"{len(value)} values for {n} models")
        return list(value)
    return [value] * n


def weighted_sum(values: Sequence[Tensor] | Tensor, weight: Sequence[float]) -> Tensor:
    """sum_i weight[i] * values[i], in index order, as a new tensor."""
    total = values[0] * weight[0]
    for value, w in zip(values[1:], weight[1:], strict=True):
        total.add_(value, alpha=w)
    return total


def added(values: Sequence[Tensor]) -> Tensor:
    """sum_i values[i], in index order, as a new tensor."""
    total = values[0] + values[1] if len(values) > 1 else values[0].clone()
    for value in values[2:]:
        total += value
    return total


def keep_above(value: Tensor, threshold: float) -> Tensor:
    """value where |value| >= threshold, else 0, as a new tensor."""
    if threshold <= 0.0:
        return value.clone()
    if math.isinf(threshold):
        return value - value  # what is not finite stays so
    import numpy as np

    kind = np.dtype(f"f{value.element_size()}").type
    return torch.nn.functional.hardshrink(value, float(np.nextafter(kind(threshold), kind(0))))


def elect_sign(
    values: Sequence[Tensor], elect: Elect, zero: float, power: Sequence[float] = ()
) -> Tensor:
    """The elected sign of each entry: +1 or -1, or `zero` where the vote is even.

    mass: sgn(sum_i v_i). count: sgn(sum_i sgn v_i). normfrac: the sign of the entry with the
    largest v_i^2 / power[i], several of them voting by number. normmass: sgn(sum_i sgn(v_i) *
    v_i^2 / power[i]). Source: TIES, eq. of the elect step; the last two are variants of its
    released code.
    """
    if elect == "count":
        vote = values[0].sign()
        for value in values[1:]:
            vote += value.sign()
    elif elect in ("normfrac", "normmass"):
        wide = [v.double() for v in values]
        share = torch.stack([v * v / (p or 1.0) for v, p in zip(wide, power, strict=True)])
        if elect == "normfrac":
            share = (share == share.amax(0)).double()
        vote = (torch.stack(wide).sign_() * share).sum(0).sign_().to(values[0].dtype)
    else:
        vote = added(values)
    vote = vote.sign_()
    return vote if zero == 0.0 else vote.add_(zero / 2).sign_()


def agree(
    values: Sequence[Tensor],
    sign: Tensor,
    aggregate: Literal["mean", "sum", "max"],
    weight: Sequence[float],
) -> Tensor:
    """Aggregates the entries whose sign is the elected one (TIES, disjoint merge).

    sum: their sum. mean: their sum over the sum of their weights (over 1 where that is 0). max: the
    largest magnitude, with the elected sign. Overwrites the values.
    """
    masses = [value.mul_(sign).relu_() for value in values]
    if aggregate == "max":
        return functools.reduce(torch.maximum, masses).mul(sign)
    total = added(masses)
    if aggregate == "mean":
        share = masses[0].sign_()
        if weight[0] != 1:
            share.mul_(weight[0])
        for mass, w in zip(masses[1:], weight[1:], strict=True):
            share.add_(mass.sign_(), alpha=w)
        if min(weight) > 0:  # a share is 0, where total is 0 too, or at least the smallest weight
            share.clamp_min_(min(weight))
        else:
            share += 1.0 - share.sign().abs_()
        total /= share
    return total.mul_(sign)


def l1_norms(values: Sequence[Tensor] | Tensor) -> Tensor:
    """The sum of magnitudes of each value, [N] in fp64."""
    return torch.stack([v.abs().sum(dtype=torch.float64) for v in values])


def restoring(before: Tensor, after: Tensor) -> list[float]:
    """before / after, one factor a model; 1 where either norm is below 1e-7."""
    pairs = zip(before.tolist(), after.tolist(), strict=True)
    return [b / a if b >= 1e-7 and a >= 1e-7 else 1.0 for b, a in pairs]


def settle(
    reduce: Callable[[Sequence[Extent]], Reduction],
    values: Tensor,
    parameters: Mapping[str, Any],
    rng: Draws | None = None,
) -> Any:
    """Runs a reduction on one tensor in memory and returns its state: what the engine streams."""
    rounds = reduce([Extent(values[0].numel(), parameters)])
    flat = values.reshape(len(values), -1)
    rng = rng or Draws()
    try:
        fold = next(rounds)
        while True:
            fold = fold.fresh()
            for start in range(0, max(flat.shape[1], 1), RUN):
                draws = Draws(rng.seed, rng.models, rng.tensor, rng.start + start)
                fold.observe(
                    Block(flat[:, start : start + RUN], parameters, draws, values[0].numel())
                )
            fold = rounds.send(fold)
    except StopIteration as done:
        return done.value


class Sum:
    """Adds fn(block) over runs of 65,536 elements, in index order, in fp64.

    `exact` says that fn's own sums are exact, as those of signs are: then whole blocks will do.
    """

    share = 1.0

    def __init__(self, fn: Callable[[Block], Tensor], *, exact: bool = False) -> None:
        self.fn, self.exact = fn, exact
        self.total: Tensor | float = 0.0

    def fresh(self) -> Sum:
        """An empty sum of the same function."""
        return Sum(self.fn, exact=self.exact)

    def observe(self, block: Block) -> None:
        """Adds a block, run by run."""
        if self.exact:
            self.total = self.total + self.fn(block).double()
            return
        flat = block.values.reshape(len(block.values), -1)
        for start in range(0, max(flat.shape[1], 1), RUN):
            rng = block.rng
            draws = Draws(rng.seed, rng.models, rng.tensor, rng.start + start)
            run = Block(flat[:, start : start + RUN], block.parameters, draws, block.numel)
            self.total = self.total + self.fn(run).double()

    def merge(self, other: Sum) -> None:
        """Adds another tensor's total."""
        self.total = self.total + other.total


def gram(block: Block) -> Tensor:
    """The inner products <v_i, v_j> of a block, [N,N], in fp64."""
    wide = block.values.double()
    return wide @ wide.T


def kth_largest(ranks: Sequence[int], total: int) -> Reduction:
    """Returns, for each model i, the ranks[i]-th largest of `total` magnitudes; inf for rank 0.

    Exact. A sample brackets each value, then counting passes narrow the bracket: entries above it
    are counted, entries inside it go to a histogram over their bit patterns, which order as the
    magnitudes do. One counting pass is the rule; a sample that misleads costs more passes, never
    exactness. Memory is one histogram a model, whatever the number of ties.
    """
    sample = yield _Sample(len(ranks), max(SAMPLE_SHARE, SAMPLE_LEAST / max(total, 1)))
    spans = [sample.bracket(i, rank / max(total, 1)) for i, rank in enumerate(ranks)]
    found = [math.inf if rank == 0 else None for rank in ranks]
    while None in found:
        open_spans = [span if f is None else None for span, f in zip(spans, found, strict=True)]
        count = yield _Count(open_spans, sample.itemsize)
        for i, rank in enumerate(ranks):
            if found[i] is None:
                spans[i], found[i] = count.locate(i, rank)
    return found


def trim_thresholds(density: Sequence[float], total: int, *, extra: int) -> Reduction:
    """Returns each model's least magnitude of those that trimming keeps; 0s where all keep all.

    Of `total` entries model i keeps floor(total * density[i]) + extra, at least 1; none at 0.
    """
    if all(d == 1 for d in density):
        return [0.0] * len(density)
    ranks = [min(total, max(1, int(total * d) + extra)) if d > 0 else 0 for d in density]
    return (yield from kth_largest(ranks, total))


def majority(
    kept: Callable[[Block], Sequence[Tensor]], elect: Elect = "mass", power: Sequence[float] = ()
) -> Reduction:
    """Returns the sign that most entries of `kept(block)` elect: 1.0, or -1.0 where it is even."""
    balance = yield Sum(lambda b: elect_sign(kept(b), elect, 0.0, power).sum(), exact=True)
    return 1.0 if balance.total > 0 else -1.0


def _codes(value: Tensor, itemsize: int) -> Any:
    """The bit patterns of |value| as unsigned integers, which order as the magnitudes do."""
    magnitude = value.abs().cpu().numpy().ravel()
    return magnitude.astype(f"f{itemsize}", copy=False).view(f"u{itemsize}")


class _Sample:
    """Keeps a share of each model's magnitudes."""

    def __init__(self, n: int, share: float) -> None:
        self.n, self.share, self.itemsize = n, share, 4
        self.kept: list[list[Any]] = [[] for _ in range(n)]

    def fresh(self) -> _Sample:
        return _Sample(self.n, self.share)

    def observe(self, block: Block) -> None:
        for kept, value in zip(self.kept, block.values, strict=True):
            kept.append(value.abs().cpu().numpy().ravel())
            self.itemsize = value.element_size()

    def merge(self, other: _Sample) -> None:
        self.itemsize = max(self.itemsize, other.itemsize)
        for mine, theirs in zip(self.kept, other.kept, strict=True):
            mine.extend(theirs)

    def bracket(self, i: int, share: float) -> tuple[int, int]:
        """Codes between which the magnitude that a `share` of all exceed should lie."""
        import numpy as np

        magnitudes = np.concatenate([np.zeros(0, f"f{self.itemsize}"), *self.kept[i]])
        codes = magnitudes.view(f"u{self.itemsize}")
        top = (1 << (8 * self.itemsize - 1)) - 1
        n = len(codes)
        place, margin = n * (1 - share), 8 + 4 * math.sqrt(n * share * (1 - share))
        first, last = math.floor(place - margin), math.ceil(place + margin)
        wanted = [k for k in (first, last) if 0 <= k < n]
        part = np.partition(codes, wanted) if wanted else codes
        low = int(part[first]) if 0 <= first < n else 0
        return low, int(part[last]) if 0 <= last < n else top


class _Count:
    """Counts codes above each span and histograms those inside it, in at most 2^18 bins.

    A bin wider than one code also keeps its least and largest code: where they agree, as they do
    in most bins, the bin is as good as one code.
    """

    share = 1.0

    def __init__(self, spans: Sequence[tuple[int, int] | None], itemsize: int) -> None:
        self.spans, self.itemsize = spans, itemsize
        self.tallies = [_Tally(*s, itemsize) if s else None for s in spans]

    def fresh(self) -> _Count:
        return _Count(self.spans, self.itemsize)

    def observe(self, block: Block) -> None:
        for tally, value in zip(self.tallies, block.values, strict=True):
            if tally:
                tally.observe(_codes(value, self.itemsize))

    def merge(self, other: _Count) -> None:
        for mine, theirs in zip(self.tallies, other.tallies, strict=True):
            if mine and theirs:
                mine.merge(theirs)

    def locate(self, i: int, rank: int) -> tuple[tuple[int, int], float | None]:
        """The span in which the rank-th largest lies, and its value once that is one code."""
        import numpy as np

        tally = self.tallies[i]
        assert tally is not None
        low, high = tally.locate(rank)
        if low != high or not tally.low <= low <= tally.high:
            return (low, high), None
        kind = str(self.itemsize)
        return (low, low), float(np.array(low, "u" + kind).view("f" + kind))


class _Tally:
    """One model's counts for one span of codes."""

    def __init__(self, low: int, high: int, itemsize: int) -> None:
        import numpy as np

        self.low, self.high, self.above = low, high, 0
        self.shift = max(0, (high - low).bit_length() - BIN_BITS)
        self.top = (1 << (8 * itemsize - 1)) - 1
        bins, kind = ((high - low) >> self.shift) + 1, f"u{itemsize}"
        self.bins = np.zeros(bins, np.int64)
        self.least = np.full(bins if self.shift else 0, np.iinfo(kind).max, kind)
        self.most = np.zeros(bins if self.shift else 0, kind)

    def observe(self, codes: Any) -> None:
        import numpy as np

        above, reach = codes > self.high, codes >= self.low
        self.above += int(np.count_nonzero(above))
        if self.low == self.high:
            self.bins[0] += int(np.count_nonzero(reach)) - int(np.count_nonzero(above))
            return
        inside = codes.compress(np.logical_xor(above, reach, out=reach))
        place = (inside - self.low) >> self.shift
        np.add.at(self.bins, place, 1)
        if self.shift:
            np.minimum.at(self.least, place, inside)
            np.maximum.at(self.most, place, inside)

    def merge(self, other: _Tally) -> None:
        import numpy as np

        self.above += other.above
        self.bins += other.bins
        np.minimum(self.least, other.least, out=self.least)
        np.maximum(self.most, other.most, out=self.most)

    def locate(self, rank: int) -> tuple[int, int]:
        """The codes between which the rank-th largest lies."""
        import numpy as np

        reach = self.above + np.cumsum(self.bins[::-1])
        if rank <= self.above:
            return self.high + 1, self.top
        if rank > reach[-1]:
            return 0, self.low - 1
        place = len(reach) - 1 - int(np.searchsorted(reach, rank))
        if self.shift:
            return int(self.least[place]), int(self.most[place])
        return self.low + place, self.low + place
