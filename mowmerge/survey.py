"""Measures what a dynamic method's layout depends on: a streamed pass before the plan is final."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mowmerge import __version__
from mowmerge.engine import Engine
from mowmerge.errors import RecipeError
from mowmerge.methods import registry
from mowmerge.plan import Plan
from mowmerge.recipe.model import Recipe
from mowmerge.upcycle import sites_of


def survey(recipe: Recipe, plan: Plan) -> Mapping[str, Any] | None:
    """What the recipe's method decides from the weights; None where it needs no survey.

    Kept in the user's cache by a digest of the plan and of every input file's size and time. A
    cache that cannot be read or written is done without.
    """
    dynamic = registry.get(recipe.method).dynamic
    if dynamic is None or dynamic.survey is None:
        return None
    file = _cache() / f"{_key(plan)}.json"
    known = _known(file)
    if known is not None:
        return known
    sites = sites_of(recipe, plan)
    folds = {site.name: dynamic.survey.measure(site) for site in sites}
    jobs = [job for job in plan.jobs if job.code and folds.get(job.output.name) is not None]
    totals = Engine(plan).measure([(job, folds[job.output.name]) for job in jobs])
    given = {tuple(job.parameters.items()): job.parameters for job in jobs}
    decided, *others = [dynamic.survey.decide(totals, sites, p) for p in given.values()] or [{}]
    if any(other != decided for other in others):
        raise RecipeError(
            f"'{recipe.method}' chooses once for the whole model, and rules change what it goes by",
            where=recipe.where("rules"),
            hint="give those parameters the same value for all tensors",
        )
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        staged = file.with_suffix(f".{os.getpid()}")
        staged.write_text(json.dumps(decided), "utf-8")
        staged.replace(file)
    return decided


def _known(file: Path) -> Mapping[str, Any] | None:
    """What an earlier survey of the same plan and files decided."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "mowmerge" / "surveys"


def _key(plan: Plan) -> str:
    """A digest of the plan, and of the files it reads as they are now."""
    seen = [__version__, plan.fingerprint]
    for _, stored in plan.checkpoints:
        for file in sorted({p.file for p in stored.tensors.values()}):
            facts = os.stat(file)
            seen.append(f"{file} {facts.st_size} {facts.st_mtime_ns} {facts.st_ino}")
    return hashlib.sha256("\n".join(seen).encode()).hexdigest()[:32]
