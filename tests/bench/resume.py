"""What taking up a merge costs over the work that was left; prints ratios.

    python -m tests.bench.resume DIR [--runs 3] [--only linear,ties-global]

DIR is what `python -m tests.bench.family DIR` writes. What a run takes after half of its tensors is
the work that is left where another is cut off there (by an exit that tidies nothing up); the time
of that one's resumption, parsing and planning included, is set against it. One worker, inputs in
the page cache, no hashes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from mowmerge import merge
from mowmerge.checkpoint.journal import Journal
from mowmerge.planner import Options
from tests.bench.merge import ours

ALLOWED = 1.05


class Clock:
    """Notes when each tensor was finished; cuts the run off after `last` of them."""

    def __init__(self, last: int | None = None) -> None:
        self.times: list[float] = []
        self._last, self._real = last, Journal.finished

    def __enter__(self) -> Clock:
        clock, real = self, self._real

        def finished(journal: Journal, *args: Any) -> None:
            real(journal, *args)
            clock.times.append(time.perf_counter())
            if len(clock.times) == clock._last:
                os._exit(9)

        Journal.finished = finished  # type: ignore[method-assign]
        return self

    def __exit__(self, *exc: object) -> None:
        Journal.finished = self._real  # type: ignore[method-assign]


def run(recipe: Path, out: Path, resume: bool) -> float:
    """Merges; when it ended."""
    merge(recipe, out, options=Options(workers=1), hashes=False, resume=resume)
    return time.perf_counter()


def ratio(recipe: Path, room: Path) -> tuple[float, float, float]:
    """Seconds that the second half takes in one run, and when it is resumed; their ratio."""
    with Clock() as clock:
        ended = run(recipe, room / "whole", resume=False)
    half = len(clock.times) // 2
    left = ended - clock.times[half - 1]
    shutil.rmtree(room / "whole")
    child = os.fork()
    if not child:
        with Clock(half):
            run(recipe, room / "out", resume=True)
    os.waitpid(child, 0)
    began = time.perf_counter()
    taken = run(recipe, room / "out", resume=True) - began
    shutil.rmtree(room / "out")
    return left, taken, taken / left


def main() -> None:
    """Prints the ratios, and whether each is allowed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("family", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default="linear,ties-global")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.family) as folder:
        room = Path(folder)
        for method in given.only.split(","):
            recipe = room / f"{method}.yaml"
            recipe.write_text(ours(given.family, method))
            run(recipe, room / "warm", resume=False)
            shutil.rmtree(room / "warm")
            found = [ratio(recipe, room) for _ in range(given.runs)]
            left, taken, share = (median(row[i] for row in found) for i in range(3))
            says = "ok" if share <= ALLOWED else "too much"
            print(json.dumps({"method": method, "left": left, "resumed": taken, "ratio": share}))
            print(f"{method}: {left:.2f} s left, {taken:.2f} s resumed, {share:.3f}: {says}")


if __name__ == "__main__":
    main()
