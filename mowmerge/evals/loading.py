"""A task's eval split, checked."""

from __future__ import annotations

from mowmerge.errors import RecipeError
from mowmerge.recipe.model import Recipe
from mowmerge.tasks.data import Items
from mowmerge.tasks.splits import load_apart


def load(recipe: Recipe, task: str) -> Items:
    """The eval split's items. All splits that the task names are loaded, so that one which shares
    samples with another is refused; so is an empty one."""
    asked = recipe.tasks[task]
    named = [use for use in ("router", "select") if getattr(asked.splits, use)]
    items = load_apart(recipe, task, [*named, "eval"])["eval"]
    if not len(items):
        raise RecipeError(f"the eval split of task '{task}' is empty", where=items.where)
    return items
