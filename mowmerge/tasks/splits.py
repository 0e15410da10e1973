"""Content hashes of samples, by which splits that share samples are found and refused."""

from __future__ import annotations

from collections.abc import Sequence

from mowmerge.errors import RecipeError
from mowmerge.recipe.model import Recipe
from mowmerge.tasks.data import Items, load


def load_apart(
    recipe: Recipe, task: str, uses: Sequence[str], *, labelled: bool = True
) -> dict[str, Items]:
    """The task's items for each use, of splits that share no sample.

    Raises:
        RecipeError: two of the splits hold the same text or picture.
        SourceError: see `mowmerge.tasks.data.load`.
    """
    loaded: dict[str, Items] = {}
    held: dict[str, tuple[str, int]] = {}
    for use in uses:
        loaded[use] = load(recipe, task, use, labelled=labelled)
        found = loaded[use].digests
        shared = [(i, held[d]) for i, d in enumerate(found) if d in held]
        if shared:
            i, (other, j) = shared[0]
            raise RecipeError(
                f"the splits for {other} and {use} share {len(shared)} sample(s), the first of"
                f" them item {j} of one and item {i} of the other",
                where=recipe.where("tasks", task, "splits", use),
                hint="scores on samples that were trained on say nothing: use other splits",
            )
        held |= {d: (use, i) for i, d in enumerate(found)}
    return loaded
