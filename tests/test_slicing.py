"""Slices: layers stacked anew, by hand, to the byte, and as transformers loads them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from zoo import Zoo, llama, load, raw

from mowmerge import api
from mowmerge.checkpoint import layers
from mowmerge.errors import CheckpointError, MowmergeError, RecipeError

CONFIG = {"model_type": "llama", "num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"]}
PASS = {"method": "passthrough", "base": None}


@pytest.fixture
def models(zoo: Zoo) -> dict[str, Any]:
    made = zoo.family(llama(4), 2)
    for name, tensors in made.items():
        zoo.save(name, tensors, config=CONFIG)
    return made


def at(layer: int, rest: str) -> str:
    return f"model.layers.{layer}.{rest}"


def layer(tensors: Any, number: int) -> dict[str, bytes]:
    start = f"model.layers.{number}."
    return raw({n.removeprefix(start): v for n, v in tensors.items() if n.startswith(start)})


# --- copies


def test_layers_are_copied_in_order_and_the_rest_from_the_ends(
    zoo: Zoo, models: dict[str, Any]
) -> None:
    slices = [{"layers": {"a": "0..2"}}, {"layers": {"b": 1}}, {"layers": {"b": "1..3"}}]
    found, _ = zoo.merge({**PASS, "slices": slices})
    for i, (name, was) in enumerate(
        [("a", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 1), ("b", 2), ("b", 3)]
    ):
        assert layer(found, i) == layer(models[name], was)
    assert len(found) == 7 * 9 + 3
    assert torch.equal(found["model.embed_tokens.weight"], models["a"]["model.embed_tokens.weight"])
    for name in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(found[name], models["b"][name])
        assert not torch.equal(found[name], models["a"][name])
    config = json.loads((zoo.folder / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 7
    assert config["layer_types"] == ["a", "b", "c", "b", "b", "c", "d"]


def test_the_whole_model_in_slices_is_the_model(zoo: Zoo, models: dict[str, Any]) -> None:
    one, _ = zoo.merge({**PASS, "models": {"a": "./a"}, "slices": [{"layers": "0..3"}]})
    two, _ = zoo.merge(
        {**PASS, "models": {"a": "./a"}, "slices": [{"layers": 0}, {"layers": {"a": "1..3"}}]}, "2"
    )
    assert raw(one) == raw(two) == raw(models["a"])
    for out in ("out", "2"):
        written = (zoo.folder / out / "config.json").read_bytes()
        assert json.loads(written) == CONFIG


def test_depth_up_scaling_switches_projections_off(zoo: Zoo, models: dict[str, Any]) -> None:
    off = [{"match": {"tensors": ["*o_proj*", "*down_proj*"]}, "value": 0}]
    slices = [
        {"layers": "0..3"},
        {"layers": 3, "parameters": {"scale": [*off, {"value": 1}]}},
    ]
    found, _ = zoo.merge({**PASS, "models": {"a": "./a"}, "slices": slices})
    assert found[at(4, "self_attn.o_proj.weight")].abs().max() == 0
    assert found[at(4, "mlp.down_proj.weight")].abs().max() == 0
    kept = at(4, "mlp.up_proj.weight"), at(3, "mlp.up_proj.weight")
    assert torch.equal(found[kept[0]], models["a"][kept[1]])
    assert torch.equal(
        found[at(3, "mlp.down_proj.weight")], models["a"][at(3, "mlp.down_proj.weight")]
    )


def test_rules_know_output_layers(zoo: Zoo, models: dict[str, Any]) -> None:
    found, _ = zoo.merge({
        **PASS, "models": {"a": "./a"}, "slices": [{"layers": "2..3"}, {"layers": "2..3"}],
        "rules": [{"match": {"layers": 3, "role": "mlp"}, "parameters": {"scale": 0.5}}],
    })  # fmt: skip
    assert torch.equal(
        found[at(3, "mlp.up_proj.weight")], 0.5 * models["a"][at(3, "mlp.up_proj.weight")]
    )
    assert torch.equal(found[at(1, "mlp.up_proj.weight")], models["a"][at(3, "mlp.up_proj.weight")])


def test_a_rule_takes_the_ends_of_another_model(zoo: Zoo, models: dict[str, Any]) -> None:
    slices = [{"layers": {"a": 0}}, {"layers": {"b": 1}}]
    rules = [{"match": {"role": "head"}, "models": ["a"]}]
    found, _ = zoo.merge({**PASS, "slices": slices, "rules": rules})
    assert torch.equal(found["lm_head.weight"], models["a"]["lm_head.weight"])
    assert torch.equal(found["model.norm.weight"], models["b"]["model.norm.weight"])
    (told,) = problems(
        zoo, CheckpointError, slices=slices,
        rules=[{"match": {"tensors": "model.layers.0.mlp.up*"}, "models": ["b"]}],
    )  # fmt: skip
    assert "its slice takes nothing of b" in told


# --- merges


def test_layers_of_other_numbers_are_averaged(zoo: Zoo, models: dict[str, Any]) -> None:
    a, b = models["a"], models["b"]
    found, _ = zoo.merge({
        "base": None, "models": {"a": "./a", "b": "./b", "again": "./a"}, "method": "linear",
        "slices": [
            {"layers": {"a": 1, "b": 3}, "parameters": {"weight": {"a": 0.25, "b": 0.75}}},
            {"layers": {"a": 2, "again": 0}},
            {"layers": {"b": 0}, "method": "passthrough"},
        ],
    })  # fmt: skip
    part = "mlp.up_proj.weight"
    torch.testing.assert_close(found[at(0, part)], 0.25 * a[at(1, part)] + 0.75 * b[at(3, part)])
    torch.testing.assert_close(found[at(1, part)], (a[at(2, part)] + a[at(0, part)]) / 2)
    assert torch.equal(found[at(2, part)], b[at(0, part)])
    embedded = 0.25 * a["model.embed_tokens.weight"] + 0.75 * b["model.embed_tokens.weight"]
    torch.testing.assert_close(found["model.embed_tokens.weight"], embedded)
    assert torch.equal(found["lm_head.weight"], b["lm_head.weight"])


def test_task_vectors_are_of_the_base_layers_that_are_named(
    zoo: Zoo, models: dict[str, Any]
) -> None:
    a, base, part = models["a"], models["base"], "mlp.up_proj.weight"
    content = {"base": "./base", "models": {"a": "./a"}, "method": "task_arithmetic"}
    halved = {"parameters": {"scale": 0.5}}
    found, _ = zoo.merge({
        **content, "slices": [{"layers": {"a": 1}, **halved}, {"layers": {"a": 1, "base": 0}}],
    })  # fmt: skip
    torch.testing.assert_close(found[at(0, part)], (a[at(1, part)] + base[at(1, part)]) / 2)
    torch.testing.assert_close(found[at(1, part)], a[at(1, part)])
    embedded = (a["model.embed_tokens.weight"] + base["model.embed_tokens.weight"]) / 2
    torch.testing.assert_close(found["model.embed_tokens.weight"], embedded)


def test_gradients_run_over_the_slice_or_over_all(zoo: Zoo, models: dict[str, Any]) -> None:
    slices: list[dict[str, Any]] = [{"layers": "0..1"}, {"layers": "0..2"}]
    slices[1]["parameters"] = {"scale": [0, 1]}
    planned = api.plan(
        zoo.recipe({
            **PASS, "models": {"a": "./a"}, "slices": slices, "parameters": {"scale": [0, 4]},
        })
    )  # fmt: skip
    scale = {job.output.name: job.parameters["scale"][0] for job in planned.jobs}
    assert [scale[at(i, "mlp.up_proj.weight")] for i in range(5)] == [0, 1, 0, 0.5, 1]
    assert scale["model.embed_tokens.weight"] == 0
    assert scale["lm_head.weight"] == 1  # the last slice's


def test_a_nested_recipe_of_slices_is_a_model(zoo: Zoo, models: dict[str, Any]) -> None:
    inner = {**PASS, "models": {"a": "./a"}, "slices": [{"layers": "0..3"}, {"layers": "2..3"}]}
    del inner["base"]
    alone, _ = zoo.merge(inner, "alone")
    found, _ = zoo.merge({**PASS, "models": {"deep": {"source": inner}}}, "outer")
    assert raw(found) == raw(alone)
    assert (zoo.folder / "outer/config.json").read_text() == (
        zoo.folder / "alone/config.json"
    ).read_text()
    again, _ = zoo.merge(
        {**PASS, "models": {"deep": {"source": inner}}, "slices": [{"layers": "4..5"}]}, "cut"
    )
    config = json.loads((zoo.folder / "cut/config.json").read_text())
    assert (config["num_hidden_layers"], config["layer_types"]) == (2, ["c", "d"])
    assert layer(again, 0) == layer(models["a"], 2)


def test_the_lock_and_a_resumed_merge_know_slices(zoo: Zoo, models: dict[str, Any]) -> None:
    found, _ = zoo.merge({**PASS, "slices": [{"layers": {"a": "1..2"}}, {"layers": {"b": 0}}]})
    api.merge(zoo.folder / "out/recipe.lock.yaml", zoo.folder / "again")
    assert raw(load(zoo.folder / "again")) == raw(found)


# --- what is wrong


def problems(zoo: Zoo, kind: type[MowmergeError], **content: Any) -> list[str]:
    with pytest.raises(kind) as caught:
        api.plan(zoo.recipe({**PASS, **content}))
    return [str(problem) for problem in caught.value.problems]


def test_layers_past_the_depth_are_named(zoo: Zoo, models: dict[str, Any]) -> None:
    (told,) = problems(zoo, CheckpointError, slices=[{"layers": {"a": "2..4"}}])
    assert "layers 2..4 of 'a', which has 4 (0..3)" in told
    assert "recipe.yaml:" in told


@pytest.mark.parametrize(("piece", "says"), [
    ({"layers": {"a": "0..2", "b": "0..1"}}, "must be as many of every model: a 0..2, b 0..1"),
    ({"layers": {}}, "must name at least one model"),
    ({"layers": {"a": "3..1"}}, "runs backwards"),
    ({"layers": {"a": "3.."}}, "needs its last layer"),
    ({"layers": {"a": -1}}, "must be a layer"),
    ({"layers": {"z": 0}}, "there is no model 'z'"),
    ({"layers": {"a": 0, "b": 0}}, "takes exactly 1 model(s), not 2"),
    ({"layers": {"a": 0}, "parameters": {"scal": 1}}, "'passthrough'"),
    ({"layers": {"a": 0}, "methud": "linear"}, "unknown key 'slices.0.methud'"),
    ({"layers": {"a": 0}, "method": "ties"}, "'ties' needs a base"),
    ({"layers": {"a": 0}, "method": "mow"}, "slices stack layers anew"),
    ({"layers": {"a": 0}, "method": "adamerging"}, "'adamerging' is fitted on models as they are"),
    ({}, "'slices.0.layers' is missing"),
    ({"layers": {"base": 0}}, "names the base alone"),
])  # fmt: skip
def test_faults_are_found_before_a_model_is(
    zoo: Zoo, models: dict[str, Any], piece: dict[str, Any], says: str
) -> None:
    told = problems(zoo, RecipeError, slices=[piece])
    assert any(says in each for each in told), told


def test_only_layers_of_one_width_are_stacked(zoo: Zoo, models: dict[str, Any]) -> None:
    zoo.save("c", {n: torch.ones(s) for n, s in llama(4, hidden=32).items()})
    told = problems(
        zoo, CheckpointError, models={"a": "./a", "c": "./c"},
        slices=[{"layers": {"a": 0}}, {"layers": {"c": 0}}],
    )  # fmt: skip
    assert any("has the shape [32, 32], and [16, 16] in 'a'" in each for each in told), told


def test_of_several_stacks_one_is_named(zoo: Zoo) -> None:
    shapes = {
        f"{side}.block.{i}.{part}.weight": (8, 8)
        for side in ("encoder", "decoder")
        for i in range(3)
        for part in ("self_attention.q", "mlp.up_proj")
    } | {"shared.weight": (4, 8)}
    config = {"model_type": "t5", "num_layers": 3, "num_decoder_layers": 3}
    a = {name: torch.randn(shape) for name, shape in shapes.items()}
    zoo.save("a", a, config=config)
    content = {**PASS, "models": {"a": "./a"}, "slices": [{"layers": "1..2"}]}
    (told,) = problems(zoo, CheckpointError, **content)
    assert "stack: one of decoder.block, encoder.block" in told
    content["slices"] = [{"layers": "1..2", "stack": "decoder.block"}]
    found, _ = zoo.merge(content)
    assert len(found) == 1 + 3 * 2 + 2 * 2
    assert torch.equal(
        found["decoder.block.0.mlp.up_proj.weight"], a["decoder.block.1.mlp.up_proj.weight"]
    )
    assert torch.equal(
        found["encoder.block.2.mlp.up_proj.weight"], a["encoder.block.2.mlp.up_proj.weight"]
    )
    assert json.loads((zoo.folder / "out/config.json").read_text()) == {
        **config, "num_decoder_layers": 2,
    }  # fmt: skip


# --- configs


@pytest.mark.parametrize(("settings", "wanted", "told"), [
    ({"n_layer": 4}, {"n_layer": 3}, 0),
    ({"num_hidden_layers": 4, "eos_token_id": [1, 2, 3, 4]}, {"num_hidden_layers": 3}, 0),
    ({"num_hidden_layers": 4, "mlp_only_layers": [0, 3]},
     {"num_hidden_layers": 3, "mlp_only_layers": [2]}, 0),
    ({"num_hidden_layers": 4, "first_k_dense_replace": 2},
     {"num_hidden_layers": 3, "first_k_dense_replace": 1}, 0),
    ({"num_hidden_layers": 4, "first_k_dense_replace": 3},
     {"num_hidden_layers": 3, "first_k_dense_replace": 2}, 0),
    ({"num_hidden_layers": 4, "max_window_layers": 1},
     {"num_hidden_layers": 3, "max_window_layers": 0}, 0),
    ({"num_hidden_layers": 4, "decoder_sparse_step": 2}, {"num_hidden_layers": 3}, 1),
    ({"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 4}},
     {"text_config": {"num_hidden_layers": 3}}, 0),
    ({"num_hidden_layers": 9}, {}, 1),
    ({}, {}, 0),
])  # fmt: skip
def test_what_a_config_says_of_layers_follows(
    settings: dict[str, Any], wanted: dict[str, Any], told: int
) -> None:
    made = [("a", 1), ("a", 2), ("a", 3)]
    found, warned = layers.changes("model.layers.", 4, made, "a", {"a": settings})
    assert found == wanted
    assert len(warned) == told


@pytest.mark.parametrize(("stack", "wanted"), [
    ("vision_tower.encoder.layers.", {"vision_config": {"num_hidden_layers": 1}}),
    ("model.language_model.layers.", {"text_config": {"num_hidden_layers": 1}}),
])  # fmt: skip
def test_each_stack_has_its_section(stack: str, wanted: dict[str, Any]) -> None:
    both = {"vision_config": {"num_hidden_layers": 2}, "text_config": {"num_hidden_layers": 2}}
    assert layers.changes(stack, 2, [("a", 0)], "a", {"a": both}) == (wanted, [])


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "GPT2", "Gemma3"])
def test_transformers_loads_what_was_stacked(zoo: Zoo, name: str) -> None:
    import transformers as hf

    small = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    }  # fmt: skip
    if name == "GPT2":
        small = {"vocab_size": 32, "n_embd": 16, "n_layer": 4, "n_head": 4, "n_positions": 16}
    kind = {"GPT2": "GPT2LMHeadModel", "Gemma3": "Gemma3ForCausalLM"}
    config = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    model = getattr(hf, kind.get(name, f"{name}ForCausalLM"))
    for seed, folder in enumerate("ab"):
        torch.manual_seed(seed)
        model(getattr(hf, config)(**small)).save_pretrained(zoo.folder / folder)
    slices = [{"layers": {"a": "0..2"}}, {"layers": {"b": "2..3"}}, {"layers": {"a": 3}}]
    zoo.merge({**PASS, "slices": slices})
    loaded, info = model.from_pretrained(zoo.folder / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.num_hidden_layers == 6
    assert torch.isfinite(loaded(torch.arange(5)[None]).logits).all()
