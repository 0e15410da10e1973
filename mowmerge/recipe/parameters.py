"""What is wrong with a recipe's methods and their parameters, at every level."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from mowmerge.errors import RecipeError, did_you_mean
from mowmerge.methods.contracts import MethodError
from mowmerge.methods.registry import MethodSpec, Parameter, get, names
from mowmerge.recipe.mergekit.presets import OURS
from mowmerge.recipe.model import BESIDE, Loc, Recipe
from mowmerge.recipe.text import dotted

MatchFaults = Callable[[Any, Loc], "Iterator[Fault]"]


@dataclass(frozen=True)
class Fault:
    """What is wrong at a key path."""

    loc: Loc
    message: str
    hint: str = ""


def as_map(value: Any) -> Mapping[str, Any]:
    """The mapping, or an empty one for what should have been one."""
    return value if isinstance(value, Mapping) else {}


def as_list(value: Any) -> Sequence[Any]:
    """The list; one item is a list of one, nothing an empty one."""
    return value if isinstance(value, list) else [] if value is None else [value]


def shown(value: Any) -> str:
    """A value as messages name it."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping | list):
        return "a mapping" if isinstance(value, Mapping) else "a list"
    return repr(value)


def hint_for(word: str, known: Sequence[str]) -> str:
    """The word it is called here, where mergekit calls it so; else the nearest known word."""
    ours = OURS.get(word, "")
    if ours.partition(".")[0] in known:
        return f"mergekit's '{word}' is '{ours}' here"
    return did_you_mean(word, known)


def nearest(value: Any, choices: Sequence[str]) -> str:
    """The hint for a word that is none of the choices, which the message lists."""
    hint = did_you_mean(value, choices) if isinstance(value, str) else ""
    return hint if hint.startswith("did") else ""


def unknown_model(name: str, loc: Loc, models: Collection[str]) -> Iterator[Fault]:
    """A fault where `name` is no model of the recipe."""
    if name not in models:
        message = f"{dotted(loc)}: there is no model '{name}'"
        yield Fault(loc, message, did_you_mean(name, list(models)))


def method_faults(data: Mapping[str, Any], match_faults: MatchFaults) -> Iterator[Fault]:
    """Faults of the methods, of their parameters at every level, and of what they need."""
    entries: dict[str, Mapping[str, Any]] = {
        name: _beside(entry) for name, entry in as_map(data.get("models")).items()
    }
    outer = as_map(data.get("parameters"))
    rules = [as_map(rule) for rule in as_list(data.get("rules"))]
    checked = Parameters(list(entries), match_faults)
    spec = yield from _spec(data.get("method"), ("method",), data)
    faults: list[Fault] = []
    if meant := spec or _meant(data.get("method")):
        faults += checked.faults(meant, outer, ("parameters",))
        for name, own in entries.items():
            faults += checked.entry_faults(meant, own, ("models", name))
        yield from faults
    if spec:
        some = data.get("slices") or any(rule.get("models") for rule in rules)
        if not some:  # else the slices say who takes part, or the planner knows
            levels = [per_model(entries), outer]
            yield from _together(spec, levels, list(entries), (), not faults)
    yield from _rest_faults(spec, data, checked)
    yield from _nested_faults(data)
    for i, piece in enumerate(map(as_map, as_list(data.get("slices")))):
        yield from _slice_faults(spec, piece, ("slices", i), data, checked)
    for i, rule in enumerate(rules):
        loc: Loc = ("rules", i)
        own_spec = yield from _spec(rule.get("method"), (*loc, "method"), data)
        used = own_spec or (spec if rule.get("method") is None else None)
        if used is None or rule.get("drop") is True:
            continue
        yield from _rule_faults(spec, used, rule, loc)
        own = as_map(rule.get("parameters"))
        own_faults = list(checked.faults(used, own, (*loc, "parameters")))
        yield from own_faults
        if own_spec or own or rule.get("models"):
            if (not own_spec and not rule.get("models")) or data.get("slices"):
                used = replace(used, count=None, at_least=0)  # said for the recipe already
            inherits = spec is not None and used.name == spec.name
            levels = [own, per_model(entries), outer] if inherits else [own]
            named = [name for name in as_list(rule.get("models")) if isinstance(name, str)]
            plain = not own_faults and not (inherits and faults)
            yield from _together(used, levels, named or list(entries), loc, plain)


def _slice_faults(
    spec: MethodSpec | None,
    piece: Mapping[str, Any],
    loc: Loc,
    data: Mapping[str, Any],
    checked: Parameters,
) -> Iterator[Fault]:
    """Faults of a slice's method and parameters, and of both with the models that it has."""
    used = yield from _spec(piece.get("method"), (*loc, "method"), data)
    used = used or (spec if piece.get("method") is None else None)
    if used is None:
        return
    own = as_map(piece.get("parameters"))
    faults = list(checked.faults(used, own, (*loc, "parameters")))
    yield from faults
    levels = [own]
    if spec is not None and used.name == spec.name:
        entries = {name: _beside(entry) for name, entry in as_map(data.get("models")).items()}
        levels += [per_model(entries), as_map(data.get("parameters"))]
    taken = piece.get("layers")
    models = [m for m in taken if m != "base"] if isinstance(taken, Mapping) else checked.models
    yield from _together(used, levels, models, loc, not faults)


