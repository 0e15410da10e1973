"""Every fault of a recipe at once: its structure by pydantic, its parameters by the methods."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from pydantic import BaseModel, ValidationError

from mowmerge.errors import Problem, did_you_mean
from mowmerge.methods import registry
from mowmerge.recipe import vocabulary
from mowmerge.recipe.layers import Slice
from mowmerge.recipe.model import (
    NAME,
    AdapterRef,
    Digest,
    Heads,
    Loc,
    Lock,
    Match,
    Origin,
    Output,
    Recipe,
    Rest,
    Rule,
)
from mowmerge.recipe.parameters import (
    Fault,
    as_list,
    as_map,
    hint_for,
    method_faults,
    nearest,
    shown,
    unknown_model,
)
from mowmerge.recipe.task import Asking, Splits, Task
from mowmerge.recipe.task_types import TYPES
from mowmerge.recipe.text import dotted

APART = "merge the slices of base and models first (method: passthrough), each to a folder"
ALIKE = (
    "have every slice take layers of every model, without a method or parameters of its own (rules"
    " know the output's layers); or slice base and models before: each a nested recipe, {source:"
    " {models: ..., method: passthrough, slices: ...}}"
)
FIRST = (
    "merge the slices of each model first (method: passthrough), and fit on those; or replay an"
    " earlier fit, `coefficients:`"
)
WANTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "mapping_type": "a mapping",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "tuple_type": "a list",
}


def check(data: Mapping[str, Any], origin: Origin) -> tuple[Recipe | None, list[Problem]]:
    """The recipe of plain data (nested ones are Recipes by now), and its faults."""
    recipe, faults = None, []
    try:
        recipe = Recipe.model_validate(data, context=origin)
    except ValidationError as error:
        faults = list(_structure(error, origin))
    faults += [*_names(data), *method_faults(data, partial(_match_faults, origin)), *_fit(data)]
    faults += _slices(data)
    for name, task in as_map(data.get("tasks")).items():
        faults += _task(("tasks", name), as_map(task))
    faults += [*_vocabulary(data), *_output(data)]
    return recipe, [Problem(f.message, origin.where(f.loc), f.hint) for f in faults]


def _structure(error: ValidationError, origin: Origin, above: Loc = ()) -> Iterator[Fault]:
    """Pydantic's findings in our words."""
    for found in error.errors(include_url=False):
        kind, value, context = found["type"], found["input"], found.get("ctx", {})
        loc = (*above, *(part for part in found["loc"] if part not in vocabulary.TAGS))
        here = loc if kind in ("missing", "extra_forbidden") else origin.known(loc)
        path, hint = dotted(here) or "the recipe", ""
        if kind == "extra_forbidden":
            known = list(_model(here[:-1]).model_fields)
            message, hint = f"unknown key '{path}'", hint_for(str(here[-1]), known)
        elif kind == "missing":
            message = f"'{path}' is missing"
            hint = "a Hub id, a path or a nested recipe" if here[-1] == "source" else ""
        elif kind == "value_error":
            message = f"{path} {context['error']}"
        elif kind == "literal_error":
            known = re.findall(r"'([^']*)'", context["expected"])
            words = known[0] if len(known) == 1 else f"one of {', '.join(known)}"
            message = f"{path} must be {words}, not {shown(value)}"
            hint = nearest(value, known)
        elif kind == "greater_than_equal":
            message = f"{path} must be at least {context['ge']}, not {shown(value)}"
        else:
            message = f"{path} must be {WANTED.get(kind, found['msg'])}, not {shown(value)}"
        yield Fault(here, message, hint)


def _model(loc: Loc) -> type[BaseModel]:
    """The model whose keys stand at `loc`."""
    match loc:
        case ("models", _, "adapter", *_):
            return AdapterRef
        case ("rules", _):
            return Rule
        case ("slices", _):
            return Slice
        case ("tasks", _):
            return Task
        case ("tasks", _, "splits"):
            return Splits
        case ("tasks", _, "options"):
            return Asking
        case ("rest",):
            return Rest
        case ("heads",):
            return Heads
        case ("output",):
            return Output
        case ("vocabulary",):
            return vocabulary.Vocabulary
        case ("vocabulary", "source"):
            return vocabulary.Outside
        case ("vocabulary", "tokens", _):
            return vocabulary.Token
        case ("vocabulary", *_):
            return vocabulary.Row
        case ("lock",):
            return Lock
        case ("lock", *_):
            return Digest
    return Match if loc[-1:] == ("match",) else Recipe


