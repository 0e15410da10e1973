"""`mowmerge check`: read a recipe, report every fault, show it with every default filled in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mowmerge.recipe.model import Recipe


def check(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file; - reads stdin.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a value: parameters.density=0.3.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a recipe without opening a model, and show it with every default filled in."""
    from mowmerge.recipe.parse import load
    from mowmerge.recipe.text import dump

    read = load(recipe, set_ or ())
    if json_:
        print(json.dumps({"file": read.file, "ok": True, "recipe": completed(read)}, indent=2))
    else:
        print(f"{read.file}: ok\n\n{dump(completed(read))}", end="")


def completed(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data with every default of recipe and methods."""
    from mowmerge.methods.registry import get

    rules = []
    for rule in recipe.rules:
        plain = rule.model_dump(mode="json", exclude_defaults=True)
        layers = plain["match"].get("layers")
        if layers:
            plain["match"]["layers"] = [
                low if low == high else f"{low}..{high}" for low, high in layers
            ]
        if rule.method not in (None, recipe.method):
            plain["parameters"] = get(str(rule.method)).complete(rule.parameters)
        rules.append(plain)
    return {
        "name": recipe.name,
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
        "rest": _rest(recipe),
        "missing": recipe.missing,
        "heads": recipe.heads and recipe.heads.model_dump(mode="json"),
        "tasks": {name: task.model_dump(mode="json") for name, task in recipe.tasks.items()},
        "coefficients": recipe.coefficients,
        "output": recipe.output.model_dump(mode="json"),
    }


def _rest(recipe: Recipe) -> dict[str, Any] | None:
    """The static method of a dynamic recipe, its own or the method's default."""
    from mowmerge.methods.registry import get
    from mowmerge.recipe.values import default_rest

    spec = get(recipe.method)
    if spec.dynamic is None:
        return None
    if recipe.rest is not None:
        method, given = recipe.rest.method, recipe.rest.parameters
    else:
        default, _ = default_rest(recipe, spec.complete(recipe.parameters))
        method, given = default.method, default.parameters
    return {"method": method, "parameters": get(method).complete(given)}


def _source(source: str | Recipe | None) -> str | Mapping[str, Any] | None:
    return source if isinstance(source, str | None) else completed(source)
