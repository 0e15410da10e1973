"""check, methods and schema: what they print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mowmerge.cli.check import check
from mowmerge.cli.methods import methods
from mowmerge.cli.schema import schema
from mowmerge.errors import RecipeError
from mowmerge.recipe.complete import completed
from mowmerge.recipe.parse import loads
from mowmerge.recipe.schema import json_schema
from mowmerge.recipe.text import read

TEXT = """\
base: {models: {p: org/p}, method: linear}
models: {a: org/a, b: {source: org/c, weight: 0.5}}
method: ties
rules:
  - match: {role: mlp, layers: [3, 4..6]}
    parameters: {weight: {a: 1e-5}}
  - {match: {tensors: "*head*"}, method: linear, parameters: {normalize: false}}
"""
RULES = [
    {"match": {"role": ["mlp"], "layers": [3, "4..6"]}, "parameters": {"weight": {"a": 1e-5}}},
    {
        "match": {"tensors": ["*head*"]},
        "method": "linear",
        "parameters": {"weight": 1.0, "normalize": False},
    },
]


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "r.yaml").write_text(TEXT)
    return str(tmp_path / "r.yaml")


def test_check_shows_every_default(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    check(recipe)
    head, _, listing = capsys.readouterr().out.partition("\n")
    data = read(listing, "x").data
    assert head == f"# {recipe}: ok, by itself: its models are not all on this machine"
    assert completed(loads(listing)) == data  # it is a recipe itself
    assert data["rules"] == RULES
    assert data["models"]["b"] == {"source": "org/c", "weight": 0.5}
    assert data["base"]["parameters"] == {"weight": 1.0, "normalize": True}
    assert (data["parameters"]["density"], data["output"]["shard_size"]) == (0.2, 5 * 10**9)


def test_check_as_json_is_the_same(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    check(recipe)
    data = read(capsys.readouterr().out.partition("\n")[2], "x").data
    check(recipe, json_=True)
    told = {"file": recipe, "ok": True, "headers": False, "recipe": data}
    assert json.loads(capsys.readouterr().out) == told


def test_check_takes_overrides(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    check(recipe, ["parameters.density=0.7"], json_=True)
    assert json.loads(capsys.readouterr().out)["recipe"]["parameters"]["density"] == 0.7
    with pytest.raises(RecipeError, match="did you mean 'density'"):
        check(recipe, ["parameters.densty=0.7"])


def test_the_list_of_methods(capsys: pytest.CaptureFixture[str]) -> None:
    methods()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:4] == ["ties", "base,", "1+", "models"] for line in lines)
    assert any(line.split()[:3] == ["slerp", "2", "models"] for line in lines)
    assert any(line.split()[:3] == ["passthrough", "1", "model"] for line in lines)


def test_one_method(capsys: pytest.CaptureFixture[str]) -> None:
    methods("ties")
    page = capsys.readouterr().out
    assert page.startswith("ties (base, 1+ models)\n\nThe trimmed, sign-elected")
    density = next(line for line in page.splitlines() if line.startswith("density "))
    assert density.split()[:5] == ["density", "number", "0..1", "0.2", "yes"]
    assert page.endswith(
        "Laws: permutation, scale, propagates (with elect: mass)\nPaper: arXiv:2306.01708\n"
    )
    methods("linear", json_=True)
    described = json.loads(capsys.readouterr().out)
    assert described["models"] == {"exactly": None, "at_least": 1}
    assert described["laws"]["idempotent"] == {"normalize": True}
    assert [p["name"] for p in described["parameters"]] == ["weight", "normalize"]
    with pytest.raises(RecipeError, match="there is no method 'tie'"):
        methods("tie")


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    schema()
    assert json.loads(capsys.readouterr().out) == json_schema()
