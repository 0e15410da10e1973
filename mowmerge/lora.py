"""Adapters as output: of a checkpoint (`extract-lora`), of a merge (`output: {format: adapter}`).

A merge that adds up low-rank deltas stays one without its dense form: the factors are joined.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mowmerge import __version__
from mowmerge.checkpoint import lowrank, source, writer
from mowmerge.checkpoint.adapter import AdaptedReader
from mowmerge.checkpoint.lowrank import Factors
from mowmerge.checkpoint.reader import StoredReader
from mowmerge.checkpoint.writer import Staging
from mowmerge.difference import Cut, Difference, shown, write
from mowmerge.engine import Engine, MergedReader, one_thread_each
from mowmerge.methods import registry
from mowmerge.plan import Adapted, Input, Plan, TensorJob, config_source
from mowmerge.recipe.model import Recipe
from mowmerge.tensors import Tensor, torch

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
    allow_pickle: bool = False,
    hashes: bool = True,
    force: bool = False,
    begin: Callable[[int], Callable[[int], None]] = lambda total: lambda nbytes: None,
) -> tuple[Path, dict[str, Any]]:
    """Writes what a model adds to its base as an adapter into `out`; its path and report.

    Each matrix is cut to `rank` (64 where nothing is said), or to the least rank that keeps
    `energy`, a share of its squared norm. `begin` is given the bytes of the matrices and returns
    what is told of those done. A worker holds a matrix and its decomposition, about six times its
    size in fp32.

    Raises:
        ValueError: both a rank and an energy.
        CheckpointError: the two do not fit, are the same, or one cannot be read.
        ResourceError: `out` cannot be written.
    """
    if rank is not None and energy is not None:
        raise ValueError("give a rank or an energy, and not both")
    began, cut = time.perf_counter(), Cut(RANK if rank is energy is None else rank, energy)
    ours, theirs = (source.find(where, allow_pickle=allow_pickle) for where in (model, base))
    difference = Difference(StoredReader(ours), StoredReader(theirs), theirs)
    keep = [Path(stored.folder) for stored in (ours, theirs)]
    about = {"from": shown(ours), "base": shown(theirs), "cut": vars(cut)}
    workers = workers or min(8, os.cpu_count() or 1)
    with Staging(out, force=force, keep=keep) as staging, one_thread_each():
        told = write(
            difference,
            staging.path,
            cut,
            workers or min(8, os.cpu_count() or 1),
            begin(difference.nbytes),
        )
        return _finish(staging, {**about, **told}, began, hashes)


def merge(
    recipe: Recipe,
    plan: Plan,
    out: Path,
    *,
    hashes: bool = True,
    force: bool = False,
    begin: Callable[[Plan], Callable[[int], None]],
) -> tuple[Path, dict[str, Any]]:
    """Writes a recipe's merge as an adapter of its base into `out`; its path and report."""
    began = time.perf_counter()
    engine = Engine(plan)
    asked = recipe.output
    cut = Cut(asked.rank, asked.energy)
    if asked.rank is None and asked.energy is None:
        cut = Cut(energy=ENERGY)
    sums = Sums(engine, Cut(asked.rank, asked.energy))
    difference = Difference(
        MergedReader(engine), engine.readers["base"], config_source(plan.sources["base"]),
        sums.joined, sums.same,
    )  # fmt: skip
    keep = [Path(stored.folder) for _, stored in plan.checkpoints]
    about = {
        "recipe": recipe.name, "method": recipe.method, "base": shown(difference.origin),
        "cut": vars(cut), "warnings": list(plan.warnings),
    }  # fmt: skip
    with Staging(out, force=force, keep=keep) as staging, one_thread_each():
        told = write(difference, staging.path, cut, plan.workers, begin(plan))
        (staging.path / "recipe.yaml").write_text(recipe.text, "utf-8")
        return _finish(staging, {**about, **told}, began, hashes)


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


@dataclass(frozen=True)
class Sums:
    """A merge's updates where they are sums of its adapters', c_k B_k A_k for each tensor, or
    products that its method makes of them."""

    engine: Engine
    cut: Cut

    def joined(self, name: str) -> Factors | None:
        """The factors of the merged update; None where the method is not linear for this tensor,
        or a model is not the base with low-rank updates on it."""
        job = self._job(name)
        if job is not None and job.matrix:
            return self._product(job)
        shares = _shares(job) if job else None
        if job is None or shares is None:
            return None
        pairs = []
        for given, share in zip(job.models, shares, strict=True):
            updates = self._updates(given)
            if updates is None:
                return None
            pairs += [(share, b, a) for b, a in updates if share]
        return lowrank.joined(pairs, self.cut.rank, self.cut.energy) if pairs else None

    def _product(self, job: TensorJob) -> Factors | None:
        """What a method on matrices makes of products, where it keeps them so."""
        with self.engine.open(job) as opened:
            if opened.factors is None:
                return None
            self.engine.settle(opened)
            found = opened.product()
        if found is None:
            return None
        b, a = (part.float().cpu() for part in found)
        readers = [(self.engine.readers[i.model], i.spec.name) for i in job.models]
        if any(isinstance(r, AdaptedReader) and r.across(name) for r, name in readers):
            b, a = a.T, b.T
        cut = self.cut if len(a) else Cut()
        return lowrank.joined([(1.0, b, a)], cut.rank, cut.energy)

    def same(self, name: str) -> bool:
        """Whether no model changes the tensor, so that the merge does not either."""
        job = self._job(name)
        if job is None:
            return False
        kept = job.method is None or _keeps(job)
        return kept and all(self._updates(given) == [] for given in job.models)

    def _job(self, name: str) -> TensorJob | None:
        return next((j for j in self.engine.plan.jobs if j.output.name == name), None)

    def _updates(self, given: Input) -> list[tuple[Tensor, Tensor]] | None:
        """What a model adds to the base's tensor; None where that is not known as products."""
        sources, reader = self.engine.plan.sources, self.engine.readers[given.model]
        origin = sources[given.model]
        if origin == sources["base"]:
            return []
        if not isinstance(reader, AdaptedReader) or not isinstance(origin, Adapted):
            return None
        return reader.updates(given.spec.name) if origin.model == sources["base"] else None


def _keeps(job: TensorJob) -> bool:
    """Whether the method gives the base where every model is the base."""
    spec = registry.get(str(job.method))
    return spec.values == "deltas" or spec.holds("idempotent", job.parameters)


def _shares(job: TensorJob) -> list[float] | None:
    """The c_k of a method that is sum_k c_k D_k, found and checked on unit and random deltas."""
    if job.method is None or job.scope != "element":
        return None
    spec, n = registry.get(job.method), len(job.models)
    if spec.inputs & {"rng", "base"}:
        return None
    draws = torch.Generator().manual_seed(0)
    probes = torch.cat([torch.eye(n), torch.randn(n, 64, generator=draws)], dim=1)
    result = spec.function(probes, **job.parameters)
    shares = result[:n]
    if not torch.allclose(result, shares @ probes, rtol=1e-4, atol=1e-5):
        return None
    exact = spec.function(torch.eye(n, dtype=torch.float64), **job.parameters).tolist()
    whole = spec.values == "deltas" or abs(sum(exact) - 1) < 1e-9
    return [float(share) for share in exact] if whole else None
