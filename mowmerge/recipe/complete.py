"""A recipe as plain data with every default of recipe and methods."""

from __future__ import annotations

from typing import Any

from mowmerge.methods.registry import get
from mowmerge.recipe.layers import Slice, written
from mowmerge.recipe.model import Recipe
from mowmerge.recipe.task import Task
from mowmerge.recipe.task_types import TYPES
from mowmerge.recipe.values import default_rest


def completed(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data with every default of recipe and methods."""
    rules = []
    for rule in recipe.rules:
        plain = rule.model_dump(mode="json", exclude_defaults=True)
        layers = plain["match"].get("layers")
        if layers:
            plain["match"]["layers"] = [written((low, high)) for low, high in layers]
        if rule.method not in (None, recipe.method):
            plain["parameters"] = get(str(rule.method)).complete(rule.parameters)
        rules.append(plain)
    return {
        "version": recipe.version,
        "base": _source(recipe.base),
        "models": {
            name: {
                "source": _source(model.source),
                **({"adapter": [a.model_dump() for a in model.adapter]} if model.adapter else {}),
                **model.parameters,
            }
            for name, model in recipe.models.items()
        },
        "method": recipe.method,
        "parameters": get(recipe.method).complete(recipe.parameters),
        "rules": rules,
        "slices": [_slice(recipe, piece) for piece in recipe.slices],
        "rest": _rest(recipe),
        "encoder": recipe.encoder,
        "missing": recipe.missing,
        "vocabulary": recipe.vocabulary and recipe.vocabulary.model_dump(mode="json"),
        "heads": recipe.heads and recipe.heads.model_dump(mode="json"),
        "tasks": {name: _task(task) for name, task in recipe.tasks.items()},
        "coefficients": recipe.coefficients,
        "output": recipe.output.model_dump(mode="json"),
    }


def _slice(recipe: Recipe, piece: Slice) -> dict[str, Any]:
    """A slice, with every parameter of its method where that is another."""
    taken = {model: written(span) for model, span in piece.layers.items()}
    own = piece.method not in (None, recipe.method)
    return {
        "layers": taken.get("", taken),
        **({"stack": list(piece.stack)} if piece.stack else {}),
        **({"method": piece.method} if own else {}),
        "parameters": get(str(piece.method)).complete(piece.parameters) if own else dict(
            piece.parameters),
    }  # fmt: skip


def _task(task: Task) -> dict[str, Any]:
    """A task, with those options that its type takes."""
    plain = task.model_dump(mode="json")
    taken = TYPES[task.type].options
    options = {name: value for name, value in plain.pop("options").items() if name in taken}
    return {**plain, **({"options": options} if options else {})}


def _rest(recipe: Recipe) -> dict[str, Any] | None:
    """The static method of a dynamic recipe, its own or the method's default."""
    spec = get(recipe.method)
    if spec.dynamic is None:
        return None
    if recipe.rest is not None:
        method, given = recipe.rest.method, recipe.rest.parameters
    else:
        default, _ = default_rest(recipe, spec.complete(recipe.parameters))
        method, given = default.method, default.parameters
    return {"method": method, "parameters": get(method).complete(given)}


def _source(source: str | Recipe | None) -> Any:
    return source if isinstance(source, str | None) else completed(source)
