"""What is measured on a classification task: each metric maps what is predicted and true, class
numbers or, for a regression, numbers, to a score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import fsum, sqrt

Metric = Callable[[Sequence[float], Sequence[float]], float]


def accuracy(predicted: Sequence[float], true: Sequence[float]) -> float:
    """Share of items whose class is right, 0 to 1."""
    return sum(p == t for p, t in zip(predicted, true, strict=True)) / len(true)


def macro_f1(predicted: Sequence[float], true: Sequence[float]) -> float:
    """Mean over classes of F1 = 2 TP / (predicted + true), 0 to 1.

    The classes are those that are predicted or true at least once.
    """
    hits = Counter(t for p, t in zip(predicted, true, strict=True) if p == t)
    seen = Counter(predicted) + Counter(true)
    return sum(2 * hits[label] / n for label, n in seen.items()) / len(seen)


def matthews(predicted: Sequence[float], true: Sequence[float]) -> float:
    """The correlation of predicted and true classes, -1 to 1; 0 where either is always the same.

    (n hits - sum_k p_k t_k) / sqrt((n^2 - sum_k p_k^2) (n^2 - sum_k t_k^2)), with p_k and t_k how
    often class k is predicted and true.
    """
    n, hits = len(true), sum(p == t for p, t in zip(predicted, true, strict=True))
    p, t = Counter(predicted), Counter(true)
    shared = n * hits - sum(p[k] * t[k] for k in p)
    spread = (n * n - sum(c * c for c in p.values())) * (n * n - sum(c * c for c in t.values()))
    return float(shared / sqrt(spread)) if spread else 0.0


def spearman(predicted: Sequence[float], true: Sequence[float]) -> float:
    """The correlation of ranks, equal values sharing their mean rank; -1 to 1, 0 where either is
    always the same."""
    p, t = _ranks(predicted), _ranks(true)
    middle = (len(t) - 1) / 2
    shared = fsum((a - middle) * (b - middle) for a, b in zip(p, t, strict=True))
    spread = fsum((a - middle) ** 2 for a in p) * fsum((b - middle) ** 2 for b in t)
    return shared / sqrt(spread) if spread else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    """Each value's rank from 0, the mean one among equals."""
    first: dict[float, int] = {}
    for place, value in enumerate(sorted(values)):
        first.setdefault(value, place)
    counts = Counter(values)
    return [first[value] + (counts[value] - 1) / 2 for value in values]


METRICS: Mapping[str, Metric] = {
    "accuracy": accuracy, "macro_f1": macro_f1, "matthews": matthews, "spearman": spearman,
}  # fmt: skip
