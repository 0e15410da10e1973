"""Two ranks on two cores against one rank with one worker: ties over the family; prints ratios.

    python -m tests.bench.ranks DIR [--runs 3] [--only ties,ties-global] [--least 1.7]

DIR is what `python -m tests.bench.family DIR` writes. Each rank has one worker; the two are started
by torchrun. Wall seconds of whole commands, with what torchrun and imports take, and those of the
merge alone, as its report has them: they begin with the recipe. No statistics, no hashes, inputs in
the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

from .merge import measure, ours

WORDS = ("--workers", "1", "--no-stats", "--no-hash", "--quiet")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def seconds(ranks: int, recipe: Path, room: Path) -> tuple[float, float]:
    """Wall seconds of one command, and those of its merge."""
    start = TORCHRUN if ranks == 2 else (sys.executable,)
    out = room / "out"
    os.sync()
    found = measure(
        [*start, "-m", "mowmerge", "merge", str(recipe), str(out), *WORDS], room / "log"
    )
    report = json.loads((out / "report.json").read_text())
    assert len(report.get("ranks", [0])) == ranks
    shutil.rmtree(out)
    return found.wall, report["seconds"]


def main() -> None:
    """Measures one rank and two in turns, and prints how many times faster two are."""
    parser = argparse.ArgumentParser(description="Two ranks against one.")
    parser.add_argument("family", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default="ties,ties-global")
    parser.add_argument("--least", type=float, default=1.7)
    asked = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    family = asked.family.resolve()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=family.parent) as made:
        room = Path(made)
        for method in asked.only.split(","):
            recipe = room / f"{method}.yaml"
            recipe.write_text(ours(family, method))
            seconds(1, recipe, room)
            one, two = [], []
            for _ in range(asked.runs):
                one.append(seconds(1, recipe, room))
                two.append(seconds(2, recipe, room))
            whole, merge = (median(r[i] for r in one) / median(r[i] for r in two) for i in (0, 1))
            told = {"method": method, "one": one, "two": two, "command": whole, "merge": merge}
            print(json.dumps(told))
            says = "ok" if merge >= asked.least else "too little"
            print(
                f"{method}: two ranks are {merge:.2f} times as fast as one ({whole:.2f} with the"
                f" start of processes), at least {asked.least} wanted: {says}"
            )


if __name__ == "__main__":
    main()
