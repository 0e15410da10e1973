"""What a dynamic merge plans: codes, gates, rest, rules, heads, manifest, by architecture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from made import made
from zoo import ROOT, Shapes, Zoo, bert, gpt2, llama, load, raw, rewrite

from mowmerge import api
from mowmerge.checkpoint import naming
from mowmerge.errors import CheckpointError, MowmergeError, RecipeError
from mowmerge.plan import Plan, TensorJob
from mowmerge.planner import Options


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def vit(layers: int = 2, h: int = 16) -> Shapes:
    shapes: Shapes = {
        "embeddings.cls_token": (1, 1, h), "embeddings.position_embeddings": (1, 5, h),
        "embeddings.mask_token": (1, 1, h),
        "embeddings.patch_embeddings.projection.weight": (h, 3, 4, 4),
        "embeddings.patch_embeddings.projection.bias": (h,),
    }  # fmt: skip
    for i in range(layers):
        at = f"encoder.layer.{i}."
        for name, rows, columns in (
            ("attention.attention.query", h, h), ("attention.attention.key", h, h),
            ("attention.attention.value", h, h), ("attention.output.dense", h, h),
            ("intermediate.dense", 2 * h, h), ("output.dense", h, 2 * h),
        ):  # fmt: skip
            shapes |= {f"{at}{name}.weight": (rows, columns), f"{at}{name}.bias": (rows,)}
        for name in ("layernorm_before", "layernorm_after"):
            shapes |= {f"{at}{name}.weight": (h,), f"{at}{name}.bias": (h,)}
    return shapes | {"layernorm.weight": (h,), "layernorm.bias": (h,)}


def t5(layers: int = 2, h: int = 16) -> Shapes:
    shapes: Shapes = {"shared.weight": (24, h)}
    for tower, parts in (("encoder", 2), ("decoder", 3)):
        for i in range(layers):
            at = f"{tower}.block.{i}.layer."
            for p, name in enumerate(["SelfAttention", "EncDecAttention"][: parts - 1]):
                shapes |= {f"{at}{p}.{name}.{x}.weight": (h, h) for x in "qkvo"}
                shapes[f"{at}{p}.layer_norm.weight"] = (h,)
            if i == 0:
                shapes[f"{at}0.SelfAttention.relative_attention_bias.weight"] = (8, 2)
            last = f"{at}{parts - 1}."
            shapes |= {
                last + "DenseReluDense.wi.weight": (2 * h, h),
                last + "DenseReluDense.wo.weight": (h, 2 * h), last + "layer_norm.weight": (h,),
            }  # fmt: skip
        shapes[f"{tower}.final_layer_norm.weight"] = (h,)
    return shapes


ARCHITECTURES = {"bert": bert, "vit": vit, "llama": llama, "gpt2": gpt2, "t5": t5}
BLOCKS = {
    "bert": ["encoder.layer.0", "encoder.layer.1"], "vit": ["encoder.layer.0", "encoder.layer.1"],
    "llama": ["model.layers.0", "model.layers.1"], "gpt2": ["transformer.h.0", "transformer.h.1"],
    "t5": ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"],
}  # fmt: skip
MLPS = {"bert": 8, "vit": 8, "llama": 6, "gpt2": 8, "t5": 8}


def headers(zoo: Zoo, shapes: Shapes, n: int = 3) -> None:
    """A base and experts whose files have headers and zeros, never read."""
    for name in ("base", *"abcdefgh"[:n]):
        zoo.save(name, {key: torch.zeros(shape) for key, shape in shapes.items()})


def plan(zoo: Zoo, method: str, **more: Any) -> Plan:
    return api.plan(zoo.recipe({"method": method, **more}), options=Options(workers=1))


def jobs(planned: Plan) -> dict[str, TensorJob]:
    return {job.output.name: job for job in planned.jobs}


def coded(planned: Plan) -> set[str]:
    return {job.output.name for job in planned.jobs if job.code}


# --- gates and routers by architecture


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_wemoe_has_a_gate_and_a_router_for_each_mlp(zoo: Zoo, kind: str) -> None:
    headers(zoo, ARCHITECTURES[kind]())
    manifest = plan(zoo, "wemoe").manifest
    assert manifest is not None
    assert sorted(manifest.gates) == sorted(BLOCKS[kind])
    assert len(manifest.routers) == len(BLOCKS[kind])
    assert {router.width for router in manifest.routers.values()} == {16}
    assert len(manifest.codes) == MLPS[kind]
    assert all(naming.role(code.name) == "mlp" for code in manifest.codes)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_e_wemoe_shares_a_router_within_a_tower(zoo: Zoo, kind: str) -> None:
    headers(zoo, ARCHITECTURES[kind](4))
    manifest = plan(zoo, "e_wemoe").manifest
    assert manifest is not None
    assert len(manifest.routers) == (2 if kind == "t5" else 1)
    assert {gate.index for gate in manifest.gates.values()} == {0, 1, 2, 3}


def test_towers_of_two_widths_have_a_router_each(zoo: Zoo) -> None:
    wide, narrow = vit(2, 16), vit(2, 8)
    shapes = {f"vision_model.{k}": v for k, v in wide.items()}
    shapes |= {f"text_model.{k}": v for k, v in narrow.items()}
    headers(zoo, shapes)
    manifest = plan(zoo, "e_wemoe").manifest
    assert manifest is not None
    assert sorted(router.width for router in manifest.routers.values()) == [8, 16]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_classifier_reads_the_anchors_hidden_states(zoo: Zoo, kind: str) -> None:
    headers(zoo, ARCHITECTURES[kind](6))
    for method, way, layer in (
        ("mow", {}, 2), ("one_bit", {"prefix": 0.5}, 3), ("twin_merging", {"prefix": 1}, 0),
        ("emr", {"router": "deep"}, 2),
    ):  # fmt: skip
        manifest = plan(zoo, method, parameters=way).manifest
        assert manifest is not None
        (router,) = manifest.routers.values()
        assert (router.width, router.outputs, router.layer) == (16, 3, layer)
        assert manifest.gates["0"].scope == "sample"


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_smile_scores_tokens_in_every_matrix_of_a_block(zoo: Zoo, kind: str) -> None:
    headers(zoo, ARCHITECTURES[kind]())
    manifest = plan(zoo, "smile", parameters={"rank": 4}).manifest
    assert manifest is not None
    assert manifest.gates["0"].scope == "module"
    assert manifest.routed == ()
    for code in manifest.codes:
        matrix = len(code.shape) == 2
        assert (code.codec, code.gate_rank) == (("low_rank", 1) if matrix else ("full", 0))


def test_what_no_layer_reads_a_sample_at_a_time_stays_static_and_is_named(zoo: Zoo) -> None:
    headers(zoo, t5())
    for method in ("emr", "mow", "smile", "bitdelta"):
        planned = plan(zoo, method)
        assert not any("relative_attention_bias" in name for name in coded(planned))
        (warning,) = (w for w in planned.warnings if "stay static" in w)
        assert "2 tensor(s)" in warning and "relative_attention_bias" in warning
    headers(zoo, vit())
    assert "embeddings.mask_token" not in coded(plan(zoo, "emr"))


def test_without_a_norm_there_is_no_width(zoo: Zoo) -> None:
    headers(zoo, {"model.layers.0.mlp.up_proj.weight": (4, 4)})
    for method in ("wemoe", "mow"):
        with pytest.raises(RecipeError, match="no normalisation tells how wide") as caught:
            plan(zoo, method)
        assert "recipe.yaml:" in caught.value.problems[0].where
    assert plan(zoo, "emr").manifest is not None


@pytest.mark.parametrize("name", ["mow", "wemoe", "twin_merging", "emr", "smile"])
def test_recipes_are_planned_over_a_zoo_like_the_demos(zoo: Zoo, name: str) -> None:
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=../docs/recipe.schema.json\n# ")
    file = zoo.recipe(text, name)
    body, config = vit(4, 64), {"architectures": ["ViTForImageClassification"]}
    for model in ("base", *api.check(file).models):
        held = body if model == "base" else {f"vit.{k}": v for k, v in body.items()}
        held = held | ({} if model == "base" else {"classifier.weight": (10, 64)})
        zoo.save(
            f"mowmerge-demo/{model}", {k: torch.zeros(v) for k, v in held.items()}, config=config
        )
    planned = api.survey(file)
    assert planned.manifest is not None
    assert len(planned.manifest.heads) == 8
    one = sum(4 * math.prod(shape) for shape in body.values())
    if name == "emr":
        assert planned.write_bytes < 2.6 * one
    else:
        assert one < planned.write_bytes < 9.2 * one


# --- rest and rules


def test_the_rest_is_the_static_merge(zoo: Zoo) -> None:
    zoo.family("llama", 3)
    rest = {"method": "ties", "parameters": {"density": 0.3, "trim": "global"}}
    static, _ = zoo.merge(rest, "static")
    content = {"method": "mow", "parameters": {"blocks": 1}, "rest": rest}
    found, report = zoo.merge(content)
    for name, value in static.items():
        assert torch.equal(found[name], value), name
    told = {t["name"]: (t["method"], t.get("anchor")) for t in report["tensors"]}
    assert set(told.values()) == {("mow", "ties"), ("ties", None)}
    ties = [job for job in api.survey(zoo.recipe(content)).each if job.method == "ties"]
    assert {job.group for job in ties} == {0}


@pytest.mark.parametrize("method", ["mow", "twin_merging"])
@pytest.mark.parametrize("rest", [
    {"method": "linear"}, {"method": "ties", "parameters": {"trim": "tensor"}},
    {"method": "model_stock", "parameters": {"filter_wise": True}}, {"method": "dare"},
    {"method": "task_arithmetic", "parameters": {"scale": [0.1, 0.5]}},
])  # fmt: skip
def test_an_anchor_is_the_bytes_of_its_static_merge(
    zoo: Zoo, method: str, rest: dict[str, Any]
) -> None:
    zoo.family("llama", 3, dtype=torch.bfloat16)
    static = raw(zoo.merge(rest, "static")[0])
    found = raw(zoo.merge({"method": method, "rest": rest})[0])
    assert {name: found[name] for name in static} == static


def test_mow_with_nothing_dynamic_is_the_static_merge(zoo: Zoo) -> None:
    zoo.family("llama", 3)
    nothing = {"blocks": 0, "norms": "none", "embeddings": "none"}
    rest = {"method": "task_arithmetic", "parameters": {"scale": 0.3}}
    static = raw(zoo.merge(rest, "static")[0])
    found, report = zoo.merge({"method": "mow", "parameters": nothing})
    assert raw(found) == static
    assert "'mow' makes no tensor dynamic" in "\n".join(report["warnings"])
    assert not list((zoo.folder / "out").glob("*.py"))
    assert json.loads((zoo.folder / "out/config.json").read_text())["model_type"] == "llama"


def test_a_rule_takes_tensors_out(zoo: Zoo) -> None:
    zoo.family("bert", 3)
    rules = [{"match": {"layers": 0}, "method": "linear"}]
    content = {"method": "wemoe", "rules": rules}
    assert all(".layer.1." in name for name in coded(plan(zoo, **content)))
    found, _ = zoo.merge(content)
    linear, _ = zoo.merge({"method": "linear"}, "linear")
    for name, value in linear.items():
        assert torch.equal(found[name], value) == (".layer.0." in name), name
    assert list(made(zoo.folder / "out").manifest.gates) == ["encoder.layer.1"]


def test_a_rule_changes_parameters_gate_by_gate(zoo: Zoo) -> None:
    zoo.family("bert", 3)
    rules = [{"match": {"layers": 1}, "parameters": {"scale": 0.5}}]
    zoo.merge({"method": "wemoe", "rules": rules})
    found = made(zoo.folder / "out")
    assert [gate.offset for gate in found.manifest.gates.values()] == [0.3, 0.5]
    assert [router.init for router in found.manifest.routers.values()] == [0.3, 0.5]
    base, a = (load(zoo.folder / name) for name in ("base", "a"))
    for name in found.codes:
        torch.testing.assert_close(found.expert(name, 0).float(), a[name])
        assert not torch.equal(found.tensors[name], base[name])
    rules = [{"match": {"tensors": "*.1.output.dense.*"}, "parameters": {"scale": 0.5}}]
    with pytest.raises(RecipeError, match="ask for another gate or router") as caught:
        plan(zoo, "wemoe", rules=rules)
    assert "whole blocks" in caught.value.problems[0].hint


def test_a_rule_cannot_change_what_the_survey_goes_by(zoo: Zoo) -> None:
    zoo.family("bert", 3)
    rules = [{"match": {"layers": 1}, "parameters": {"blocks": 1}}]
    with pytest.raises(RecipeError, match="'mow' chooses once for the whole model"):
        zoo.merge({"method": "mow", "rules": rules})
    out = [{"match": {"layers": 1}, "parameters": {"blocks": 0}}]
    _, report = zoo.merge({"method": "mow", "rules": out})
    assert report["survey"]["dynamic"] == {
        "attention": ["encoder.layer.0"], "mlp": ["encoder.layer.0"],
    }  # fmt: skip


def test_codecs_by_rule(zoo: Zoo) -> None:
    zoo.family("llama", 3)
    low = {"match": {"role": "mlp"}, "parameters": {"codec": "low_rank", "rank": 2}}
    _, report = zoo.merge({"method": "mow", "rules": [low]})
    codecs = {t["name"]: t["codec"] for t in report["tensors"] if "codec" in t}
    for name, codec in codecs.items():
        assert codec == ("low_rank" if ".mlp." in name else "full_abs")


# --- heads


LABELS = {"pos": ["a", "b", "c"], "sky": ["x", "y"]}


def headed(zoo: Zoo, **changed: Any) -> None:
    """A bare bert and experts with a classifier each; configs changed by model."""
    body = bert()
    torch.manual_seed(0)
    base = {name: torch.randn(shape) for name, shape in body.items()}
    zoo.save("base", base, config={"model_type": "bert", "architectures": ["BertModel"]})
    for expert, labels in LABELS.items():
        moved = {f"bert.{n}": v + 0.1 * torch.randn(v.shape) for n, v in base.items()}
        head = changed.get(expert, {}).pop("head", "classifier")
        if head:
            moved |= {f"{head}.weight": torch.randn(len(labels), 16)}
            moved |= {f"{head}.bias": torch.randn(len(labels))}
        config = {
            "model_type": "bert", "architectures": ["BertForSequenceClassification"],
            "id2label": {str(i): label for i, label in enumerate(labels)},
        }  # fmt: skip
        zoo.save(expert, moved, config=config | changed.get(expert, {}))


def heads(method: str = "wemoe", **more: Any) -> dict[str, Any]:
    models = {expert: f"./{expert}" for expert in LABELS}
    return {"method": method, "base": "./base", "models": models,
            "heads": {"match": "classifier.*"}, **more}  # fmt: skip


@pytest.mark.parametrize("method", ["wemoe", "emr", "mow"])
def test_heads_are_kept_inside_byte_for_byte(zoo: Zoo, method: str) -> None:
    headed(zoo)
    content = heads(method, output={"dtype": "bfloat16"})
    planned = api.survey(zoo.recipe(content))
    found, report = zoo.merge(content)
    for expert in LABELS:
        own = load(zoo.folder / expert)
        for part in ("weight", "bias"):
            assert torch.equal(found[f"mow_heads.{expert}.{part}"], own[f"classifier.{part}"])
    out = zoo.folder / "out"
    assert not (out / "heads").exists()
    manifest = made(out).manifest
    assert [head.expert for head in manifest.heads] == list(LABELS)
    assert manifest.heads[1].config["id2label"] == {"0": "x", "1": "y"}
    assert manifest.head_class == "BertForSequenceClassification"
    settings = json.loads((out / "config.json").read_text())
    assert settings["architectures"] == ["MowmergeForSequenceClassification"]
    assert settings["base_config"]["architectures"] == ["BertModel"]
    size = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert planned.write_bytes == report["written_bytes"] == size


@pytest.mark.parametrize(("changed", "words"), [
    ({"sky": {"head": ""}}, "model 'sky' has no head, and the router would choose it"),
    ({"sky": {"head": "score"}}, "one head module of one class, and here are classifier, score"),
    ({"sky": {"architectures": ["BertForTokenClassification"]}},
     "of BertForSequenceClassification, BertForTokenClassification"),
    ({"sky": {"architectures": None}}, "one head module of one class"),
])  # fmt: skip
def test_heads_that_cannot_be_kept(zoo: Zoo, changed: dict[str, Any], words: str) -> None:
    headed(zoo, **changed)
    content = heads(heads={"match": ["classifier.*", "score.*"]})
    with pytest.raises(RecipeError) as caught:
        api.plan(zoo.recipe(content))
    (problem,) = caught.value.problems
    assert words in problem.message
    assert "recipe.yaml:" in problem.where


def test_tied_embeddings_are_coded_once(zoo: Zoo) -> None:
    models = zoo.family("gpt2", 2, tied=True)
    zoo.save("b", models["b"] | {"lm_head.weight": models["b"]["transformer.wte.weight"].clone()})
    found, report = zoo.merge({"method": "mow", "parameters": {"embeddings": "all"}})
    assert "transformer.wte.dyn_abs" in found
    assert not any(name.startswith("lm_head") for name in found)
    assert any("'lm_head.weight'" in w for w in report["warnings"])


# --- bad input


@pytest.mark.parametrize(("content", "line", "words", "hint"), [
    ({"method": "mow", "models": {"a": "./a"}}, "method",
     "'mow' takes at least 2 models, not 1", ""),
    ({"method": "linear", "rest": {"method": "linear"}}, "rest",
     "rest is for dynamic methods, and 'linear' is static", "remove it"),
    ({"method": "mow", "rest": {"method": "wemoe"}}, "wemoe",
     "rest.method: 'wemoe' is dynamic, and the rest stays static", "task_arithmetic"),
    ({"method": "mow", "rest": {"method": "tise"}}, "tise", "there is no method 'tise'", "ties"),
    ({"method": "mow", "rest": {"method": "slerp"}}, "slerp",
     "'slerp' takes exactly 2 model(s), not 3", ""),
    ({"method": "mow", "rest": {"method": "ties", "parameters": {"density": 2}}}, "density",
     "rest.parameters.density must be 0..1, not 2", ""),
    ({"method": "mow", "rules": [{"match": {}, "method": "wemoe"}]}, "wemoe",
     "rules.0.method: 'wemoe' is dynamic, and a rule takes a static one", "recipe's own"),
    ({"method": "linear", "rules": [{"match": {}, "method": "emr"}]}, "emr",
     "rules.0.method: 'emr' is dynamic", "recipe's own"),
    ({"method": "emr", "rules": [{"match": {}, "models": ["a", "b"]}]}, "models",
     "rules.0: 'emr' mixes all models, so the rule can name none", "static method"),
    ({"method": "mow", "parameters": {"blocks": -1}}, "blocks", "blocks must be at least 0", ""),
    ({"method": "smile", "parameters": {"rank": 0}}, "rank", "rank must be at least 1", ""),
    ({"method": "twin_merging", "parameters": {"density": 1.1}}, "density", "must be 0..1", ""),
    ({"method": "mow", "base": None, "models": {"a": "./a", "b": "./b"}}, "method",
     "'mow' makes the rest by task_arithmetic, which needs a base, and there is none",
     "rest: {method: linear}"),
    ({"method": "wemoe", "base": None, "models": {"a": "./a", "b": "./b"}}, "method",
     "'wemoe' needs a base", "add base"),
    ({"method": "linear", "models": {"n": {"source": {"method": "emr", "base": "./base",
      "models": {"a": "./a"}}}}}, '"n"',
     "models.n: its method 'emr' is dynamic, and gives no model", "static method"),
])  # fmt: skip
def test_faults_of_recipes(
    zoo: Zoo, content: dict[str, Any], line: str, words: str, hint: str
) -> None:
    headers(zoo, llama())
    given = content if "models" in content and "base" in content else {"base": "./base", **content}
    file = zoo.recipe(given)
    with pytest.raises(RecipeError) as caught:
        api.check(file)
    problem = next(p for p in caught.value.problems if words in p.message)
    assert hint in problem.hint
    number = int(problem.where.rpartition(":")[2])
    assert line in file.read_text().splitlines()[number - 1]


def test_experts_of_other_shapes(zoo: Zoo) -> None:
    models = zoo.family("llama", 2)
    name = "model.layers.0.mlp.up_proj.weight"
    zoo.save("b", models["b"] | {name: torch.zeros(3, 3)})
    with pytest.raises(CheckpointError) as caught:
        plan(zoo, "mow")
    (problem,) = caught.value.problems
    assert (name in problem.message, problem.where) == (True, "model 'b'")


def test_a_dynamic_checkpoint_is_no_source(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    zoo.merge({"method": "emr"}, "d")
    with pytest.raises(CheckpointError, match="is a dynamic checkpoint") as caught:
        plan(zoo, "linear", models={"d": "./d", "a": "./a"}, base="./base")
    assert caught.value.problems[0].hint


@pytest.mark.parametrize("method", ["mow", "emr", "wemoe", "twin_merging"])
def test_what_is_not_finite_names_tensor_and_model(zoo: Zoo, method: str) -> None:
    models = zoo.family("llama", 2)
    models["b"]["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    zoo.save("b", models["b"])
    with pytest.raises(MowmergeError, match=r"up_proj.weight' holds NaN or Inf") as caught:
        zoo.merge({"method": method})
    assert caught.value.problems[0].where == "model 'b'"
    assert not (zoo.folder / "out").exists()


def test_an_output_that_overflows(zoo: Zoo) -> None:
    models = zoo.family("llama", 2)
    models["b"]["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    zoo.save("b", models["b"])
    for method in ("emr", "wemoe", "mow", "twin_merging"):
        with pytest.raises(CheckpointError, match=r"up_proj.* overflows F16"):
            zoo.merge({"method": method, "output": {"dtype": "float16"}})


def test_a_truncated_expert(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    file = zoo.folder / "b" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        plan(zoo, "mow")
    rewrite(file, lambda header: header, b"")
    with pytest.raises(CheckpointError):
        plan(zoo, "mow")
