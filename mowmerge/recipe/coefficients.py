"""coefficients.json: what a fit pass found, by tensor and model, and on which data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from mowmerge.errors import RecipeError, ResourceError
from mowmerge.methods import registry
from mowmerge.plan import Fit, TensorJob
from mowmerge.recipe.fields import Strict
from mowmerge.recipe.model import Recipe

HELD = 4 << 30  # bytes of task vectors that a fit keeps in memory where no limit says otherwise
LISTED = 5  # names in a message
RUNTIME = 500 << 20  # bytes that Python, torch and transformers take


class Samples(Strict):
    """The samples of a task that a fit has seen."""

    expert: str
    split: str
    count: int = Field(description="How many different ones.")
    sha256: str = Field(description="Of their inputs' sha256 digests, a line each, in item order.")


class Coefficients(Strict):
    """Learned coefficients: tensor -> model -> value."""

    version: Literal[1] = 1
    methods: tuple[str, ...]
    granularity: Literal["tensor", "task"]
    models: tuple[str, ...]
    steps: int
    rate: float
    batch: int
    balance: bool
    seed: int
    data: Mapping[str, Samples]
    uses_test_inputs: bool = Field(description="Whether a split it was fitted on is named a test.")
    without_gradient: tuple[str, ...] = Field(description="Tensors that stayed where they started.")
    tensors: Mapping[str, Mapping[str, float]]


def read(recipe: Recipe) -> Coefficients:
    """The coefficients that a recipe replays; RecipeError where there are none to read."""
    named = str(recipe.coefficients)
    where = recipe.where("coefficients")
    try:
        return Coefficients.model_validate_json(Path(recipe.locate(named)).read_bytes())
    except OSError as error:
        raise RecipeError(
            f"'{named}' cannot be read: {error.strerror}",
            where=where,
            hint="it lies in the folder of the merge that was fitted, as coefficients.json",
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(map(str, first["loc"]))
        raise RecipeError(
            f"'{named}' holds no coefficients: {at or 'it'}: {first['msg']}",
            where=where,
            hint="take the coefficients.json of a merge that was fitted",
        ) from error


def of(job: TensorJob) -> dict[str, float]:
    """A job's coefficients, those that its method has fitted, by model."""
    values = job.parameters[str(registry.get(str(job.method)).fit)]
    return {i.model: value for i, value in zip(job.models, values, strict=True)}


def applied(job: TensorJob, row: Mapping[str, float]) -> TensorJob:
    """The job with these coefficients, by model, in its parameters."""
    values = tuple(row[i.model] for i in job.models)
    return replace(
        job, parameters={**job.parameters, str(registry.get(str(job.method)).fit): values}
    )


def replayed(jobs: Sequence[TensorJob], found: Coefficients, where: str) -> dict[str, TensorJob]:
    """The fitted jobs with found coefficients, by tensor; RecipeError where those do not fit."""
    theirs, ours = set(found.tensors), {job.output.name for job in jobs}
    methods, rows, faults = {str(job.method) for job in jobs}, {}, []
    if set(found.methods) != methods:
        faults = [f"they are of {', '.join(found.methods)}, not of {', '.join(sorted(methods))}"]
    elif theirs != ours:
        faults = [f"tensors of one only: {', '.join(sorted(theirs ^ ours)[:LISTED])}"]
    for job in [] if faults else jobs:
        spec, row = registry.get(str(job.method)), found.tensors[job.output.name]
        if set(row) != {i.model for i in job.models}:
            faults.append(f"'{job.output.name}' has them for the models {', '.join(row)}")
            continue
        checked = map(spec.parameters[str(spec.fit)].fault, row.values())
        faults += [f"'{job.output.name}': one {fault}" for fault in checked if fault]
        rows[job.output.name] = applied(job, row)
    if faults:
        raise RecipeError(
            f"the coefficients do not fit this recipe: {faults[0]}",
            where=where,
            hint="remove `coefficients` to fit again",
        )
    return rows


def settled(
    recipe: Recipe, jobs: Sequence[TensorJob], limit: int | None
) -> tuple[list[TensorJob], Fit | None]:
    """The jobs with the coefficients that the recipe replays, or the fit that they need.

    A fit's memory is what `limit` leaves, where there is one. The anchors of coded tensors count.
    """
    statics = [job.anchor or job for job in jobs]
    fitted = [job for job in statics if job.method and registry.get(job.method).fit]
    if not fitted:
        return list(jobs), None
    alone = next((job for job in statics if job.code is not None), None)
    if alone is not None:
        raise RecipeError(
            f"'{alone.method}' makes its own anchor, so the rest cannot be fitted with it",
            where=recipe.where("rest"),
            hint="fit a static merge first, or use a method whose anchor is the rest",
        )
    if recipe.coefficients is None:
        room = None if limit is None else limit - RUNTIME
        return list(jobs), fit(recipe, statics, fitted, room)
    rows = replayed(fitted, read(recipe), recipe.where("coefficients"))
    again = [rows.get(job.output.name, job) for job in statics]
    pairs = zip(jobs, again, strict=True)
    return [replace(job, anchor=one) if job.code else one for job, one in pairs], None


def fit(
    recipe: Recipe, jobs: Sequence[TensorJob], fitted: Sequence[TensorJob], room: int | None
) -> Fit:
    """The fit that `fitted` of a plan's jobs need, in `room` bytes where that is limited."""
    how = {tuple(job.parameters[word] for word in registry.FITTING) for job in fitted}
    start = {pair for job in fitted for pair in of(job).items()}
    granularity, steps, rate, batch, balance, seed = next(iter(how))
    if len(how) > 1 or (granularity == "task" and len(start) > len(dict(start))):
        raise RecipeError(
            f"{', '.join(registry.FITTING)}, and with granularity: task where the fit starts, must"
            " be the same for all tensors that are fitted",
            where=recipe.where("rules"),
        )
    sizes = [4 * job.output.numel for job in fitted]
    bare = 4 * sum(job.output.numel for job in jobs) + sum(sizes)
    vectors = sum(size * len(job.inputs) for size, job in zip(sizes, fitted, strict=True))
    if room is not None and bare > room:
        raise ResourceError(
            f"--max-memory is too little for a fit: weights and gradients take {bare:,} bytes",
            hint="allow more, or replay an earlier fit with `coefficients:`",
        )
    held = vectors <= (HELD if room is None else room - bare)
    return Fit(
        tuple(job.output.name for job in fitted), tuple(recipe.trained), granularity, steps, rate,
        batch, balance, seed, held, bare + (vectors if held else 0),
    )  # fmt: skip
