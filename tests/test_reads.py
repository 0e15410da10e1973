"""The bytes that a plan says are read are those that are read of files, whatever a model is."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from golden_cases import GOLDEN
from safetensors.torch import load_file
from zoo import Zoo, llama

from mowmerge import api
from mowmerge.planner import Options
from tests.tokenized import listed, rows, save, words

INNER = {"models": {"a": "./a", "b": "./b"}, "method": "linear"}
BYTES = 4 * 5456  # of a model of the family in fp32


@pytest.fixture
def family(zoo: Zoo) -> Zoo:
    models = zoo.family("llama", 3)
    assert sum(value.nbytes for value in models["a"].values()) == BYTES
    return zoo


def planned(zoo: Zoo, content: dict[str, Any]) -> int:
    return api.plan(zoo.recipe({"base": None, **content}), options=Options(stats=False)).read_bytes


def nested(inner: dict[str, Any], **models: str) -> dict[str, Any]:
    return {"method": "linear", "models": {"n": {"source": inner}, **models}}


def test_a_nested_recipe_counts_all_the_files_behind_it(family: Zoo, counted: list[int]) -> None:
    content = nested(INNER, c="./c")
    assert planned(family, content) == 3 * BYTES
    _, report = family.merge(content, stats=False)
    assert counted == [3 * BYTES]
    assert report["read_bytes"] == sum(t["read_bytes"] for t in report["tensors"]) == 3 * BYTES


def test_a_nested_statistic_counts_what_its_own_plan_counts(family: Zoo) -> None:
    """Two models and a base; passes for a statistic count no more than in a plan of its own."""
    ties = {**INNER, "method": "ties", "base": "./base", "parameters": {"trim": "global"}}
    assert planned(family, ties) == 3 * BYTES
    assert planned(family, nested(ties, c="./c")) == 4 * BYTES
    twice = nested(nested(ties, c="./c"), a="./a", base="./base")
    assert planned(family, twice) == 6 * BYTES


def test_a_nested_model_that_two_jobs_read_counts_twice(family: Zoo, counted: list[int]) -> None:
    slices = [{"layers": {"n": layers}} for layers in ("0..1", 1)]
    content = {**nested(INNER), "method": "passthrough", "slices": slices}
    layer = 4 * sum(
        torch.Size(shape).numel() for name, shape in llama().items() if ".layers.1." in name
    )
    assert planned(family, content) == 2 * BYTES + 2 * layer
    family.merge(content, stats=False)
    assert counted == [2 * BYTES + 2 * layer]


def test_json_says_the_bytes_of_each_input(family: Zoo) -> None:
    family.recipe(nested(INNER, c="./c"))
    ran = family.here("merge", "recipe.yaml", "--dry-run", "--json")
    assert ran.rc == 0, ran.err
    told = json.loads(ran.out)
    inputs = [given for tensor in told["tensors"] for given in tensor["inputs"]]
    assert told["read_bytes"] == sum(given["read_bytes"] for given in inputs) == 3 * BYTES
    assert all(
        given["read_bytes"] == given["bytes"] * (2 if given["model"] == "n" else 1)
        for given in inputs
    )


def test_an_adapter_counts_its_factors(zoo: Zoo, counted: list[int]) -> None:
    at = GOLDEN / "models"
    files = "base/model.safetensors", "lora_a/adapter_model.safetensors", "e1/model.safetensors"
    size = sum(value.nbytes for file in files for value in load_file(at / file).values())
    adapted = {"source": str(at / "base"), "adapter": str(at / "lora_a")}
    content = {"method": "linear", "models": {"x": adapted, "e1": str(at / "e1")}}
    assert planned(zoo, content) == planned(zoo, nested(content)) == size
    zoo.merge(content, stats=False)
    assert counted == [size]


def test_fp8_counts_its_bytes_on_disk_and_its_scales(zoo: Zoo, counted: list[int]) -> None:
    tensors = {"x.q_proj.weight": torch.ones(130, 129).to(torch.float8_e4m3fn),
               "x.q_proj.weight_scale_inv": torch.ones(2, 2),
               "x.norm.weight": torch.ones(4, dtype=torch.bfloat16)}  # fmt: skip
    how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    zoo.save("m", tensors, config={"model_type": "llama", "quantization_config": how})
    content = {"method": "passthrough", "models": {"m": "./m"}}
    assert planned(zoo, content) == 130 * 129 + 4 * 4 + 4 * 2
    zoo.merge(content, stats=False)
    assert counted == [130 * 129 + 4 * 4 + 4 * 2]


def test_rows_count_as_they_are_placed(zoo: Zoo) -> None:
    """Placed as the base's four: two rows of a merge of two files each, two lent by the base; a row
    is of two numbers, in embedding and head."""
    save(zoo, "base", words(listed(["<unk>", "x", "y", "z"])), rows(1, 2, 3, 4))
    for name in "ab":
        save(zoo, name, words(listed(["w", "y", "<unk>"])), rows(5, 6, 7))
    content = {**nested(INNER), "base": "./base", "vocabulary": {"source": "base"}}
    assert planned(zoo, content) == (2 * 2 + 2) * 2 * 4 * 2
