"""What each fault of a recipe is called, where it is, and what to do about it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mowmerge.errors import RecipeError
from mowmerge.recipe.parse import loads
from mowmerge.recipe.text import dump
from mowmerge.recipe.values import Place, setting

GOOD = """\
base: org/base@rev
models:
  math: org/math
  code: {source: ./code, weight: 0.6}
method: ties
parameters: {density: 0.2}
"""


def faults(text: str, overrides: tuple[str, ...] = ()) -> list[tuple[str, str, str]]:
    with pytest.raises(RecipeError) as caught:
        loads(text, file="r.yaml", overrides=overrides)
    assert caught.value.exit_code == 3
    return [(p.where, p.message, p.hint) for p in caught.value.problems]


CASES = [
    ("metod: ties", "unknown key 'metod'", "did you mean 'method'?"),
    ("merge_method: x", "unknown key 'merge_method'", "mergekit's 'merge_method' is 'method' here"),
    ("base_model: x", "unknown key 'base_model'", "mergekit's 'base_model' is 'base' here"),
    ("dtype: x", "unknown key 'dtype'", "mergekit's 'dtype' is 'output.dtype' here"),
    ("version: 2", "version must be 1, the only version there is", ""),
    ("version: true", "version must be 1, the only version there is", ""),
    ("missing: bse", "missing must be one of error, base, not 'bse'", "did you mean 'base'?"),
    ("rules: 3", "rules must be a list, not 3", ""),
    ("rules: [{match: {rle: mlp}}]", "unknown key 'rules.0.match.rle'", "did you mean 'role'?"),
    ("rules: [{match: {role: [mlp, nrm]}}]",
     "rules.0.match.role.1 must be one of embedding, attention, mlp, norm, head, router, other,"
     " not 'nrm'",
     "did you mean 'norm'?"),
    ("rules: [{match: {layers: 5..2}}]", "rules.0.match.layers runs backwards: 5..2", ""),
    ("rules: [{match: {layers: -1}}]",
     "rules.0.match.layers must be a layer such as 3, a range such as 0..11, or a list of those",
     ""),
    ("rules: [{match: {tensors: []}}]", "rules.0.match.tensors is an empty list", ""),
    ("rules: [{drop: true}]", "'rules.0.match' is missing", ""),
    ("rules: [{match: {}, drop: yes}]", "rules.0.drop must be true or false, not 'yes'", ""),
    ("rules: [{match: {}, drop: true, method: ties}]",
     "rules.0 drops its tensors, so it takes no method", ""),
    ("rules: [{match: {}, models: [mth]}]", "rules.0.models.0: there is no model 'mth'",
     "did you mean 'math'?"),
    ("rules: [{match: {}, models: [math, math]}]", "rules.0.models names 'math' twice", ""),
    ("rules: [{match: {}, method: slrp}]", "rules.0.method: there is no method 'slrp'",
     "did you mean 'slerp'?"),
    ("rules: [{match: {}, method: passthrough}]",
     "rules.0: 'passthrough' takes exactly 1 model(s), not 2", ""),
    ("rules: [{match: {}, method: linear, parameters: {weight: {math: 1, code: -1}}}]",
     "rules.0: the weights [1.0, -1.0] sum to zero, so they cannot be normalized", ""),
    ("rules: [{match: {}, method: linear, parameters: {density: 1}}]",
     "rules.0.parameters.density is not a parameter of 'linear'", "known: normalize, weight"),
    ("rules: [{match: {}, parameters: {weight: {cod: 1}}}]",
     "rules.0.parameters.weight.cod: there is no model 'cod'", "did you mean 'code'?"),
    ("output: {dtype: bf16}",
     "output.dtype must be one of float64, float32, float16, bfloat16, fp8, not 'bf16'",
     "did you mean 'bfloat16'?"),
    ("output: {shard_size: big}",
     "output.shard_size must be a number of bytes such as 5GB, 500MB or 1GiB", ""),
    ("output: {shard_size: 0}",
     "output.shard_size must be a number of bytes such as 5GB, 500MB or 1GiB", ""),
    ("output: {path: 3}", "output.path must be text, not 3", ""),
    ("heads: {match: x, policy: all}", "heads.policy must be per_task, not 'all'", ""),
    ("tasks: {t: {expert: mat, type: causal-lm, data: {}}}",
     "tasks.t.expert: there is no model 'mat'", "did you mean 'math'?"),
    ("tasks: {t: {expert: math, type: causal-lm, data: {}, limit: '3'}}",
     "tasks.t.limit must be a whole number, not '3'", ""),
    ("tasks: {t: {expert: math, type: causal-lm, data: {}, limit: true}}",
     "tasks.t.limit must be a whole number, not true", ""),
    ("tasks: {t: {expert: math, type: causal-lm}}", "'tasks.t.data' is missing", ""),
    ("? [a]\n: 3", "a key must be a word", ""),
    ("'': 3", "a key must be a word", ""),
    ("3: x", "the key 3 is not text", "put it in quotes"),
    ("x: !!python/name:os.system", "the tag 'tag:yaml.org,2002:python/name:os.system' is not known",
     ""),
]  # fmt: skip

PARAMETERS = [
    ("density: 1.5", "parameters.density must be 0..1, not 1.5", ""),
    ("density: '0.5'", "parameters.density must be a number, not '0.5'", ""),
    ("density: true", "parameters.density must be a number, not true", ""),
    ("density: .nan", "parameters.density must be finite, not nan", ""),
    ("density: ", "parameters.density must be a number, not empty", ""),
    ("density: []", "parameters.density is an empty list", ""),
    ("density: [0, 0.5, -1]", "parameters.density.2 must be 0..1, not -1", ""),
    ("density: [0, {value: 1}]", "parameters.density.1 must be a number, not a mapping", ""),
    ("density: {math: 2}", "parameters.density.math must be 0..1, not 2", ""),
    ("density: {math: {code: 1}}",
     "parameters.density.math is for one model already, so it takes no map", ""),
    ("density: {maths: 1}", "parameters.density.maths: there is no model 'maths'",
     "did you mean 'math'?"),
    ("density: {value: 1}", "parameters.density is a filtered value outside a list",
     "write a list: - {match: ..., value: ...}"),
    ("density: [{value: {code: [0, 9]}}]", "parameters.density.0.value.code.1 must be 0..1, not 9",
     ""),
    ("density: [{match: {role: mlp}}]", "'parameters.density.0.value' is missing", ""),
    ("density: [{matches: {}, value: 1}]", "unknown key 'parameters.density.0.matches'",
     "did you mean 'match'?"),
    ("density: [{match: {layers: a}, value: 1}]",
     "parameters.density.0.match.layers must be a layer such as 3, a range such as 0..11, or a list"
     " of those",
     ""),
    ("density: [{match: {rol: mlp}, value: 1}]", "unknown key 'parameters.density.0.match.rol'",
     "did you mean 'role'?"),
    ("scale: {math: 1}",
     "parameters.scale: 'scale' is one value for all models, so it takes no map", ""),
    ("trim: globl", "parameters.trim must be one of global, tensor, not 'globl'",
     "did you mean 'global'?"),
    ("trim: [global, 2]", "parameters.trim.1 must be one of global, tensor, not 2", ""),
    ("rescale: on", "parameters.rescale must be true or false, not 'on'", ""),
    ("lambda: 1", "parameters.lambda is not a parameter of 'ties'",
     "mergekit's 'lambda' is 'scale' here"),
    ("densty: 1", "parameters.densty is not a parameter of 'ties'", "did you mean 'density'?"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message", "hint"), CASES)
def test_a_fault_says_where_what_and_what_to_do(line: str, message: str, hint: str) -> None:
    assert ("r.yaml:7", message, hint) in faults(GOOD + line + "\n")


@pytest.mark.parametrize(("line", "message", "hint"), PARAMETERS)
def test_a_faulty_parameter(line: str, message: str, hint: str) -> None:
    text = GOOD.replace("parameters: {density: 0.2}\n", f"parameters:\n  {line}\n")
    assert faults(text) == [("r.yaml:7", message, hint)]


def test_faults_of_model_entries() -> None:
    text = """\
