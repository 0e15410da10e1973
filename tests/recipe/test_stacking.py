"""Slices under a dynamic method: each model is stacked before, as by a recipe of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from zoo import Zoo, llama

from mowmerge.errors import RecipeError
from mowmerge.recipe import parse

CONFIG = {"model_type": "llama", "num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"]}
SLICES = [{"layers": "0..2"}, {"layers": {"a": "1..3", "b": "0..2", "base": "1..3"}}]
EACH = {name: ["0..2", "0..2" if name == "b" else "1..3"] for name in ("base", "a", "b")}
MOW = {"method": "mow", "parameters": {"blocks": 1}, "base": "./base"}


@pytest.fixture
def zoo(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Zoo:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, tensors in zoo.family(llama(4), 2).items():
        zoo.save(name, tensors, config=CONFIG)
    return zoo


def held(folder: Path) -> dict[str, Any]:
    return {
        key: value
        for file in sorted(folder.glob("*.safetensors"))
        for key, value in load_file(file).items()
    }


@pytest.mark.parametrize("content", [
    MOW, {**MOW, "method": "emr", "parameters": {}},
    {**MOW, "rules": [{"match": {"layers": "3.."}, "method": "linear"}]},
    {"method": "wemoe", "base": "./base", "rest": {"method": "ties"}},
])  # fmt: skip
def test_it_is_the_merge_of_stacked_models(zoo: Zoo, content: dict[str, Any]) -> None:
    plain = {"models": {"a": {"source": "./a"}, "b": "./b"}, "slices": SLICES}
    zoo.merge({**content, **plain})
    for name, spans in EACH.items():
        pieces = [{"layers": span} for span in spans]
        zoo.merge(
            {"base": None, "models": {name: f"./{name}"}, "method": "passthrough",
             "slices": pieces}, f"s-{name}",
        )  # fmt: skip
    zoo.merge({**content, "base": "./s-base", "models": {"a": "./s-a", "b": "./s-b"}}, "again")
    found, wanted = held(zoo.folder / "out"), held(zoo.folder / "again")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    config = json.loads((zoo.folder / "out/config.json").read_text())
    assert config["base_config"]["num_hidden_layers"] == 6
    assert config["base_config"]["layer_types"] == ["a", "b", "c", "b", "c", "d"]


def test_what_it_becomes(zoo: Zoo) -> None:
    models = {"a": {"source": "base", "adapter": "./x"}, "b": {"source": "./b", "threshold": 0.2}}
    recipe = parse.load(
        zoo.recipe({"method": "tall_mask", "base": "./base", "models": models, "slices": SLICES})
    )
    assert recipe.slices == ()
    a, b = (recipe.models[name] for name in "ab")
    assert (dict(b.parameters), a.adapter) == ({"threshold": 0.2}, ())
    (inner,) = a.source.models.values()  # type: ignore[union-attr]
    assert (inner.source, inner.adapter[0].source) == ("./base", "./x")
    assert [piece.layers for piece in a.source.slices] == [{"": (0, 2)}, {"": (1, 3)}]  # type: ignore[union-attr]
    assert [piece.layers for piece in b.source.slices] == [{"": (0, 2)}, {"": (0, 2)}]  # type: ignore[union-attr]
    assert a.source.where("slices", 1).startswith(recipe.where("models", "a").partition(":")[0])  # type: ignore[union-attr]


def test_a_fit_that_is_replayed(zoo: Zoo) -> None:
    content = {"method": "adamerging", "base": "./base", "models": {"a": "./a"},
               "slices": [{"layers": 0}]}  # fmt: skip
    assert parse.load(zoo.recipe({**content, "coefficients": "c.json"})).slices == ()
    with pytest.raises(RecipeError, match="merge the slices of each model first"):
        parse.load(zoo.recipe(content))


@pytest.mark.parametrize("piece", [
    {"layers": {"a": "0..1"}}, {"layers": "0..1", "parameters": {}},
    {"layers": "0..1", "method": "linear"}, {"layers": {"a": 0, "b": 0, "z": 0}}, {},
])  # fmt: skip
def test_what_cannot_be_done_to_each_model_alone_is_refused(zoo: Zoo, piece: Any) -> None:
    models = {"a": "./a", "b": "./b"}
    with pytest.raises(RecipeError, match="'mow' codes models as they are"):
        parse.load(zoo.recipe({**MOW, "models": models, "slices": [{"layers": 0}, piece]}))


def test_faults_have_their_lines(zoo: Zoo) -> None:
    text = (
        "method: mow\nbase: ./base\nmodels: {a: ./a, b: ./b}\nslices:\n- layers: 0\n- layers: x\n"
    )
    with pytest.raises(RecipeError) as caught:
        parse.load(zoo.recipe(text))
    assert {p.where.rpartition(":")[2] for p in caught.value.problems} == {"6"}
