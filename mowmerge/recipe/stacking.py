"""Slices under a method that takes models as they are: each model is stacked anew before, which is
a nested recipe in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mowmerge.methods import registry
from mowmerge.recipe.model import BESIDE, Loc
from mowmerge.recipe.parameters import as_list, as_map
from mowmerge.recipe.text import Document


def stacked(document: Document) -> Document:
    """The document with its slices inside its models, where its method codes models or replays what
    was fitted on them; else itself. Each slice has to take layers of every model, and no more."""
    data = as_map(document.data)
    models, pieces = as_map(data.get("models")), as_list(data.get("slices"))
    if not pieces or not models or not _whole(data):
        return document
    names = [*(["base"] if data.get("base") is not None else []), *models]
    spans: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for piece in map(as_map, pieces):
        taken = piece.get("layers")
        each = taken if isinstance(taken, Mapping) else dict.fromkeys(models, taken)
        plain = "layers" in piece and piece.keys() <= {"layers", "stack"}
        if not plain or not models.keys() <= each.keys() <= {*names}:
            return document
        for name in names:
            given = each.get(name, each[next(iter(models))])
            spans[name].append({**piece, "layers": given})
    made = {key: value for key, value in data.items() if key != "slices"}
    lines = {loc: line for loc, line in document.lines.items() if loc[:1] != ("slices",)}
    below = {loc: line for loc, line in document.lines.items() if loc[:1] == ("slices",)}
    made["models"] = {}
    for name in names:
        entry = models[name] if name in models else data["base"]
        own = dict(entry) if isinstance(entry, Mapping) and name in models else {"source": entry}
        held = {key: own.pop(key) for key in BESIDE if key in own}
        if held.get("source") == "base" and held.get("adapter") and "base" in names:
            held["source"] = data["base"]
        inner = {"models": {name: held}, "method": "passthrough", "slices": spans[name]}
        at: Loc = ("models", name, "source")
        if name in models:
            made["models"][name] = {"source": inner, **own}
        else:
            made["base"], at = inner, ("base",)
        lines |= {(*at, *loc): line for loc, line in below.items()}
    return Document(document.file, made, lines, document.problems)


def _whole(data: Mapping[str, Any]) -> bool:
    """Whether the method of a recipe takes models as they are, but not to fit them."""
    method = data.get("method")
    if method not in registry.names():
        return False
    spec = registry.get(str(method))
    return spec.dynamic is not None or (bool(spec.fit) and data.get("coefficients") is not None)
