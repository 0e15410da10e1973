"""What merges of large models cost, from plans over checkpoints that are headers only; a table.

    python -m tests.bench.costs

`read` and `written` are the plan's, `moved` counts each pass over the inputs and the output. `peak`
is the plan's for one rank with eight workers. Times are `moved` over the bandwidth that all ranks
reach together; digests move the inputs (once, then they are known) and the output once more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mowmerge import api
from mowmerge.plan import Plan
from mowmerge.planner import Options

from .header_only import header_only

SHAPES: Mapping[str, Mapping[str, int]] = {
    "8B": {"hidden": 4096, "layers": 32, "heads": 32, "intermediate": 14336},
    "70B": {},
    "405B": {"hidden": 16384, "layers": 126, "heads": 128, "intermediate": 53248},
}
EXPERTS = (2, 4, 8)
METHODS = {"linear": 1, "ties": 3}  # passes: ties counts magnitudes, then signs, then merges
WORKERS = 8
BANDWIDTHS = (1, 10)  # GB/s
GB = 1e9


def plan(folder: Path, method: str, experts: int) -> Plan:
    """The plan of a merge of that many copies of one checkpoint, which is their base too."""
    recipe = folder.parent / f"{folder.name}-{method}-{experts}.yaml"
    names = "".join(f"  e{i}: ./{folder.name}\n" for i in range(experts))
    base = f"base: ./{folder.name}\n" if method == "ties" else ""
    recipe.write_text(f"version: 1\nmethod: {method}\n{base}models:\n{names}")
    return api.plan(recipe, options=Options(workers=WORKERS, download=False))


def moved(plan: Plan, passes: int) -> int:
    """Bytes that a merge reads and writes."""
    return passes * plan.read_bytes + plan.write_bytes


def row(size: str, experts: int, method: str, plan: Plan) -> list[str]:
    """One line of the table."""
    total = moved(plan, METHODS[method])
    digests = plan.read_bytes + plan.write_bytes
    times = [_time(total / GB / speed) for speed in BANDWIDTHS]
    return [
        size, str(experts), method, f"{plan.read_bytes / GB:,.0f}", f"{plan.write_bytes / GB:,.0f}",
        f"{total / GB:,.0f}", f"{plan.peak_bytes / GB:.2f}", *times,
        _time(digests / GB / BANDWIDTHS[0]),
    ]  # fmt: skip


def _time(seconds: float) -> str:
    """Minutes, or hours and minutes."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d}"


def rows(room: Path) -> Iterator[list[str]]:
    """Every line of the table; `room` takes the headers."""
    for size, shape in SHAPES.items():
        folder = header_only(room / size, **shape)
        for experts in EXPERTS:
            for method in METHODS:
                yield row(size, experts, method, plan(folder, method, experts))


def table(room: Path) -> str:
    """The table of docs/scale.md."""
    head: list[Any] = ["model", "experts", "method", "read, GB", "written, GB", "moved, GB",
                       "peak, GB", *(f"at {speed} GB/s" for speed in BANDWIDTHS),
                       f"digests at {BANDWIDTHS[0]} GB/s"]  # fmt: skip
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows(room)))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        print(table(Path(made)))
