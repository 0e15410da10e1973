"""Which method and which parameter values hold for a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from mowmerge.methods.registry import Parameter, get
from mowmerge.recipe.model import Match, Recipe, Rest
from mowmerge.recipe.parameters import per_model


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in its model.

    `depth` is 0 before the layers, layer / (layers - 1) inside, 1 after; 0 in a stack of one.
    `within` is the same over the slice, the number of which is `slice` where the recipe has any.
    """

    name: str
    role: str
    layer: int | None
    depth: float
    slice: int | None = None
    within: float = 0.0


@dataclass(frozen=True)
class Setting:
    """What holds for a tensor: every parameter of the method, per-model ones as tuples.

    Tensors for which the same holds share one Setting. `rule` is the index of the rule that
    matched.
    """

    method: str
    parameters: Mapping[str, Any]
    models: tuple[str, ...]
    drop: bool
    rule: int | None


@dataclass(frozen=True)
class Filtered:
    """Values of which the first that matches holds."""

    items: tuple[tuple[Match, Any], ...]


def setting(recipe: Recipe, place: Place) -> Setting:
    """What the recipe says for a tensor at this place."""
    return _settings(recipe).at(place)


def default_rest(recipe: Recipe, parameters: Mapping[str, Any]) -> tuple[Rest, str]:
    """The rest that a dynamic recipe does not name, for these parameters of its method; and why it
    is that one, where the method could have another."""
    how = get(recipe.method).dynamic
    assert how is not None
    method, given = how.rest(parameters)
    if not how.learned:
        return Rest(method=method, parameters=given), ""
    if why := recipe.unfit:
        return Rest(method=method, parameters=given), f"not {how.learned}: {why}"
    source = "its coefficients are given" if recipe.coefficients else "the tasks have data for it"
    return Rest(method=how.learned), f"not {method}: {source}"


def rest_setting(recipe: Recipe, place: Place, default: Callable[[], Rest]) -> Setting:
    """What `rest` says for a tensor at this place, by default that of the dynamic method."""
    return _rests(recipe, recipe.rest or default()).at(place)


def gradient(points: Sequence[Any], depth: float) -> Any:
    """The points' linear interpolation at depth * (len - 1), never outside its two neighbours; of
    words and booleans the point before it."""
    x = min(max(depth, 0.0), 1.0) * (len(points) - 1)
    i = min(int(x), len(points) - 1)
    if isinstance(points[i], str | bool):
        return points[i]
    low, high = float(points[i]), float(points[min(i + 1, len(points) - 1)])
    value = low * (1.0 - (x - i)) + high * (x - i)
    return min(max(value, min(low, high)), max(low, high))


@lru_cache(maxsize=32)
def _rests(recipe: Recipe, rest: Rest) -> Settings:
    bare = {name: ref.model_copy(update={"parameters": {}}) for name, ref in recipe.models.items()}
    static = {"method": rest.method, "parameters": rest.parameters, "rules": (), "models": bare}
    return Settings(recipe.model_copy(update=static))


@lru_cache(maxsize=32)
def _settings(recipe: Recipe) -> Settings:
    return Settings(recipe)


class Settings:
    """A recipe's values made ready: filters compiled, settled once for all tensors alike."""

    def __init__(self, recipe: Recipe) -> None:
        """Compiles the levels, and finds out which traits of a place matter."""
        self.recipe = recipe
        entries = {name: model.parameters for name, model in recipe.models.items()}
        self.outer = [_ready(per_model(entries)), _ready(recipe.parameters)]
        self.rules = [_ready(rule.parameters) for rule in recipe.rules]
        self.slices = [_ready(piece.parameters) for piece in recipe.slices]
        levels = [*self.outer, *self.rules, *self.slices]
        matches = [rule.match for rule in recipe.rules]
        matches += [match for level in levels for match in _matches(level)]
        self.globs = [match for match in matches if match.tensors is not None]
        self.by_role = any(match.role is not None for match in matches)
        self.by_layer = any(match.layers is not None for match in matches)
        self.by_depth = any(_has_gradient(level) for level in levels)
        self.known: dict[Any, Setting] = {}

    def at(self, place: Place) -> Setting:
        """What holds at this place."""
        key = (
            place.role if self.by_role else None,
            place.layer if self.by_layer else None,
            (place.depth, place.within) if self.by_depth else None,
            place.slice,
            *[match.names(place.name) for match in self.globs],
        )
        found = self.known.get(key)
        if found is None:
            found = self.known[key] = self._settle(place)
        return found

    def _settle(self, place: Place) -> Setting:
        recipe, levels, models = self.recipe, self.outer, tuple(self.recipe.models)
        method, drop, index = recipe.method, False, None
        own: Any = {}  # of the slice
        if place.slice is not None:
            piece = recipe.slices[place.slice]
            changes = piece.method is not None and piece.method != method
            own, levels = self.slices[place.slice], [] if changes else levels
            method, models = piece.method or method, piece.models(recipe.models)
            levels = [own, *levels]
        for i, rule in enumerate(recipe.rules):
            if rule.match.accepts(place.name, place.role, place.layer):
                changes = rule.method is not None and rule.method != method
                levels = [self.rules[i], *([] if changes else levels)]
                method, drop, index = rule.method or method, rule.drop, i
                models = rule.models or models
                break
        inner = replace(place, depth=place.within)
        places = [(level, inner if level is own else place) for level in levels]
        parameters = {
            name: tuple(_value(p, places, model) for model in models)
            if p.per_model
            else _value(p, places, None)
            for name, p in get(method).parameters.items()
        }
        return Setting(method, parameters, models, drop, index)


def _value(p: Parameter, levels: Sequence[tuple[Any, Place]], model: str | None) -> Any:
    """The first level's value that holds, else the method's default."""
    found = (_at(level.get(p.name), model, place) for level, place in levels)
    value = next((v for v in found if v is not None), p.default)
    return {"number": float, "integer": int}.get(p.kind, lambda v: v)(value)


def _at(value: Any, model: str | None, place: Place) -> Any:
    """The one value for this model and place; None where there is none."""
    if isinstance(value, Filtered):
        for match, inner in value.items:
            if match.accepts(place.name, place.role, place.layer):
                return _at(inner, model, place)
        return None
    if isinstance(value, Mapping):
        return _at(value.get(model), model, place)
    return gradient(value, place.depth) if isinstance(value, list) else value


def _ready(value: Any) -> Any:
    """The value with filters compiled."""
    if isinstance(value, Mapping):
        return {key: _ready(inner) for key, inner in value.items()}
    if isinstance(value, list) and isinstance(value[0], Mapping):
        return Filtered(
            tuple((Match.model_validate(v.get("match", {})), _ready(v["value"])) for v in value)
        )
    return value


def _parts(value: Any) -> Iterator[Any]:
    """The value and all values in it."""
    yield value
    if isinstance(value, Filtered):
        for _, inner in value.items:
            yield from _parts(inner)
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _parts(inner)


def _matches(value: Any) -> list[Match]:
    return [
        match for part in _parts(value) if isinstance(part, Filtered) for match, _ in part.items
    ]


def _has_gradient(value: Any) -> bool:
    return any(isinstance(part, list) for part in _parts(value))
