"""Measures how each static method grows with layers and with experts; prints ratios.

    python -m tests.bench.catalogue [--only ties,tsv_m] [--hidden 512] [--memory]

A llama-shaped family in bf16. Every merge is a child process with one worker, which merges a tiny
model first; from then on its CPU time and the largest resident set above what it holds are taken.
Memory is counted in largest matrices, of fp32.

- *layers*: that memory for twice the layers over once, four experts (aim: at most 1.1)
- *eight*: that memory for eight experts, in largest matrices
- *further*: what each further expert adds to it from four to eight (aim: at most 1)
- *time*: CPU time a further expert from four to eight over that from two to four (linear: 1); not
  taken with --memory, which needs no quiet machine
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mowmerge.methods import registry
from tests.bench.family import Llama, write_family
from tests.bench.merge import table

COUNTS, LAYERS = (2, 4, 8), 2
SIDES = {"small": 1, "wide": 3}  # times the matrices' sides: wide for methods that decompose none
FEW: dict[str, dict[str, Any]] = {"wudi": {"steps": 10}, "doge": {"steps": 10}}
CHILD = """
import json, sys, time
from pathlib import Path
from mowmerge import api
from mowmerge.planner import Options

def kept(word):
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[word].split()[0]) * 1024

def run(recipe):
    options = Options(workers=1, stats=False)
    api.merge(recipe, "out", options=options, hashes=False, force=True)

run("tiny.yaml")
Path("/proc/self/clear_refs").write_text("5")
floor, began = kept("VmRSS"), time.process_time()
run(sys.argv[1])
print(json.dumps([time.process_time() - began, kept("VmHWM") - floor]))
"""


def shape(hidden: int, layers: int) -> Llama:
    """A llama whose vocabulary is no larger than an MLP's matrix."""
    wide = hidden * 11 // 4
    return Llama(hidden, layers, heads=8, kv_heads=2, intermediate=wide, vocab=wide)


def size_for(method: str) -> str:
    """Of the family that it is measured on."""
    return "small" if registry.get(method).decompositions else "wide"


def measured(room: Path, family: str, method: str, n: int) -> tuple[float, float]:
    """CPU seconds and bytes above the floor of one merge of n experts."""
    spec = registry.get(method)
    for name, folder in (("tiny", "tiny"), ("asked", family)):
        recipe: dict[str, Any] = {
            "method": method,
            "models": {f"m{i}": str(room / folder / f"expert-{i + 1}") for i in range(n)},
            "parameters": FEW.get(method, {}),
        }
        if spec.wants_base:
            recipe["base"] = str(room / folder / "base")
        (room / f"{name}.yaml").write_text(json.dumps(recipe))
    words = [sys.executable, "-c", CHILD, "asked.yaml"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(words, cwd=room, env=env, capture_output=True, text=True, check=True)
    cpu, peak = json.loads(done.stdout)
    return cpu, peak


def row(room: Path, method: str, hidden: int, *, time: bool) -> list[str]:
    """A method's ratios; of one with a fixed number of models those without further experts."""
    spec, size = registry.get(method), size_for(method)
    counts = (spec.count,) if spec.count else COUNTS
    unit = 4 * 11 // 4 * (SIDES[size] * hidden) ** 2
    cpu, peak = {}, {}
    for n in counts:
        cpu[n], peak[n] = measured(room, f"{size}-once", method, n)
    middle = spec.count or 4
    layers = f"{measured(room, f'{size}-twice', method, middle)[1] / peak[middle]:.2f}"
    if spec.count:
        return [method, layers, f"{peak[middle] / unit:.2f} of {middle}", ""] + [""] * time
    few, some, many = COUNTS
    found = [method, layers, f"{peak[many] / unit:.2f}"]
    found.append(f"{(peak[many] - peak[some]) / (many - some) / unit:.2f}")
    slope = (cpu[many] - cpu[some]) / (cpu[some] - cpu[few]) / 2
    return [*found, f"{slope:.2f}"] if time else found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Measure each static method's growth.")
    parser.add_argument("--only", default="", help="methods, comma-separated")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--memory", action="store_true")
    asked = parser.parse_args()
    static = [name for name in registry.names() if registry.get(name).family == "static"]
    static.remove("pem_composition")  # of adapters alone
    methods = asked.only.split(",") if asked.only else static
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        write_family(room / "tiny", shape(64, 1), experts=COUNTS[-1])
        for size in {size_for(method) for method in methods}:
            for name, layers in (("once", LAYERS), ("twice", 2 * LAYERS)):
                shaped = shape(SIDES[size] * asked.hidden, layers)
                write_family(room / f"{size}-{name}", shaped, experts=COUNTS[-1])
        rows = []
        for method in methods:
            rows.append(row(room, method, asked.hidden, time=not asked.memory))
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    head = "method | layers | eight | further"
    print(table(head if asked.memory else f"{head} | time", rows))


if __name__ == "__main__":
    main()
