"""Which value holds where: levels, maps, gradients, filters, rules."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mowmerge.methods.registry import get
from mowmerge.recipe.parse import loads
from mowmerge.recipe.values import Place, Setting, gradient, setting

HEAD = "base: base\nmodels: {a: x, b: {source: y, weight: 0.5}, c: z}\nmethod: ties\n"


def at(
    text: str, name: str = "w", role: str = "mlp", layer: int | None = 0, depth: float = 0.0
) -> Setting:
    return setting(loads(HEAD + text), Place(name, role, layer, depth))


def test_defaults() -> None:
    found = at("")
    assert found.parameters == {
        "weight": (1.0, 0.5, 1.0), "density": (0.2, 0.2, 0.2), "trim": "global", "elect": "mass",
        "aggregate": "mean", "zero_sign": "majority", "rescale": False, "scale": 1.0,
    }  # fmt: skip
    assert (found.method, found.models, found.drop, found.rule) == (
        "ties",
        ("a", "b", "c"),
        False,
        None,
    )


def test_levels_fall_through_for_each_model() -> None:
    text = """\
parameters: {weight: {a: 2, b: 3}, density: 0.9}
rules:
  - match: {role: mlp}
    parameters: {weight: {a: 4}}
"""
    assert at(text).parameters["weight"] == (4.0, 0.5, 1.0)  # rule, entry, default
    assert at(text, role="norm").parameters["weight"] == (2.0, 0.5, 1.0)
    assert at(text).parameters["density"] == (0.9, 0.9, 0.9)


def test_a_rule_that_changes_the_method_starts_from_its_defaults() -> None:
    text = """\
parameters: {weight: 2, scale: 3}
rules:
  - {match: {role: head}, method: task_arithmetic, parameters: {weight: {a: 5}}}
  - {match: {role: norm}, method: ties, parameters: {scale: 4}}
"""
    head, norm = at(text, role="head"), at(text, role="norm")
    assert (head.method, head.rule) == ("task_arithmetic", 0)
    defaults = {"scale": 1.0, "normalize": False, "coefficients": "given"}
    assert head.parameters == {"weight": (5.0, 1.0, 1.0), **defaults}
    assert norm.parameters["weight"] == (2.0, 0.5, 2.0)  # the same method: nothing is reset
    assert norm.parameters["scale"] == 4.0


def test_the_first_rule_that_matches_wins() -> None:
    text = """\
rules:
  - {match: {role: [mlp, norm], layers: [1, 3..4]}, parameters: {scale: 1.5}}
  - {match: {tensors: ["*.bias", "lm_*"]}, drop: true}
  - {match: {layers: 0..4}, models: [c, a]}
"""
    assert [at(text, layer=n).rule for n in (0, 1, 2, 3, 4, 5)] == [2, 0, 2, 0, 0, None]
    assert at(text, role="attention", layer=1).rule == 2
    assert at(text, layer=None).rule is None
    assert at(text, name="x.bias", layer=None).drop and at(text, name="lm_head", layer=9).drop
    assert at(text, name="LM_head", layer=None).rule is None  # case matters
    assert at(text, name="x.bias\n", layer=None).rule is None
    picked = at("parameters: {weight: {a: 2}}\n" + text)
    assert (picked.models, picked.parameters["weight"]) == (("c", "a"), (1.0, 2.0))


def test_filtered_values() -> None:
    text = """\
parameters:
  scale: [{match: {role: mlp, layers: 0..1}, value: 2}, {match: {role: mlp}, value: [3, 5]}]
  weight:
    - {match: {tensors: "*.q"}, value: {a: 7}}
    - {match: {role: norm}, value: 8}
