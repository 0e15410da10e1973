"""The engine: the same bytes however it runs, exact copies, exact figures, and clean ends."""

from __future__ import annotations

import hashlib
import json
import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import KINDS, Shapes, Tensors, Zoo, left, load, raw

from mowmerge import api, planner, reduction
from mowmerge.errors import CheckpointError
from mowmerge.methods import registry
from mowmerge.methods.ops import settle
from mowmerge.plan import RUN
from mowmerge.planner import Options
from mowmerge.recipe import parse

LARGE: Shapes = {
    "model.embed_tokens.weight": (257, 513),
    "model.layers.0.mlp.up_proj.weight": (300, 1000),
    "model.layers.0.self_attn.q_proj.bias": (2 * RUN + 3,),
    "model.layers.1.mlp.up_proj.weight": (RUN, 3),
    "model.layers.1.self_attn.rel": (4, 5, 6),
    "model.layers.1.scalar": (),
    "model.layers.1.empty": (0, 4),
    "model.norm.weight": (7,),
}
WAYS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "parameters": {"weight": {"a": 0.3, "b": 0.6, "c": 0.2}}},
    "task_arithmetic": {"method": "task_arithmetic", "parameters": {"scale": 0.4}},
    "slerp": {"method": "slerp", "models": {"a": "./a", "b": "./b"}, "parameters": {"t": 0.3}},
    "ties": {"method": "ties", "parameters": {"density": 0.3, "trim": "tensor"}},
    "ties_global": {"method": "ties", "parameters": {"density": 0.3, "trim": "global"}},
    "dare": {"method": "dare", "parameters": {"density": 0.4, "elect": "mass", "seed": 3}},
    "model_stock": {"method": "model_stock", "base": "./base"},
    "model_stock_row": {"method": "model_stock", "parameters": {"filter_wise": True}},
    "breadcrumbs": {"method": "breadcrumbs", "parameters": {"rescale": True}},
    "della": {"method": "della", "parameters": {"rescale": "l1", "seed": 5}},
    "sce": {"method": "sce", "parameters": {"density": 0.4}},
    "nuslerp_columns": {
        "method": "nuslerp", "base": "./base", "models": {"a": "./a", "b": "./b"},
        "parameters": {"axis": "columns"},
    },
    "arcee_fusion": {"method": "arcee_fusion", "base": "./base", "models": {"a": "./a"}},
    "ram": {"method": "ram", "parameters": {"boost": 0.1, "eps": 0.3}},
    "pcb_merging": {"method": "pcb_merging"},
    "metagpt": {"method": "task_arithmetic", "parameters": {"coefficients": "metagpt"}},
}  # fmt: skip


# --- the same bytes


@pytest.mark.parametrize("way", WAYS)
def test_bytes_depend_on_nothing_but_plan_and_inputs(
    zoo: Zoo, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduction, "SPAN", 2 * RUN)
    zoo.family(LARGE, 3)
    wanted = raw(zoo.merge(WAYS[way], "one", workers=1, stats=False)[0])
    assert set(wanted) == set(LARGE)
    for workers, block, shard_size in (
        (2, None, "600kB"), (3, RUN, "5GB"), (2, 4 * RUN, "1MB"), (1, RUN, "2MB")
    ):  # fmt: skip
        monkeypatch.setattr(planner, "BLOCK", block or 2 * RUN)
        out = f"w{workers}-{block}-{shard_size}"
        content = WAYS[way] | {"output": {"shard_size": shard_size}}
        found, _ = zoo.merge(content, out, workers=workers, stats=workers > 2)
        assert raw(found) == wanted, out
    zoo.family(LARGE, 3, shards=3)
    for model in ("base", "a", "b", "c"):
        (zoo.folder / model / "model.safetensors").unlink()
    assert raw(zoo.merge(WAYS[way], "sharded", workers=2)[0]) == wanted


def test_bytes_do_not_depend_on_the_hash_seed(zoo: Zoo) -> None:
    zoo.family({"w": (RUN + 3,), "v": (300, 5)}, 3)
    for way, content in WAYS.items():
        zoo.recipe(content, way)
    code = (
        "import hashlib, sys; from pathlib import Path; from mowmerge import merge\n"
        "for way in sys.argv[1:]:\n"
        "    out = merge(way + '.yaml', f'{way}-{hash(\"x\")}', hashes=False).path\n"
        "    print(way, hashlib.sha256((out / 'model.safetensors').read_bytes()).hexdigest())\n"
    )
    runs = [zoo.python(code, *WAYS, env={"PYTHONHASHSEED": seed}) for seed in ("0", "1", "77")]
    assert [run.rc for run in runs] == [0, 0, 0], runs[0].err
    assert len({run.out for run in runs}) == 1
    assert len(runs[0].out.splitlines()) == len(WAYS)


