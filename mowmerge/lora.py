"""Adapters as output: of a checkpoint (`extract-lora`), of a merge (`output: {format: adapter}`).

A merge that adds up low-rank deltas stays one without its dense form: the factors are joined.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mowmerge import __version__, lock, replay
from mowmerge.checkpoint import identity, source, writer
from mowmerge.checkpoint.journal import changed
from mowmerge.checkpoint.peft import CONFIG, WEIGHTS
from mowmerge.checkpoint.reader import StoredReader
from mowmerge.checkpoint.writer import Staging
from mowmerge.difference import Difference, shown
from mowmerge.engine import Engine, MergedReader, one_thread_each
from mowmerge.errors import refused
from mowmerge.known import Cut
from mowmerge.memory import working_bytes
from mowmerge.outline import Outline, outline
from mowmerge.plan import Plan, Stored, config_source
from mowmerge.ranks import Ranks
from mowmerge.recipe import parse
from mowmerge.recipe.model import Digest, Recipe
from mowmerge.sums import Sums
from mowmerge.tensors import torch
from mowmerge.updates import lengths, write

Advance = Callable[[int], None]
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
    resume: bool = False,
    begin: Callable[[int], Advance] = lambda total: lambda nbytes: None,
    ranks: Ranks | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Writes what a model adds to its base as an adapter into `out`; its path and report.

    Each matrix is cut to `rank` (64 where nothing is said), or to the least rank that keeps
    `energy`, a share of its squared norm. `begin` is given the bytes of the matrices and returns
    what is told of those done. A worker holds a matrix and its decomposition, up to eight times its
    size in fp32; `max_memory` bytes make for fewer workers. With `resume` the work of one that was
    cut off is taken up. Several ranks share the matrices.

    Raises:
        ValueError: both a rank and an energy.
        CheckpointError: the two do not fit, are the same, one cannot be read, or changes meanwhile.
        ResourceError: `out` cannot be written, or one matrix takes more than `max_memory`; what was
            cut off was something else.
    """
    if rank is not None and energy is not None:
        raise ValueError("give a rank or an energy, and not both")
    began, cut = time.perf_counter(), Cut(RANK if rank is energy is None else rank, energy)

    def looked() -> tuple[Stored, Difference, Outline]:
        ours, theirs = (source.find(where, allow_pickle=allow_pickle) for where in (model, base))
        difference = Difference(StoredReader(ours), StoredReader(theirs), theirs)
        count = workers or min(8, os.cpu_count() or 1)
        return ours, difference, outline(difference, cut, count, max_memory, lambda name: 0)

    ranks = ranks or Ranks()
    ours, difference, planned = ranks.together(looked)
    theirs, seen = difference.origin, partial(_seen, ours, difference.origin)
    key: dict[str, Any] = {
        "journal": 1, "mowmerge": __version__, "torch": str(torch.__version__),
        "model": shown(ours), "base": shown(theirs), "revision": theirs.revision, **vars(cut),
        "layout": hashlib.sha256(planned.file.header).hexdigest()[:16], "inputs": seen(),
    }  # fmt: skip
    about = {
        "from": shown(ours), "base": shown(theirs), "cut": vars(cut), "workers": planned.workers,
        "peak_bytes": planned.peak_bytes,
    }  # fmt: skip
    keep = [Path(stored.folder) for stored in (ours, theirs)]
    with _staged(out, key, keep, force=force, resume=resume, ranks=ranks) as staging:
        advance = begin(difference.nbytes)
        config, told = write(difference, staging, cut, planned.workers, advance)
        staging.ranks.together(lambda: lock.unchanged(key["inputs"], seen()))

        def finish() -> dict[str, Any]:
            return _finished(staging, config, {**about, **told}, began, hashes)

        return staging.out, staging.ranks.from_first(finish)


