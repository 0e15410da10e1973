"""A dynamic checkpoint scored in batches of all tasks: as it stands, task given, oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mowmerge import api
from tests.evals.test_evaluator import COUNT, LABELS, _own_cache, recipe

__all__ = ["_own_cache", "recipe"]  # fixtures


def upcycled(file: Path, method: str, parameters: dict[str, object]) -> Path:
    """The recipe's models merged by a dynamic method, beside it."""
    content = json.loads(file.read_text()) | {"method": method, "parameters": parameters}
    dynamic = file.with_name(f"{method}.yaml")
    dynamic.write_text(json.dumps(content))
    return api.merge(dynamic, file.with_name(method)).path


EVERYTHING = {"blocks": 2, "norms": "all", "embeddings": "all", "others": True, "router": "linear"}


def test_the_oracle_is_the_expert_and_the_router_decides_the_head(recipe: Path) -> None:
    out = upcycled(recipe, "mow", EVERYTHING)
    router = load_file(out / "router.safetensors")
    for name, value in router.items():  # whatever it sees, it is the first expert's
        value.fill_(1.0 if name.endswith("temperature") else 0.0)
    router["mow_router.0.last.bias"][0] = 100.0
    save_file(router, out / "router.safetensors", {"format": "pt"})
    scores = {(s.row, s.task): s for s in api.evaluate(out, recipe).scores}
    first, second = LABELS
    for name in LABELS:
        expert = scores["expert", name]
        assert scores["merged, oracle", name].predicted == expert.predicted
        assert scores["merged, oracle", name].value == expert.value
        assert scores["merged, oracle", name].true == expert.true
    assert scores["merged", first].predicted == scores["expert", first].predicted
    assert scores["merged", second].predicted == [-1] * COUNT
    assert scores["merged", second].value == 0.0
    assert set(scores["merged, task given", second].predicted) <= {0, 1}


@pytest.mark.parametrize(
    ("method", "ways"),
    [
        ("emr", ["merged, oracle"]),
        ("smile", ["merged, task given", "merged, oracle"]),
        ("wemoe", ["merged, task given", "merged, oracle"]),
        ("one_bit", ["merged", "merged, task given", "merged, oracle"]),
    ],
)
def test_only_classifiers_choose_heads(recipe: Path, method: str, ways: list[str]) -> None:
    out = upcycled(recipe, method, {})
    scores = api.evaluate(out, recipe, against=["base"]).scores
    assert list(dict.fromkeys(s.row for s in scores)) == [*ways, "base"]
    assert all(len(s.predicted) == COUNT for s in scores)
