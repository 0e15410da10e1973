"""Measures merges beside mergekit's and beside plain read and write loops; prints ratios.

    python -m tests.bench.merge DIR [--mergekit MERGEKIT_YAML] [--runs 3] [--only linear,ties]
                                    [--twice DIR_WITH_TWICE_THE_LAYERS]

DIR is what `python -m tests.bench.family DIR` writes. Every case is a child process on the same two
cores; CPU is user + system time and peak is ru_maxrss, both as wait4 reports them. Cases take turns
in each of the runs, and medians are taken. mergekit runs with its own defaults and `dtype:
bfloat16`, as its users' recipes have it, without model card and tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

Command = Callable[[Path], list[str]]
MB = 1e6

OURS: Mapping[str, Mapping[str, Any]] = {
    "linear": {"method": "linear"},
    "ties": {"method": "ties", "parameters": {"density": 0.5, "trim": "tensor"}},
    "dare": {"method": "dare", "parameters": {"density": 0.5, "elect": "mass"}},
    "ties-global": {"method": "ties", "parameters": {"density": 0.5, "trim": "global"}},
    "breadcrumbs": {"method": "breadcrumbs", "parameters": {"density": 0.5, "gamma": 0.01}},
    "della": {"method": "della", "parameters": {"density": 0.5, "epsilon": 0.1}},
    "sce": {"method": "sce", "parameters": {"density": 0.5}},
}
THEIRS: Mapping[str, Mapping[str, Any]] = {
    "linear": {"merge_method": "linear", "parameters": {"normalize": True}},
    "ties": {"merge_method": "ties", "parameters": {"normalize": True}},
    "dare": {"merge_method": "dare_ties", "parameters": {"normalize": False}},
    "breadcrumbs": {"merge_method": "breadcrumbs", "parameters": {"gamma": 0.01}},
    "della": {"merge_method": "della", "parameters": {"epsilon": 0.1}},
    "sce": {"merge_method": "sce", "parameters": {"select_topk": 0.5}},
}
LEAST = {  # times less CPU than mergekit
    "linear": 5, "ties": 10, "dare": 6, "breadcrumbs": 6, "della": 6, "sce": 6,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Who merges, how, with how many workers, with statistics and hashes or without."""

    tool: str  # ours | mergekit | loops | loops, reused
    method: str
    workers: int = 2
    full: bool = False
    twice: bool = False

    def __str__(self) -> str:
        if self.tool != "ours":
            return f"{self.tool}: {self.method}"
        extra = [f"{self.workers} workers"[: -1 if self.workers == 1 else None]]
        extra += ["stats and hashes"] * self.full + ["twice the layers"] * self.twice
        return f"ours: {self.method}, {', '.join(extra)}"


@dataclass(frozen=True)
class Sample:
    """What one run cost: CPU seconds, wall seconds, peak resident bytes."""

    cpu: float
    wall: float
    peak: float


Figures = Mapping[Case, Sample]


def inputs(family: Path, method: str) -> list[Path]:
    """The folders that a method reads: the experts, and but for linear the base."""
    experts = sorted(family.glob("expert-*"))
    return experts if method == "linear" else [family / "base", *experts]


def ours(family: Path, method: str) -> str:
    """Our recipe; JSON is YAML."""
    *base, a, b, c = inputs(family, method)
    models = {path.name: str(path) for path in (a, b, c)}
    recipe: dict[str, Any] = {"version": 1, "models": models, **OURS[method]}
    return json.dumps(recipe | ({"base": str(base[0])} if base else {}))


def theirs(family: Path, method: str) -> str:
    """mergekit's recipe for the same merge."""
    *base, a, b, c = inputs(family, method)
    each: dict[str, float] = {"weight": 1.0} | ({"density": 0.5} if base else {})
    models = [{"model": str(path), "parameters": each} for path in (a, b, c)]
    recipe: dict[str, Any] = {"models": models, "dtype": "bfloat16", **THEIRS[method]}
    return json.dumps(recipe | ({"base_model": str(base[0])} if base else {}))


