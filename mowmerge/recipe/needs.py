"""What a merge needs beyond the experts, and how near its methods are to their papers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mowmerge.methods.registry import MethodSpec, get
from mowmerge.recipe.model import Recipe
from mowmerge.recipe.values import default_rest

GRADIENTS = ("entropy", "distill", "lm")  # the objectives that go back through the model


def methods(recipe: Recipe) -> list[MethodSpec]:
    """Every method that a recipe uses: its own, those of rules, of the rest and of nested ones."""
    return list({spec.name: spec for spec in _methods(recipe)}.values())


def _methods(recipe: Recipe) -> Iterator[MethodSpec]:
    spec = get(recipe.method)
    yield spec
    yield from (get(rule.method) for rule in recipe.rules if rule.method)
    if spec.dynamic is not None:
        rest = recipe.rest or default_rest(recipe, spec.complete(recipe.parameters))[0]
        yield get(rest.method)
    for source in (recipe.base, *(model.source for model in recipe.models.values())):
        if isinstance(source, Recipe):
            yield from _methods(source)


def needs(recipe: Recipe, objective: str | None = None) -> dict[str, Any]:
    """The flags of a merge. objective: that its routers were trained for, None where none were.

    needs_base: a method cannot do without it. needs_data: coefficients were fitted or routers
    trained. needs_labels: of these data; no fit and no objective reads any. needs_gradients: a
    pass back through the model. heads: per_task where each expert's is kept, else merged.
    faithful: yes where no method's docstring names a difference from its paper, variant with the
    methods that do, unverified with those that say nothing.
    """
    used = methods(recipe)
    fitted = any(spec.fit for spec in used)
    return {
        "needs_base": any(spec.needs_base for spec in used),
        "needs_data": fitted or objective is not None,
        "needs_labels": False,
        "needs_gradients": fitted or objective in GRADIENTS,
        "heads": recipe.heads.policy if recipe.heads else "merged",
        "faithful": _faithful(used),
    }


def _faithful(used: list[MethodSpec]) -> str:
    for word in ("unverified", "variant"):
        if named := [spec.name for spec in used if spec.faithful == word]:
            return f"{word} ({', '.join(named)})"
    return "yes"