def _names(data: Mapping[str, Any]) -> Iterator[Fault]:
    """Names of models and tasks, and that what names a model means one."""
    models = as_map(data.get("models"))
    for section in ("models", "tasks"):
        for name in as_map(data.get(section)):
            if not re.fullmatch(NAME, name):
                hint = "letters, digits, '-', '_' and '.', a letter or digit first"
                message = f"'{name}' in {section} cannot be a name of files"
                yield Fault((section, name), message, hint)
    if "base" in models and data.get("base") is not None:
        message = "a model cannot be named 'base' where the recipe names a base"
        yield Fault(("models", "base"), message, "give it another name")
    if data.get("encoder") is not None:
        if "encoder" in models:
            message = "a model cannot be named 'encoder' where the recipe names an encoder"
            yield Fault(("models", "encoder"), message, "give it another name")
        if not _dynamic(data):
            message = "an encoder is for classifiers, and a static method has none"
            yield Fault(("encoder",), message, "remove it")
    for i, rule in enumerate(map(as_map, as_list(data.get("rules")))):
        named = rule.get("models")
        for j, name in enumerate(as_list(named)):
            if isinstance(name, str):
                loc: Loc = ("rules", i, "models")
                loc = (*loc, j) if isinstance(named, list) else loc
                yield from unknown_model(name, loc, models)
    for task, body in as_map(data.get("tasks")).items():
        expert = as_map(body).get("expert")
        if isinstance(expert, str):
            yield from unknown_model(expert, ("tasks", task, "expert"), models)
    if data.get("missing") == "base" and data.get("base") is None:
        yield Fault(("missing",), "missing: base needs a base, and the recipe names none")


def _slices(data: Mapping[str, Any]) -> Iterator[Fault]:
    """Models of slices that are none, and what slices do not go with."""
    known = [*as_map(data.get("models")), *(["base"] if data.get("base") is not None else [])]
    pieces = as_list(data.get("slices"))
    for i, piece in enumerate(map(as_map, pieces)):
        taken = as_map(piece.get("layers"))
        if list(taken) == ["base"]:
            told = f"slices.{i}.layers names the base alone"
            yield Fault(
                ("slices", i, "layers"), told, "name it under models too, and that one here"
            )
        for name in taken:
            yield from unknown_model(name, ("slices", i, "layers", name), known)
    if not pieces:
        return
    if as_map(data.get("output")).get("format") == "adapter":
        message = "slices are other layers than the base's, and an adapter is a difference from it"
        yield Fault(("output", "format"), message, APART)
    used: dict[Loc, Any] = {("method",): data.get("method")}
    for section in ("slices", "rules"):
        for i, part in enumerate(map(as_map, as_list(data.get(section)))):
            used[section, i, "method"] = part.get("method")
    for loc, method in used.items():
        spec = registry.get(method) if method in registry.names() else None
        if spec and (spec.dynamic or spec.fit):
            what = "codes models" if spec.dynamic else "is fitted on models"
            message = f"'{method}' {what} as they are, and slices stack layers anew"
            yield Fault(loc, message, ALIKE if spec.dynamic else FIRST)


def _vocabulary(data: Mapping[str, Any]) -> Iterator[Fault]:
    """Models that `vocabulary` names and the recipe does not."""
    given: Mapping[str, Any] = as_map(data.get("vocabulary"))
    at: Loc = ("vocabulary",)
    based = data.get("base") is not None
    known = {**as_map(data.get("models")), **({"base": None} if based else {})}
    source = given.get("source", "union")
    if isinstance(source, Mapping) and "tokenizer" in known:
        message = "a model cannot be named 'tokenizer' where vocabulary.source names one"
        yield Fault(("models", "tokenizer"), message, "give it another name")
    if source == "base" and "base" not in known:
        message = "vocabulary.source is base, and the recipe names none"
        yield Fault((*at, "source"), message, "add base:, or name a model, or union")
    elif isinstance(source, str) and source not in ("union", *known):
        message = f"vocabulary.source: there is no model '{source}'"
        hint = f"{did_you_mean(source, list(known))}; {{tokenizer: SOURCE}} for one not merged"
        yield Fault((*at, "source"), message, hint)
    rows: dict[Loc, Any] = {(*at, "missing"): given.get("missing")}
    for token, about in as_map(given.get("tokens")).items():
        loc: Loc = (*at, "tokens", token)
        rows[loc] = about
        rows[*loc, "source"] = as_map(about).get("source")
    for loc, row in rows.items():
        model = as_map(row).get("model")
        if isinstance(model, str):
            yield from unknown_model(model, (*loc, "model"), known)


def _task(loc: Loc, task: Mapping[str, Any]) -> Iterator[Fault]:
    """What a task says that its type knows nothing of, and what it lacks."""
    kind, metric = task.get("type"), task.get("metric")
    if not isinstance(kind, str) or kind not in TYPES:
        return  # which pydantic reports
    about = TYPES[kind]
    if about.columns and "data" not in task:
        yield Fault((*loc, "data"), f"'{dotted((*loc, 'data'))}' is missing")
    if about.metrics and isinstance(metric, str) and metric not in about.metrics:
        hint = hint_for(metric, about.metrics)
        yield Fault((*loc, "metric"), f"{kind} has no metric '{metric}'", hint)
    for section, known in (("columns", about.columns), ("options", about.options)):
        for key in as_map(task.get(section)):
            if key not in known and (section == "columns" or key in Asking.model_fields):
                message = f"a task of type {kind} takes no '{key}' in {section}"
                yield Fault((*loc, section, key), message, hint_for(key, sorted(known)))


