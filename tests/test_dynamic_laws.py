"""The laws of dynamic methods, over the registry: what is planned is what is written, however the
merge runs, and anchor and codes give the experts back as well as the codec says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from made import Made, made
from torch import Tensor
from zoo import Shapes, Zoo, bert, gpt2, llama, load, raw

from mowmerge import api, planner, streaming
from mowmerge.dynamic import codecs
from mowmerge.dynamic.format import Code, Manifest
from mowmerge.methods import registry
from mowmerge.methods.registry import MethodSpec
from mowmerge.plan import RUN, Plan
from mowmerge.planner import Options

NAMES = [name for name in registry.names() if registry.get(name).dynamic is not None]
LARGE: Shapes = {
    "model.embed_tokens.weight": (37, 16),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.0.self_attn.q_proj.weight": (300, 450),
    "model.layers.0.self_attn.q_proj.bias": (300,),
    "model.layers.0.mlp.up_proj.weight": (19, 9001),
    "model.layers.0.mlp.up_proj.bias": (2 * RUN + 3,),
    "model.layers.1.input_layernorm.weight": (16,),
    "model.layers.1.self_attn.q_proj.weight": (5, 7),
    "model.layers.1.mlp.up_proj.weight": (RUN, 3),
    "model.layers.1.scalar": (),
    "model.layers.1.mlp.empty.weight": (0, 4),
    "model.norm.weight": (16,),
}
SMALL: dict[str, Callable[[], Shapes]] = {"llama": llama, "bert": bert, "gpt2": gpt2}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# --- every method, every way it codes


def ways(spec: MethodSpec) -> list[dict[str, Any]]:
    """The defaults, and each choice of a word that the method leaves."""
    found: list[dict[str, Any]] = [{}]
    for name, p in spec.parameters.items():
        found += [{name: choice} for choice in p.choices if choice != p.default]
    return found


WAYS = [
    pytest.param(name, way, id="-".join([name, *map(str, way.values())]))
    for name in NAMES
    for way in ways(registry.get(name))
]
every = pytest.mark.parametrize("name", NAMES)
each_way = pytest.mark.parametrize(("name", "way"), WAYS)


def recipe(name: str, way: Mapping[str, Any] = {}, **more: Any) -> dict[str, Any]:
    return {"method": name, "parameters": dict(way), **more}


def merge(zoo: Zoo, content: Mapping[str, Any], out: str = "out", **options: Any) -> Made:
    zoo.merge(content, out, **options)
    return made(zoo.folder / out)


def planned(zoo: Zoo, content: Mapping[str, Any], **options: Any) -> Plan:
    return api.survey(zoo.recipe(content), options=Options(**options))


# --- what is planned is what is written


@each_way
@pytest.mark.parametrize("kind", SMALL)
def test_the_plan_is_what_is_written(zoo: Zoo, kind: str, name: str, way: dict[str, Any]) -> None:
    zoo.family(kind, 3, dtype=torch.bfloat16, shards=2)
    content = recipe(name, way, output={"shard_size": "20kB"})
    plan = planned(zoo, content)
    upper = api.plan(zoo.recipe(content))
    assert upper.write_bytes >= plan.write_bytes
    found, report = zoo.merge(content)
    out = zoo.folder / "out"
    sizes = {p.name: p.stat().st_size for p in out.glob("*.safetensors")}
    assert {shard.file: shard.nbytes for shard in plan.files} == sizes
    assert sum(sizes.values()) == plan.write_bytes == report["written_bytes"]
    assert {n for s in plan.files for n in s.offsets} == set(found)
    specs = {p.name: p for job in plan.jobs for p in (job.output, *job.parts)}
    routers = {n for n in found if n.startswith("mow_router.")}
    assert set(specs) == set(found) - routers
    for tensor, spec in specs.items():
        assert tuple(found[tensor].shape) == spec.shape, tensor
        assert found[tensor].nbytes == spec.nbytes
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert {n: s.file for s in plan.files for n in s.offsets} == index
    assert plan.manifest is not None
    for router, described in plan.manifest.routers.items():
        names = {f"mow_router.{router}.{part}" for part in described.parts}
        assert names <= routers
    actions = {t["name"]: t["action"] for t in report["tensors"]}
    assert {n for n, action in actions.items() if action == "dynamic"} == {
        code.name for code in plan.manifest.codes
    }


@each_way
def test_bytes_depend_on_nothing_but_plan_and_inputs(
    zoo: Zoo, name: str, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.family(LARGE, 3)
    content = recipe(name, way)
    tensors, report = zoo.merge(content, "one", workers=1, stats=False)
    wanted, measured = raw(tensors), report.get("survey")
    for workers, block in ((2, RUN), (1, 8 * RUN)):
        monkeypatch.setattr(planner, "BLOCK", block)
        monkeypatch.setenv("XDG_CACHE_HOME", str(zoo.folder / f"cache-{block}"))
        found, report = zoo.merge(content, f"w{workers}-{block}", workers=workers)
        assert raw(found) == wanted
        assert report.get("survey") == measured
    monkeypatch.undo()
    zoo.family(LARGE, 3, shards=3)
    for model in ("base", "a", "b", "c"):
        (zoo.folder / model / "model.safetensors").unlink()
    assert raw(zoo.merge(content, "sharded")[0]) == wanted


def test_bytes_do_not_depend_on_the_hash_seed(zoo: Zoo) -> None:
    zoo.family("llama", 3)
    for name in NAMES:
        zoo.recipe(recipe(name), name)
    code = (
        "import hashlib, os, sys; from pathlib import Path; from mowmerge import merge\n"
        "os.environ['XDG_CACHE_HOME'] = f'cache-{hash(\"x\")}'\n"
        "for name in sys.argv[1:]:\n"
        "    out = merge(name + '.yaml', f'{name}-{hash(\"x\")}', hashes=False).path\n"
        "    for file in sorted([*out.glob('*.safetensors'), out / 'config.json']):\n"
        "        print(name, file.name, hashlib.sha256(file.read_bytes()).hexdigest())\n"
    )
    runs = [zoo.python(code, *NAMES, env={"PYTHONHASHSEED": seed}) for seed in ("0", "1", "77")]
    assert [run.rc for run in runs] == [0, 0, 0], runs[0].err
    assert len({run.out for run in runs}) == 1
    assert len(runs[0].out.splitlines()) >= 3 * len(NAMES)


@each_way
def test_blocks_of_rows_give_what_the_whole_tensor_gives(
    zoo: Zoo, name: str, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.family(LARGE, 3)
    content = recipe(name, way)
    wanted = raw(zoo.merge(content, "rows", workers=1)[0])

    def at_once(block: int, job: Any, *, whole: bool) -> int:
        return max(job.output.numel, 1)

    monkeypatch.setattr(streaming, "block_length", at_once)
    assert raw(zoo.merge(content, "whole", workers=1)[0]) == wanted


# --- the order of models


@each_way
def test_models_in_another_order_permute_the_slots_and_nothing_else(
    zoo: Zoo, name: str, way: dict[str, Any]
) -> None:
    zoo.family("llama", 3)
    one = merge(zoo, recipe(name, way))
    order = "cab"
    models = {expert: f"./{expert}" for expert in order}
    two = merge(zoo, recipe(name, way, models=models, base="./base"), "two")
    assert one.manifest.experts == ("a", "b", "c")
    assert two.manifest.experts == tuple(order)
    assert list(two.codes) == list(one.codes)
    assert (two.manifest.gates, two.manifest.routers) == (one.manifest.gates, one.manifest.routers)
    for tensor, code in one.codes.items():
        assert two.codes[tensor] == code
        torch.testing.assert_close(two.tensors[tensor], one.tensors[tensor])
        for k, expert in enumerate(order):
            ours = two.expert(tensor, k)
            theirs = one.expert(tensor, "abc".index(expert))
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    for tensor, value in one.tensors.items():
        if tensor in zoo_names(zoo) and tensor not in one.codes:
            torch.testing.assert_close(two.tensors[tensor], value)


def zoo_names(zoo: Zoo) -> set[str]:
    return set(load(zoo.folder / "base"))


# --- the experts come back


def bound(code: Code, delta: Tensor) -> float:
    """How far a codec is from one of three experts' deltas, by its own statement; inf: any."""
    size = float(delta.norm())
    if code.codec in ("full", "full_abs"):
        return 0.0
    if code.codec == "low_rank":
        tail = torch.linalg.svdvals(delta.reshape(code.matrix))[code.rank * code.slots // 3 :]
        return float(tail.square().sum().sqrt())
    if code.codec == "sparse":
        smallest = delta.flatten().abs().sort(descending=True).values[code.kept :]
        return float(smallest.square().sum().sqrt())
    if code.codec == "one_bit":
        entries = delta[delta != 0] if code.zeros else delta
        mean = float(entries.abs().sum()) / max(1, entries.numel())
        return max(0.0, size**2 - entries.numel() * mean**2) ** 0.5
    return float("inf")


@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_anchor_and_code_give_the_expert_back(
    zoo: Zoo, name: str, way: dict[str, Any], dtype: torch.dtype
) -> None:
    models = zoo.family("llama", 3, dtype=dtype)
    found = merge(zoo, recipe(name, way))
    tiny = torch.finfo(dtype).eps
    assert found.codes
    for tensor, code in found.codes.items():
        assert found.tensors[tensor].dtype == dtype
        base = models["base"][tensor].double()
        anchor = found.tensors[tensor].double()
        for k, expert in enumerate("abc"):
            want = models[expert][tensor].double()
            got = found.expert(tensor, k)
            if code.codec == "full_abs":
                assert torch.equal(found.parts(code)["abs"][k], models[expert][tensor])
            from_anchor = "anchor" in registry.get(name).inputs
            delta = want - (anchor if from_anchor else base)
            allowed = bound(code, delta)
            slack = 4 * tiny * float(want.norm() + delta.norm()) + 1e-5
            error = float((got - want).norm())
            assert error <= allowed + slack, (tensor, k, error, allowed)
            if 0 < allowed < float("inf"):
                assert error >= allowed - slack, (tensor, k, error, allowed)


@each_way
def test_bf16_is_read_wide_and_written_narrow(zoo: Zoo, name: str, way: dict[str, Any]) -> None:
    models = zoo.family("llama", 3, dtype=torch.bfloat16)
    narrow = merge(zoo, recipe(name, way))
    wide = merge(zoo, recipe(name, way, output={"dtype": "float32"}), "wide")
    assert {v.dtype for v in wide.tensors.values()} <= {
        torch.float32, torch.uint8, torch.int32, torch.int64,
    }  # fmt: skip
    for tensor in narrow.codes:
        assert torch.equal(wide.tensors[tensor].bfloat16(), narrow.tensors[tensor])
        for k, expert in enumerate("abc"):
            a, b = narrow.expert(tensor, k), wide.expert(tensor, k)
            size = float(models[expert][tensor].double().norm())
            assert float((a - b).norm()) <= 0.02 * size + 1e-6


# --- experts that are alike, alone, or the base


@each_way
def test_experts_that_equal_the_base_have_zero_deltas(
    zoo: Zoo, name: str, way: dict[str, Any]
) -> None:
    models = zoo.family("llama", 3)
    for expert in "abc":
        zoo.save(expert, models["base"])
    found = merge(zoo, recipe(name, way))
    for tensor in zoo_names(zoo):
        assert torch.equal(found.tensors[tensor], models["base"][tensor]), tensor
    for tensor in found.codes:
        assert not any(float(d.abs().max()) for d in found.slots(tensor)), tensor


@each_way
def test_one_expert_that_equals_the_base(zoo: Zoo, name: str, way: dict[str, Any]) -> None:
    models = zoo.family("llama", 3)
    zoo.save("b", models["base"])
    found = merge(zoo, recipe(name, way))
    for tensor, value in found.tensors.items():
        assert not value.is_floating_point() or torch.isfinite(value).all(), tensor
    for tensor, code in found.codes.items():
        if code.codec == "basis":  # holds what is common first
            continue
        if "anchor" not in registry.get(name).inputs:
            got = found.expert(tensor, 1).float()
            torch.testing.assert_close(got, models["base"][tensor], rtol=1e-4, atol=1e-4)


@each_way
def test_identical_experts_have_identical_deltas(zoo: Zoo, name: str, way: dict[str, Any]) -> None:
    models = zoo.family("llama", 1)
    for expert in "bc":
        zoo.save(expert, models["a"])
    found = merge(zoo, recipe(name, way))
    for tensor in found.codes:
        one, *others = (found.expert(tensor, k) for k in range(3))
        for other in others:
            torch.testing.assert_close(other, one)


@every
def test_one_model_is_merged_or_refused(zoo: Zoo, name: str) -> None:
    models = zoo.family("llama", 1)
    spec = registry.get(name)
    if spec.at_least > 1:
        with pytest.raises(Exception, match=f"'{name}' takes at least {spec.at_least} models"):
            zoo.merge(recipe(name))
        return
    found = merge(zoo, recipe(name))
    for tensor, code in found.codes.items():
        want, got = models["a"][tensor].double(), found.expert(tensor, 0)
        if code.codec in ("full", "mask"):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        delta = want - models["base"][tensor].double()
        assert float((got - want).norm()) <= float(delta.norm()) + 1e-5


# --- gates


@every
def test_gates_are_whole(zoo: Zoo, name: str) -> None:
    zoo.family("bert", 3)
    found = merge(zoo, recipe(name)).manifest
    assert {code.gate for code in found.codes} == set(found.gates)
    assert {gate.router for gate in found.gates.values() if gate.router} == set(found.routers)
    for id, gate in found.gates.items():
        if gate.router and found.routers[gate.router].kind != "projection":
            assert found.routers[gate.router].outputs == found.slots(id)
            assert found.routers[gate.router].width == 16
        assert len({code.slots for code in found.codes if code.gate == id}) == 1
    assert found == Manifest.from_json(json.loads(json.dumps(found.to_json())))


@every
def test_the_static_tensors_are_those_of_the_static_merge(zoo: Zoo, name: str) -> None:
    zoo.family("llama", 3)
    spec = registry.get(name)
    assert spec.dynamic is not None
    method, given = spec.dynamic.rest(spec.complete({}))
    static, _ = zoo.merge({"method": method, "parameters": dict(given)}, "static")
    found = merge(zoo, recipe(name))
    for tensor, value in static.items():
        anchored = "anchor" in spec.inputs
        if anchored or tensor not in found.codes:
            assert torch.equal(found.tensors[tensor], value), tensor


@every
def test_the_offsets_give_the_anchor(zoo: Zoo, name: str) -> None:
    """With every coefficient at its offset the model is the anchor, whose values are finite."""
    zoo.family("gpt2", 3)
    found = merge(zoo, recipe(name))
    for tensor, code in found.codes.items():
        c = torch.zeros(1, code.slots)  # less the offsets
        mixed = codecs.mixed(code, found.parts(code), found.tensors[tensor], c)
        assert torch.equal(mixed[0], found.tensors[tensor])


@cache
def _documented() -> str:
    return (Path(__file__).parents[1] / "docs" / "dynamic.md").read_text()


@every
def test_the_page_for_users_names_the_method(name: str) -> None:
    if registry.get(name).origin == "mowmerge":
        assert f"`{name}`" in _documented()