def _beside(entry: Any) -> dict[str, Any]:
    """The parameters of an entry of `models`, beside its source."""
    return {key: value for key, value in as_map(entry).items() if key not in BESIDE}


def _rest_faults(
    spec: MethodSpec | None, data: Mapping[str, Any], checked: Parameters
) -> Iterator[Fault]:
    """Faults of `rest`: a static method beside a dynamic one."""
    if data.get("rest") is None:
        if spec is not None and spec.dynamic is not None:
            yield from _default_rest_faults(spec, data)
        return
    rest = as_map(data["rest"])
    if spec is not None and spec.dynamic is None:
        message = f"rest is for dynamic methods, and '{spec.name}' is static"
        yield Fault(("rest",), message, "remove it, or use rules")
    used = yield from _spec(rest.get("method"), ("rest", "method"), data)
    if used is not None and used.dynamic is not None:
        message = f"rest.method: '{used.name}' is dynamic, and the rest stays static"
        yield Fault(("rest", "method"), message, "task_arithmetic, ties, linear, ...")
    elif used is not None:
        own = as_map(rest.get("parameters"))
        faults = list(checked.faults(used, own, ("rest", "parameters")))
        yield from faults
        yield from _together(used, [own], checked.models, ("rest",), not faults)


def _default_rest_faults(spec: MethodSpec, data: Mapping[str, Any]) -> Iterator[Fault]:
    """Whether what a dynamic method makes of the rest has the base that it needs."""
    assert spec.dynamic is not None
    method, _ = spec.dynamic.rest(spec.complete({}))
    if data.get("base") is None and get(method).needs_base and not spec.needs_base:
        message = f"'{spec.name}' makes the rest by {method}, which needs a base, and there is none"
        hint = "add base: the model that the others were fine-tuned from, or rest: {method: linear}"
        yield Fault(("method",), message, hint)


def _rule_faults(
    spec: MethodSpec | None, used: MethodSpec, rule: Mapping[str, Any], loc: Loc
) -> Iterator[Fault]:
    """Faults of a rule whose method is dynamic: the recipe's own, of all models, and no other."""
    if used.dynamic is None:
        return
    if spec is None or used.name != spec.name:
        message = f"{dotted(loc)}.method: '{used.name}' is dynamic, and a rule takes a static one"
        hint = "name a dynamic method as the recipe's own; rules say what stays static"
        yield Fault((*loc, "method"), message, hint)
    elif rule.get("models"):
        message = f"{dotted(loc)}: '{used.name}' mixes all models, so the rule can name none"
        yield Fault((*loc, "models"), message, "add a static method to the rule")


def _nested_faults(data: Mapping[str, Any]) -> Iterator[Fault]:
    """Faults of sources that are recipes of dynamic merges."""
    sources: dict[Loc, Any] = {("base",): data.get("base")}
    for name, entry in as_map(data.get("models")).items():
        sources["models", name] = entry.get("source") if isinstance(entry, Mapping) else entry
    for loc, source in sources.items():
        if isinstance(source, Recipe) and get(source.method).dynamic is not None:
            message = f"{dotted(loc)}: its method '{source.method}' is dynamic, and gives no model"
            yield Fault(loc, message, "a nested recipe takes a static method")


