"""Runs a model over items of several tasks, mixed and shuffled, in batches as large as memory lets.

While one batch computes, the next is decoded and encoded on a thread. Out of memory halves the
batch; what is answered is kept batch by batch.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from mowmerge.errors import ResourceError
from mowmerge.evals.cache import Journal
from mowmerge.evals.job import Answer, Place
from mowmerge.evals.models import Loaded
from mowmerge.evals.settings import Advance
from mowmerge.tensors import torch

SINGLE = 3  # items that are run alone, for their latency
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass
class Spent:
    """What forward passes took, by way."""

    seconds: dict[str, float] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)
    latency: dict[str, float] = field(default_factory=dict)
    peak: int = 0

    def add(self, way: str, seconds: float, items: int) -> None:
        """Counts a pass."""
        self.seconds[way] = self.seconds.get(way, 0.0) + seconds
        self.items[way] = self.items.get(way, 0) + items


class Batches:
    """The size that memory has allowed so far, and the passes at it."""

    def __init__(self, size: int, advance: Advance) -> None:
        self.size, self._advance = size, advance

    def skip(self, items: int) -> None:
        """Counts what was done before."""
        if items:
            self._advance(items)

    def run(
        self, loaded: Loaded, places: Sequence[Place], ways: Sequence[str],
        journals: Mapping[tuple[str, str], Journal],
    ) -> Spent:  # fmt: skip
        """Answers for every place, each way, into the journals by way and task.

        Raises:
            ResourceError: memory does not suffice for a single item.
        """
        kind, spent, start = places[0].job.kind, Spent(), 0
        _forget_peak()
        with ThreadPoolExecutor(1) as pool, torch.inference_mode():
            ahead: tuple[Sequence[Place], Future[Any]] | None = None
            while start < len(places):
                some = places[start : start + self.size]
                if ahead is not None and ahead[0] == some:
                    given = ahead[1].result()
                else:
                    given = kind.encode(loaded.tools, some)
                after = places[start + self.size : start + 2 * self.size]
                ahead = (after, pool.submit(kind.encode, loaded.tools, after)) if after else None
                try:
                    found = self._answers(loaded, some, given, ways, spent)
                except (MemoryError, RuntimeError) as error:
                    if not _out_of_memory(error):
                        raise
                    self._halve(loaded, error)
                    continue
                for way, answers in found.items():
                    _keep(journals, way, some, answers)
                start += len(some)
                self._advance(len(some))
            spent.peak = _peak()
            if not kind.WHOLE:
                self._alone(loaded, places[:SINGLE], ways, spent)
        return spent

    def _answers(
        self, loaded: Loaded, some: Sequence[Place], given: Any, ways: Sequence[str], spent: Spent
    ) -> dict[str, list[Answer]]:
        """The answers of one batch, each way, with what the router said of each item."""
        found = {}
        for way in ways:
            loaded.gates.clear()
            loaded.routed.clear()
            began = time.perf_counter()
            answers = some[0].job.kind.answer(loaded, way, some, given)
            spent.add(way, time.perf_counter() - began, len(some))
            for i, answer in enumerate(answers):
                if i in loaded.gates:
                    answer["gates"] = [round(g, 6) for g in loaded.gates[i].tolist()]
                    answer["routed"] = loaded.routed[i]
            found[way] = answers
        return found

    def _halve(self, loaded: Loaded, error: Exception) -> None:
        """Half the batch, and what was held for it given back; or the end."""
        where = str(loaded.folder)
        if self.size == 1:
            raise ResourceError(
                f"memory does not suffice for one item: {str(error).splitlines()[0]}", where=where,
                hint="--dtype bfloat16, or --device auto; what is finished is kept",
            ) from error  # fmt: skip
        self.size //= 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _alone(
        self, loaded: Loaded, places: Sequence[Place], ways: Sequence[str], spent: Spent
    ) -> None:
        """The time that a batch of one takes: the median of a few."""
        kind = places[0].job.kind
        for way in ways:
            times = []
            for place in places:
                given = kind.encode(loaded.tools, [place])
                began = time.perf_counter()
                kind.answer(loaded, way, [place], given)
                times.append(time.perf_counter() - began)
            spent.latency[way] = median(times)


def _keep(
    journals: Mapping[tuple[str, str], Journal], way: str, some: Sequence[Place],
    answers: Sequence[Answer],
) -> None:  # fmt: skip
    """Each task's answers into its journal."""
    by_task: dict[str, dict[int, Answer]] = {}
    for place, answer in zip(some, answers, strict=True):
        by_task.setdefault(place.job.name, {})[place.item] = answer
    for task, held in by_task.items():
        if (way, task) in journals:
            journals[way, task].add(held)


def _out_of_memory(error: Exception) -> bool:
    words = str(error).lower()
    return isinstance(error, MemoryError) or any(said in words for said in OUT_OF_MEMORY)


def _forget_peak() -> None:
    """From here on the peak is measured, where it can be."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return


def _peak() -> int:
    """Bytes at most since then: allocated on the GPU, else resident in this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
