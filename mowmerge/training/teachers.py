"""The experts' own models, whose answers a checkpoint's scales are to give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mowmerge.checkpoint.source import find
from mowmerge.dynamic.format import Manifest
from mowmerge.errors import RecipeError, SourceError
from mowmerge.recipe.model import Recipe
from mowmerge.tasks import heads
from mowmerge.training.data import Samples
from mowmerge.training.processes import Processes


def of(
    recipe: Recipe, held: Manifest, samples: Sequence[Samples], processes: Processes
) -> dict[int, Any]:
    """Each expert that has a task, by number: frozen, in eval mode, all at once in memory.

    Raises:
        RecipeError: an expert that is no checkpoint but an adapter or a recipe.
        SourceError: one that is not where the recipe says.
    """
    found = {}
    for k in sorted({sample.expert for sample in samples}):
        name = held.experts[k]
        ref, where = recipe.models.get(name), recipe.where("models", name)
        if ref is None or not isinstance(ref.source, str) or ref.adapter:
            raise RecipeError(
                f"scales learn from the expert '{name}' itself, which is no checkpoint here",
                where=where, hint="merge it into one, and name that in the recipe",
            )  # fmt: skip
        try:
            folder = Path(find(recipe.locate(ref.source)).folder)
        except SourceError as error:
            raise SourceError(
                f"scales learn from the expert '{name}' itself: {error.problems[0].message}",
                where=where, hint="its source is needed until they have learned",
            ) from error  # fmt: skip
        model = heads.load(folder, None, dtype="float32")
        found[k] = model.to(processes.device).requires_grad_(False)
    return found