"""
    assert at(text, layer=1).parameters["scale"] == 2.0
    assert at(text, layer=2, depth=0.5).parameters["scale"] == 4.0
    assert at(text, role="norm").parameters["scale"] == 1.0
    assert at(text, name="l.q").parameters["weight"] == (7.0, 0.5, 1.0)
    assert at(text, role="norm").parameters["weight"] == (8.0, 0.5, 8.0)


def test_kinds() -> None:
    found = at("rules: [{match: {}, method: dare, parameters: {seed: 3.0, scale: 2}}]").parameters
    assert (found["seed"], type(found["seed"])) == (3, int)
    assert (found["scale"], type(found["scale"])) == (2.0, float)
    assert set(found) == set(get("dare").parameters)


@pytest.mark.parametrize(
    ("points", "depth", "value"),
    [
        ([0, 0.5, 1], 0.0, 0.0),
        ([0, 0.5, 1], 0.25, 0.25),
        ([0, 0.5, 1], 1.0, 1.0),
        ([3], 0.7, 3.0),
        ([0, 10], 0.3, 3.0),
        ([1, 0, 1], 0.75, 0.5),
    ],
)
def test_gradients(points: list[float], depth: float, value: float) -> None:
    assert gradient(points, depth) == pytest.approx(value, abs=1e-15)
    found = at(f"parameters: {{scale: {points}}}", depth=depth)
    assert found.parameters["scale"] == gradient(points, depth)


@pytest.mark.parametrize(("points", "steps"), [
    ([True, False], [True, True, True, True, False]),
    (["mean", "sum", "mean"], ["mean", "mean", "sum", "sum", "mean"]),
])  # fmt: skip
def test_a_gradient_of_words_is_in_steps(points: list[Any], steps: list[Any]) -> None:
    assert [gradient(points, depth / 4) for depth in range(5)] == steps


def test_words_may_be_a_gradient() -> None:
    head = "base: b\nmodels: {a: x}\nmethod: ties\nparameters: {aggregate: [mean, sum]}\n"
    recipe = loads(head)
    found = [setting(recipe, Place("w", "mlp", n, n / 3)).parameters["aggregate"] for n in range(4)]
    assert found == ["mean", "mean", "mean", "sum"]


finite = st.floats(-1e308, 1e308)
depths = st.floats(0, 1)


@given(st.lists(finite, min_size=1, max_size=6), depths)
def test_a_gradient_stays_between_its_points(points: list[float], depth: float) -> None:
    assert min(points) <= gradient(points, depth) <= max(points)
    assert (gradient(points, 0.0), gradient(points, 1.0)) == (points[0], points[-1])


@given(finite, finite, depths, depths)
def test_a_gradient_of_two_points_is_monotonic(a: float, b: float, x: float, y: float) -> None:
    low, high = sorted((x, y))
    rise = gradient([a, b], high) - gradient([a, b], low)
    assert rise * (1 if b >= a else -1) >= -1e-12 * max(abs(a), abs(b), 1)


levels = st.fixed_dictionaries(
    {},
    optional={
        "rule": st.dictionaries(st.sampled_from("ab"), st.integers(0, 9), min_size=1),
        "recipe": st.dictionaries(st.sampled_from("ab"), st.integers(10, 19), min_size=1),
        "entry": st.dictionaries(st.sampled_from("ab"), st.integers(20, 29), min_size=1),
    },
)


@given(levels)
def test_precedence(given_levels: dict[str, dict[str, int]]) -> None:
    entry = given_levels.get("entry", {})
    models = {m: {"source": "x"} | ({"weight": entry[m]} if m in entry else {}) for m in "ab"}
    data = {
        "models": models, "method": "linear", "base": "b",
        "parameters": {"weight": given_levels.get("recipe", {}), "normalize": False},
        "rules": [{"match": {}, "parameters": {"weight": given_levels.get("rule", {})}}],
    }  # fmt: skip
    found = setting(loads(str(data).replace("False", "false")), Place("w", "mlp", 0, 0.0))
    for i, model in enumerate("ab"):
        values = [given_levels.get(level, {}).get(model) for level in ("rule", "entry", "recipe")]
        assert found.parameters["weight"][i] == next((v for v in values if v is not None), 1.0)


def test_tensors_alike_share_a_setting() -> None:
    recipe = loads(HEAD + "rules: [{match: {role: mlp}, parameters: {scale: 2}}]")
    places = [Place(str(n), "mlp", n, n / 9) for n in range(10)]
    assert len({id(setting(recipe, place)) for place in places}) == 1


def test_twenty_thousand_tensors_settle_in_a_blink() -> None:
    recipe = loads(
        HEAD
        + """\
parameters: {density: [0.1, 0.5, 0.9], weight: [{match: {tensors: "*.q_proj.*"}, value: {a: 2}}]}
rules:
  - {match: {tensors: "*lm_head*"}, method: linear}
  - {match: {role: mlp, layers: [0..11, 40..79]}, parameters: {scale: [0.5, 1]}}
  - {match: {tensors: ["model.embed*", "*.norm.*"]}, drop: true}
"""
    )
    roles = ("mlp", "attention", "norm", "other")
    places = [
        Place(
            f"model.layers.{n % 100}.{n // 100}.q_proj.weight", roles[n % 4], n % 100, n % 100 / 99
        )
        for n in range(21_000)
    ]
    start = time.process_time()
    for place in places:
        setting(recipe, place)
    assert time.process_time() - start < 0.3
