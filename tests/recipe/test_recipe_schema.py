"""The JSON Schema accepts what the parser accepts, and refuses typing errors."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from mowmerge.errors import RecipeError
from mowmerge.methods.registry import get, names
from mowmerge.recipe.parse import loads
from mowmerge.recipe.schema import json_schema
from mowmerge.recipe.text import read

BASE = "base: b\nmodels: {m: x, n: {source: y, weight: 0.5}}\nmethod: ties\n"
GOOD = [
    BASE,
    "models: {m: x}\nmethod: linear\nversion: 1\n",
    BASE + "parameters: {density: 0.1, weight: {m: [0, 1]}, trim: tensor, scale: [1, 2.5]}",
    BASE
    + "parameters: {scale: [{match: {role: [mlp], layers: [1, 2..3]}, value: 2}, {value: [1, 2]}]}",
    BASE + "parameters: {weight: [{match: {tensors: a*}, value: {n: [{value: 2}]}}]}",
    BASE + "rules: [{match: {role: mlp, layers: 0..3, tensors: [a, b]}, parameters: {scale: 2}}]",
    BASE + "rules: [{match: {layers: 3}, method: slerp, parameters: {t: 0.1}, models: [m, n]}]",
    BASE + "rules: [{match: {}, models: m}, {match: {}, drop: true}]",
    BASE
    + "missing: base\nheads: {match: 'c.*'}\noutput: {path: x, dtype: float16, shard_size: 5GB}",
    BASE
    + "tasks: {t: {expert: m, type: causal-lm, data: {path: x}, splits: {eval: test}, limit: 3}}",
    "base: {models: {p: x}, method: linear}\n"
    "models: {m: {source: {models: {q: y}, method: linear}}}\nmethod: ties",
]
BAD = [
    "models: {m: x}\nmethod: ties",
    "models: {}\nmethod: linear",
    "models: {m: 3}\nmethod: linear",
    "models: {'a b': x}\nmethod: linear",
    "models: {m: {weight: 1}}\nmethod: linear",
    "models: {m: {source: x, normalize: true}}\nmethod: linear",
    "models: {m: {source: {models: {q: y}, method: liner}}}\nmethod: linear",
    BASE + "metod: ties",
    BASE + "version: 2",
    BASE + "parameters: {densty: 1}",
    BASE + "parameters: {density: 1.5}",
    BASE + "parameters: {density: [0, 2]}",
    BASE + "parameters: {density: '0.5'}",
    BASE + "parameters: {density: true}",
    BASE + "parameters: {scale: {m: 1}}",
    BASE + "parameters: {trim: globl}",
    BASE + "parameters: {scale: [{match: {rol: mlp}, value: 1}]}",
    BASE + "rules: [{match: {role: mpl}}]",
    BASE + "rules: [{match: {layers: a..b}}]",
    BASE + "rules: [{parameters: {scale: 1}}]",
    BASE + "rules: [{match: {}, parameters: {scal: 1}}]",
    BASE + "rules: [{match: {}, method: linear, parameters: {density: 1}}]",
    BASE + "rules: [{match: {}, method: lin}]",
    BASE + "rules: [{match: {}, drop: true, method: linear}]",
    BASE + "output: {dtype: bf16}",
    BASE + "output: {shard_size: big}",
    BASE + "tasks: {t: {expert: m, type: vision, data: {}}}",
]


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


@pytest.mark.parametrize("text", GOOD)
def test_good_recipes_are_valid(validator: Any, text: str) -> None:
    loads(text)
    assert not list(validator.iter_errors(read(text, "r").data))


@pytest.mark.parametrize("text", BAD)
def test_bad_recipes_are_not(validator: Any, text: str) -> None:
    with pytest.raises(RecipeError):
        loads(text)
    assert list(validator.iter_errors(read(text, "r").data))


def test_the_schema_is_local_draft_07_and_helps() -> None:
    schema = json_schema()
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    assert schema["title"] == "mowmerge recipe"
    assert schema["properties"]["method"]["enum"] == names()
    branch = next(b for b in schema["allOf"] if b["if"]["properties"]["method"]["const"] == "ties")
    density = branch["then"]["properties"]["parameters"]["properties"]["density"]
    assert density["description"] == f"{get('ties').parameters['density'].help} Default: 0.2."

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            assert not {"prefixItems", "unevaluatedProperties", "$dynamicRef"} & set(node)
            if "$ref" in node:
                assert len(node) == 1
                target: Any = schema
                for part in node["$ref"].removeprefix("#").split("/")[1:]:
                    target = target[part]
        for inner in (
            node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        ):
            walk(inner)

    walk(schema)
    assert all("description" in value for value in schema["properties"].values())
