"""The planner: exact from headers alone, every problem at once, nothing dropped in silence."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from zoo import Zoo, load

from mowmerge import memory, planner
from mowmerge.errors import CheckpointError, MowmergeError, RecipeError, ResourceError
from mowmerge.plan import RUN, Plan, TensorJob
from mowmerge.planner import Options, build
from mowmerge.recipe import parse


def plan(zoo: Zoo, content: dict[str, Any], **options: Any) -> Plan:
    return build(parse.load(zoo.recipe(content)), Options(**options))


def jobs(zoo: Zoo, content: dict[str, Any], **options: Any) -> dict[str, TensorJob]:
    return {job.output.name: job for job in plan(zoo, content, **options).jobs}


def problems(zoo: Zoo, content: dict[str, Any], kind: type[MowmergeError]) -> list[str]:
    with pytest.raises(kind) as caught:
        plan(zoo, content)
    return [str(problem) for problem in caught.value.problems]


# --- exactness


@pytest.mark.parametrize("content", [
    {"method": "linear"},
    {"method": "ties", "output": {"dtype": "bfloat16", "shard_size": "5kB"}},
    {"method": "slerp", "models": {"a": "./a", "b": "./b"}, "output": {"shard_size": 1}},
    {"method": "dare", "rules": [{"match": {"role": "mlp"}, "drop": True}],
     "output": {"dtype": "float64"}},
])  # fmt: skip
def test_the_plan_is_what_happens(zoo: Zoo, content: dict[str, Any]) -> None:
    models = zoo.family("llama", 2, dtype=torch.float16, shards=2)
    planned = plan(zoo, content)
    found, report = zoo.merge(content)
    files = {p.name: p.stat().st_size for p in (zoo.folder / "out").glob("*.safetensors")}
    assert {s.file: s.nbytes for s in planned.shards} == files
    assert planned.write_bytes == sum(files.values()) == report["written_bytes"]
    assert set(planned.specs) == set(found)
    for name, spec in planned.specs.items():
        dtype = content.get("output", {}).get("dtype", "float16")
        assert (spec.shape, found[name].dtype) == (tuple(found[name].shape), getattr(torch, dtype))
        assert spec.nbytes == found[name].nbytes
    kept = sum(v.nbytes for k, v in models["base"].items() if k in found)
    assert planned.read_bytes == kept * len(planned.sources) == report["read_bytes"]
    assert planned.fingerprint == report["fingerprint"]
    assert {t["name"]: t["read_bytes"] for t in report["tensors"]} == {
        job.output.name: job.read_bytes for job in planned.jobs
    }


def test_the_fingerprint_follows_what_decides_the_bytes(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    one = plan(zoo, {"method": "ties"})
    assert plan(zoo, {"method": "ties"}, workers=3).fingerprint == one.fingerprint
    for other in ({"method": "ties", "parameters": {"density": 0.3}}, {"method": "linear"}):
        assert plan(zoo, other).fingerprint != one.fingerprint


def test_output_dtype(zoo: Zoo) -> None:
    models = zoo.family("llama", 2)
    for name, tensors in models.items():
        zoo.save(name, tensors | {"ids": torch.arange(3)})
    found = jobs(zoo, {"method": "linear", "output": {"dtype": "float16"}})
    assert {job.output.dtype for name, job in found.items() if name != "ids"} == {"F16"}
    assert (found["ids"].output.dtype, found["ids"].method) == ("I64", None)


# --- what does not fit


def test_every_problem_at_once(zoo: Zoo) -> None:
    models = zoo.family("llama", 3)
    del models["a"]["model.norm.weight"]
    models["b"]["model.extra"] = torch.ones(1)
    models["b"]["lm_head.weight"] = torch.ones(24, 17)
    models["c"]["model.layers.0.mlp.up_proj.weight"] = torch.ones(32, 16).int()
    for name in "abc":
        zoo.save(name, models[name])
    found = "\n".join(problems(zoo, {"method": "linear"}, CheckpointError))
    for words in (
        "model 'a': tensor 'model.norm.weight' is missing",
        "model 'b': tensor 'lm_head.weight' has the shape [24, 17], but [24, 16] in the base",
        "model 'b': tensor 'model.extra' is in no other model",
        "model 'c': tensor 'model.layers.0.mlp.up_proj.weight' has the kind of dtype integer",
    ):
        assert words in found
    assert found.count("\n  -> ") == 4


def test_a_hundred_problems_are_cut_short(zoo: Zoo) -> None:
    zoo.family({f"w{i:03d}": (2,) for i in range(100)}, 2)
    zoo.save("a", {"w000": torch.ones(2)})
    found = problems(zoo, {"method": "linear"}, CheckpointError)
    assert found[-1] == "... and 79 more problems of this kind"


def test_every_source_that_is_not_there_at_once(zoo: Zoo) -> None:
    zoo.family("llama", 1)
    content = {"method": "linear", "models": {"x": "./x", "a": "./a", "y": "./y"}, "base": "./z"}
    found = "\n".join(problems(zoo, content, MowmergeError))
    assert [n for n in "axyz" if f"'./{n}'" in found] == ["x", "y", "z"]


def test_missing_base_takes_the_base_s(zoo: Zoo) -> None:
    models = zoo.family("llama", 2)
    value = models["a"].pop("model.norm.weight")
    zoo.save("a", models["a"])
    content = {"method": "linear", "missing": "base"}
    job = jobs(zoo, content)["model.norm.weight"]
    assert [i.model for i in job.models] == ["base", "b"]
    found, report = zoo.merge(content)
    base, b = (models[n]["model.norm.weight"] for n in ("base", "b"))
    assert torch.equal(found["model.norm.weight"], (base * 0.5).add_(b, alpha=0.5))
    assert not torch.equal(base, value)
    line = next(t for t in report["tensors"] if t["name"] == "model.norm.weight")
    assert line["delta_norms"][0] == 0.0


def test_drop_rules_leave_tensors_out_of_both_sides(zoo: Zoo) -> None:
    models = zoo.family("llama", 2)
    zoo.save("b", models["b"] | {"score.weight": torch.ones(2, 16)})
    content = {
        "method": "linear",
        "rules": [{"match": {"tensors": ["score.*", "lm_head.*"]}, "drop": True}],
    }
    planned = plan(zoo, content)
    assert sorted(planned.dropped) == ["lm_head.weight", "score.weight"]
    assert planned.warnings == ()
    found, report = zoo.merge(content)
    assert set(found) == set(models["base"]) - {"lm_head.weight"}
    assert sorted(report["dropped"]) == ["lm_head.weight", "score.weight"]


def test_a_rule_that_drops_everything_is_refused(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    content = {"method": "linear", "rules": [{"match": {}, "drop": True}]}
    assert "nothing is left to write" in problems(zoo, content, RecipeError)[0]


# --- tied heads


HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def tied(zoo: Zoo, *, own_head: bool) -> None:
    models = zoo.family("llama", 2, tied=True)
    head = models["b"][EMBED].clone()
    if own_head:
        head[-1, -1] += 1
    zoo.save("b", models["b"] | {HEAD: head})


def test_a_head_that_equals_what_the_base_ties_it_to_is_left_out_with_a_warning(zoo: Zoo) -> None:
    tied(zoo, own_head=False)
    found, report = zoo.merge({"method": "linear"})
    assert HEAD not in found
    (warning,) = report["warnings"]
    assert "model 'b'" in warning
    assert f"'{HEAD}'" in warning
    assert plan(zoo, {"method": "linear"}).warnings == (warning,)


@pytest.mark.parametrize("nested", [False, True])
def test_a_head_of_its_own_is_never_lost(zoo: Zoo, nested: bool) -> None:
    tied(zoo, own_head=True)
    content: dict[str, Any] = {"method": "linear"}
    if nested:
        inner = {"method": "linear", "models": {"a": "./a", "b": "./b"}, "base": "./base"}
        content = {"method": "linear", "models": {"n": {"source": inner}, "a": "./a"}}
    assert plan(zoo, content).warnings
    with pytest.raises(CheckpointError, match=f"'{HEAD}' .* '{EMBED}'") as caught:
        zoo.merge(content)
    assert caught.value.problems[0].where == "model 'b'"
    assert caught.value.problems[0].hint
    assert not (zoo.folder / "out").exists()


@pytest.mark.parametrize("change", [torch.Tensor.bfloat16, lambda head: head[:-1]])
def test_a_head_of_another_shape_or_dtype_is_no_tied_one(zoo: Zoo, change: Any) -> None:
    models = zoo.family("llama", 2, tied=True)
    zoo.save("b", models["b"] | {HEAD: change(models["b"][EMBED]).clone()})
    (found,) = problems(zoo, {"method": "linear"}, CheckpointError)
    assert f"model 'b': tensor '{HEAD}' is in no other model" in found


def test_a_head_that_an_expert_ties_is_read_from_its_embedding(zoo: Zoo) -> None:
    models = zoo.family("llama", 2, tied=False)
    del models["b"][HEAD]
    zoo.save("b", models["b"])
    job = jobs(zoo, {"method": "linear"})[HEAD]
    assert [(i.model, i.spec.name) for i in job.models] == [("a", HEAD), ("b", EMBED)]
    found, _ = zoo.merge({"method": "linear"})
    mean = (models["a"][HEAD] * 0.5).add_(models["b"][EMBED], alpha=0.5)
    assert torch.equal(found[HEAD], mean)


# --- rules and values


def test_a_rule_that_matches_nothing_is_a_warning(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    rules = [{"match": {"tensors": "*lm_haed*"}, "method": "ties"}, {"match": {"role": "norm"}}]
    (warning,) = plan(zoo, {"method": "linear", "rules": rules}).warnings
    assert "this rule matches no tensor" in warning
    assert "recipe.yaml:" in warning


def test_a_rule_may_change_the_method_and_starts_from_its_defaults(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    rules = [{"match": {"role": "norm"}, "method": "dare"},
             {"match": {"layers": 1}, "parameters": {"density": 0.9}}]  # fmt: skip
    parameters = {"density": 0.7, "trim": "tensor"}
    found = jobs(zoo, {"method": "ties", "parameters": parameters, "rules": rules})
    for name, job in found.items():
        norm = "norm" in name
        density = 0.5 if norm else 0.9 if ".layers.1." in name else 0.7
        assert (job.method, job.parameters["density"][0]) == ("dare" if norm else "ties", density)
    merged, report = zoo.merge({"method": "linear", "rules": rules[:1]})
    assert {t["method"] for t in report["tensors"]} == {"linear", "dare"}
    assert set(merged) == set(found)


def test_gradients_run_over_each_stack(zoo: Zoo) -> None:
    encoder = {f"encoder.block.{i}.layer.0.SelfAttention.q.weight": (2, 2) for i in range(3)}
    decoder = {f"decoder.block.{i}.layer.0.SelfAttention.q.weight": (2, 2) for i in range(5)}
    zoo.family({"shared.weight": (4, 2)} | encoder | decoder | {"lm_head.weight": (4, 2)}, 2)
    content = {"method": "slerp", "parameters": {"t": [0, 0.5, 1]}}
    t = {name: job.parameters["t"] for name, job in jobs(zoo, content).items()}
    assert [t[name] for name in encoder] == [0.0, 0.5, 1.0]
    assert [t[name] for name in decoder] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert (t["shared.weight"], t["lm_head.weight"]) == (0.0, 1.0)


def test_weights_by_model_and_models_by_rule(zoo: Zoo) -> None:
    zoo.family("llama", 3)
    rules = [{"match": {"role": "mlp"}, "parameters": {"weight": {"b": 2}}},
             {"match": {"role": "head"}, "models": ["c", "a"]}]  # fmt: skip
    content = {"method": "linear", "parameters": {"weight": {"a": 0.25, "b": 0.5}}, "rules": rules}
    for name, job in jobs(zoo, content).items():
        head = name == "lm_head.weight"
        b = 2.0 if ".mlp." in name else 0.5
        assert job.parameters["weight"] == ((1.0, 0.25) if head else (0.25, b, 1.0)), name
        assert [i.model for i in job.models] == (["c", "a"] if head else ["a", "b", "c"])


def test_a_global_trim_with_two_densities_is_refused(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    rules = [{"match": {"role": "mlp"}, "parameters": {"density": 0.5}}]
    (found,) = problems(zoo, {"method": "ties", "rules": rules}, RecipeError)
    assert "density must be the same for all tensors" in found
    assert "recipe.yaml:" in found
    assert plan(zoo, {"method": "ties", "rules": rules, "parameters": {"trim": "tensor"}})


@pytest.mark.parametrize(("content", "words"), [
    ({"method": "slerp"}, "'slerp' takes exactly 2 model(s), not 3"),
    ({"method": "linear", "rules": [{"match": {"role": "mlp"}, "parameters":
      {"weight": {"a": 1, "b": -2, "c": 1}}}]}, "sum to zero"),
    ({"method": "linear", "rules": [{"match": {"role": "mlp"}, "method": "model_stock",
      "models": ["a"]}]}, "takes at least 2 models, not 1"),
])  # fmt: skip
def test_what_a_method_cannot_do(zoo: Zoo, content: dict[str, Any], words: str) -> None:
    zoo.family("llama", 3)
    assert words in "\n".join(problems(zoo, content, RecipeError))


def test_a_sum_of_many_task_vectors_is_warned_of(zoo: Zoo) -> None:
    zoo.family("llama", 3)
    (warning,) = plan(zoo, {"method": "task_arithmetic"}).warnings
    assert "adds up 3 task vectors" in warning
    assert plan(zoo, {"method": "task_arithmetic", "parameters": {"scale": 0.3}}).warnings == ()


# --- memory


def test_max_memory_narrows_blocks_and_then_refuses(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "BLOCK", 16 * RUN)
    zoo.family({"w": (2000, 1000)}, 3)
    content = {"method": "task_arithmetic", "parameters": {"scale": 0.3}}
    free = plan(zoo, content, workers=1)
    assert free.block == 16 * RUN
    narrow = plan(zoo, content, workers=1, max_memory=free.peak_bytes - 1)
    assert narrow.block == 8 * RUN
    sixteenth = memory.RUNTIME + (free.peak_bytes - memory.RUNTIME) // 16
    least = plan(zoo, content, workers=1, max_memory=sixteenth)
    assert least.block == RUN
    assert memory.RUNTIME < least.peak_bytes < narrow.peak_bytes < free.peak_bytes
    with pytest.raises(ResourceError, match="is too little") as caught:
        plan(zoo, content, workers=1, max_memory=least.peak_bytes - 1)
    (problem,) = caught.value.problems
    assert "tensor 'w'" in problem.where
    assert "--workers" in problem.hint
    a, _ = zoo.merge(content, "free", workers=1)
    b, _ = zoo.merge(content, "least", workers=1, max_memory=least.peak_bytes)
    assert torch.equal(a["w"], b["w"])


def test_more_workers_take_more_memory(zoo: Zoo) -> None:
    zoo.family({f"w{i}": (300, 1000) for i in range(4)}, 2)
    peaks = [plan(zoo, {"method": "linear"}, workers=n).peak_bytes for n in (1, 2, 3)]
    assert peaks == sorted(set(peaks))


def test_memory_does_not_grow_with_the_model(zoo: Zoo) -> None:
    zoo.family({f"w{i}": (300, 1000) for i in range(3)}, 2)
    small = plan(zoo, {"method": "ties"}).peak_bytes
    zoo.family({f"w{i}": (300, 1000) for i in range(9)}, 2)
    assert plan(zoo, {"method": "ties"}).peak_bytes == small


def test_a_plan_can_be_shown_as_json(zoo: Zoo) -> None:
    models = zoo.family("llama", 2)
    zoo.recipe({"method": "ties", "parameters": {"weight": {"a": 0.5}}})
    shown = json.loads(zoo.here("merge", "recipe.yaml", "--dry-run", "--json").out)
    assert {t["name"] for t in shown["tensors"]} == set(load(zoo.folder / "base"))
    for tensor in shown["tensors"]:
        value = models["base"][tensor["name"]]
        assert (tensor["shape"], tensor["bytes"]) == (list(value.shape), value.nbytes)
        assert [i["model"] for i in tensor["inputs"]] == ["base", "a", "b"]
        assert tensor["parameters"]["weight"] == [0.5, 1.0]
    table = zoo.here("merge", "recipe.yaml", "--dry-run").out
    assert len(table.splitlines()) == len(models["base"]) + 4
    assert f"write {sum(s['bytes'] for s in shown['shards']) / 1e3:.3g} kB" in table