def per_model(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The models' own parameters as per-model maps: {parameter: {model: value}}."""
    found: dict[str, Any] = {}
    for model, own in entries.items():
        for name, value in own.items():
            found.setdefault(name, {})[model] = value
    return found


def _spec(
    name: Any, loc: Loc, data: Mapping[str, Any]
) -> Generator[Fault, None, MethodSpec | None]:
    """The method of that name, if there is one; it must find the base it needs."""
    if not isinstance(name, str):
        return None
    try:
        spec = get(name)
    except RecipeError as error:
        problem = error.problems[0]
        yield Fault(loc, f"{dotted(loc)}: {problem.message}", problem.hint)
        return None
    if spec.needs_base and data.get("base") is None:
        message = f"{dotted(loc)}: '{name}' needs a base, and the recipe names none"
        yield Fault(loc, message, "add base: the model that the others were fine-tuned from")
    return spec


def _meant(name: Any) -> MethodSpec | None:
    """The method of nearly that name: one that is misspelt hides no other fault."""
    near = get_close_matches(name, names(), n=1) if isinstance(name, str) else []
    return get(near[0]) if near else None


def _together(
    spec: MethodSpec,
    levels: Sequence[Mapping[str, Any]],
    models: Sequence[str],
    loc: Loc,
    plain: bool,
) -> Iterator[Fault]:
    """Whether the number of models, and the parameters where all are plain, can work together."""
    if not models:
        return
    parameters: dict[str, Any] = {}
    for name, p in spec.parameters.items():
        values = [_plain(name, p.default, levels, model) for model in models]
        plain = plain and None not in values
        parameters[name] = tuple(values) if p.per_model else values[0]
    place: Loc = (*loc, "method")
    try:
        replace(spec, validate=None).check(parameters, len(models))
        place = (*loc, "parameters") if loc or levels[-1] else ("method",)
        if plain:
            spec.check(parameters, len(models))
    except MethodError as error:
        yield Fault(place, f"{dotted(loc)}: {error}" if loc else str(error))


def _plain(name: str, default: Any, levels: Sequence[Mapping[str, Any]], model: str) -> Any:
    """The value that holds for every tensor; None where it depends on the tensor."""
    for level in levels:
        value = level.get(name)
        value = value.get(model) if isinstance(value, Mapping) else value
        if value is not None:
            return None if isinstance(value, list) else value
    return default


@dataclass(frozen=True)
class Parameters:
    """Checks parameters against a method; knows the recipe's models."""

    models: Sequence[str]
    match_faults: MatchFaults

    def faults(self, spec: MethodSpec, given: Mapping[str, Any], loc: Loc) -> Iterator[Fault]:
        """Faults of a `parameters` section."""
        for name, value in given.items():
            p = spec.parameters.get(name)
            if p:
                yield from self._value(p, value, (*loc, name))
            else:
                message = f"{dotted((*loc, name))} is not a parameter of '{spec.name}'"
                yield Fault((*loc, name), message, hint_for(name, list(spec.parameters)))

    def entry_faults(self, spec: MethodSpec, given: Mapping[str, Any], loc: Loc) -> Iterator[Fault]:
        """Faults of the parameters beside a model's source."""
        single = [name for name, p in spec.parameters.items() if p.per_model]
        for name, value in given.items():
            p, here = spec.parameters.get(name), (*loc, name)
            if p is None:
                message = f"{dotted(here)} is not a parameter of '{spec.name}'"
                yield Fault(here, message, hint_for(name, [*single, *BESIDE]))
            elif not p.per_model:
                message = f"{dotted(here)}: '{name}' is one value for all models"
                yield Fault(here, message, "write it under parameters")
            else:
                yield from self._value(p, value, here, mapped=True)

    def _value(self, p: Parameter, value: Any, loc: Loc, mapped: bool = False) -> Iterator[Fault]:
        """Faults of a number or word, a per-model map, a gradient, or filtered values."""
        path = dotted(loc)
        if isinstance(value, Mapping):
            yield from self._map(p, value, loc, mapped)
        elif not isinstance(value, list):
            if fault := p.fault(value):
                hint = nearest(value, p.choices)
                yield Fault(loc, f"{path} {fault}, not {shown(value)}", hint)
        elif not value:
            yield Fault(loc, f"{path} is an empty list")
        elif all(isinstance(item, Mapping) for item in value):
            for i, item in enumerate(value):
                yield from self._filtered(p, item, (*loc, i), mapped)
        elif p.kind == "integer":
            yield Fault(loc, f"{path}: '{p.name}' is a whole number, so it takes no gradient")
        else:
            for i, item in enumerate(value):
                if fault := p.fault(item):
                    here = (*loc, i)
                    yield Fault(here, f"{dotted(here)} {fault}, not {shown(item)}")

    def _map(
        self, p: Parameter, value: Mapping[str, Any], loc: Loc, mapped: bool
    ) -> Iterator[Fault]:
        path = dotted(loc)
        if "value" in value and "value" not in self.models and set(value) <= {"match", "value"}:
            hint = "write a list: - {match: ..., value: ...}"
            yield Fault(loc, f"{path} is a filtered value outside a list", hint)
        elif not p.per_model:
            yield Fault(loc, f"{path}: '{p.name}' is one value for all models, so it takes no map")
        elif mapped:
            yield Fault(loc, f"{path} is for one model already, so it takes no map")
        else:
            for name, inner in value.items():
                yield from unknown_model(name, (*loc, name), self.models)
                yield from self._value(p, inner, (*loc, name), mapped=True)

    def _filtered(
        self, p: Parameter, item: Mapping[str, Any], loc: Loc, mapped: bool
    ) -> Iterator[Fault]:
        for key in item:
            if key not in ("match", "value"):
                here = (*loc, key)
                yield Fault(
                    here, f"unknown key '{dotted(here)}'", hint_for(key, ["match", "value"])
                )
        if "match" in item:
            yield from self.match_faults(item["match"], (*loc, "match"))
        if "value" in item:
            yield from self._value(p, item["value"], (*loc, "value"), mapped)
        else:
            yield Fault(loc, f"'{dotted((*loc, 'value'))}' is missing")
