"""What is shown of recipes and of dynamic checkpoints before and after anything is built."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mowmerge import api
from mowmerge.errors import CheckpointError
from tests.test_cli import COUNTED
from tests.zoo import Zoo, load

MOW = {"method": "mow", "parameters": {"blocks": 1}}


@pytest.fixture
def family(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> Zoo:
    """A llama family; the second layer's MLP and the first's attention differ most."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(zoo.folder / "cache"))
    models = zoo.family("llama", 2)
    models["b"]["model.layers.1.mlp.up_proj.weight"].add_(1.0)
    models["b"]["model.layers.0.self_attn.q_proj.weight"].add_(1.0)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    for name, tensors in models.items():
        zoo.save(name, tensors, config=config)
    return zoo


def held(told: dict[str, Any]) -> dict[str, Any]:
    """What plan and checkpoint must agree on."""
    keys = ("method", "experts", "bytes", "multiple", "codes", "gates", "routers", "heads")
    return {key: told[key] for key in keys}


# --- a recipe


def test_the_similarity_table_is_the_experts_own(family: Zoo) -> None:
    told = api.inspect(family.recipe(MOW))
    assert told["survey"]["dynamic"] == {
        "attention": ["model.layers.0"], "mlp": ["model.layers.1"],
    }  # fmt: skip
    a, b = (load(family.folder / name) for name in "ab")
    for role, part in (("attention", "self_attn"), ("mlp", "mlp")):
        for i in range(2):
            block = f"model.layers.{i}"
            names = [n for n in a if n.startswith(f"{block}.{part}.")]
            one, two = (torch.cat([m[n].double().flatten() for n in names]) for m in (a, b))
            cosine = torch.nn.functional.cosine_similarity(one, two, 0).item()
            assert told["survey"]["dissimilarity"][role][block] == pytest.approx(1 - cosine)


@pytest.mark.parametrize("content", [
    MOW, {"method": "wemoe"}, {"method": "e_wemoe"}, {"method": "smile"}, {"method": "one_bit"},
    {"method": "emr"}, {"method": "rank_one_moe"}, {"method": "twin_merging"},
])  # fmt: skip
def test_what_is_foretold_is_what_is_written(family: Zoo, content: dict[str, Any]) -> None:
    told = api.inspect(family.recipe(content))
    out = family.folder / "out"
    assert not out.exists()
    api.merge(family.folder / "recipe.yaml", out)
    assert held(told) == held(api.inspect(out))
    files = list(out.glob("*.safetensors"))
    assert told["write_bytes"] == sum(file.stat().st_size for file in files)
    stored = [load_file(file) for file in files]
    assert told["bytes"]["total"] == sum(v.nbytes for f in stored for v in f.values())
    assert told["multiple"] == pytest.approx(told["bytes"]["total"] / told["bytes"]["anchor"], 1e-3)
    assert (told["survey"] is None) == (content["method"] not in ("mow", "one_bit"))


def test_the_page(family: Zoo) -> None:
    family.recipe(MOW)
    ran = family.here("inspect", "recipe.yaml")
    lines = ran.out.splitlines()
    assert (ran.rc, ran.err) == (0, "")
    assert lines[0] == "mow of 2 experts: a, b"
    first = next(line for line in lines if line.startswith("model.layers.0"))
    second = next(line for line in lines if line.startswith("model.layers.1"))
    assert (first.split()[2], first.endswith("*")) == ("*", False)
    assert (second.split()[2], second.split()[-1]) == (second.split()[-2], "*")
    assert "mlp        model.layers 1" in ran.out
    assert "times its anchor" in ran.out
    assert re.search(r"(?m)^router 0: \w+, \d+ -> 2, after layer 1, not trained$", ran.out)
    ran = family.here("inspect", "recipe.yaml", "--set", "parameters.blocks=2", "--json")
    told = json.loads(ran.out)
    assert (told["kind"], told["codes"][1]["layers"]) == ("recipe", [0, 1])


