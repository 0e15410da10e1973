"""Chat templates: that of most models, of one of them, or a text, as transformers loads it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from zoo import Zoo

from mowmerge import api
from mowmerge.errors import CheckpointError


@pytest.fixture
def models(zoo: Zoo) -> Zoo:
    zoo.family("llama", 3)
    for name, text in (("base", None), ("a", "{{ a }}"), ("b", "{{ b }}"), ("c", "{{ b }}\n")):
        folder = zoo.folder / name
        (folder / "chat_template.jinja").unlink()
        if text and name != "b":
            (folder / "chat_template.jinja").write_text(text)
        elif text:
            (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}))
    return zoo


@pytest.mark.parametrize(("asked", "text"), [
    ("auto", "{{ b }}"), ("a", "{{ a }}"), ("b", "{{ b }}"), ("{{ own }}", "{{ own }}"),
])  # fmt: skip
def test_the_output_has_the_template(models: Zoo, asked: str, text: str) -> None:
    content: dict[str, Any] = {"method": "linear", "output": {"chat_template": asked}}
    content["base"] = None
    content["models"] = {"b": "./b", "a": "./a", "c": "./c"}
    models.merge(content, hashes=True)
    out = models.folder / "out"
    assert (out / "chat_template.jinja").read_text() == text
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    assert api.verify(out).problems == ()


def test_where_no_model_has_one_there_is_none(models: Zoo) -> None:
    content = {"method": "linear", "base": None, "models": {"base": "./base", "d": "./base"},
               "output": {"chat_template": "auto"}}  # fmt: skip
    _, report = models.merge(content)
    assert any("no model has a chat template" in each for each in report["warnings"])
    assert not (models.folder / "out/chat_template.jinja").exists()


def test_a_model_without_one_is_told_before_the_merge(models: Zoo) -> None:
    content = {"method": "linear", "output": {"chat_template": "base"}}
    with pytest.raises(CheckpointError, match="model 'base' has no chat template"):
        models.merge(content)
    assert not (models.folder / "out").exists()
