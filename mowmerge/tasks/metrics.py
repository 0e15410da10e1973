"""What is measured on a task: each metric maps predicted and true class numbers to a score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

Metric = Callable[[Sequence[int], Sequence[int]], float]


def accuracy(predicted: Sequence[int], true: Sequence[int]) -> float:
    """Share of items whose class is right, 0 to 1."""
    return sum(p == t for p, t in zip(predicted, true, strict=True)) / len(true)


def macro_f1(predicted: Sequence[int], true: Sequence[int]) -> float:
    """Mean over classes of F1 = 2 TP / (predicted + true), 0 to 1.

    The classes are those that are predicted or true at least once.
    """
    hits = Counter(t for p, t in zip(predicted, true, strict=True) if p == t)
    seen = Counter(predicted) + Counter(true)
    return sum(2 * hits[label] / n for label, n in seen.items()) / len(seen)


METRICS: Mapping[str, Metric] = {"accuracy": accuracy, "macro_f1": macro_f1}
