"""Where the models of a recipe are that its tasks are scored on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mowmerge.checkpoint.source import find
from mowmerge.errors import MowmergeError, RecipeError
from mowmerge.plan import Adapted, Stored
from mowmerge.recipe.model import Recipe
from mowmerge.sources import adapted
from mowmerge.tasks.adapters import Where


def where_of(origin: Stored | Adapted) -> Where:
    """What is loaded of it."""
    return origin if isinstance(origin, Adapted) else Path(origin.folder)


def found_at(recipe: Recipe, model: str | None, task: str) -> Stored | Adapted:
    """Where a model of the recipe is, or its base.

    Raises:
        RecipeError: it is itself a recipe.
        SourceError, CheckpointError: it is not there, or an adapter does not fit.
    """
    what = f"the expert '{model}' of task '{task}'" if model else "the base"
    source = recipe.models[model].source if model else recipe.base
    if not isinstance(source, str):
        raise RecipeError(
            f"{what} is itself a recipe", where=recipe.file,
            hint="merge it first: only checkpoints and adapters on them can be scored",
        )  # fmt: skip
    try:
        if model and recipe.models[model].adapter:
            return adapted(recipe, model)
        return find(recipe.locate(source))
    except MowmergeError as error:
        first = error.problems[0]
        hint = first.hint or "paths start at the recipe's folder, or here"
        message = f"{what} cannot be had: {first.message}"
        where = recipe.where(*(("models", model) if model else ("base",)))
        raise type(error)([replace(first, message=message, where=where, hint=hint)]) from error