# --- the right bytes


def plain(way: str, models: dict[str, Tensors], name: str) -> Tensor:
    """The merged tensor, from the method called on whole tensors."""
    recipe = WAYS[way]
    spec, p = registry.get(recipe["method"]), dict(recipe.get("parameters", {}))
    experts = list(recipe.get("models", "abc"))
    weight = p.get("weight")
    if isinstance(weight, dict):
        p["weight"] = tuple(weight[e] for e in experts)
    base = models["base"][name].float()
    values = torch.stack([models[e][name].float() for e in experts])
    if "base" in spec.inputs:
        p["base"] = base
    if spec.values == "models":
        return spec.function(values, **p)
    deltas = values - base
    given = spec.complete(p)
    if spec.scope(given) == "model":
        whole = torch.cat(
            [torch.stack([models[e][n] - models["base"][n] for e in experts]).reshape(3, -1)
             for n in LARGE], 1
        )  # fmt: skip
        each = {k: (v,) * 3 if spec.parameters[k].per_model else v for k, v in given.items()}
        assert spec.reduce is not None
        p["state"] = settle(spec.reduce, whole, each)
    if "rng" in spec.inputs:
        from mowmerge.methods.contracts import Draws

        p["rng"] = Draws(p["seed"], experts, name)
    return base + spec.function(deltas, **p)


@pytest.mark.parametrize("way", WAYS)
def test_the_engine_gives_what_the_method_gives_on_whole_tensors(zoo: Zoo, way: str) -> None:
    models = zoo.family(LARGE, 3)
    found, _ = zoo.merge(WAYS[way])
    for name in LARGE:
        assert found[name].shape == models["base"][name].shape
        assert torch.equal(found[name], plain(way, models, name)), name


@pytest.mark.parametrize("kind", KINDS)
def test_linear_is_the_mean_for_every_shape_of_model(zoo: Zoo, kind: str) -> None:
    models = zoo.family(kind, 2, shards=2)
    found, _ = zoo.merge({"method": "linear"})
    assert set(found) == set(models["base"])
    for name, value in found.items():
        torch.testing.assert_close(value, (models["a"][name] + models["b"][name]) / 2)


def test_ties_keeps_the_largest_elects_and_averages(zoo: Zoo) -> None:
    models = zoo.family({"w": (40, 50)}, 3)
    found, _ = zoo.merge({"method": "ties", "parameters": {"density": 0.25, "trim": "tensor"}})
    deltas = torch.stack([models[e]["w"] - models["base"]["w"] for e in "abc"])
    for delta in deltas:
        delta[delta.abs() < delta.abs().flatten().topk(500).values[-1]] = 0
    sign = deltas.sum(0).sign()
    agreeing = deltas * (deltas.sign() == sign)
    mean = agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)
    torch.testing.assert_close(found["w"], models["base"]["w"] + mean)


# --- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_arithmetic_is_wide_and_cast_once(zoo: Zoo, dtype: torch.dtype) -> None:
    models = zoo.family({"w": (30, 41)}, 3, dtype=dtype)
    found, _ = zoo.merge({"method": "task_arithmetic", "parameters": {"scale": 0.3}})
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    base = models["base"]["w"].to(wide)
    delta = (models["a"]["w"].to(wide) - base) * 0.3
    for expert in "bc":
        delta.add_(models[expert]["w"].to(wide) - base, alpha=0.3)
    assert torch.equal(found["w"], (delta + base).to(dtype))


def test_dtypes_mix(zoo: Zoo) -> None:
    dtypes = {"base": torch.bfloat16, "a": torch.float32, "b": torch.float16, "c": torch.float64}
    models = zoo.family({"w": (30, 41)}, 3)
    for name, dtype in dtypes.items():
        models[name] = {"w": models[name]["w"].to(dtype)}
        zoo.save(name, models[name])
    found, _ = zoo.merge({"method": "linear"})
    mean = sum(models[e]["w"].double() for e in "abc") / 3
    assert found["w"].dtype == torch.bfloat16
    assert torch.equal(found["w"], mean.to(torch.bfloat16))