def _seen(ours: Stored, theirs: Stored) -> lock.Seen:
    """Size, time and inode of the files of a model and its base."""
    config = Path(theirs.folder) / "config.json"
    base = [*theirs.files, *([str(config)] if config.is_file() else [])]
    files = {"model": ours.files, "base": base}
    return {name: {Path(f).name: identity.of(f) for f in each} for name, each in files.items()}


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
    begin: Callable[[Plan], Advance],
    ranks: Ranks,
) -> tuple[Path, dict[str, Any]]:
    """Writes a recipe's merge as an adapter of its base into `out`; its path and report. With
    `resume` the work of one that was cut off is taken up. Several ranks share the matrices.

    Raises:
        CheckpointError: an input that changes meanwhile, or is not what `locked` asks for.
    """
    began, difference, planned = time.perf_counter(), asked.difference, asked.plan

    def replaying() -> replay.Replay | None:
        return replay.begin(recipe, planned, hashed=hashes, strict=locked)

    again = ranks.together(lambda: replaying() if ranks.first else None)
    key = lock.key(recipe, planned)
    key["layout"] += f" {asked.cut}"
    drift = again.drift if again else ()
    keep = [Path(stored.folder) for _, stored in planned.checkpoints]
    about = {
        "recipe": recipe.name, "method": recipe.method, "base": shown(difference.origin),
        "cut": vars(asked.cut), "workers": asked.outline.workers,
        "peak_bytes": asked.outline.peak_bytes, "warnings": [*planned.warnings, *drift],
    }  # fmt: skip
    with _staged(out, key, keep, force=force, resume=resume, ranks=ranks) as staging:
        asked.engine.ranks = staging.ranks
        advance = begin(planned)
        asked.engine.prepare(staging.journal)
        config, told = write(difference, staging, asked.cut, asked.outline.workers, advance)
        staging.ranks.together(lambda: lock.unchanged(key["inputs"], lock.seen(planned)))

        def finish() -> dict[str, Any]:
            with refused(staging.path):
                written = _seal(recipe, planned, staging, hashes)
            if again:
                told["replay"] = again.outcome(planned, staging.path, written)
            return _finished(staging, config, {**about, **told}, began, hashes)

        return staging.out, staging.ranks.from_first(finish)


@contextmanager
def _staged(
    out: Path, key: Mapping[str, Any], keep: Sequence[Path], *, force: bool, resume: bool,
    ranks: Ranks,
) -> Iterator[Staging]:  # fmt: skip
    """The stage of an adapter with the journal begun; all ranks must be about to make the same."""
    ranks.alike(lambda: {part: key[part] for part in key if part != "inputs"}, changed)
    staging = Staging(out, force=force, keep=keep, key=key, resume=resume, ranks=ranks)
    with staging, one_thread_each():
        staging.wait(lengths(staging.journal.done))
        yield staging


def _seal(recipe: Recipe, planned: Plan, staging: Staging, hashes: bool) -> dict[str, Digest]:
    """Writes recipe and lock; what the weight file is."""
    folder, read = staging.path, lock.inputs(planned, hashed=hashes)
    file = folder / WEIGHTS
    sha256 = writer.sha256(file) if hashes else None
    written = {WEIGHTS: Digest(bytes=file.stat().st_size, sha256=sha256)}
    (folder / "recipe.yaml").write_text(recipe.text, "utf-8")
    text = lock.text(recipe, planned, folder, staging.out, read, written)
    (folder / parse.LOCK).write_text(text, "utf-8")
    return written


def _finished(
    staging: Staging, config: Mapping[str, Any], told: Mapping[str, Any], began: float, hashes: bool
) -> dict[str, Any]:
    """Writes report, card, config and sums, and puts the folder in place; the report."""
    seconds, folder = round(time.perf_counter() - began, 3), staging.path
    report = {"version": 1, "mowmerge": __version__, "seconds": seconds, **told}
    with refused(folder):
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        (folder / "README.md").write_text(_card(report), "utf-8")
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        if hashes:
            (folder / "SHA256SUMS").write_text("\n".join(writer.sums(folder)) + "\n", "utf-8")
    staging.commit()
    return report


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