def test_a_recipe_that_makes_nothing_dynamic_says_so(family: Zoo) -> None:
    family.recipe({"method": "mow", "parameters": {"blocks": 0, "norms": "none"}})
    ran = family.here("inspect", "recipe.yaml")
    assert "nothing would be dynamic" in ran.out
    assert "'mow' makes no tensor dynamic" in ran.err


def test_a_static_recipe_is_pointed_to_its_plan(family: Zoo) -> None:
    family.recipe({"method": "ties"})
    ran = family.here("inspect", "recipe.yaml")
    assert ran.out == (
        "'ties' is a static method: `mowmerge merge recipe.yaml --dry-run` shows the plan\n"
    )
    assert json.loads(family.here("inspect", "recipe.yaml", "--json").out)["dynamic"] is False


def test_a_recipe_from_stdin(family: Zoo) -> None:
    text = "base: ./base\nmodels: {a: ./a, b: ./b}\nmethod: wemoe\n"
    assert family.here("inspect", "-", stdin=text).out.startswith("wemoe of 2 experts")


# --- a checkpoint


def test_a_trained_router_is_told(family: Zoo) -> None:
    out = family.folder / "out"
    api.merge(family.recipe(MOW), out)
    assert api.inspect(out)["trained"] is False
    file = out / "router.safetensors"
    save_file(load_file(file), file, {"format": "pt", "trained": "true"})
    assert api.inspect(out)["trained"] is True
    assert "after layer 1, trained" in family.here("inspect", "out").out


def test_heads_and_labels(tmp_path: Path) -> None:
    from tests.test_extract import KINDS, recipe, save

    save(tmp_path, KINDS["vit"])
    told = api.inspect(recipe(tmp_path, KINDS["vit"], "mow"))
    out = api.merge(tmp_path / "mow.yaml", tmp_path / "out").path
    assert held(told) == held(api.inspect(out))
    assert told["heads"] == [
        {"expert": "pets", "class": "ViTForImageClassification", "labels": 3},
        {"expert": "sky", "class": "ViTForImageClassification", "labels": 2},
    ]
    assert "head sky: ViTForImageClassification, 2 labels" in Zoo(tmp_path).here("inspect", out).out


def test_loads_no_torch(family: Zoo) -> None:
    family.recipe({"method": "wemoe"})
    api.merge(family.folder / "recipe.yaml", family.folder / "out")
    for target in ("out", "recipe.yaml"):
        ran = family.python(COUNTED, "inspect", target, "--json")
        assert (ran.rc, ran.err.split()) == (0, [])
        assert json.loads(ran.out)["method"] == "wemoe"


# --- what is refused


def test_bad_input(family: Zoo) -> None:
    api.merge(family.recipe(MOW), family.folder / "out")
    for rc, words, args in (
        (4, "no dynamic checkpoint", ["a"]), (3, "there is no file 'nowhere'", ["nowhere"]),
        (2, "a folder takes no overrides", ["out", "--set", "x=1"]),
    ):  # fmt: skip
        ran = family.here("inspect", *args)
        assert (ran.rc, ran.out) == (rc, "")
        assert words in ran.err


def test_a_damaged_checkpoint(family: Zoo) -> None:
    out = family.folder / "out"
    api.merge(family.recipe(MOW), out)
    router = out / "router.safetensors"
    held = load_file(router)
    save_file({**held, "mow_router.0.last.weight": torch.zeros(3, 16)}, router)
    with pytest.raises(CheckpointError, match=r"last\.weight' is \[3, 16\], and config\.json says"):
        api.inspect(out)
    save_file(held, router)
    shard = next(out.glob("dynamic-*"))
    os.truncate(shard, shard.stat().st_size - 9)
    with pytest.raises(CheckpointError, match="truncated"):
        api.inspect(out)
    (out / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        api.inspect(out)
