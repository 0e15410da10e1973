"""Exact order statistics of a tensor or a model, streamed in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mowmerge.methods.contracts import Block, Reduction
from mowmerge.tensors import Tensor, torch

SAMPLE_SHARE = 1 / 1024  # of a tensor or model; SAMPLE_LEAST elements of a small one
SAMPLE_LEAST, SAMPLE_MOST = 65_536, 1 << 20  # however large a model is
BIN_BITS = 18
TALLY = 1 << (BIN_BITS + 2)  # numbers of 4 bytes: bins of 8, the least and the largest of each


Scores = Callable[[Block], Iterable[Tensor] | Tensor]


def kth_largest(
    ranks: Sequence[int],
    total: int,
    of: Scores = lambda block: block.values,
    *,
    signed: bool = False,
) -> Reduction:
    """Returns, for each model i, the ranks[i]-th largest of `total` magnitudes; inf for rank 0.

    See `ranked`.
    """
    found = yield from ranked(ranks, total, of, signed=signed)
    return [one.value for one in found]


class Ranked(NamedTuple):
    """A number, how many are larger than it, and how many equal it, itself among them."""

    value: float = math.inf
    larger: int = 0
    equal: int = 0


def ranked(
    ranks: Sequence[int],
    total: int,
    of: Scores = lambda block: block.values,
    *,
    signed: bool = False,
) -> Reduction:
    """Returns, for each model i, the ranks[i]-th largest of `total` magnitudes as Ranked.

    of: whose magnitudes count: the values', or what it makes of a block. signed: numbers, not
    magnitudes.

    Exact. Up to 65,536 numbers are all kept. Of more a sample brackets each value, then counting
    passes narrow the bracket: entries above it are counted, entries inside it go to a histogram
    over their bit patterns, which order as they do. What the sample has most often inside is
    counted by itself: differences of bf16 numbers are often the same few. One counting pass is the
    rule; a sample that misleads costs more passes, never exactness. Memory is one histogram a
    model, whatever the number of ties.
    """
    share = max(min(SAMPLE_SHARE, SAMPLE_MOST / max(total, 1)), SAMPLE_LEAST / max(total, 1))
    sample = yield _Sample(len(ranks), share, of, _Order(signed))
    if share >= 1:  # it is all there is
        return [sample.largest(i, rank) if rank else Ranked() for i, rank in enumerate(ranks)]
    spans = [sample.bracket(i, rank / max(total, 1)) for i, rank in enumerate(ranks)]
    order = sample.order
    del sample  # up to gigabytes, for the largest models
    found = [None if rank else Ranked() for rank in ranks]
    while None in found:
        open_spans = [span if f is None else None for span, f in zip(spans, found, strict=True)]
        count = yield _Count(open_spans, of, order)
        for i, rank in enumerate(ranks):
            if found[i] is None:
                spans[i], found[i] = count.locate(i, rank)
    return found


def trim_thresholds(
    density: Sequence[float],
    total: int,
    *,
    extra: int,
    of: Scores = lambda block: block.values,
) -> Reduction:
    """Returns each model's least magnitude of those that trimming keeps; 0s where all keep all.

    Of `total` entries model i keeps floor(total * density[i]) + extra, at least 1; none at 0.
    """
    if all(d == 1 for d in density):
        return [0.0] * len(density)
    return (yield from kth_largest(trim_ranks(density, total, extra), total, of))


def trim_ranks(density: Sequence[float], total: int, extra: int = 0) -> list[int]:
    """How many of `total` entries trimming keeps of each model."""
    return [min(total, max(1, int(total * d) + extra)) if d > 0 else 0 for d in density]


@dataclass(frozen=True)
class _Order:
    """Codes: unsigned integers that order as the magnitudes do or, signed, as the numbers do."""

    signed: bool
    itemsize: int = 4

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << (8 * self.itemsize - (not self.signed))) - 1

    def codes(self, value: Any) -> Any:
        """The codes of an array of numbers."""
        import numpy as np

        wide = value.astype(f"f{self.itemsize}", copy=False)
        if not self.signed:
            return np.abs(wide).view(f"u{self.itemsize}")
        bits = wide.view(f"u{self.itemsize}")
        half = 1 << (8 * self.itemsize - 1)
        return np.where(bits >= half, ~bits, bits ^ bits.dtype.type(half))

    def number(self, code: int) -> float:
        """The number, or the magnitude, of a code."""
        import numpy as np

        half = 1 << (8 * self.itemsize - 1)
        bits = code if not self.signed else code ^ half if code >= half else 2 * half - 1 - code
        return float(np.array(bits, f"u{self.itemsize}").view(f"f{self.itemsize}"))


class _Span(NamedTuple):
    """Codes from low to high, both among them; `peak` is the one there that is thought to be the
    most frequent."""

    low: int
    high: int
    peak: int


class _Sample:
    """Keeps a share of each model's numbers."""

    exact = True

    def __init__(self, n: int, share: float, of: Scores, order: _Order) -> None:
        self.n, self.share, self.of, self.order = n, share, of, order
        self.kept: list[list[Any]] = [[] for _ in range(n)]

    def fresh(self) -> _Sample:
        return _Sample(self.n, self.share, self.of, self.order)

    def observe(self, block: Block) -> None:
        whole = block.matrices is not None  # not a piece of the sample
        step = round(1 / min(1.0, self.share)) | 1 if whole else 1
        for kept, value in zip(self.kept, self.of(block), strict=True):
            kept.append(value.cpu().numpy().ravel()[::step].copy())
        self.order = _Order(self.order.signed, kept[-1].itemsize)

    def merge(self, other: _Sample) -> None:
        self.order = max(self.order, other.order, key=lambda order: order.itemsize)
        for mine, theirs in zip(self.kept, other.kept, strict=True):
            mine.extend(theirs)

    def _codes(self, i: int) -> Any:
        import numpy as np

        kept = self.kept[i] or [np.zeros(0, "f4")]
        return self.order.codes(kept[0] if len(kept) == 1 else np.concatenate(kept))

    def largest(self, i: int, rank: int) -> Ranked:
        """The rank-th largest of the numbers kept."""
        import numpy as np

        codes = self._codes(i)
        code = np.partition(codes, len(codes) - rank)[len(codes) - rank]
        larger, equal = (int(np.count_nonzero(found)) for found in (codes > code, codes == code))
        return Ranked(self.order.number(int(code)), larger, equal)

    def bracket(self, i: int, share: float) -> _Span:
        """Codes between which the number that a `share` of all exceed should lie."""
        import numpy as np

        codes = self._codes(i)
        n = len(codes)
        place, margin = n * (1 - share), 8 + 4 * math.sqrt(n * share * (1 - share))
        first, last = math.floor(place - margin), math.ceil(place + margin)
        wanted = [k for k in (first, last) if 0 <= k < n]
        part = np.partition(codes, wanted) if wanted else codes
        low = int(part[first]) if 0 <= first < n else 0
        high = int(part[last]) if 0 <= last < n else self.order.top
        inside, times = np.unique(part[max(first, 0) : last + 1], return_counts=True)
        return _Span(low, high, int(inside[times.argmax()]) if len(inside) else low)


