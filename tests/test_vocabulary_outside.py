"""Tokens of a tokenizer that is no model's: `vocabulary: {source: {tokenizer: ...}}`."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from zoo import Zoo

from mowmerge import api
from mowmerge.errors import CheckpointError, RecipeError, SourceError
from mowmerge.planner import build
from mowmerge.recipe import parse
from tests.tokenized import EMBED, HEAD, firsts, listed, rows, save, view, words, written

LINEAR: dict[str, Any] = {"method": "linear", "base": "./base", "models": {"a": "./a", "b": "./b"}}
OUTSIDE = {"tokenizer": "./other"}
TOKENS = ["y", "<unk>", "w", "v", "new"]


@pytest.fixture
def five(zoo: Zoo) -> Zoo:
    """base: <unk> x y z; a has z before y, and w; b has neither x nor z, and w and v. other has a
    tokenizer and a config, and no weights."""
    save(zoo, "base", words(listed(["<unk>", "x", "y", "z"])), rows(1, 2, 3, 4))
    save(zoo, "a", words(listed(["<unk>", "x", "z", "y", "w"])), rows(10, 20, 40, 30, 50))
    save(zoo, "b", words(listed(["w", "y", "<unk>", "v"])), rows(500, 300, 100, 600))
    other(zoo)
    return zoo


def other(zoo: Zoo, **config: Any) -> None:
    folder = zoo.folder / "other"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(words(listed(TOKENS))))
    (folder / "chat_template.jinja").write_text("{{ other }}")
    if config:
        (folder / "config.json").write_text(json.dumps(config))


def views(zoo: Zoo, vocabulary: Any, **content: Any) -> dict[str, list[float]]:
    plan = build(parse.load(zoo.recipe({**LINEAR, "vocabulary": vocabulary, **content})))
    found = {name: firsts(view(plan, name)) for name in plan.sources}
    for name, numbers in found.items():
        assert firsts(view(plan, name, HEAD)) == [100 * n for n in numbers]
    return found


@pytest.mark.parametrize(("more", "new"), [
    ({}, [2.5, 30, 375]), ({"unseen": "zero"}, [0, 0, 0]),
    ({"tokens": {"new": {"model": "a", "token": "x"}}}, [20, 20, 20]),
    ({"missing": "zero"}, [0, 0, 0]),
])  # fmt: skip
def test_rows_by_hand(five: Zoo, more: Any, new: list[float]) -> None:
    """y <unk> w v new: w is a's and b's, v is b's, new is nobody's, so each model's own mean."""
    found = views(five, {"source": OUTSIDE, **more})
    w, v = (0, 0) if "missing" in more else (275, 600)
    assert found == {
        "base": [3, 1, w, v, new[0]],
        "a": [30, 10, 50, v, new[1]],
        "b": [300, 100, 500, 600, new[2]],
    }


def test_the_output_has_its_files(five: Zoo) -> None:
    other(five, bos_token_id=1)
    (five.folder / "other/LICENSE").write_text("of its own\n")
    content = {**LINEAR, "vocabulary": {"source": OUTSIDE, "unseen": "zero"}}
    got, report = five.merge(content, hashes=True)
    out = five.folder / "out"
    assert firsts(got[EMBED]) == [165, 55, 275, 600, 0]
    assert written(out) == listed(TOKENS)
    assert (out / "chat_template.jinja").read_text() == "{{ other }}"
    assert (out / "LICENSE-tokenizer").read_text() == "of its own\n"
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"]) == (5, 1)
    told = report["vocabulary"]
    assert (told["source"], told["rows"], told["models"]["a"]["missing"]) == (
        "./other", 5, {"mean": 1, "zero": 1},
    )  # fmt: skip
    assert [row["name"] for row in report["inputs"]] == ["base", "a", "b"]
    assert api.verify(out).problems == ()


