"""Measures what a dynamic method's layout depends on: a streamed pass before the plan is final."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from mowmerge import __version__
from mowmerge.checkpoint import identity
from mowmerge.engine import Engine
from mowmerge.errors import RecipeError
from mowmerge.methods import registry
from mowmerge.plan import Plan
from mowmerge.ranks import Ranks
from mowmerge.recipe.model import Recipe
from mowmerge.upcycle import sites_of


def survey(recipe: Recipe, plan: Plan, ranks: Ranks) -> Mapping[str, Any] | None:
    """What the recipe's method decides from the weights; None where it needs no survey.

    Kept in the user's cache by a digest of the plan and of every input file's size and time. A
    cache that cannot be read or written is done without. Ranks measure a share of the tensors each.
    """
    dynamic = registry.get(recipe.method).dynamic
    if dynamic is None or dynamic.survey is None:
        return None
    file = identity.cache("surveys") / f"{_key(plan)}.json"
    known = ranks.from_first(lambda: identity.known(file))
    if known is not None:
        return known
    sites = sites_of(recipe, plan)
    folds = {site.name: dynamic.survey.measure(site) for site in sites}
    jobs = [job for job in plan.jobs if job.code and folds.get(job.output.name) is not None]
    totals = Engine(plan, ranks=ranks).measure([(job, folds[job.output.name]) for job in jobs])
    given = {tuple(job.parameters.items()): job.parameters for job in jobs}
    decided, *others = [dynamic.survey.decide(totals, sites, p) for p in given.values()] or [{}]
    if any(other != decided for other in others):
        raise RecipeError(
            f"'{recipe.method}' chooses once for the whole model, and rules change what it goes by",
            where=recipe.where("rules"),
            hint="give those parameters the same value for all tensors",
        )
    if ranks.first:
        identity.keep(file, decided)
    return decided


def _key(plan: Plan) -> str:
    """A digest of the plan, and of the files it reads as they are now."""
    files = sorted({file for _, stored in plan.checkpoints for file in stored.files})
    seen = [__version__, plan.fingerprint, *(f"{file} {identity.of(file)}" for file in files)]
    return hashlib.sha256("\n".join(seen).encode()).hexdigest()[:32]