class _Count:
    """Counts codes above each span and histograms those inside it, in at most 2^18 bins.

    A bin wider than one code also keeps its least and largest code: where they agree, as they do
    in most bins, the bin is as good as one code.
    """

    share, exact = 1.0, True

    def __init__(self, spans: Sequence[_Span | None], of: Scores, order: _Order) -> None:
        self.spans, self.of, self.order = spans, of, order
        self.tallies = [_Tally(span, order) if span else None for span in spans]

    def fresh(self) -> _Count:
        return _Count(self.spans, self.of, self.order)

    def observe(self, block: Block) -> None:
        for tally, value in zip(self.tallies, self.of(block), strict=True):
            if tally:
                near = value if value.device.type == "cpu" else tally.near(value)
                tally.observe(self.order.codes(near.cpu().numpy().ravel()))

    def merge(self, other: _Count) -> None:
        for mine, theirs in zip(self.tallies, other.tallies, strict=True):
            if mine and theirs:
                mine.merge(theirs)

    def locate(self, i: int, rank: int) -> tuple[_Span, Ranked | None]:
        """The span in which the rank-th largest lies, and that once the span is one code."""
        tally = self.tallies[i]
        assert tally is not None
        low, high = tally.locate(rank)
        if low != high or not tally.low <= low <= tally.high:
            return _Span(low, high, low), None
        return _Span(low, low, low), Ranked(self.order.number(low), *tally.counts(low))


