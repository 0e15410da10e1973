"""Merges on a GPU beside the link to it, and methods on singular vectors beside the processor.

    python -m tests.bench.gpu DIR [--runs 3] [--workers 8] [--hidden 4096] [--experts 4]
                                  [--only link,linear,ties,ties-global,spectral]

DIR is what `python -m tests.bench.family DIR` writes. The link is what pinned memory moves to the
device, from it, and both ways at once. Of a merge its bytes each way are counted where they are
sent; the link alone would take the longer of the two ways, and the share is that over what the
merge took, as its report has it: no statistics, no hashes, inputs in the page cache, the output on
the same disk. With several GPUs linear runs on all of them too. A layer's matrices of random task
vectors go through each method on singular vectors, on the processor with all of its cores and on
the device; wall seconds. Everything runs once before it counts, and medians are taken.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mowmerge import api, staging
from mowmerge.planner import Options

from .merge import ours
from .spectral import CASES, layer, merged, task_vectors

SHARE, TIMES = 0.7, 10
PIECE = 1 << 26  # bytes sent at a time where the link alone is measured
MERGES = ("linear", "ties", "ties-global")
GB = 1e9


def link(device: str, runs: int) -> dict[str, float]:
    """Bytes a second: up, down, and each way when both are busy."""
    here = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    there = [torch.empty(PIECE, dtype=torch.uint8, device=device) for _ in range(2)]
    queues = [torch.cuda.Stream(device) for _ in range(2)]

    def send(ways: Iterable[int]) -> None:
        for _ in range(16):
            for way in ways:
                with torch.cuda.stream(queues[way]):
                    out, value = (there[0], here[0]) if way == 0 else (here[1], there[1])
                    out.copy_(value, non_blocking=True)
        torch.cuda.synchronize(device)

    ways = {"up": (0,), "down": (1,), "both ways": (0, 1)}
    return {name: 16 * PIECE / wall(partial(send, way), runs) for name, way in ways.items()}


def wall(work: Callable[[], object], runs: int) -> float:
    """Wall seconds, the median of so many runs after a first."""
    found = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return median(found[1:])


class Counted:
    """Counts what goes each way through every worker's lane."""

    def __init__(self) -> None:
        self.moved = {"up": 0, "work": 0, "down": 0}
        true = staging._Streams.copy

        def copy(lane: Any, queue: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
            listed = list(pairs)
            self.moved[queue] += sum(value.nbytes for _, value in listed)
            true(lane, queue, listed)

        staging._Streams.copy = copy  # type: ignore[method-assign]

    def taken(self) -> dict[str, int]:
        """What went since this was last asked."""
        found, self.moved = self.moved, dict.fromkeys(self.moved, 0)
        return found


def merge(
    family: Path, method: str, options: Options, runs: int, counted: Counted
) -> tuple[float, dict[str, int]]:
    """Seconds of a merge, and its bytes each way."""
    room = Path(tempfile.mkdtemp(dir=family.parent))
    recipe, seconds = room / "recipe.yaml", []
    recipe.write_text(ours(family, method))
    try:
        for _ in range(runs + 1):
            os.sync()
            counted.taken()
            made = api.merge(recipe, room / "out", options=options, hashes=False, force=True)
            seconds.append(made.report["seconds"])
    finally:
        shutil.rmtree(room)
    return median(seconds[1:]), counted.taken()


def spectral(device: str, hidden: int, n: int, runs: int) -> None:
    """Prints each method's seconds for a layer here and there."""
    print("\n| method | cpu, s | device, s | times | at least 10 |")
    print("| --- | ---: | ---: | ---: | --- |")
    for case, (name, given, _) in CASES.items():
        seconds = []
        for where in ("cpu", device):
            deltas = [task_vectors(shape, n, where) for shape in layer(hidden)]

            def work(deltas: list[Tensor] = deltas, name: str = name, given: Any = given) -> None:
                for each in deltas:
                    merged(each.clone(), name, given)
                torch.cuda.synchronize(device)

            seconds.append(wall(work, runs))
        here, there = seconds
        held = "yes" if here >= TIMES * there else "no"
        print(f"| {case} | {here:.2f} | {there:.3f} | {here / there:.1f} | {held} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure merges on a GPU.")
    parser.add_argument("family", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--only", default=",".join(("link", *MERGES, "spectral")))
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device here: nothing of this can be measured")
    only, device, count = asked.only.split(","), asked.device, torch.cuda.device_count()
    print(f"{torch.cuda.get_device_name(device)}, one of {count}; torch {torch.__version__},")
    print(f"CUDA {torch.version.cuda}; {os.cpu_count()} cores")
    found = link(device, asked.runs)
    print("; ".join(f"{name} {speed / GB:.1f} GB/s" for name, speed in found.items()))
    counted = Counted()
    if set(only) & set(MERGES):
        print("\n| merge | up, GB | down, GB | s | the link's, s | share | at least 0.7 |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for method in (method for method in MERGES if method in only):
        for devices in (device, *(["cuda"] if count > 1 and method == "linear" else [])):
            options = Options(asked.workers, device=devices, stats=False)
            seconds, moved = merge(asked.family, method, options, asked.runs, counted)
            least = max(moved["up"] / found["up"], moved["down"] / found["down"])
            held = "yes" if least >= SHARE * seconds else "no"
            print(
                f"| {method}, {devices} | {moved['up'] / GB:.2f} | {moved['down'] / GB:.2f}"
                f" | {seconds:.2f} | {least:.2f} | {least / seconds:.2f} | {held} |", flush=True,
            )  # fmt: skip
    if "spectral" in only:
        spectral(device, asked.hidden, asked.experts, asked.runs)


if __name__ == "__main__":
    main()
