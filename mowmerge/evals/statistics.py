"""How sure a figure is: intervals from resampled items, paired tests, calibration.

Everything here is a pure function of arrays; `R` is the number of resamples, `n` that of items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, exp, lgamma, log

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Statistic = Callable[[Array, Array, Array], Array]  # two columns [G], counts [r,G] -> [r]

RESAMPLES = 10_000
LEVEL = 0.95
BINS = 15
CELLS = 2_000_000  # of a block of counts


@dataclass(frozen=True)
class Bin:
    """Items whose confidence lies in (low, high]: how many, their mean confidence and accuracy."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


def resample(
    columns: Sequence[tuple[Array, Array]],
    statistics: Sequence[Statistic],
    seed: int,
    resamples: int = RESAMPLES,
) -> Array:
    """Each statistic of each pair of columns under the same resampled items: [K,R].

    An item is drawn for all columns at once, so that rows may be compared and divided pairwise.
    Items that are alike in every column are counted together: R multinomial draws over few groups,
    or n indices a resample over many.

    Shapes: columns are K pairs of [n].
    """
    flat = np.stack([side for pair in columns for side in pair], 1)
    rows, group = np.unique(flat, axis=0, return_inverse=True)
    blocks = []
    for counts in _counts(group.reshape(-1), len(rows), seed, resamples):
        values = [s(rows[:, 2 * k], rows[:, 2 * k + 1], counts) for k, s in enumerate(statistics)]
        blocks.append(np.stack(values))
    return np.concatenate(blocks, 1)


def _counts(group: NDArray[np.intp], groups: int, seed: int, resamples: int) -> Iterator[Array]:
    """How often each group is drawn in each resample, in blocks [r,G]."""
    n, rng = len(group), np.random.default_rng(seed)
    few = groups * 10 <= n
    shares = np.bincount(group, minlength=groups) / n
    step = max(1, CELLS // max(groups, 1 if few else n))
    for start in range(0, resamples, step):
        r = min(step, resamples - start)
        if few:
            yield rng.multinomial(n, shares, size=r).astype(np.float64)
        else:
            drawn = group[rng.integers(0, n, (r, n))] + groups * np.arange(r)[:, None]
            counted = np.bincount(drawn.reshape(-1), minlength=r * groups)
            yield counted.reshape(r, groups).astype(np.float64)


def mean(values: Array, weights: Array, counts: Array) -> Array:
    """sum(count weight value) / sum(count weight)."""
    total: Array = counts @ (values * weights) / (counts @ weights)
    return total


def perplexity(values: Array, weights: Array, counts: Array) -> Array:
    """exp of the weighted mean of negative log likelihoods in nats."""
    found: Array = np.exp(mean(values, weights, counts))
    return found


def macro_f1(predicted: Array, true: Array, counts: Array) -> Array:
    """Mean of 2 TP / (predicted + true) over the classes that occur."""
    classes = np.union1d(predicted, true)
    guessed, real = (predicted[:, None] == classes), (true[:, None] == classes)
    hits = counts @ (guessed & real)
    seen = counts @ guessed + counts @ real
    f1 = np.divide(2 * hits, seen, out=np.zeros_like(seen), where=seen > 0)
    total: Array = f1.sum(1) / (seen > 0).sum(1)
    return total


def matthews(predicted: Array, true: Array, counts: Array) -> Array:
    """Matthews' correlation for any number of classes; 0 where it is not defined.

    (c s - sum_k p_k t_k) / sqrt((s^2 - sum p_k^2) (s^2 - sum t_k^2)), with c right of s items.
    """
    classes = np.union1d(predicted, true)
    p = counts @ (predicted[:, None] == classes)
    t = counts @ (true[:, None] == classes)
    c, s = counts @ (predicted == true), counts.sum(1)
    above = c * s - (p * t).sum(1)
    below = np.sqrt((s**2 - (p**2).sum(1)) * (s**2 - (t**2).sum(1)))
    found: Array = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return found


def pearson(x: Array, y: Array, counts: Array) -> Array:
    """Pearson's correlation; 0 where one side is constant."""
    total = counts.sum(1, keepdims=True)
    return _correlation(np.broadcast_to(x, counts.shape), np.broadcast_to(y, counts.shape), counts,
                        total)  # fmt: skip


def spearman(x: Array, y: Array, counts: Array) -> Array:
    """Pearson's correlation of the ranks; equals share their mean rank."""
    total = counts.sum(1, keepdims=True)
    return _correlation(_ranks(x, counts), _ranks(y, counts), counts, total)


def _ranks(x: Array, counts: Array) -> Array:
    """The mean rank of each item in each resample: [r,G]."""
    _, group = np.unique(x, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(group.max() + 1))
    held = np.add.reduceat(counts[:, order], starts, axis=1)
    upto = np.cumsum(held, 1)
    ranks: Array = (upto - (held - 1) / 2)[:, group]
    return ranks


def _correlation(x: Array, y: Array, counts: Array, total: Array) -> Array:
    x = x - (counts * x).sum(1, keepdims=True) / total
    y = y - (counts * y).sum(1, keepdims=True) / total
    above = (counts * x * y).sum(1)
    below = np.sqrt((counts * x * x).sum(1) * (counts * y * y).sum(1))
    found: Array = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return found


OF_CLASSES: Mapping[str, Statistic] = {
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def interval(values: Array, level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of resampled values [R]."""
    tail = 50 * (1 - level)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def bootstrap_p(differences: Array) -> float:
    """Two-sided p of "no difference" from resampled differences [R]: twice the smaller tail.

    One is added to both counts: no finite number of resamples shows that p is 0.
    """
    resamples = len(differences)
    tail = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (resamples + 1))


def mcnemar(first: Sequence[float], second: Sequence[float]) -> tuple[int, int, float]:
    """Items only the first has right, only the second, and the exact two-sided p.

    p = min(1, 2 P(X <= min(b, c))), X binomial of b + c fair tosses.
    """
    one, two = np.asarray(first) > 0, np.asarray(second) > 0
    wins, losses = int((one & ~two).sum()), int((two & ~one).sum())
    n = wins + losses
    terms = [
        exp(lgamma(n + 1) - lgamma(i + 1) - lgamma(n - i + 1) - n * log(2))
        for i in range(min(wins, losses) + 1)
    ]
    return wins, losses, min(1.0, 2 * sum(terms))


def holm(p: Sequence[float]) -> list[float]:
    """p adjusted for the number of tests: with any subset of nulls true, the chance that one of
    them falls below a level is at most that level."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def calibration(
    confidence: Sequence[float], right: Sequence[float], bins: int = BINS
) -> tuple[list[Bin], float]:
    """The bins that hold items, of equal width over 0 to 1, and the expected calibration error.

    ECE = sum_b n_b / n |accuracy_b - confidence_b|.
    """
    held: dict[int, list[tuple[float, float]]] = {}
    for c, r in zip(confidence, right, strict=True):
        held.setdefault(max(0, ceil(c * bins) - 1), []).append((c, r))
    found = [
        Bin(b / bins, (b + 1) / bins, len(i), sum(c for c, _ in i) / len(i),
            sum(r for _, r in i) / len(i))
        for b, i in sorted(held.items())
    ]  # fmt: skip
    return found, sum(b.n * abs(b.accuracy - b.confidence) for b in found) / len(confidence)