def command(case: Case, family: Path, room: Path, mergekit: str | None) -> Command:
    """What to run, given the output folder; writes the recipe."""
    if case.tool.startswith("loops"):
        loop = [sys.executable, "-m", "tests.bench.loops"]
        folders = [str(folder) for folder in inputs(family, case.method)]
        return lambda out: [*loop, str(out), *folders, *["--reuse"] * ("reused" in case.tool)]
    recipe = room / f"{case.tool}-{case.method}{'-twice' * case.twice}.yaml"
    if case.tool == "mergekit":
        recipe.write_text(theirs(family, case.method))
        quiet = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
        return lambda out: [str(mergekit), str(recipe), str(out), *quiet]
    recipe.write_text(ours(family, case.method))
    merge = [sys.executable, "-m", "mowmerge", "merge", str(recipe)]
    options = ["--workers", str(case.workers), "--quiet"]
    options += [] if case.full else ["--no-stats", "--no-hash"]
    return lambda out: [*merge, str(out), *options]


def surroundings() -> dict[str, str]:
    """The environment of every case: modules are compiled once, as those of an installed tool are,
    whatever is asked of the interpreter here."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"HF_HUB_OFFLINE": "1"}


def measure(argv: Sequence[str], log: Path) -> Sample:
    """One child process from start to end."""
    with open(log, "wb") as talk:
        began = time.perf_counter()
        child = subprocess.Popen(argv, stdout=talk, stderr=talk, env=surroundings())
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(argv)}\nexited with {child.returncode}:\n{log.read_text()}")
    return Sample(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss * 1024)


def middle(samples: Iterable[Sample]) -> Sample:
    """The median of each figure."""
    cpu, wall, peak = zip(*((s.cpu, s.wall, s.peak) for s in samples), strict=True)
    return Sample(median(cpu), median(wall), median(peak))


def take_turns(commands: Mapping[Case, Command], room: Path, runs: int) -> Figures:
    """Runs A B C A B C ...; each output is removed before the next begins."""
    samples: dict[Case, list[Sample]] = {case: [] for case in commands}
    for turn in range(runs):
        for case, argv in commands.items():
            out = room / "out"
            os.sync()
            found = measure(argv(out), room / "log")
            shutil.rmtree(out)
            samples[case].append(found)
            cost = f"{found.cpu:.2f} CPU-s, {found.wall:.2f} s, {found.peak / MB:.0f} MB"
            print(f"[{turn + 1}/{runs}] {case}: {cost}", file=sys.stderr, flush=True)
    return {case: middle(found) for case, found in samples.items()}


def table(head: str, rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is aligned to the right."""
    rule = " | ".join(["---", *["---:"] * head.count("|")])
    lines = [head, rule, *map(" | ".join, rows)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def ratios(found: Figures) -> str:
    """Ours to the loops, and mergekit to ours."""

    def row(case: Case, us: Sample) -> list[str]:
        floor = found[Case("loops", "linear" if case.method == "linear" else "ties")]
        rival = found.get(Case("mergekit", case.method))
        cells = [f"{us.cpu / floor.cpu:.2f}", f"{us.wall / floor.wall:.2f}"]
        if rival is None:
            return [str(case), *cells, "", "", ""]
        cells += [f"{rival.cpu / us.cpu:.1f}", f"{rival.wall / us.wall:.1f}"]
        return [str(case), *cells, f"{rival.peak / us.peak:.1f}"]

    rows = [row(c, s) for c, s in found.items() if c.tool == "ours" and not c.twice]
    head = "case | CPU, ours / loops | wall, ours / loops | CPU, mergekit / ours"
    return table(f"{head} | wall, mergekit / ours | peak, mergekit / ours", rows)


def absolute(found: Figures) -> str:
    """Every case's medians."""
    rows = [
        [str(case), f"{s.cpu:.2f}", f"{s.wall:.2f}", f"{s.peak / MB:.0f}"]
        for case, s in found.items()
    ]
    return table("case | CPU, s | wall, s | peak, MB", rows)


def targets(found: Figures) -> Iterable[tuple[str, float, float, bool]]:
    """Each target that was measured: what, the figure, its limit, and whether more is better."""

    def ours(method: str, **more: Any) -> Sample | None:
        return found.get(Case("ours", method, **more))

    linear, floor = ours("linear"), found.get(Case("loops", "linear"))
    if linear and floor:
        yield "linear: CPU over plain loops", linear.cpu / floor.cpu, 1.6, False
        yield "linear: wall over plain loops", linear.wall / floor.wall, 1.6, False
    for method, least in LEAST.items():
        us, rival = ours(method), found.get(Case("mergekit", method))
        if us and rival:
            yield f"{method}: mergekit's CPU over ours", rival.cpu / us.cpu, least, True
    for method in OURS:
        us, full, twice = ours(method), ours(method, full=True), ours(method, twice=True)
        if us:
            yield f"{method}: peak, MB", us.peak / MB, 700, False
        if us and twice:
            yield f"{method}: peak, twice the layers over once", twice.peak / us.peak, 1.1, False
        if us and full:
            yield f"{method}: CPU, stats and hashes over none", full.cpu / us.cpu, 2.5, False
    ties, whole = ours("ties"), ours("ties-global")
    if ties and whole:
        yield "ties: CPU, global trim over per tensor", whole.cpu / ties.cpu, 2.5, False


def startup(room: Path) -> Iterable[tuple[str, float, float, bool]]:
    """The time of --help, and how many of the commands that need no torch load it."""
    recipe = str(next(room.glob("ours-*.yaml")))
    helps = [measure([sys.executable, "-m", "mowmerge", "--help"], room / "log") for _ in range(5)]
    yield "--help: wall, s", median(h.wall for h in helps), 0.4, False
    loading = 0
    for words in (["--help"], ["check", recipe], ["methods"]):
        measure([sys.executable, "-X", "importtime", "-m", "mowmerge", *words], room / "log")
        loading += bool(re.search(r"\| +torch$", (room / "log").read_text(), re.MULTILINE))
    yield "--help, check, methods: how many load torch", loading, 0, False


def verdict(found: Iterable[tuple[str, float, float, bool]]) -> str:
    """Which targets hold."""
    rows = [
        [what, f"{value:.2f}", f"{'at least' if more else 'at most'} {limit}",
         "yes" if (value >= limit if more else value <= limit) else "no"]
        for what, value, limit, more in found
    ]  # fmt: skip
    return table("target | measured | wanted | holds", rows)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Measure merges; print ratios.")
    parser.add_argument("family", type=Path)
    parser.add_argument("--twice", type=Path, help="a family with twice the layers: its peak")
    parser.add_argument("--mergekit", help="mergekit-yaml of an environment that has it")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default=",".join(OURS), help="methods, comma-separated")
    asked = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    methods = asked.only.split(",")
    if unknown := set(methods) - set(OURS):
        parser.error(f"--only knows {', '.join(OURS)}, not {', '.join(sorted(unknown))}")
    cases = [Case(t, m) for m in ("linear", "ties") for t in ("loops", "loops, reused")]
    for method in methods:
        cases += [Case("ours", method, w, full) for full in (False, True) for w in (2, 1)]
        cases += [Case("mergekit", method)] * bool(asked.mergekit and method in THEIRS)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=asked.family.resolve().parent) as made:
        room, family = Path(made), asked.family.resolve()
        commands = {case: command(case, family, room, asked.mergekit) for case in cases}
        take_turns({c: commands[c] for c in cases[2:3]}, room, 1)  # inputs into the page cache
        found = dict(take_turns(commands, room, asked.runs))
        if asked.twice:  # last: it crowds the first family out of the page cache
            again = [Case("ours", method, twice=True) for method in methods]
            large = {c: command(c, asked.twice.resolve(), room, None) for c in again}
            found |= take_turns(large, room, 1)
        size = sum(p.stat().st_size for p in (family / "base").glob("*.safetensors"))
        print(f"Four models of {size / 1e9:.2f} GB, two cores, medians of {asked.runs} runs.\n")
        print(ratios(found))
        print(absolute(found))
        print(verdict([*targets(found), *startup(room)]))


if __name__ == "__main__":
    main()
