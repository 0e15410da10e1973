"""The plan of an adapter: what `--dry-run` says is what is written, and what it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import adapt, save
from safetensors import safe_open
from zoo import Zoo

from mowmerge import api
from mowmerge.checkpoint import lowrank
from mowmerge.errors import ResourceError
from mowmerge.planner import Options

WEIGHTS = "adapter_model.safetensors"


def recipe(method: str = "linear", output: dict[str, Any] | None = None, **more: Any) -> str:
    models = {n: {"source": "base", "adapter": f"./{n}"} for n in "ab"}
    asked = {"format": "adapter", **(output or {})}
    return json.dumps(
        {"base": "./base", "models": models, "method": method, "output": asked, **more}
    )


@pytest.fixture
def family(zoo: Zoo) -> Zoo:
    """A bf16 base, and adapters a and b on it of ranks 3 and 2; b is on fewer modules."""
    base = save(zoo.folder / "base", "llama", torch.bfloat16)
    adapt(base, zoo.folder / "a", r=3, target_modules=["q_proj", "down_proj", "o_proj"])
    adapt(base, zoo.folder / "b", seed=2, r=2, target_modules=["q_proj"])
    return zoo


def planned(zoo: Zoo, text: str) -> dict[str, Any]:
    zoo.recipe(text)
    ran = zoo.here("merge", "recipe.yaml", "--dry-run", "--json")
    assert ran.rc == 0, ran.err
    found: dict[str, Any] = json.loads(ran.out)
    return found


def shapes(out: Path) -> dict[str, list[int]]:
    with safe_open(out / WEIGHTS, "pt") as held:
        return {name: held.get_slice(name).get_shape() for name in held.keys()}  # noqa: SIM118


def test_sums_of_adapters_are_known_to_the_byte(family: Zoo) -> None:
    told = planned(family, recipe())
    assert told["exact"]
    out = api.merge(family.recipe(recipe()), family.folder / "out").path
    parts = {p["name"]: p["shape"] for tensor in told["tensors"] for p in tensor["parts"]}
    assert parts == shapes(out)
    assert told["write_bytes"] == (out / WEIGHTS).stat().st_size
    assert set(told["files"]) == {p.name for p in out.iterdir()}
    ranks = {tensor["name"]: tensor["rank"] for tensor in told["tensors"]}
    assert ranks["model.layers.0.self_attn.q_proj.weight"] == 5
    assert ranks["model.layers.1.self_attn.o_proj.weight"] == 3
    read = sum((family.folder / n / WEIGHTS).stat().st_size for n in "ab")
    assert 0 < told["read_bytes"] < read  # without their headers


def test_a_share_of_nothing_brings_no_rank(family: Zoo) -> None:
    told = planned(family, recipe("task_arithmetic", parameters={"weight": {"a": 1, "b": 0}}))
    assert {tensor["rank"] for tensor in told["tensors"]} == {3}


@pytest.mark.parametrize(
    ("method", "output", "how"),
    [
        ("linear", {"rank": 4}, {"joined", "joined, then cut"}),
        ("linear", {"energy": 0.8}, {"joined, then cut"}),
        ("ties", {}, {"decomposed"}),
        ("ties", {"rank": 2}, {"decomposed"}),
    ],
)
def test_bounds_hold(family: Zoo, method: str, output: dict[str, Any], how: set[str]) -> None:
    told = planned(family, recipe(method, output))
    assert not told["exact"]
    assert {tensor["how"] for tensor in told["tensors"]} == how
    result = api.merge(family.recipe(recipe(method, output)), family.folder / "out")
    bounds = {tensor["name"]: tensor["rank"] for tensor in told["tensors"]}
    ranks = {line["name"]: line["rank"] for line in result.report["tensors"]}
    assert ranks.keys() == bounds.keys()
    assert all(ranks[name] <= bounds[name] for name in ranks)
    assert max(bounds.values()) == output.get("rank", 5 if method == "linear" else 16)
    assert (result.path / WEIGHTS).stat().st_size <= told["write_bytes"]


def test_what_is_no_matrix_is_told_as_a_bound(zoo: Zoo) -> None:
    shapes = {"model.layers.0.self_attn.q_proj.weight": (4, 4), "model.norm.weight": (4,)}
    zoo.family(shapes, 2)
    text = json.dumps({"base": "./base", "models": {"a": "./a", "b": "./b"}, "method": "linear",
                       "output": {"format": "adapter"}})  # fmt: skip
    told = planned(zoo, text)
    assert told["whole"] == [{"name": "base_model.model.model.norm.weight", "bytes": 16}]
    assert not told["exact"]
    ran = zoo.here("merge", "recipe.yaml", "--dry-run")
    assert "as they are, if they differ: 1 tensors, 16 B" in ran.out
    assert "at most 4" in ran.out
    assert "peak memory" in ran.out
    assert not (zoo.folder / "merged").exists()
    out = api.merge(zoo.recipe(text), zoo.folder / "out").path
    assert (out / WEIGHTS).stat().st_size <= told["write_bytes"]


def test_less_memory_makes_for_fewer_workers_and_the_same_bytes(zoo: Zoo) -> None:
    zoo.family({f"model.layers.{i}.mlp.up_proj.weight": (512, 512) for i in range(4)}, 1)
    each, asked = 4 * lowrank.workspace((512, 512), None), {"energy": 0.5, "hashes": False}

    def extracted(out: str, **more: Any) -> api.Result:
        where = [zoo.folder / name for name in ("a", "base", out)]
        return api.extract_lora(*where, **asked, **more)

    one = extracted("one", workers=1)
    least, held = one.report["peak_bytes"], (one.path / WEIGHTS).read_bytes()
    for memory, workers in ((least, 1), (least + each, 2), (least + 4 * each, 4)):
        found = extracted(f"out{workers}", workers=4, max_memory=memory)
        assert found.report["workers"] == workers
        assert found.report["peak_bytes"] <= memory
        assert (found.path / WEIGHTS).read_bytes() == held
    little = ("--energy", "0.5", "--max-memory", f"{least // 1000 - 1}kB")
    ran = zoo.here("extract-lora", "a", "out", "--base", "base", *little)
    assert ran.rc == 6
    assert "is too little" in ran.err
    assert "up_proj.weight" in ran.err
    assert not (zoo.folder / "out").exists()


def test_a_merge_refuses_what_one_matrix_does_not_fit_into(zoo: Zoo) -> None:
    zoo.family({"model.layers.0.mlp.up_proj.weight": (1024, 1024)}, 2)
    content = {"method": "ties", "output": {"format": "adapter"}}
    options = Options(max_memory=460_000_000, workers=1)
    with pytest.raises(ResourceError, match="a matrix is decomposed as a whole"):
        api.merge(zoo.recipe(content), zoo.folder / "out", options=options)


PEAK = """
import sys
from mowmerge import api
from mowmerge.planner import Options
options = Options(workers=1)
asked = api.outline(api.check("recipe.yaml"), options).outline.peak_bytes
api.merge("recipe.yaml", "out", options=options, hashes=False)
lines = open("/proc/self/status").read().splitlines()
print(asked, next(int(l.split()[1]) * 1024 for l in lines if l.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("output", [{"energy": 0.9}, {"rank": 64}])
def test_the_stated_memory_is_what_is_taken(zoo: Zoo, output: dict[str, Any]) -> None:
    zoo.family({f"model.layers.{i}.mlp.up_proj.weight": (2048, 2048) for i in range(3)}, 2)
    zoo.recipe({"method": "ties", "output": {"format": "adapter", **output}})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3}
    (zoo.folder / "base/config.json").write_text(json.dumps(config))
    ran = zoo.python(PEAK)
    assert ran.rc == 0, ran.err
    asked, taken = map(int, ran.out.split())
    assert taken == pytest.approx(asked, rel=0.1)