def test_mergekit_s_tokenizer_source(five: Zoo) -> None:
    """What no model has is zero there."""
    text = """
merge_method: linear
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 3}}]
tokenizer_source: ./other
"""
    got, _ = five.merge(text)
    assert firsts(got[EMBED]) == [232.5, 77.5, 387.5, 600, 0]
    assert firsts(got[HEAD]) == [23250, 7750, 38750, 60000, 0]
    assert written(five.folder / "out") == listed(TOKENS)


@pytest.mark.parametrize(("config", "multiple", "count"), [
    ({}, None, 5), ({"vocab_size": 7}, None, 7), ({"vocab_size": 4}, None, 5),
    ({"text_config": {"vocab_size": 6}}, None, 6), ({"vocab_size": 7}, 1, 5),
    ({"vocab_size": 7}, 4, 8),
])  # fmt: skip
def test_there_are_as_many_rows_as_its_config_says(
    five: Zoo, config: Any, multiple: int | None, count: int
) -> None:
    other(five, **config)
    found = views(five, {"source": OUTSIDE, "pad_to_multiple_of": multiple, "unseen": "zero"})
    assert len(found["a"]) == count
    assert found["a"][5:] == [30] * (count - 5)  # the mean of a's own


def test_the_lock_knows_it(five: Zoo) -> None:
    five.merge({**LINEAR, "vocabulary": {"source": OUTSIDE}}, hashes=True)
    out = five.folder / "out"
    lock = parse.load(out / "recipe.lock.yaml")
    assert lock.lock is not None
    assert lock.lock.inputs["tokenizer"].keys() == {"tokenizer.json"}
    again = api.merge(out / "recipe.lock.yaml", five.folder / "again", locked=True)
    assert again.report["replay"]["outcome"] == "same bytes"
    file = five.folder / "other/tokenizer.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(CheckpointError, match="tokenizer.json is not the file that the lock names"):
        api.merge(out / "recipe.lock.yaml", five.folder / "third", locked=True)


def test_a_nested_recipe_has_its_tokens(five: Zoo) -> None:
    inner = {**LINEAR, "vocabulary": {"source": OUTSIDE, "unseen": "zero"}}
    content = {"models": {"m": {"source": inner}}, "method": "passthrough"}
    got, _ = five.merge(content)
    assert firsts(got[EMBED]) == [165, 55, 275, 600, 0]
    assert written(five.folder / "out") == listed(TOKENS)
    (five.folder / "out").rename(five.folder / "first")
    assert torch.equal(five.merge(content)[0][EMBED], got[EMBED])


def test_what_is_wrong_with_it(five: Zoo) -> None:
    with pytest.raises(SourceError, match="recipe.yaml:.*no folder or file './none'"):
        views(five, {"source": {"tokenizer": "./none"}})
    (five.folder / "empty").mkdir()
    with pytest.raises(CheckpointError, match="recipe.yaml:.*there is no tokenizer.json"):
        views(five, {"source": {"tokenizer": "./empty"}})
    (five.folder / "other/tokenizer.json").write_text(
        json.dumps({**words(listed(TOKENS)), "pre_tokenizer": {"type": "ByteLevel"}})
    )
    with pytest.raises(CheckpointError, match="stand for text, and the output's for bytes"):
        views(five, {"source": OUTSIDE})
    for source, says in (
        ({}, "'vocabulary.source.tokenizer' is missing"),
        ({"tokenizr": "x"}, "unknown key 'vocabulary.source.tokenizr'"),
        ([1], "must be union, base, a model's name, or {tokenizer: SOURCE}"),
        ("", "must be union, base"),
        ("other", "there is no model 'other'"),
    ):
        with pytest.raises(RecipeError, match=says):
            views(five, {"source": source})
    with pytest.raises(RecipeError, match="a model cannot be named 'tokenizer'"):
        views(five, {"source": OUTSIDE}, models={"tokenizer": "./a"})