base: b
models:
  math: {source: x, densty: 1}
  code: {source: x, scale: 2, density: {math: 1}}
  a b: 3
  none: {weight: 1}
  base: z
method: ties
"""
    assert faults(text) == [
        ("r.yaml:3", "models.math.densty is not a parameter of 'ties'", "did you mean 'density'?"),
        ("r.yaml:4", "models.code.scale: 'scale' is one value for all models",
         "write it under parameters"),
        ("r.yaml:4", "models.code.density is for one model already, so it takes no map", ""),
        ("r.yaml:5", "models.a b must be a source, or a mapping with 'source' and parameters", ""),
        ("r.yaml:5", "'a b' in models cannot be a name of files",
         "letters, digits, '-', '_' and '.', a letter or digit first"),
        ("r.yaml:6", "'models.none.source' is missing", "a Hub id, a path or a nested recipe"),
        ("r.yaml:7", "a model cannot be named 'base' where the recipe names a base",
         "give it another name"),
    ]  # fmt: skip


def test_all_faults_come_at_once_in_the_order_of_their_lines() -> None:
    text = """\
version: 3
models: {a: x, b: y}
method: ties
parameters:
  density: 7
  density: 8
  elect: majority
rules:
  - match: {role: mpl}
    parameters: {scale: big}
  - match: {}
    method: tie
