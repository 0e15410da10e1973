"""docs/scale.md says what the plans say, and merges read their inputs as often as it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench.costs import METHODS, SHAPES, table
from bench.header_only import header_only
from zoo import ROOT, Zoo

from mowmerge import api
from mowmerge.planner import Options


def test_the_table_of_costs_is_that_of_the_plans(tmp_path: Path) -> None:
    text = (ROOT / "docs/scale.md").read_text()
    told = text.partition("<!-- costs -->\n")[2].partition("\n<!-- to here -->")[0]
    assert told == table(tmp_path), "put in what `python -m tests.bench.costs` prints"


def test_the_shapes_have_the_sizes_of_their_names(tmp_path: Path) -> None:
    sizes = {"8B": 8.03e9, "70B": 70.55e9, "405B": 405.85e9}  # as published
    for name, shape in SHAPES.items():
        folder = header_only(tmp_path / name, **shape)
        held = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        assert held / 2 == pytest.approx(sizes[name], rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_read_as_often_as_the_table_says(
    zoo: Zoo, method: str, counted: list[int]
) -> None:
    zoo.family({"model.layers.0.mlp.up_proj.weight": (4000, 2000)}, 3, dtype=torch.bfloat16)
    recipe = zoo.recipe({"method": method, "models": {n: f"./{n}" for n in "abc"},
                         "base": "./base" if method == "ties" else None})  # fmt: skip
    options = Options(workers=1, stats=False)
    done = api.merge(recipe, zoo.folder / "out", options=options, hashes=False)
    passes = counted[0] / done.report["read_bytes"]
    more = 0.1  # a sample, and a block that is compared: a small part of a large model
    assert METHODS[method] <= passes <= METHODS[method] + more, passes
