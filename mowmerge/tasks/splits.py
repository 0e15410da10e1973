"""Content hashes of samples, by which splits that share samples are found and refused."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from mowmerge.errors import RecipeError
from mowmerge.recipe.model import Recipe
from mowmerge.tasks.data import Items, load


def digest(value: Any) -> str:
    """The sha256 of a text, or of an image's size and colours: how it is stored does not matter."""
    if isinstance(value, str):
        return sha256(value.encode()).hexdigest()
    if value.mode not in ("I", "F", "I;16"):  # these hold more than a byte a channel
        value = value.convert("RGBA")
    shape = f"{value.mode} {value.width} {value.height} ".encode()
    return sha256(shape + value.tobytes()).hexdigest()


def digests(items: Items) -> list[str]:
    """The digest of each item's input, in order."""
    return [digest(items.input(i)) for i in range(len(items))]


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
        found = digests(loaded[use])
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
