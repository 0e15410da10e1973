"""Tokenizers that differ: what a dynamic plan says of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from zoo import Zoo

from mowmerge.checkpoint import tokenizers
from mowmerge.errors import CheckpointError
from mowmerge.planner import build
from mowmerge.recipe import parse


def differences(donor: Path, folder: Path) -> Iterator[str]:
    return tokenizers.differences(donor, folder, *map(tokenizers.known, (donor, folder)))


WORDS = {"a": 0, "b": 1, "c": 2}
ITS, WRITTEN = "in its tokenizer", "in the one written"


def folder(path: Path, vocab: Any, added: dict[str, int] | None = None, template: str = "") -> Path:
    path.mkdir(exist_ok=True)
    tokens = [{"content": word, "id": i} for word, i in (added or {}).items()]
    (path / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": vocab}, "added_tokens": tokens})
    )
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template or None}))
    return path


@pytest.mark.parametrize(("vocab", "added", "said"), [
    (WORDS, {}, []),
    ([["a", -1.0], ["b", -2.0], ["c", -3.0]], {}, []),  # the same, as a unigram model says it
    ({"a": 0, "b": 1}, {}, []),  # what it lacks it has not learned from either
    (WORDS, {"<x>": 2, "<y>": 3}, [f"id 2 is '<x>' {ITS} and 'c' {WRITTEN}, and 1 more"]),
    (WORDS, {"<y>": 3}, [f"id 3 is '<y>' {ITS} and nothing {WRITTEN}"]),
    ({"a": 1, "b": 0, "c": 2}, {}, [f"id 0 is 'b' {ITS} and 'a' {WRITTEN}, and 1 more"]),
    ("nonsense", {}, []),
])  # fmt: skip
def test_ids_that_mean_another_token(
    tmp_path: Path, vocab: Any, added: dict[str, int], said: list[str]
) -> None:
    ours = folder(tmp_path / "ours", WORDS)
    assert list(differences(ours, folder(tmp_path / "theirs", vocab, added))) == said


def test_chat_templates(tmp_path: Path) -> None:
    plain, chat = folder(tmp_path / "a", WORDS), folder(tmp_path / "b", WORDS, template="{{x}}")
    other = folder(tmp_path / "c", WORDS)
    (other / "chat_template.jinja").write_text("{{x}}")
    assert list(differences(chat, other)) == list(differences(chat, plain)) == []
    (other / "chat_template.jinja").write_text("{{y}}")
    assert list(differences(chat, other)) == ["its chat template is not the one written"]
    assert list(differences(plain, chat)) == [
        "its chat template is not the one written, as there is none"
    ]


def test_files_that_only_bytes_compare(tmp_path: Path) -> None:
    for name, text in (("a", "x\ny"), ("b", "y\nx")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_text(text)
    assert list(differences(tmp_path / "a", tmp_path / "b")) == [
        "its tokenizer.model is not the one written"
    ]
    (tmp_path / "b" / "tokenizer.json").write_text("{")
    assert list(differences(tmp_path / "b", tmp_path / "b")) == []


def test_a_plan_warns_once_for_each_expert_that_differs(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    for name, added in (("base", {}), ("a", {}), ("b", {"<x>": 2})):
        folder(zoo.folder / name, WORDS, added)
    for method, count in (("emr", 1), ("linear", 1)):
        planned = build(parse.load(zoo.recipe({"method": method})))
        said = [w for w in planned.warnings if "read texts" in w]
        assert len(said) == count
        assert all(
            w.startswith("'b' will read texts otherwise than it learned: id 2") for w in said
        )


@pytest.mark.parametrize("method", ["mow", "wemoe", "emr", "twin_merging", "bitdelta"])
@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json", "vocab.txt"])
def test_a_dynamic_plan_refuses_experts_of_another_order(zoo: Zoo, method: str, file: str) -> None:
    """The same tokens under other ids: routers and experts would read other texts."""
    zoo.family("llama", 2)
    for name, words in (("base", "abc"), ("a", "abc"), ("b", "acb")):
        ids = {word: i for i, word in enumerate(words)}
        where = folder(zoo.folder / name, ids)
        if file != "tokenizer.json":
            (where / "tokenizer.json").unlink()
            (where / file).write_text(json.dumps(ids) if "json" in file else "\n".join(words))
    recipe = parse.load(zoo.recipe({"method": method}))
    with pytest.raises(CheckpointError) as error:
        build(recipe)
    (problem,) = error.value.problems
    assert "the token 'b' has id 1 in the tokenizer that is written and 2 in that of 'b'" in (
        problem.message
    )
    assert "vocabulary: {source: union}" in problem.hint


def test_an_expert_with_more_tokens_is_told_what_to_do(zoo: Zoo) -> None:
    models = zoo.family("llama", 2)
    held = models["b"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        held[name] = held[name].new_zeros(len(held[name]) + 2, held[name].shape[1])
    zoo.save("b", held)
    with pytest.raises(CheckpointError, match="embed_tokens") as error:
        build(parse.load(zoo.recipe({"method": "mow"})))
    first, second = error.value.problems
    assert "2 rows more: place rows by token, `vocabulary:" in first.hint == second.hint
