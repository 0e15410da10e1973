"""Reading recipes: lines, overrides, nested recipes, and what each fault is called."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from mowmerge.errors import Problem, RecipeError
from mowmerge.recipe.model import Recipe
from mowmerge.recipe.parse import load, loads

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


def test_a_good_recipe_has_every_default() -> None:
    recipe = loads(GOOD, name="demo")
    assert (recipe.version, recipe.base, recipe.method) == (1, "org/base@rev", "ties")
    assert recipe.models["math"].source == "org/math"
    assert recipe.models["code"].parameters == {"weight": 0.6}
    assert (recipe.missing, recipe.rules, recipe.heads, dict(recipe.tasks)) == (
        "error",
        (),
        None,
        {},
    )
    assert (recipe.output.path, recipe.output.dtype, recipe.output.shard_size) == (
        None,
        None,
        5 * 10**9,
    )
    assert (recipe.name, recipe.text) == ("demo", GOOD)


def test_everything_that_the_grammar_has() -> None:
    recipe = loads(
        GOOD
        + """\
version: 1
rules:
  - match: {role: [mlp, attention], layers: [3, 5..7], tensors: "*.weight"}
    parameters: {weight: {math: 0.8}}
  - match: {layers: 0..2}
    method: linear
    models: [code]
  - {match: {tensors: [a.*, b.*]}, drop: true}
missing: base
heads: {match: "classifier.*", policy: per_task}
tasks:
  math:
    expert: math
    type: image-classification
    data: {path: imagefolder, data_dir: ./data}
    columns: {input: image}
    splits: {router: train, eval: test}
    metric: accuracy
    limit: 10
output: {path: ./out, dtype: bfloat16, shard_size: 1GiB}
"""
    )
    first, second, third = recipe.rules
    assert (first.match.role, first.match.layers) == (("mlp", "attention"), ((3, 3), (5, 7)))
    assert first.match.tensors == ("*.weight",)
    assert (second.method, second.models, third.drop) == ("linear", ("code",), True)
    assert recipe.heads is not None and recipe.heads.match == ("classifier.*",)
    assert (recipe.tasks["math"].limit, recipe.tasks["math"].seed) == (10, 0)
    assert recipe.output.shard_size == 2**30


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("64KiB", 65536), ("7", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert loads(GOOD + f"output: {{shard_size: {text}}}").output.shard_size == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the recipe is empty"),
        ("# nothing\n", "the recipe is empty"),
        ("{}", "the recipe is empty"),
        ("- a\n", "the recipe is not a mapping of keys to values"),
        ("word", "the recipe is not a mapping of keys to values"),
    ],
)
def test_no_recipe_at_all(text: str, message: str) -> None:
    assert faults(text) == [("r.yaml:1", message, "write at least models: and method:")]


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("a: 1\nb: [1\n", "r.yaml:3", "not YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: *b\n", "r.yaml:1", "not YAML: found undefined alias 'b'"),
        ("a: 1\n---\nb: 2\n", "r.yaml:3", "not a recipe: several documents in one file"),
        ("a: &x [1, *x]\n", "r.yaml:1", "an anchor contains itself"),
        ("[" * 1500, "r.yaml", "not a recipe: nested too deeply"),
        ("a: \x07", "r.yaml",
         "not YAML: unacceptable character #x0007: special characters are not allowed",),
    ],
)  # fmt: skip
def test_text_that_is_not_yaml(text: str, where: str, message: str) -> None:
    assert faults(text) == [(where, message, "")]


def test_a_bomb_of_aliases_is_refused() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    [(_, message, _)] = faults("\n".join(lines))
    assert message == "not a recipe: over 100,000 values"


def test_yaml_numbers_and_words() -> None:
    recipe = loads(GOOD + "rules: [{match: {}, parameters: {scale: 1e-5, weight: {math: 1E5}}}]")
    assert recipe.rules[0].parameters == {"scale": 1e-5, "weight": {"math": 1e5}}
    text = (
        GOOD
        + "tasks: {t: {expert: math, type: causal-lm, data: {a: on, b: no, c: 012, d: 12:30:00}}}"
    )
    assert loads(text).tasks["t"].data == {"a": "on", "b": "no", "c": 12, "d": "12:30:00"}


def test_anchors_and_merged_keys() -> None:
    text = """\
