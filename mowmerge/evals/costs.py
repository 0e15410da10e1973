"""What each row took: sizes, and the time of the passes that gave the scores, now or then.

What a pass took is kept with the answers that it gave, and with a description of what it ran on, so
that a row whose answers come from the cache still says what they cost, and on what.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain
from math import fsum
from os import cpu_count
from pathlib import Path
from typing import Any

from mowmerge.evals.job import Taken
from mowmerge.evals.models import Entry
from mowmerge.evals.runner import Spent
from mowmerge.evals.score import Cost
from mowmerge.tasks.adapters import folders
from mowmerge.tensors import torch


def surroundings(device: Any, processes: int, batch: int) -> dict[str, Any]:
    """What a pass ran on: passes are compared where all of it is the same."""
    device = torch.device(device)
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "processes": processes,
        "batch": batch,
    }


@cache
def _processor() -> str:
    """The processor's name and how many there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(named, platform.processor() or platform.machine())
    return f"{name}, {cpu_count()} cores"


def size(model: Any) -> int:
    """The numbers that a model holds."""
    return sum(tensor.numel() for tensor in chain(model.parameters(), model.buffers()))


def shared(
    spent: Spent, way: str, items: int, whole: bool, parameters: int, on: Mapping[str, Any]
) -> Taken:
    """A task's part of passes over several, by its number of items; of a whole task's one only the
    memory."""
    if whole:
        return Taken(0.0, 0, 0.0, spent.peak, parameters, on, now=True)
    seconds = spent.seconds[way] * items / spent.items[way]
    return Taken(seconds, items, spent.latency[way], spent.peak, parameters, on, now=True)


def table(taken: Mapping[tuple[Entry, str], Sequence[Taken]]) -> list[Cost]:
    """A row's costs, from what was taken by checkpoint and way: of the surroundings in which most
    of its items ran. The expert's are the mean over experts, its time and items their sum."""
    rows: dict[str, dict[Entry, list[Taken]]] = {}
    for (entry, way), pieces in taken.items():
        row = f"{entry.row}, {way}" if way else entry.row
        if any(piece.items for piece in pieces):
            rows.setdefault(row, {})[entry] = list(pieces)
    return [_row(row, by_entry) for row, by_entry in rows.items()]


def _row(row: str, by_entry: Mapping[Entry, Sequence[Taken]]) -> Cost:
    every = [piece for pieces in by_entry.values() for piece in pieces]
    places: list[Mapping[str, Any]] = []
    places += (piece.on for piece in every if piece.on not in places)
    most = max(places, key=lambda on: sum(piece.items for piece in every if piece.on == on))
    alike = {e: [p for p in pieces if p.on == most] for e, pieces in by_entry.items()}
    alike = {entry: pieces for entry, pieces in alike.items() if pieces}
    n, chosen = len(alike), [piece for pieces in alike.values() for piece in pieces]
    seconds, items = fsum(p.seconds for p in chosen), sum(p.items for p in chosen)
    latencies = [[p.latency for p in pieces if p.items] for pieces in alike.values()]
    means = [fsum(each) / len(each) for each in latencies if each]
    return Cost(
        row,
        sum(max(p.parameters for p in pieces) for pieces in alike.values()) // n,
        sum(map(_on_disk, alike)) // n,
        sum(max(p.peak for p in pieces) for pieces in alike.values()) // n,
        seconds,
        items,
        fsum(means) / len(means),
        items / seconds,
        dict(most),
        not any(piece.now for piece in chosen),
    )


def _on_disk(entry: Entry) -> int:
    found = (file for at in folders(entry.where) for file in at.rglob("*.safetensors"))
    return sum(file.stat().st_size for file in found)
