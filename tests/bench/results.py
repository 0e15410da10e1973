"""Merges the demo's zoo by every method, trains what is to be trained, and prints one table.

    python -m tests.bench.results ZOO [--seeds 3] [--only mow,wemoe]

ZOO is what `mowmerge demo ZOO` builds. Fits and routers are repeated for each seed; a row has the
mean over seeds and, behind it, half the distance between the best and the worst. Nothing is chosen
on the test split: every parameter stands below.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import fsum
from pathlib import Path

import torch

from mowmerge import api
from mowmerge.evals.score import Score
from mowmerge.training.settings import Options


@dataclass(frozen=True)
class Case:
    """A row: a method, its parameters, the rest of a dynamic one, and what depends on the seed."""

    name: str
    method: str
    parameters: str = ""
    rest: str = ""
    seeded: bool = False
    training: tuple[Options, ...] = ()


SUM = (
    "{method: task_arithmetic, parameters: {scale: 0.05}}"  # the demo's scale, of its select split
)
FIT = "weight: 0.05, balance: true, steps: 150"  # docs/learned.md says why
ENTROPY, SCALES = Options(objective="entropy"), Options(objective="distill")
CASES = (
    Case("linear", "linear"),
    Case("task_arithmetic", "task_arithmetic", "scale: 0.05"),
    Case("ties", "ties", "density: 0.2, scale: 0.2"),
    Case("adamerging", "adamerging", FIT, seeded=True),
    Case("adamerging_pp", "adamerging_pp", FIT, seeded=True),
    Case("mow, 0 blocks", "mow", "blocks: 0", SUM, True, (Options(),)),
    Case("mow, 2 blocks", "mow", "blocks: 2", SUM, True, (Options(),)),
    Case("mow, all", "mow", "blocks: 4, norms: all, embeddings: all", SUM, True, (Options(),)),
    Case("wemoe", "wemoe", "scale: 0.05", "", True, (Options(),)),
    Case("wemoe, entropy", "wemoe", "scale: 0.05", "", True, (ENTROPY,)),
    Case("e_wemoe, 90 % pruned", "e_wemoe", "density: 0.1, scale: 0.05", "", True, (Options(),)),
    Case("twin_merging, rank 25 %", "twin_merging", "density: 0.25", SUM, True, (Options(),)),
    Case("one_bit", "one_bit", "", "", True, (Options(),)),
    Case("one_bit, scales distilled", "one_bit", "", "", True, (Options(), SCALES)),
    Case("smile", "smile", "rank: 16"),
    Case("smile, wide gate", "smile", "rank: 16, gate_rank: 40, top_k: 2"),
    Case("emr", "emr", "router: deep", "", True, (Options(),)),
    Case("tall_mask", "tall_mask", "router: deep", "", True, (Options(),)),
)


def recipe(zoo: Path, case: Case, seed: int) -> str:
    """The demo's recipe with another method; JSON paths stay relative to the zoo."""
    text = (zoo / "linear.yaml").read_text("utf-8")
    own = [case.parameters] * bool(case.parameters) + [f"seed: {seed}"] * case.seeded
    text = re.sub("(?m)^method: .*$", f"method: {case.method}", text)
    rest = f"\nrest: {case.rest}" if case.rest else ""
    return re.sub("(?m)^parameters: .*$", f"parameters: {{{', '.join(own)}}}{rest}", text)


def score(zoo: Path, case: Case, seed: int) -> tuple[list[Score], float]:
    """The scores of one run, and what its weights take as a multiple of the base's."""
    stem = re.sub(r"\W+", "_", case.name) + f"_{seed}"
    file, out = zoo / f"results_{stem}.yaml", zoo / "results" / stem
    file.write_text(recipe(zoo, case, seed), "utf-8")
    api.merge(file, out, force=True)
    for training in case.training:
        api.train_router(out, file, replace(training, seed=seed))
    found = api.evaluate({case.name: out}, file, against=())
    return list(found.scores), _weights(out) / _weights(zoo / "base")


def _weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def rows(found: Sequence[Sequence[Score]], experts: dict[str, float]) -> Iterator[list[str]]:
    """A row for each way of running the model: tasks, mean, mean of score over expert's."""
    for name in dict.fromkeys(s.row for run in found for s in run):
        runs = [{s.task: s.value for s in run if s.row == name} for run in found]
        tasks = [fsum(run[t] for run in runs) / len(runs) for t in runs[0]]
        means = [fsum(run.values()) / len(run) for run in runs]
        shares = [fsum(v / experts[t] for t, v in run.items()) / len(run) for run in runs]
        cells = [f"{value:.3f}" for value in tasks]
        yield [name, *cells, _spread(means), _spread(shares)]


def _spread(values: Sequence[float]) -> str:
    middle = f"{fsum(values) / len(values):.3f}"
    return middle if len(values) == 1 else f"{middle} ± {(max(values) - min(values)) / 2:.3f}"


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description="One table of every method on the demo's zoo.")
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="methods, comma-separated")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    reference = api.evaluate({}, asked.zoo / "linear.yaml", against=["base", "experts"]).scores
    experts = {s.task: s.value for s in reference if s.model == "expert"}
    names = [*experts, "mean", "normalised", "size"]
    print("| " + " | ".join(["model", *names]) + " |")
    print("|---" + "|---:" * len(names) + "|")

    def show(row: list[str], size: str) -> None:
        print("| " + " | ".join([*row, size]) + " |", flush=True)

    for row in rows([reference], experts):
        show(row, "1")
    only = set(asked.only.split(",")) - {""}
    for case in CASES:
        if only and case.method not in only:
            continue
        runs = [score(asked.zoo, case, s) for s in range(asked.seeds * case.seeded or 1)]
        print(f"{case.name}: done", file=sys.stderr, flush=True)
        for row in rows([found for found, _ in runs], experts):
            show(row, f"{runs[0][1]:.2f}")


if __name__ == "__main__":
    main()
