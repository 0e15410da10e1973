"""What scoring gives: a model on a task, item by item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """One model on one task: the metric's value, and what was predicted of each item."""

    model: str
    task: str
    metric: str
    value: float
    predicted: Sequence[int]
    true: Sequence[int]