class _Tally:
    """One model's counts for one span of codes."""

    def __init__(self, span: _Span, order: _Order) -> None:
        import numpy as np

        low, high = self.low, self.high = span.low, span.high
        self.peak, self.above = span.peak, 0
        self.shift = max(0, (high - low).bit_length() - BIN_BITS)
        self.top, self.signed = order.top, order.signed
        self.ends = order.number(low), order.number(high)
        self.kind = torch.float64 if order.itemsize == 8 else torch.float32
        self.width, self.code = ((high - low) >> self.shift) + 1, f"u{order.itemsize}"
        self.bins: Any = None  # until there is a code to count: a fold that is asked for has none
        self.least = self.most = np.zeros(0, self.code)

    def near(self, value: Tensor) -> Tensor:
        """Those of a device's numbers that may lie in the span; counts there which lie above it.
        A NaN, or a span that ends in one, decides nothing: then the codes do."""
        wide = value.to(self.kind)
        size, (least, most) = wide if self.signed else wide.abs(), self.ends
        above = size > most
        self.above += int(above.sum())
        return value[above.logical_or_(size < least).logical_not_()]

    def observe(self, codes: Any) -> None:
        import numpy as np

        above, inside = codes > self.high, codes >= self.low
        self.above += int(np.count_nonzero(above))
        inside ^= above
        if self.low < self.high:
            at_peak = codes == self.peak
            self._take(codes.compress(inside ^ at_peak), 1)
            inside = at_peak
        if times := int(np.count_nonzero(inside)):
            self._take(np.full(1, self.peak, codes.dtype), times)

    def _take(self, codes: Any, times: int) -> None:
        """Counts codes inside the span, each that many times."""
        import numpy as np

        if self.bins is None:
            self._begin()
        place = (codes - self.low) >> self.shift
        np.add.at(self.bins, place, times)
        if self.shift:
            np.minimum.at(self.least, place, codes)
            np.maximum.at(self.most, place, codes)

    def _begin(self) -> None:
        import numpy as np

        self.bins = np.zeros(self.width, np.int64)
        if self.shift:
            self.least = np.full(self.width, np.iinfo(self.code).max, self.code)
            self.most = np.zeros(self.width, self.code)

    def merge(self, other: _Tally) -> None:
        import numpy as np

        self.above += other.above
        if other.bins is None:
            return
        if self.bins is None:
            self._begin()
        self.bins += other.bins
        np.minimum(self.least, other.least, out=self.least)
        np.maximum(self.most, other.most, out=self.most)

    def locate(self, rank: int) -> tuple[int, int]:
        """The codes between which the rank-th largest lies."""
        import numpy as np

        if rank <= self.above:
            return self.high + 1, self.top
        reach = self.above + np.cumsum(np.zeros(1) if self.bins is None else self.bins[::-1])
        if rank > reach[-1]:
            return 0, self.low - 1
        place = len(reach) - 1 - int(np.searchsorted(reach, rank))
        if self.shift:
            return int(self.least[place]), int(self.most[place])
        return self.low + place, self.low + place

    def counts(self, code: int) -> tuple[int, int]:
        """How many codes are above that one, which has its bin to itself, and how many it."""
        place = (code - self.low) >> self.shift
        return self.above + int(self.bins[place + 1 :].sum()), int(self.bins[place])
