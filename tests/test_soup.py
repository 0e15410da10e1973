"""Greedy soups: the choice by hand, its file, the whole way on real checkpoints and pictures."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil
from zoo import Zoo

from mowmerge import api
from mowmerge.errors import RecipeError
from mowmerge.soup import choose, known

WORTH = {"a": 0.7, "b": 0.9, "c": 0.8, "b+c": 0.85, "b+a": 0.95, "b+c+a": 0.99}


def test_a_soup_by_hand() -> None:
    found = choose("abc", lambda models: WORTH["+".join(models)])
    assert list(found.ingredients) == ["b", "a"]  # c came second, and made it worse
    assert dict(found.scores) == {k: v for k, v in WORTH.items() if k != "b+c+a"}


@pytest.mark.parametrize(("equal", "most", "wanted"), [
    (False, None, "a"), (True, None, "abc"), (True, 2, "ab"), (False, 1, "a"),
])  # fmt: skip
def test_models_that_change_nothing(equal: bool, most: int | None, wanted: str) -> None:
    found = choose("abc", lambda models: 0.5, equal=equal, most=most)
    assert "".join(found.ingredients) == wanted


@pytest.mark.parametrize(("patience", "wanted", "tried"), [
    (None, "abe", 4), (2, "ab", 3), (1, "ab", 2), (3, "abe", 4),
])  # fmt: skip
def test_patience_counts_those_in_a_row_that_did_not_join(
    patience: int | None, wanted: str, tried: int
) -> None:
    def score(models: Sequence[str]) -> float:
        alone = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6, "e": 0.5}
        made = {"ab": 0.91, "abe": 0.92}
        return alone[models[0]] if len(models) == 1 else made.get("".join(models), 0.0)

    found = choose("abcde", score, patience=patience)
    assert "".join(found.ingredients) == wanted
    assert len(found.scores) == 5 + tried


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_a_soup_is_never_worse_than_the_best_alone(worth: list[float], chance: Any) -> None:
    said: dict[tuple[str, ...], float] = {}

    def score(models: Sequence[str]) -> float:
        alone = worth[int(models[0])] if len(models) == 1 else chance.uniform(-1, 1)
        return said.setdefault(tuple(models), alone)

    found = choose([str(i) for i in range(len(worth))], score)
    assert said[tuple(found.ingredients)] >= max(worth)
    assert len(said) == 2 * len(worth) - 1


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three models of one task, two of them near one that is right, and a split to choose by."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    chance = random.Random(0)
    for i in range(60):
        at = tmp_path / "data" / "validation" / ("dark", "light")[i % 2]
        at.mkdir(parents=True, exist_ok=True)
        low = 128 * (i % 2)
        pixels = bytes(chance.randrange(low, low + 128) for _ in range(192))
        Image.frombytes("RGB", (8, 8), pixels).save(at / f"{i:03d}.png")
    maps = {"id2label": {0: "dark", 1: "light"}, "label2id": {"dark": 0, "light": 1}}
    for name in "abc":
        torch.manual_seed(0)
        config = ViTConfig(
            image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, **maps,
        )  # fmt: skip
        model = ViTForImageClassification(config)
        torch.manual_seed(ord(name))
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value) * 0.05)
        model.save_pretrained(tmp_path / name)
        ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / name)
    task = {
        "type": "image-classification", "data": {"path": "imagefolder", "data_dir": "./data"},
        "splits": {"select": "validation", "eval": "test"},
    }  # fmt: skip
    content = {"models": {n: f"./{n}" for n in "abc"}, "method": "linear", "tasks": {"light": task}}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(content))
    return file


def test_the_whole_way(zoo: Zoo, recipe: Path) -> None:
    ran = zoo.here("soup", "recipe.yaml", "out")
    assert ran.rc == 0, ran.err
    told = json.loads((zoo.folder / "out-soup.json").read_text())
    chosen, scores = told["ingredients"], told["scores"]
    assert f"the soup: {', '.join(chosen)}" in ran.out and told["metric"] == "accuracy"
    assert list(choose("abc", lambda models: scores["+".join(models)]).ingredients) == chosen
    kept = [load_file(zoo.folder / name / "model.safetensors") for name in chosen]
    for name, value in load_file(zoo.folder / "out" / "model.safetensors").items():
        mean = torch.stack([each[name].double() for each in kept]).mean(0)
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-7)
    for name in "abc":
        asked = json.loads(recipe.read_text())
        asked["tasks"]["light"]["splits"] = {"eval": "validation"}
        one = zoo.recipe({"models": {name: f"./{name}"}, "method": "linear"}, name)
        api.merge(one, zoo.folder / f"only-{name}")
        asked["models"] = {name: f"./{name}"}
        (found,) = api.evaluate(
            zoo.folder / f"only-{name}", zoo.recipe(asked, "asked"), against=()
        ).scores
        assert scores[name] == pytest.approx(found.value)
    assert not [p.name for p in zoo.folder.iterdir() if p.name.startswith(".soup")]
    # and again from what is known: no task, no data, the same bytes
    bare = {k: v for k, v in json.loads(recipe.read_text()).items() if k != "tasks"}
    zoo.recipe(bare, "bare")
    ran = zoo.here("soup", "bare.yaml", "again", "--scores", "out-soup.json", "--json")
    assert ran.rc == 0 and json.loads(ran.out)["ingredients"] == chosen
    files = [zoo.folder / out / "model.safetensors" for out in ("out", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(("change", "scores", "says"), [
    ({"method": "ties", "base": "./a"}, None, "a soup is the plain average"),
    ({"parameters": {"weight": 0.5}}, None, "method: linear, without weights"),
    ({"tasks": {}}, None, "the recipe has no tasks"),
    ({"tasks": {}}, {"a": 1, "b": 2, "c": 3}, "the recipe has no tasks"),  # b+c is not known
    ({}, {"a": 1, "d": 2}, "the scores name 'd'"),
    ({}, {"a": "good"}, "holds no scores"),
    ({}, [1], "holds no scores"),
])  # fmt: skip
def test_what_is_no_soup(zoo: Zoo, recipe: Path, change: Any, scores: Any, says: str) -> None:
    zoo.recipe({**json.loads(recipe.read_text()), **change}, "recipe")
    (zoo.folder / "scores.json").write_text(json.dumps({"scores": scores}))
    given = [] if scores is None else ["--scores", "scores.json"]
    ran = zoo.here("soup", "recipe.yaml", "out", *given)
    assert ran.rc == 3 and says in ran.err, ran.err
    assert not (zoo.folder / "out").exists()


def test_no_split_to_choose_by_and_a_taken_folder(zoo: Zoo, recipe: Path) -> None:
    content = json.loads(recipe.read_text())
    content["tasks"]["light"]["splits"] = {"eval": "validation"}
    zoo.recipe(content, "test-only")
    ran = zoo.here("soup", "test-only.yaml", "out")
    assert ran.rc == 3 and "no split to choose by" in ran.err
    ran = zoo.here("soup", "recipe.yaml", "a")
    assert ran.rc == 6 and "--force" in ran.err


def test_scores_by_which_models_were_averaged(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    file.write_text('{"scores": {"b+a": 1, "c": 0.5}}')
    assert known(file) == {frozenset("ab"): 1.0, frozenset("c"): 0.5}
    with pytest.raises(RecipeError, match="cannot be read"):
        known(tmp_path / "none.json")
