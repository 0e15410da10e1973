"""What a merge costs beside reading and writing, and what in it is rarely meant, from its jobs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mowmerge.checkpoint import adapter
from mowmerge.errors import Problem
from mowmerge.methods import registry
from mowmerge.plan import Algebra, Input, Source, TensorJob
from mowmerge.recipe.model import Loc, Recipe
from mowmerge.recipe.text import dotted

HOURS = 10**15  # floating-point operations from which on a processor takes hours
RANKS = ("rank", "gate_rank")  # parameters that are ranks of matrices


def algebra(jobs: Sequence[TensorJob]) -> Algebra | None:
    """What the methods on matrices decompose; None where there are none.

    A thin SVD of [m,k] is counted as 6 l s^2 + 20 s^3 operations, l and s its longer and shorter
    side (Golub and Van Loan, R-SVD).
    """
    each = [one for job in jobs for one in (job, job.anchor) if one is not None and one.matrix]
    each = [job for job in each if _decomposed(job)]
    shapes = [shape for job in each for shape in _decomposed(job)]
    if not shapes:
        return None
    costs = [6 * max(s) * min(s) ** 2 + 20 * min(s) ** 3 for s in shapes]
    largest = shapes[costs.index(max(costs))]
    return Algebra(len(each), len(shapes), sum(costs), largest, sum(map(_kept, each)))


def _decomposed(job: TensorJob) -> Sequence[tuple[int, int]]:
    """The shapes of the decompositions that a job's method takes."""
    decompositions = registry.get(str(job.method)).decompositions
    assert decompositions is not None
    return decompositions(job.output.shape, len(job.models), job.parameters)


def _kept(job: TensorJob) -> int:
    """Bytes that a job keeps on the disk from one pass over the model to the next."""
    keeps = registry.get(str(job.method)).keeps
    if keeps is None or job.group is None:
        return 0
    wide = 8 if any(i.spec.dtype == "F64" for i in job.inputs) else 4
    return wide * keeps(job.output.shape, len(job.models), job.parameters)


def faults(
    recipe: Recipe, jobs: Sequence[TensorJob], sources: Mapping[str, Source]
) -> list[Problem]:
    """Ranks that no matrix has, and models that are no adapters of one rank on the base, under a
    method for such: each once."""
    return [*_too_high(recipe, jobs), *_no_factors(jobs, sources)]


def _too_high(recipe: Recipe, jobs: Sequence[TensorJob]) -> Iterator[Problem]:
    """Ranks above that of every matrix they are for; a default holds up to a matrix's own."""
    most: dict[tuple[Loc, int], int] = {}
    for job in jobs:
        shape = job.output.shape[-2:]
        if len(shape) < 2 or job.method is None:
            continue
        known = registry.get(job.method).parameters
        asked: dict[Loc, int | None] = {("output", "rank"): recipe.output.rank}
        for word in (word for word in RANKS if word in known):
            given = job.parameters[word]
            asked["parameters", word] = given if given != known[word].default else None
        for loc, rank in asked.items():
            if rank is not None:
                most[loc, rank] = max(most.get((loc, rank), 0), min(shape))
    for (loc, rank), least in most.items():
        if rank > least:
            told = f"{dotted(loc)} is {rank}, and no matrix has a rank above {least}"
            yield Problem(told, recipe.where(*loc), f"at most {least}, which leaves nothing out")


def _no_factors(jobs: Sequence[TensorJob], sources: Mapping[str, Source]) -> list[Problem]:
    """Models that a method for adapters cannot take."""
    found: dict[str, Problem] = {}
    for job in jobs:
        if not job.matrix or not registry.get(str(job.method)).needs_factors(job.parameters):
            continue
        ranks = {i.model: _rank(job, i, sources) for i in job.models}
        for model in [model for model, rank in ranks.items() if rank is None]:
            problem = Problem(
                f"'{job.method}' works on the factors of '{job.output.name}', which has none there",
                f"model '{model}'",
                "name an adapter on the base, {source: base, adapter: ...}, or another method",
            )
            found.setdefault(model, problem)
        if None not in ranks.values() and len(set(ranks.values())) > 1:
            told = ", ".join(f"{rank} in '{model}'" for model, rank in ranks.items())
            problem = Problem(
                f"'{job.method}' adds factors up, and those of '{job.output.name}' have the rank"
                f" {told}",
                hint="adapters of one rank on the same modules, or `space: delta`",
            )
            found.setdefault("", problem)
    return list(found.values())


def _rank(job: TensorJob, given: Input, sources: Mapping[str, Source]) -> int | None:
    """Of the product that a model adds to the base's tensor; None where it adds no such thing."""
    if job.base is None or given.spec.name != job.base.spec.name:
        return None
    return adapter.rank(sources[given.model], sources.get("base"), given.spec.name)


def cautions(jobs: Sequence[TensorJob], found: Algebra | None) -> Iterator[str]:
    """What the user should know before the merge runs."""
    if found and found.flops >= HOURS:
        rows, columns = found.largest
        yield (
            f"{found.decompositions} decompositions, the largest {rows}x{columns}, take about"
            f" {found.flops:.0e} floating-point operations: hours on a processor; --device cuda is"
            " for that"
        )
    told: dict[str, str] = {}  # of each method once
    for job in jobs:
        caution = registry.get(job.method).caution if job.method else None
        if caution and (text := caution(job.parameters, len(job.models))):
            told.setdefault(str(job.method), text)
    yield from told.values()
