"""Adapters as output: of a checkpoint (`extract-lora`), of a merge (`output: {format: adapter}`).

A merge that adds up low-rank deltas stays one without its dense form: the factors are joined.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mowmerge import __version__, lock, replay
from mowmerge.checkpoint import source, writer
from mowmerge.checkpoint.peft import WEIGHTS
from mowmerge.checkpoint.reader import StoredReader
from mowmerge.checkpoint.writer import Staging
from mowmerge.difference import Difference, shown
from mowmerge.engine import Engine, MergedReader, one_thread_each
from mowmerge.known import Cut
from mowmerge.memory import working_bytes
from mowmerge.outline import Outline, outline
from mowmerge.plan import Plan, config_source
from mowmerge.recipe import parse
from mowmerge.recipe.model import Digest, Recipe
from mowmerge.sums import Sums
from mowmerge.updates import length, write

RANK = 64  # of an extraction that names neither rank nor energy
ENERGY = 0.99  # kept of a merge that is no sum of low-rank updates, where the recipe names none


def extract(
    model: str,
    base: str,
    out: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    workers: int | None = None,
    max_memory: int | None = None,
    allow_pickle: bool = False,
    hashes: bool = True,
    force: bool = False,
    begin: Callable[[int], Callable[[int], None]] = lambda total: lambda nbytes: None,
) -> tuple[Path, dict[str, Any]]:
    """Writes what a model adds to its base as an adapter into `out`; its path and report.

    Each matrix is cut to `rank` (64 where nothing is said), or to the least rank that keeps
    `energy`, a share of its squared norm. `begin` is given the bytes of the matrices and returns
    what is told of those done. A worker holds a matrix and its decomposition, up to eight times its
    size in fp32; `max_memory` bytes make for fewer workers.

    Raises:
        ValueError: both a rank and an energy.
        CheckpointError: the two do not fit, are the same, or one cannot be read.
        ResourceError: `out` cannot be written, or one matrix takes more than `max_memory`.
    """
    if rank is not None and energy is not None:
        raise ValueError("give a rank or an energy, and not both")
    began, cut = time.perf_counter(), Cut(RANK if rank is energy is None else rank, energy)
    ours, theirs = (source.find(where, allow_pickle=allow_pickle) for where in (model, base))
    difference = Difference(StoredReader(ours), StoredReader(theirs), theirs)
    planned = outline(
        difference, cut, workers or min(8, os.cpu_count() or 1), max_memory, lambda name: 0
    )
    keep = [Path(stored.folder) for stored in (ours, theirs)]
    about = {
        "from": shown(ours), "base": shown(theirs), "cut": vars(cut), "workers": planned.workers,
        "peak_bytes": planned.peak_bytes,
    }  # fmt: skip
    with Staging(out, force=force, keep=keep) as staging, one_thread_each():
        advance = begin(difference.nbytes)
        told = write(difference, staging.path, cut, planned.workers, advance)
        return _finish(staging, {**about, **told}, began, hashes)


@dataclass(frozen=True)
class Merge:
    """A recipe's merge as an adapter of its base: what merges, its difference, how far that is cut,
    and what will be written."""

    plan: Plan
    engine: Engine
    difference: Difference
    cut: Cut
    outline: Outline

    @property
    def read_bytes(self) -> int:
        """Bytes to read: of factors that are joined, and of models that are decomposed; the most
        where that is to be found out."""
        jobs = {job.output.name: job for job in self.plan.jobs}
        left = set(jobs) - {u.name for u in self.outline.updates if u.joined}
        left -= {name for name in left if self.difference.known.same(name)}
        dense = sum(jobs[n].read_bytes + self.difference.base.specs[n].nbytes for n in left)
        return dense + sum(update.joined for update in self.outline.updates)


def plan(recipe: Recipe, planned: Plan, limit: int | None = None) -> Merge:
    """What a merge whose output is an adapter will write, from headers alone.

    Raises:
        ResourceError: one matrix takes more than `limit` bytes.
    """
    engine, asked = Engine(planned), recipe.output
    wanted = Cut(asked.rank, asked.energy)
    cut = Cut(energy=ENERGY) if wanted == Cut() else wanted
    difference = Difference(
        MergedReader(engine), engine.readers["base"], config_source(planned.sources["base"]),
        Sums(engine, wanted),
    )  # fmt: skip
    jobs = {job.output.name: job for job in planned.jobs}

    def reading(name: str) -> int:
        return working_bytes(jobs[name], planned.block) if name in jobs else 0

    outlined = outline(difference, cut, planned.workers, limit, reading)
    if any(job.group is not None for job in planned.jobs):  # a pass over the whole model
        peak = max(outlined.peak_bytes, planned.peak_bytes)
        outlined = replace(outlined, peak_bytes=peak)
    return Merge(planned, engine, difference, cut, outlined)


def merge(
    recipe: Recipe,
    asked: Merge,
    out: Path,
    *,
    hashes: bool = True,
    force: bool = False,
    resume: bool = False,
    locked: bool = False,
    begin: Callable[[Plan], Callable[[int], None]],
) -> tuple[Path, dict[str, Any]]:
    """Writes a recipe's merge as an adapter of its base into `out`; its path and report. With
    `resume` the work of one that was cut off is taken up.

    Raises:
        CheckpointError: an input that changes meanwhile, or is not what `locked` asks for.
    """
    began, difference = time.perf_counter(), asked.difference
    again = replay.begin(recipe, asked.plan, hashed=hashes, strict=locked)
    key = lock.key(recipe, asked.plan)
    key["layout"] += f" {asked.cut}"
    drift = again.drift if again else ()
    keep = [Path(stored.folder) for _, stored in asked.plan.checkpoints]
    about = {
        "recipe": recipe.name, "method": recipe.method, "base": shown(difference.origin),
        "cut": vars(asked.cut), "workers": asked.outline.workers,
        "peak_bytes": asked.outline.peak_bytes, "warnings": [*asked.plan.warnings, *drift],
    }  # fmt: skip
    staging = Staging(out, force=force, keep=keep, key=key, resume=resume)
    with staging, one_thread_each():
        journal, workers = staging.journal, asked.outline.workers
        staging.begin(WEIGHTS, length(difference, journal.done))
        advance = begin(asked.plan)
        asked.engine.prepare(journal)
        told = write(difference, staging.path, asked.cut, workers, advance, journal)
        lock.unchanged(key, asked.plan)
        written = journal.finish(lambda: _seal(recipe, asked.plan, staging, hashes))
        if again:
            told["replay"] = again.outcome(asked.plan, staging.path, written)
        return _finish(staging, {**about, **told}, began, hashes)


def _seal(recipe: Recipe, planned: Plan, staging: Staging, hashes: bool) -> dict[str, Digest]:
    """Writes recipe and lock; what the weight file is."""
    folder, read = staging.path, lock.inputs(planned, hashed=hashes)
    file = folder / WEIGHTS
    sha256 = writer.sha256(file) if hashes else None
    written = {WEIGHTS: Digest(bytes=file.stat().st_size, sha256=sha256)}
    try:
        (folder / "recipe.yaml").write_text(recipe.text, "utf-8")
        text = lock.text(recipe, planned, folder, staging.out, read, written)
        (folder / parse.LOCK).write_text(text, "utf-8")
    except OSError as error:
        raise writer.denied(error, folder) from error
    return written


def _finish(
    staging: Staging, told: dict[str, Any], began: float, hashes: bool
) -> tuple[Path, dict[str, Any]]:
    """Writes report, card and sums, and puts the folder in place."""
    seconds = round(time.perf_counter() - began, 3)
    report = {"version": 1, "mowmerge": __version__, "seconds": seconds, **told}
    try:
        (staging.path / "report.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        (staging.path / "README.md").write_text(_card(report), "utf-8")
        if hashes:
            lines = "\n".join(writer.sums(staging.path)) + "\n"
            (staging.path / "SHA256SUMS").write_text(lines, "utf-8")
    except OSError as error:
        raise writer.denied(error, staging.path) from error
    staging.commit()
    return staging.out, report


def _card(report: Mapping[str, Any]) -> str:
    """The README.md: what this is and how exact."""
    what = f"the merge `{report['recipe']}`" if "recipe" in report else f"`{report['from']}`"
    lost = f" {len(report['lost'])} tensor(s) could not go into it." if report["lost"] else ""
    return "\n".join([
        "---", "library_name: peft", "tags:", "- lora", "- mowmerge", "---", "",
        f"A LoRA adapter made with mowmerge: what {what} adds to `{report['base']}`. It keeps"
        f" {report['kept_energy']:.4%} of the squared norm of that.{lost} Each tensor's share is in"
        " report.json.", "",
    ])  # fmt: skip