@pytest.mark.parametrize("way", ["linear", "ties"])
def test_output_dtype_converts_floats_and_nothing_else(zoo: Zoo, way: str) -> None:
    models = zoo.family({"w": (30, 41), "same": (9,)}, 3)
    for tensors in models.values():
        tensors |= {"ids": torch.arange(5), "same": torch.full((9,), 0.1)}
    for name, tensors in models.items():
        zoo.save(name, tensors)
    wide, _ = zoo.merge(WAYS[way], "wide")
    found, _ = zoo.merge(WAYS[way] | {"output": {"dtype": "bfloat16"}})
    assert torch.equal(found["w"], wide["w"].bfloat16())
    assert torch.equal(found["same"], torch.full((9,), 0.1).bfloat16())
    assert torch.equal(found["ids"], torch.arange(5))
    assert json.loads((zoo.folder / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("content", [
    {"method": "linear", "parameters": {"normalize": False}},
    {"method": "task_arithmetic", "parameters": {"scale": 90_000}},
    {"method": "passthrough", "models": {"a": "./a"}, "output": {"dtype": "float16"}},
])  # fmt: skip
def test_an_overflow_is_an_error_and_names_the_tensor(zoo: Zoo, content: dict[str, Any]) -> None:
    narrow = "output" not in content
    dtype = torch.float16 if narrow else torch.float32
    for name, value in (("base", 1.0), ("a", 60_000.0 if narrow else 1e6), ("b", 60_000.0)):
        zoo.save(name, {"w.bias": torch.full((11,), value, dtype=dtype)})
    with pytest.raises(CheckpointError, match=r"'w.bias' overflows F\w*16"):
        zoo.merge(content)
    assert not (zoo.folder / "out").exists()
    assert left(zoo.folder) == []


# --- copies


@pytest.mark.parametrize("way", [w for w in WAYS if w != "linear"])
def test_what_equals_the_base_in_every_expert_is_the_base_to_the_bit(zoo: Zoo, way: str) -> None:
    models = zoo.family({"w": (20, 20), "same": (300, 700)}, 3)
    models["base"]["same"][0, :3] = torch.tensor([-0.0, 0.0, 1e-42])
    for name, tensors in models.items():
        zoo.save(name, tensors | {"same": models["base"]["same"]})
    found, report = zoo.merge(WAYS[way])
    assert raw(found)["same"] == raw(models["base"])["same"]
    assert {t["name"]: t["action"] for t in report["tensors"]} == {"w": "merged", "same": "copied"}


def test_an_idempotent_method_copies_what_all_models_share(zoo: Zoo) -> None:
    models = zoo.family({"w": (300, 700)}, 3, dtype=torch.bfloat16)
    models["a"]["w"][0, :2] = torch.tensor([-0.0, 3e-39])
    for name in "bc":
        zoo.save(name, models["a"])
    zoo.save("a", models["a"])
    found, report = zoo.merge(WAYS["linear"])
    assert raw(found) == raw(models["a"])
    (only,) = report["tensors"]
    assert only["action"] == "copied"
    delta = (models["a"]["w"].double() - models["base"]["w"].double()).norm().item()
    assert only["delta_norms"] == pytest.approx([delta] * 3, rel=1e-5)
    assert only["mean_cosine"] == pytest.approx(1, rel=1e-5)
    _, plain = zoo.merge(WAYS["linear"] | {"parameters": {"normalize": False}}, "sum")
    assert plain["tensors"][0]["action"] == "merged"


# --- numbers that are not numbers


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("way", ["linear", "slerp", "ties", "ties_global", "dare"])
def test_what_is_not_finite_names_tensor_and_model(zoo: Zoo, way: str, bad: float) -> None:
    models = zoo.family({"v": (5,), "w.weight": (300, 700)}, 3)
    models["b"]["w.weight"][299, 699] = bad
    zoo.save("b", models["b"])
    with pytest.raises(CheckpointError) as caught:
        zoo.merge(WAYS[way])
    (problem,) = caught.value.problems
    assert "'w.weight' holds NaN or Inf" in problem.message
    assert problem.where == "model 'b'"
    assert problem.hint
    assert not (zoo.folder / "out").exists()
    assert left(zoo.folder) == []


@pytest.mark.parametrize("parameters", [{"density": 0.0}, {"weight": 0.0}])
def test_a_nan_is_found_where_its_model_counts_for_nothing(
    zoo: Zoo, parameters: dict[str, float]
) -> None:
    models = zoo.family({"w": (300, 700)}, 3)
    models["c"]["w"][0, 0] = math.nan
    zoo.save("c", models["c"])
    content = {"method": "ties", "parameters": {k: {"c": v} for k, v in parameters.items()}}
    with pytest.raises(CheckpointError, match="model 'c'"):
        zoo.merge(content)


@pytest.mark.parametrize("content", [
    {"method": "ties"}, {"method": "linear"},
    {"method": "passthrough", "models": {"a": "./a"}},
])  # fmt: skip
def test_a_nan_is_found_in_what_is_only_copied(zoo: Zoo, content: dict[str, Any]) -> None:
    value = torch.zeros(300, 700)
    value[150, 3] = math.nan
    for name in ("base", "a", "b"):
        zoo.save(name, {"w": value})
    with pytest.raises(CheckpointError, match="'w' holds NaN or Inf"):
        zoo.merge(content)


def test_finite_values_may_sum_to_infinity(zoo: Zoo) -> None:
    for name in ("base", "a", "b"):
        zoo.save(name, {"w": torch.full((100,), 3e38) * (1 if name == "base" else 0.5)})
    found, _ = zoo.merge({"method": "linear"})
    assert torch.equal(found["w"], torch.full((100,), 3e38) * 0.5)


# --- integers


def test_integers_are_copied_with_a_note_where_they_differ(zoo: Zoo) -> None:
    models = zoo.family({"w": (3, 4)}, 2)
    for name, tensors in models.items():
        tensors["ids"] = torch.arange(4) + (name == "b")
        tensors["flags"] = torch.tensor([True, False])
        zoo.save(name, tensors)
    found, report = zoo.merge({"method": "ties"})
    assert torch.equal(found["ids"], models["base"]["ids"])
    assert torch.equal(found["flags"], models["base"]["flags"])
    assert [w.partition(":")[0] for w in report["warnings"]] == ["ids"]
    assert {t["name"]: t["action"] for t in report["tensors"]}["ids"] == "copied"


# --- nested recipes


INNER = {
    "element": {"method": "linear"},
    "tensor": {"method": "ties", "base": "./base", "parameters": {"trim": "tensor"}},
    "model": {"method": "ties", "base": "./base", "parameters": {"trim": "global"}},
    "narrow": {"method": "linear", "output": {"dtype": "bfloat16"}},
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("outer", ["base", "model"])
@pytest.mark.parametrize("way", ["linear", "ties_global"])
def test_a_nested_recipe_is_the_two_step_merge(
    zoo: Zoo, inner: str, outer: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "BLOCK", RUN)
    zoo.family({"model.embed_tokens.weight": (300, 500), "w": (RUN + 5,), "b": (3,)}, 4)
    models = {"models": {"a": "./a", "b": "./b"}}
    zoo.merge(INNER[inner] | models, "inner", name="inner")
    sources: dict[str, Any] = {"base": "./base", "models": {"c": "./c", "d": "./d"}}
    results = []
    for source in ("./inner", "./inner.yaml"):
        if outer == "base":
            content = WAYS[way] | sources | {"base": source}
        else:
            content = WAYS[way] | sources
            content["models"] = {"c": "./c", "n": source}
        content["parameters"] = {}
        results.append(raw(zoo.merge(content, source.replace(".", "-")[2:] + "-out", workers=2)[0]))
    assert results[0] == results[1]
    assert left(zoo.folder) == []


def test_a_recipe_nested_in_a_nested_one(zoo: Zoo) -> None:
    models = zoo.family("llama", 3)
    inner = {"method": "linear", "models": {"a": "./a", "b": "./b"}}
    middle = {"method": "linear", "models": {"i": {"source": inner}, "c": "./c"}}
    found, _ = zoo.merge({"method": "linear", "models": {"m": {"source": middle}}})
    for name, value in found.items():
        mean = (models["a"][name] + models["b"][name]) / 4 + models["c"][name] / 2
        torch.testing.assert_close(value, mean)


# --- the report


def test_figures_are_those_of_a_direct_computation(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "BLOCK", RUN)
    models = zoo.family({"w": (300, 1000), "v": (17,)}, 3)
    for tensors in models.values():
        tensors["w"][:100] = models["base"]["w"][:100]
    for name, tensors in models.items():
        zoo.save(name, tensors)
    found, report = zoo.merge(WAYS["ties"])
    for line in report["tensors"]:
        base = models["base"][line["name"]].double()
        deltas = [models[e][line["name"]].double() - base for e in "abc"]
        norms = [d.norm().item() for d in deltas]
        assert line["delta_norms"] == pytest.approx(norms, rel=1e-5)
        cosines = [
            (deltas[i] * deltas[j]).sum().item() / norms[i] / norms[j]
            for i, j in combinations(range(3), 2)
        ]
        assert line["mean_cosine"] == pytest.approx(sum(cosines) / 3, abs=1e-5)
        stacked = torch.stack(deltas)
        conflict = ((stacked > 0).any(0) & (stacked < 0).any(0)).double().mean().item()
        assert line["sign_conflict"] == pytest.approx(conflict, abs=1e-12)
        moved = (found[line["name"]] != models["base"][line["name"]]).double().mean().item()
        assert line["kept_share"] == pytest.approx(moved, abs=1e-5)
        assert line["written_bytes"] == base.numel() * 4
        assert line["read_bytes"] == 4 * base.numel() * 4
        assert (line["method"], line["action"]) == ("ties", "merged")
        assert line["models"] == ["a", "b", "c"]
        assert line["parameters"]["density"] == (0.3, 0.3, 0.3)
        assert line["seconds"] >= 0
    written = json.loads((zoo.folder / "out" / "report.json").read_text())
    assert written == json.loads(json.dumps(report))
    size = (zoo.folder / "out" / "model.safetensors").stat().st_size
    assert report["written_bytes"] == size


def test_without_stats_there_are_no_figures_and_no_base_is_read(zoo: Zoo) -> None:
    zoo.family({"w": (30, 40)}, 2)
    found, report = zoo.merge({"method": "linear"}, stats=False)
    with_stats, _ = zoo.merge({"method": "linear"}, "with")
    (line,) = report["tensors"]
    assert "delta_norms" not in line
    assert line["read_bytes"] == 2 * 30 * 40 * 4
    assert raw(found) == raw(with_stats)


def test_sums_hold_for_every_file_that_they_name(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    content = {"method": "linear", "output": {"shard_size": "6kB"}}
    zoo.merge(content, hashes=True)
    out = zoo.folder / "out"
    named = set()
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest, name
        named.add(name)
    assert {"config.json", "model.safetensors.index.json", "recipe.yaml"} <= named
    assert {p.name for p in out.glob("*.safetensors")} <= named
    assert len(list(out.glob("*.safetensors"))) > 2
    assert {p.name for p in out.iterdir()} - named == {"SHA256SUMS", "report.json", "README.md"}
    zoo.merge(content, "bare", hashes=False)
    assert not (zoo.folder / "bare" / "SHA256SUMS").exists()


# --- around a run


def test_threads_of_torch_are_given_back(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    torch.set_num_threads(2)
    try:
        zoo.merge({"method": "linear"})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_progress_counts_every_byte(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    seen: list[int] = []
    recipe = parse.load(zoo.recipe({"method": "linear"}))
    api.merge(recipe, zoo.folder / "out", options=Options(), begin=lambda plan: seen.append)
    assert sum(seen) == sum(v.nbytes for v in load(zoo.folder / "out").values())


# --- transformers


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_the_result_loads_with_no_key_missing_or_unexpected(zoo: Zoo, kind: str) -> None:
    import transformers as hf

    small = {"vocab_size": 64, "num_hidden_layers": 2}
    if kind == "gpt2":
        config = hf.GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=64, n_positions=16)
        model_class: Any = hf.GPT2LMHeadModel
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
        config = getattr(hf, f"{kind.title()}Config")(**small, **sizes)
        model_class = {"llama": hf.LlamaForCausalLM, "bert": hf.BertForMaskedLM}[kind]
    models = {}
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        models[name] = model_class(config)
        models[name].save_pretrained(zoo.folder / name)
    zoo.merge({"method": "task_arithmetic", "parameters": {"scale": 0.5}})
    merged, info = model_class.from_pretrained(zoo.folder / "out", output_loading_info=True)
    assert {key: list(value) for key, value in info.items()} == {key: [] for key in info}
    states = {name: model.state_dict() for name, model in models.items()}
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, (states["a"][name] + states["b"][name]) / 2)
