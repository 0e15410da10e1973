"""What a recipe's merge needed: read off the methods it uses, wherever it uses them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from mowmerge.methods import registry
from mowmerge.recipe import needs, parse

TASK = {
    "expert": "a", "type": "text-classification", "data": {"path": "json"},
    "splits": {"router": "train", "eval": "test"},
}  # fmt: skip


def recipe(**more: Any) -> Any:
    held = {"base": "./base", "models": {"a": "./a", "b": "./b"}, "method": "linear", **more}
    return parse.loads(json.dumps(held))


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({}, {"needs_base": False, "needs_data": False, "heads": "merged"}),
        ({"method": "passthrough", "models": {"a": "./a"}}, {"faithful": "yes"}),
        ({"method": "task_arithmetic"}, {"needs_base": True, "faithful": "yes"}),
        (
            {"method": "ties", "heads": {"match": "classifier.*"}},
            {"needs_base": True, "heads": "per_task", "faithful": "variant (ties)"},
        ),
        (
            {"rules": [{"match": {"role": "mlp"}, "method": "ties"}]},
            {"needs_base": True, "faithful": "variant (linear, ties)"},
        ),
        ({"method": "mow"}, {"needs_base": True, "needs_gradients": False}),  # for the rest
        (
            {"method": "mow", "rest": {"method": "linear"}},
            {"needs_base": False, "faithful": "variant (mow, linear)"},
        ),
        (
            {"method": "adamerging", "heads": {"match": "c.*"},
             "tasks": {"a": TASK, "b": TASK | {"expert": "b"}}},
            {"needs_data": True, "needs_gradients": True, "needs_labels": False},
        ),
        (
            {"models": {"a": {"source": {"base": "./base", "models": {"c": "./c"},
                                         "method": "ties"}}, "b": "./b"}},
            {"needs_base": True, "faithful": "variant (linear, ties)"},
        ),
    ],
)  # fmt: skip
def test_flags_are_those_of_all_methods_used(more: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = needs.needs(recipe(**more))
    assert found | wanted == found


def test_trained_routers_need_data_and_some_objectives_gradients() -> None:
    mow = recipe(method="mow", rest={"method": "linear"})
    assert not needs.needs(mow)["needs_data"]
    task, distilled = needs.needs(mow, "task"), needs.needs(mow, "distill")
    assert task["needs_data"] and not task["needs_gradients"]
    assert distilled["needs_data"] and distilled["needs_gradients"]


def test_a_docstring_says_how_faithful_a_method_is() -> None:
    assert registry.get("magmax").faithful == "yes"  # none; weight and tie are additions
    wemoe = registry.get("wemoe")
    assert wemoe.faithful == "variant"

    def silent(models: Any) -> Any:
        """Says nothing of a paper."""
        return models

    assert replace(wemoe, function=silent).faithful == "unverified"
