"""What each row took: sizes, and the time of the passes that gave the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import fsum
from typing import Any

from mowmerge.evals.models import Entry
from mowmerge.evals.runner import Spent
from mowmerge.evals.score import Cost


@dataclass
class _Taken:
    parameters: int = 0
    peak: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)
    latencies: dict[str, list[float]] = field(default_factory=dict)


class Costs:
    """Adds up what each checkpoint took; what came from the cache took nothing."""

    def __init__(self) -> None:
        self._by: dict[Entry, _Taken] = {}

    def size(self, entry: Entry, model: Any) -> None:
        """Counts what was loaded."""
        tensors = chain(model.parameters(), model.buffers())
        taken = self._by.setdefault(entry, _Taken())
        taken.parameters = max(taken.parameters, sum(t.numel() for t in tensors))

    def spent(self, entry: Entry, spent: Spent, whole: bool) -> None:
        """Counts passes; of a whole task's only the memory."""
        taken = self._by.setdefault(entry, _Taken())
        taken.peak = max(taken.peak, spent.peak)
        for way in () if whole else spent.seconds:
            taken.seconds[way] = taken.seconds.get(way, 0.0) + spent.seconds[way]
            taken.items[way] = taken.items.get(way, 0) + spent.items[way]
            taken.latencies.setdefault(way, []).append(spent.latency[way])

    def table(self, entries: Sequence[Entry]) -> list[Cost]:
        """A row's costs; the expert's are the mean over experts, its time and items their sum."""
        found: dict[str, list[Cost]] = {}
        for entry in entries:
            taken = self._by.get(entry, _Taken())
            disk = sum(f.stat().st_size for f in entry.folder.rglob("*.safetensors"))
            for way in taken.seconds:
                row = f"{entry.row}, {way}" if way else entry.row
                seconds, n = taken.seconds[way], taken.items[way]
                latency = fsum(taken.latencies[way]) / len(taken.latencies[way])
                cost = Cost(
                    row, taken.parameters, disk, taken.peak, seconds, n, latency, n / seconds
                )
                found.setdefault(row, []).append(cost)
        return [_mean(costs) for costs in found.values()]


def _mean(costs: Sequence[Cost]) -> Cost:
    n, seconds, items = len(costs), fsum(c.seconds for c in costs), sum(c.items for c in costs)
    return Cost(
        costs[0].row,
        sum(c.parameters for c in costs) // n, sum(c.bytes_on_disk for c in costs) // n,
        sum(c.peak_bytes for c in costs) // n, seconds, items, fsum(c.latency for c in costs) / n,
        items / seconds,
    )  # fmt: skip