base: b
models: {a: x, b: y}
method: ties
parameters: &shared {density: 0.3, scale: 2}
rules:
  - match: {role: mlp}
    parameters: {<<: *shared, scale: 3}
  - match: {role: norm}
    parameters: *shared
"""
    first, second = loads(text).rules
    assert first.parameters == {"density": 0.3, "scale": 3}
    assert second.parameters == {"density": 0.3, "scale": 2}
    changed = loads(text, overrides=["parameters.density=0.9"])
    assert changed.rules[1].parameters["density"] == 0.3


def test_overrides() -> None:
    rules = "rules:\n- match: {role: mlp}\n"
    recipe = loads(
        GOOD + rules,
        overrides=[
            "parameters.density=0.3",
            "parameters.weight.math=1e-5",
            "rules.0.parameters.density=0.4",
            "output.path=./elsewhere",
        ],
    )
    assert recipe.parameters == {"density": 0.3, "weight": {"math": 1e-5}}
    assert recipe.rules[0].parameters == {"density": 0.4}
    assert recipe.output.path == "./elsewhere"
    again = loads(recipe.text)
    assert again.model_dump() == recipe.model_dump()
    assert recipe.where("parameters", "density") == "--set parameters.density=0.3"
    assert recipe.where("models", "code", "weight") == "<recipe>:4"


def test_a_key_with_dots_is_found_by_an_override() -> None:
    text = GOOD.replace("math: org/math", "llama-3.1: {source: org/llama}")
    recipe = loads(text, overrides=["models.llama-3.1.weight=2"])
    assert recipe.models["llama-3.1"].parameters == {"weight": 2}


def test_an_override_beside_a_source_in_its_short_form() -> None:
    text = GOOD.replace("math: org/math", "math: {source: base, adapter: ./lora}").replace(
        "{source: ./code, weight: 0.6}", "./code"
    )
    asked = ["models.code.weight=0.5", "models.math.adapter.weight=2"]
    recipe = loads(text, file="r.yaml", overrides=asked)
    code, (lora,) = recipe.models["code"], recipe.models["math"].adapter
    assert (code.source, code.parameters) == ("./code", {"weight": 0.5})
    assert (lora.source, lora.weight) == ("./lora", 2)
    assert recipe.where("models", "code", "source") == "r.yaml:4"
    assert loads(recipe.text).model_dump() == recipe.model_dump()
    inner = "models: {n: {source: {models: {a: ./a}, method: linear}}}\nmethod: linear\n"
    nested = loads(inner, overrides=["models.n.source.models.a.weight=0.5"]).models["n"].source
    assert isinstance(nested, Recipe)
    assert nested.models["a"].parameters == {"weight": 0.5}


def test_faulty_overrides() -> None:
    overrides = (
        "parameters.densty=0.3", "rules.2.method=ties", "method.x=1", "density", "output.dtype=[",
    )  # fmt: skip
    text = GOOD + "rules: []\n"
    assert faults(text, overrides) == [
        ("--set rules.2.method=ties", "rules has 0 item(s), so there is no '2'", ""),
        ("--set method.x=1", "method is neither a mapping nor a list", ""),
        ("--set density", "not an assignment",
         "write KEY.PATH=VALUE, such as parameters.density=0.3"),
        ("--set output.dtype=[",
         "not YAML: expected the node content, but found '<stream end>'", ""),
        ("--set parameters.densty=0.3", "parameters.densty is not a parameter of 'ties'",
         "did you mean 'density'?"),
    ]  # fmt: skip


def test_where_points_at_the_nearest_line() -> None:
    recipe = loads(
        GOOD + "rules:\n  - match: {role: mlp}\n    parameters:\n      scale: 2\n", file="r.yaml"
    )
    assert recipe.where("rules", 0) == "r.yaml:8"
    assert recipe.where("rules", 0, "parameters", "scale") == "r.yaml:10"
    assert recipe.where("rules", 0, "parameters", "density") == "r.yaml:9"
    assert recipe.where("output", "path") == "r.yaml:1"


def test_nested_recipes(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "sub.yaml").write_text("models: {a: ./w, b: y}\nmethod: linear\n")
    (tmp_path / "inner" / "w").mkdir()
    (tmp_path / "top.yaml").write_text(
        "base: {models: {p: x}, method: linear}\n"
        "models:\n  one: inner/sub.yaml\n  two: {source: inner/sub.yaml, weight: 2}\n"
        "method: task_arithmetic\n"
    )
    recipe = load(tmp_path / "top.yaml")
    base, one, two = recipe.base, recipe.models["one"].source, recipe.models["two"].source
    assert isinstance(base, Recipe) and isinstance(one, Recipe) and isinstance(two, Recipe)
    assert (base.name, one.name, recipe.name) == ("base", "sub", "top")
    assert recipe.models["two"].parameters == {"weight": 2}
    assert one.locate("./w") == str(tmp_path / "inner" / "w")
    assert one.locate("org/none") == "org/none"
    assert base.where("method") == f"{tmp_path / 'top.yaml'}:1"


def test_faults_of_nested_recipes_carry_their_own_lines(tmp_path: Path) -> None:
    top, sub = tmp_path / "top.yaml", tmp_path / "sub.yaml"
    sub.write_text("models: {a: x, b: y}\nmethod: linear\nparameters:\n  normalise: true\n")
    top.write_text(
        "models:\n  one: sub.yaml\n  two: {source: {models: {a: x},\n    method: lin}}\n"
        "method: tie\n"
    )
    with pytest.raises(RecipeError) as caught:
        load(top)
    assert caught.value.problems == (
        Problem("method: there is no method 'tie'", f"{top}:5", "did you mean 'ties'?"),
        Problem("parameters.normalise is not a parameter of 'linear'", f"{sub}:4",
                "did you mean 'normalize'?"),
        Problem("method: there is no method 'lin'", f"{top}:4", "did you mean 'linear'?"),
    )  # fmt: skip


def test_a_recipe_that_includes_itself(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("method: linear\nmodels: {m: b.yaml}\n")
    (tmp_path / "b.yaml").write_text("models: {m: ./a.yaml}\nmethod: linear\n")
    with pytest.raises(RecipeError, match="includes itself: a.yaml -> b.yaml -> a.yaml") as caught:
        load(tmp_path / "a.yaml")
    assert caught.value.problems[0].where == f"{tmp_path / 'b.yaml'}:1"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("models: {a: gone.yml}\nmethod: linear\n")
    (tmp_path / "latin.yaml").write_bytes(b"base: \xe9\xff")
    with pytest.raises(RecipeError) as caught:
        load(tmp_path / "recipes.yaml")
    path = tmp_path / "recipes.yaml"
    assert caught.value.problems == (
        Problem(f"there is no file '{path}'", "", "did you mean 'recipe.yaml'?"),
    )
    with pytest.raises(RecipeError, match="is not UTF-8 text"):
        load(tmp_path / "latin.yaml")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        load(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load(tmp_path / "recipe.yaml")
    assert caught.value.problems[0].where == f"{tmp_path / 'recipe.yaml'}:1"
    assert caught.value.problems[0].message == f"there is no file '{tmp_path / 'gone.yml'}'"


def test_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(GOOD))
    assert load("-").name == "recipe"
    monkeypatch.setattr(sys, "stdin", io.StringIO(GOOD + "x: 1\n"))
    with pytest.raises(RecipeError) as caught:
        load("-")
    assert caught.value.problems[0].where == "<stdin>:7"


def test_reading_a_recipe_loads_no_torch(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(GOOD + "rules: [{match: {}, method: dare}]\n")
    code = (
        "import sys; from mowmerge.recipe.parse import load;"
        "from mowmerge.recipe.values import Place, setting;"
        "from mowmerge.recipe.schema import json_schema; json_schema();"
        f"setting(load({str(tmp_path / 'r.yaml')!r}), Place('a', 'mlp', 0, 0.0));"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