def _fit(data: Mapping[str, Any]) -> Iterator[Fault]:
    """What a fit pass lacks: tasks, and of each a router split and a type that it can use."""
    used: dict[Loc, Any] = {("method",): data.get("method")}
    for i, rule in enumerate(map(as_map, as_list(data.get("rules")))):
        used["rules", i, "method"] = rule.get("method")
    used["rest", "method"] = as_map(data.get("rest")).get("method")
    fitted = {loc: m for loc, m in used.items() if m in registry.names() and registry.get(m).fit}
    if data.get("coefficients") is not None:
        if not fitted and not _fits_by_default(data):
            message = "coefficients are given, and no method of the recipe is fitted"
            yield Fault(("coefficients",), message, "remove them, or name the method they are of")
        return
    if not fitted:
        return
    loc, method = next(iter(fitted.items()))
    if data.get("vocabulary") is not None:
        message = f"'{method}' is fitted on experts as they are, and vocabulary: places their rows"
        yield Fault(("vocabulary",), message, "replay an earlier fit, or name another method")
    tasks = {n: t for n, t in as_map(data.get("tasks")).items() if _trains(as_map(t))}
    if not tasks:
        hint = "name tasks, or replay an earlier fit: `coefficients: OUT/coefficients.json`"
        yield Fault(loc, f"'{method}' is fitted on data, and the recipe has no tasks", hint)
    for name, task in tasks.items():
        if not as_map(as_map(task).get("splits")).get("router"):
            message = f"'{method}' is fitted on the router split, and task '{name}' names none"
            yield Fault(("tasks", name, "splits"), message, "name one: splits: {router: train}")
        if as_map(task).get("type") == "causal-lm":
            message = f"task '{name}' is a causal-lm task, which '{method}' cannot be fitted on yet"
            yield Fault(("tasks", name, "type"), message)


def _trains(task: Mapping[str, Any]) -> bool:
    """Whether a fit uses the task: not one that is held out, nor one that is only scored."""
    kind = str(task.get("type"))
    return task.get("expert") is not None and (kind not in TYPES or TYPES[kind].trains)


def _fits_by_default(data: Mapping[str, Any]) -> bool:
    """Whether the rest, which the recipe leaves open, can be a fitted method."""
    method = data.get("method")
    how = registry.get(method).dynamic if method in registry.names() else None
    return data.get("rest") is None and how is not None and bool(how.learned)


def _dynamic(data: Mapping[str, Any]) -> bool:
    method = data.get("method")
    return method in registry.names() and registry.get(str(method)).dynamic is not None


def _output(data: Mapping[str, Any]) -> Iterator[Fault]:
    """What does not go with an adapter as output, or only with one."""
    output = as_map(data.get("output"))
    template = output.get("chat_template")
    if isinstance(template, str) and "{" not in template and template != "auto":
        names = [*as_map(data.get("models")), *(["base"] if data.get("base") is not None else [])]
        if template not in names:
            told = f"output.chat_template: there is no model '{template}'"
            hint = did_you_mean(template, ["auto", *names]) + ", or write the Jinja text"
            yield Fault(("output", "chat_template"), told, hint)
    if output.get("format") != "adapter":
        for key in ("rank", "energy"):
            if output.get(key) is not None:
                yield Fault(("output", key), f"output.{key} is for output.format: adapter")
        if output.get("dtype") == "fp8" and _dynamic(data):
            yield Fault(("output", "dtype"), "a dynamic checkpoint cannot be stored in fp8")
        return
    loc: Loc = ("output", "format")
    if data.get("base") is None:
        yield Fault(loc, "an adapter needs a base, and the recipe names none", "add base:")
    if isinstance(data.get("base"), Recipe):
        message = "an adapter is for a base that others have too, and this one is itself a recipe"
        yield Fault(("base",), message, "merge the base first, and name its folder")
    if output.get("rank") is not None and output.get("energy") is not None:
        yield Fault(("output", "energy"), "output.rank and output.energy are two ways to say one")
    for key in ("heads", "rest", "coefficients", "vocabulary"):
        if data.get(key) is not None:
            yield Fault((key,), f"{key} cannot go into an adapter", "merge to a checkpoint first")
    if output.get("dtype") is not None:
        yield Fault(("output", "dtype"), "an adapter's factors are float32")
    method = data.get("method")
    known = registry.get(method) if method in registry.names() else None
    if known and (known.dynamic or known.fit):
        what = "dynamic" if known.dynamic else "fitted"
        yield Fault(loc, f"'{method}' is {what}, and an adapter is one static difference")


def _match_faults(origin: Origin, match: Any, loc: Loc) -> Iterator[Fault]:
    """Faults of a filtered value's `match`."""
    try:
        Match.model_validate(match)
    except ValidationError as error:
        yield from _structure(error, origin, loc)