outptu: {}
"""
    assert [where for where, _, _ in faults(text)] == [
        f"r.yaml:{n}" for n in (1, 3, 6, 6, 7, 9, 10, 12, 13)
    ]
    assert ("r.yaml:6", "the key 'parameters.density' is already on line 5", "") in faults(text)


def test_a_method_that_needs_a_base() -> None:
    hint = "add base: the model that the others were fine-tuned from"
    message = "'ties' needs a base, and the recipe names none"
    text = "models: {a: x, b: y}\nmethod: linear\nrules:\n- match: {}\n  method: ties\n"
    assert faults("models: {a: x}\nmethod: ties\n") == [("r.yaml:2", f"method: {message}", hint)]
    assert faults(text) == [("r.yaml:5", f"rules.0.method: {message}", hint)]
    assert faults("models: {a: x}\nmethod: linear\nmissing: base") == [
        ("r.yaml:3", "missing: base needs a base, and the recipe names none", "")
    ]


def test_the_number_of_models() -> None:
    three = "models: {a: x, b: y, c: z}\nmethod: slerp\n"
    assert faults(three) == [("r.yaml:2", "'slerp' takes exactly 2 model(s), not 3", "")]
    loads(three + "rules: [{match: {}, models: [a, b]}]")  # the planner knows whether that is all
    assert faults(three + "rules: [{match: {}, models: [a]}]") == [
        ("r.yaml:3", "rules.0: 'slerp' takes exactly 2 model(s), not 1", "")
    ]
    assert faults("base: b\nmodels: {a: x}\nmethod: model_stock\n") == [
        ("r.yaml:3", "'model_stock' takes at least 2 models, not 1", "")
    ]
    assert faults("models: {}\nmethod: linear") == [
        ("r.yaml:1", "models must name at least one model", "")
    ]


def test_parameters_that_cannot_work_together() -> None:
    text = "models: {a: {source: x, weight: 1}, b: {source: y, weight: -1}}\nmethod: linear\n"
    message = "the weights [1.0, -1.0] sum to zero, so they cannot be normalized"
    assert faults(text) == [("r.yaml:2", message, "")]
    loads(text + "parameters: {normalize: false}")
    rule = "models: {a: {source: x, weight: 1}, b: y}\nmethod: linear\n"
    assert faults(rule + "rules:\n- match: {}\n  parameters: {weight: {b: -1}}") == [
        ("r.yaml:5", f"rules.0: {message}", "")
    ]


FULL: dict[str, Any] = {
    "version": 1,
    "base": "b",
    "models": {
        "math": "x",
        "code": {"source": {"models": {"p": "y"}, "method": "linear"}, "weight": 2},
    },
    "method": "linear",
    "parameters": {"weight": {"math": [{"match": {"layers": "0..3"}, "value": [0, 1]}]}},
    "rules": [
        {"match": {"role": "mlp", "layers": 3}, "parameters": {"weight": 2}, "models": ["math"]}
    ],
    "missing": "base",
    "heads": {"match": "c*"},
    "tasks": {"t": {"expert": "math", "type": "causal-lm", "data": {}, "splits": {"eval": "e"}}},
    "output": {"path": "x", "shard_size": "5GB"},
}
words = st.sampled_from(
    ["ties", "slerp", "math", "weight", "mlp", "0..9", "value", "match", "", "base"]
)
scalars = words | st.none() | st.booleans() | st.integers(-2, 2) | st.floats()
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_is_put_anywhere_is_at_worst_a_recipe_error(data: st.DataObject) -> None:
    recipe = json.loads(json.dumps(FULL))
    here: Any = recipe
    while True:
        key = data.draw(
            st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here)))
        )
        if not here[key] or not isinstance(here[key], dict | list) or data.draw(st.booleans()):
            break
        here = here[key]
    here[key] = data.draw(trees)
    try:
        setting(loads(dump(recipe)), Place("w", "mlp", 3, 0.5))
    except RecipeError as error:
        assert all(problem.where and problem.message for problem in error.problems)
