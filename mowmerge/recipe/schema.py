"""The recipe's grammar as JSON Schema (draft-07), for completion and hover help in editors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mowmerge.methods.registry import MethodSpec, Parameter, get, names
from mowmerge.recipe.model import BESIDE, NAME, Recipe

Node = dict[str, Any]
SCALARS = {"number": "number", "integer": "integer", "boolean": "boolean"}


def json_schema() -> Node:
    """The schema of a recipe; parameters are those of the method that is named."""
    definitions = _draft07(Recipe.model_json_schema())["$defs"]
    root = definitions.pop("Recipe")
    properties = root["properties"]
    source = {"anyOf": [{"type": "string", "minLength": 1}, {"$ref": "#"}]}
    ref, rule = definitions["ModelRef"], definitions["Rule"]
    told = {name: ref["properties"][name]["description"] for name in BESIDE}
    one = {"anyOf": [{"type": "string", "minLength": 1}, definitions["AdapterRef"]]}
    several = {"anyOf": [*one["anyOf"], {"type": "array", "items": one, "minItems": 1}]}
    shared = {
        "source": {**source, "description": told["source"]},
        "adapter": {**several, "description": told["adapter"]},
    }
    del definitions["AdapterRef"]
    definitions["ModelRef"] = {
        "anyOf": [
            {"type": "string", "minLength": 1},
            {"type": "object", "properties": shared, "required": ["source"]},
        ]
    }
    properties["base"] = {
        "anyOf": [*source["anyOf"], {"type": "null"}],
        "description": properties["base"]["description"],
    }
    properties["models"] |= {"minProperties": 1, "propertyNames": {"pattern": f"^{NAME}$"}}
    properties["tasks"] |= {"propertyNames": {"pattern": f"^{NAME}$"}}
    rule["properties"]["models"] |= {"uniqueItems": True}
    rule["not"] = {
        "properties": {"drop": {"const": True}},
        "required": ["drop"],
        "anyOf": [{"required": [key]} for key in ("method", "parameters", "models")],
    }
    tokens = definitions["Vocabulary"]["properties"]["tokens"]
    row = definitions["Vocabulary"]["properties"]["missing"]["oneOf"]
    tokens["additionalProperties"] = {"anyOf": [*row, tokens["additionalProperties"]]}
    specs = [get(name) for name in names()]
    summaries = " ".join(f"{spec.name}: {spec.summary}" for spec in specs)
    method = {"enum": [s.name for s in specs], "description": f"The merge method. {summaries}"}
    properties["method"] = rule["properties"]["method"] = method
    piece = definitions["Slice"]
    piece["properties"]["method"] = method
    piece["allOf"] = [_when(spec, {"parameters": _parameters(spec)}) for spec in specs]
    rest = definitions["Rest"]
    rest["properties"]["method"] = {"enum": [s.name for s in specs if s.dynamic is None]}
    rest["allOf"] = [_when(s, {"parameters": _parameters(s)}) for s in specs if s.dynamic is None]
    for spec in specs:
        definitions |= dict(_definitions(spec))
    root["allOf"] = [_method(spec, shared) for spec in specs]
    rule["allOf"] = [_when(spec, {"parameters": _parameters(spec)}) for spec in specs]
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "mowmerge recipe"}
    return {**head, **root, "$defs": definitions}


def _draft07(node: Any) -> Any:
    """Untitled, and each $ref alone: what stands beside one is ignored in draft-07."""
    if isinstance(node, list):
        return [_draft07(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {k: _draft07(v) for k, v in node.items() if not (k == "title" and isinstance(v, str))}
    if "$ref" in kept and len(kept) > 1:
        kept["allOf"] = [{"$ref": kept.pop("$ref")}]
    return kept


def _method(spec: MethodSpec, shared: Mapping[str, Any]) -> Node:
    """What follows where the recipe's method is this one."""
    own = {name: _ref(spec, p, "one") for name, p in spec.parameters.items() if p.per_model}
    entry = {
        "if": {"type": "object"},
        "then": {"properties": {**shared, **own}, "additionalProperties": False},
    }
    inherits = {
        "if": {"required": ["method"]},
        "else": {"properties": {"parameters": _parameters(spec)}},
    }
    followed: Node = {
        "parameters": _parameters(spec),
        "models": {"additionalProperties": entry},
        "rules": {"items": inherits},
        "slices": {"items": inherits},
    }
    return _when(spec, followed, ["base"] if spec.needs_base else [])


def _when(spec: MethodSpec, properties: Node, required: list[str] | None = None) -> Node:
    then: Node = {"properties": properties} | ({"required": required} if required else {})
    return {
        "if": {"properties": {"method": {"const": spec.name}}, "required": ["method"]},
        "then": then,
    }


def _parameters(spec: MethodSpec) -> Node:
    return {
        "type": "object",
        "properties": {name: _ref(spec, p, "any") for name, p in spec.parameters.items()},
        "additionalProperties": False,
    }


def _ref(spec: MethodSpec, p: Parameter, kind: str) -> Node:
    """A value for this parameter: `any`, or for `one` model."""
    default = f" Default: {p.default}." if p.help else f"Default: {p.default}."
    name = f"{spec.name}.{p.name}.{kind if p.per_model else 'one'}"
    return {"allOf": [{"$ref": f"#/$defs/{name}"}], "description": p.help + default}


def _definitions(spec: MethodSpec) -> Iterator[tuple[str, Node]]:
    """For each parameter the values it takes, and where it is per-model those with a map."""
    for p in spec.parameters.values():
        name = f"{spec.name}.{p.name}"
        one: list[Node] = [_scalar(p)]
        if p.kind != "integer":
            one.append({"type": "array", "items": _scalar(p), "minItems": 1})
        yield f"{name}.one", {"anyOf": [*one, _filtered(f"{name}.one")]}
        if p.per_model:
            each = {"type": "object", "additionalProperties": {"$ref": f"#/$defs/{name}.one"}}
            yield f"{name}.any", {"anyOf": [*one, each, _filtered(f"{name}.any")]}


def _scalar(p: Parameter) -> Node:
    if p.kind == "choice":
        return {"enum": list(p.choices)}
    low = {"minimum": p.low} if p.low != float("-inf") else {}
    high = {"maximum": p.high} if p.high != float("inf") else {}
    return {"type": SCALARS[p.kind], **low, **high}


def _filtered(value: str) -> Node:
    item = {
        "type": "object",
        "properties": {"match": {"$ref": "#/$defs/Match"}, "value": {"$ref": f"#/$defs/{value}"}},
        "required": ["value"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": item, "minItems": 1}
