"""mergekit's files: what each becomes, what is ignored, what is refused, and where."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from zoo import Zoo, llama, raw

from mowmerge import api
from mowmerge.errors import CheckpointError, RecipeError
from mowmerge.methods import registry
from mowmerge.planner import build
from mowmerge.recipe import mergekit, parse
from mowmerge.recipe.mergekit.presets import PRESETS
from mowmerge.recipe.mergekit.reading import TOP
from mowmerge.recipe.text import dump, read, read_all

TIES = """\
merge_method: ties
base_model: org/base@v1
models:
  - model: org/math
    parameters: {weight: 0.5, density: 0.6}
  - model: org/code+me/lora@r2
    parameters:
      weight: 0.3
parameters: {normalize: false, int8_mask: true, lambda: 1e-1}
dtype: torch.bfloat16
"""


def native(text: str, tmp_path: Path) -> Any:
    """The converted recipe as data."""
    (tmp_path / "k.yml").write_text(text)
    return read(parse.native(tmp_path / "k.yml"), "k").data


def faults(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse.loads(text, file="k.yml")
    return [str(problem) for problem in caught.value.problems]


def ignored(text: str) -> list[str]:
    return [str(problem) for problem in parse.loads(text, file="k.yml").ignored]


# --- what each part becomes


def test_a_recipe_with_every_default_said(tmp_path: Path) -> None:
    assert native(TIES, tmp_path) == {
        "method": "ties", "base": "org/base@v1",
        "models": {
            "math": {"source": "org/math", "weight": 0.5, "density": 0.6},
            "code-lora": {"source": "org/code", "adapter": "me/lora@r2", "weight": 0.3},
        },
        "parameters": {
            "trim": "tensor", "zero_sign": "plus", "scale": 0.1, "aggregate": "sum",
            "density": 1.0, "rescale": False,
        },
        "output": {"dtype": "bfloat16"},
    }  # fmt: skip


def test_every_preset_names_what_its_method_takes() -> None:
    for preset in PRESETS.values():
        spec = registry.get(preset.method)
        for name, value in preset.defaults.items():
            assert not spec.parameters[name].fault(value), (preset, name)
        for word in preset.words.values():
            assert spec.parameters[word.ours].per_model == word.each, (preset, word)
            for value in word.flag or ():
                assert not spec.parameters[word.ours].fault(value)
        assert (preset.base == "required") == spec.needs_base


WEIGHTED = "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: %s}}\n"


@pytest.mark.parametrize(("given", "ours"), [
    ("0.3", 0.3),
    ("'1e-3'", 1e-3),
    ("true", 1.0),
    ("on", 1.0),
    ("010", 8),
    ("0x8", 8),
    ("1:30", 90),
    ("[0.2]", 0.2),
    ("[0.5, 0.5]", 0.5),
    ("[0, 1]", [{"match": {"layers": "0.."}, "value": [0, 1]}, {"value": 0}]),
    ("{filter: mlp, value: 0.2}", [{"match": {"tensors": "*mlp*"}, "value": 0.2}, {"value": 9}]),
    ("[{filter: 'a[*]?', value: 1}, {filter: '*', value: 2}, {value: 3}]",
     [{"match": {"tensors": "*a[[][*]][?]*"}, "value": 1}, {"value": 2}]),
    ("[{filter: mlp, value: [1, 3]}]",
     [{"match": {"tensors": "*mlp*", "layers": "0.."}, "value": [1, 3]},
      {"match": {"tensors": "*mlp*"}, "value": 1}, {"value": 9}]),
    ("[]", 9),
])  # fmt: skip
def test_settings(tmp_path: Path, given: str, ours: Any) -> None:
    found = native(WEIGHTED % given + "parameters: {weight: 9}", tmp_path)
    assert found["parameters"]["weight"] == ours


@pytest.mark.parametrize(("given", "ours"), [
    ("yes", True), ("'off'", False), ("'False'", False), ("1", True), ("0.0", False),
])  # fmt: skip
def test_words_for_true_and_false(tmp_path: Path, given: str, ours: bool) -> None:
    text = TIES.replace("normalize: false", f"rescale: {given}")
    assert native(text, tmp_path)["parameters"]["rescale"] is ours


STEPS = {"match": {"layers": "0.."}, "value": ["mean", "sum"]}


def test_a_gradient_of_true_and_false_is_in_steps(tmp_path: Path) -> None:
    found = native(TIES.replace("normalize: false", "normalize: [yes, 0]"), tmp_path)
    assert found["parameters"]["aggregate"] == [STEPS, {"value": "mean"}]
    text = TIES.replace("normalize: false", "normalize: [{filter: mlp, value: [true, false]}]")
    step = {**STEPS, "match": {"tensors": "*mlp*", "layers": "0.."}}
    assert native(text, tmp_path)["parameters"]["aggregate"] == [
        step, {"match": {"tensors": "*mlp*"}, "value": "mean"}, {"value": "mean"},
    ]  # fmt: skip


@pytest.mark.parametrize(("given", "ours"), [
    ("nuslerp_flatten: [true, false], nuslerp_row_wise: true",
     [{"match": {"layers": "0.."}, "value": ["all", "columns"]}, {"value": "all"}]),
    ("nuslerp_flatten: [{filter: mlp, value: false}]",
     [{"match": {"tensors": "*mlp*"}, "value": "rows"}, {"value": "all"}]),
    ("nuslerp_flatten: false, nuslerp_row_wise: [{filter: mlp, value: true}]",
     [{"match": {"tensors": "*mlp*"}, "value": "columns"}, {"value": "rows"}]),
    ("nuslerp_row_wise: [{filter: mlp, value: true}]", "all"),
])  # fmt: skip
def test_two_flags_of_nuslerp_are_one_word(tmp_path: Path, given: str, ours: Any) -> None:
    text = "merge_method: nuslerp\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1, %s}\n"
    assert native(text % given, tmp_path)["parameters"]["axis"] == ours


def test_a_share_of_more_than_all_is_all(tmp_path: Path) -> None:
    found = native(TIES.replace("density: 0.6", "density: 1.5"), tmp_path)
    assert found["models"]["math"]["density"] == 1


def test_levels_from_the_source_to_the_top(tmp_path: Path) -> None:
    found = native(
        """
merge_method: task_arithmetic
base_model: b
modules:
  default:
    slices:
      - sources:
          - {model: b, layer_range: [0, 2]}
          - {model: x, layer_range: [0, 2], parameters: {weight: [{filter: q, value: 1}]}}
        parameters: {weight: [{filter: k, value: 2}], lambda: 0.5}
    parameters: {weight: [{filter: v, value: 3}]}
parameters: {weight: 4, lambda: 7}
""",
        tmp_path,
    )
    assert found["parameters"]["scale"] == 1.0  # of what no slice is
    (piece,) = found["slices"]
    assert piece["layers"] == {"x": "0..1", "base": "0..1"}
    assert piece["parameters"]["scale"] == 0.5
    assert [item["value"] for item in piece["parameters"]["weight"]] == [1, 2, 3, 4]


def test_filters_know_layers_by_the_source_s_numbers(tmp_path: Path) -> None:
    found = native(
        """
merge_method: passthrough
slices:
  - sources:
      - {model: x, layer_range: [0, 4], parameters: {scale: {filter: layers.2., value: 0.5}}}
  - sources:
      - model: x
        layer_range: [10, 13]
        parameters:
          scale:
            - {filter: layers.11.mlp, value: 0.1}
            - {filter: layers.1, value: 0.2}
            - {filter: layers.2., value: 0.3}
            - {value: 1}
""",
        tmp_path,
    )
    first, second = (piece["parameters"]["scale"] for piece in found["slices"])
    assert first == [{"match": {"tensors": "*layers.2.*"}, "value": 0.5}]
    assert second == [
        {"match": {"tensors": "*layers.5.mlp*"}, "value": 0.1},
        {"match": {"tensors": ["*layers.4.*", "*layers.5.*", "*layers.6.*"]}, "value": 0.2},
        {"value": 1},
    ]


def test_the_base_is_what_the_method_makes_of_it(tmp_path: Path) -> None:
    plain = "base_model: z\nmodels: [{model: x}, {model: z}]\n"
    assert list(native("merge_method: karcher\n" + plain, tmp_path)["models"]) == ["z", "x"]
    unlisted = "base_model: z\nmodels: [{model: x}]\nparameters: {t: 0.5}\n"
    found = native("merge_method: slerp\n" + unlisted, tmp_path)
    assert list(found["models"]) == ["z", "x"]
    assert "base" not in found
    found = native(
        "merge_method: multislerp\nparameters: {weight: 1}\n"
        + plain.replace("x}", "x}, {model: y}"),
        tmp_path,
    )
    assert (found["base"], list(found["models"])) == ("z", ["x", "y"])


def test_the_donor_of_a_stack_is_the_base(tmp_path: Path) -> None:
    text = """
merge_method: passthrough
base_model: %s
slices:
  - sources: [{model: x, layer_range: [0, 2]}]
  - sources: [{model: y, layer_range: [0, 2]}]
"""
    assert list(native(text % "y", tmp_path)["models"]) == ["y", "x"]
    found = native(text % "z", tmp_path)
    assert (found["base"], list(found["models"])) == ("z", ["x", "y"])


def test_a_model_twice_in_a_slice_has_two_names(tmp_path: Path) -> None:
    found = native(
        "merge_method: linear\nparameters: {weight: 1}\nslices: [{sources: "
        "[{model: o/x, layer_range: [0, 1]}, {model: o/x, layer_range: [3, 4]}]}]",
        tmp_path,
    )
    assert found["models"] == {"x": "o/x", "x-2": "o/x"}
    assert found["slices"][0]["layers"] == {"x": 0, "x-2": 3}


def test_ranges_are_read_as_numbers(tmp_path: Path) -> None:
    found = native(
        "merge_method: passthrough\nslices: [{sources: [{model: o/x, layer_range: ['0', 2.0]}]}]",
        tmp_path,
    )
    assert found["slices"][0]["layers"] == {"x": "0..1"}


def test_models_as_mappings(tmp_path: Path) -> None:
    text = """
merge_method: linear
models:
  - model: {model: {path: o/x, revision: r}, lora: o/l}
    parameters: {weight: 1}
  - {model: "./some where/x", parameters: {weight: 1}}
"""
    assert native(text, tmp_path)["models"] == {
        "x-l": {"source": "o/x@r", "adapter": "o/l"}, "x": "./some where/x",
    }  # fmt: skip


def test_several_modules_are_rules(tmp_path: Path) -> None:
    found = native(
        """
merge_method: linear
modules:
  text_decoder:
    models: [{model: x, parameters: {weight: 1}}, {model: y, parameters: {weight: 3}}]
  vision_tower:
    models: [{model: x, parameters: {weight: 1}}]
""",
        tmp_path,
    )
    vision, text, rest = found["rules"]
    assert (vision["models"], text["models"]) == (["x"], ["x", "y"])
    assert text["parameters"] == {"weight": {"x": 1, "y": 3}}
    assert "*language_model.*" in text["match"]["tensors"]
    assert rest == {"match": {}, "drop": True}


def two_stacks(zoo: Zoo) -> dict[str, dict[str, torch.Tensor]]:
    """Two models of an encoder and a decoder with three layers each, saved as a and b."""
    names = [
        f"{side}.block.{i}.{part}.weight"
        for side in ("encoder", "decoder")
        for i in range(3)
        for part in ("self_attention.q", "mlp.up_proj")
    ]
    names += ["shared.weight", "encoder.final_layer_norm.weight",
              "decoder.final_layer_norm.weight", "lm_head.weight"]  # fmt: skip
    config = {"model_type": "t5", "num_layers": 3, "num_decoder_layers": 3}
    draws = torch.Generator().manual_seed(0)
    made = {model: {n: torch.randn(4, 4, generator=draws) for n in names} for model in "ab"}
    for model, tensors in made.items():
        zoo.save(model, tensors, config=config)
    return made


def test_several_modules_with_slices(zoo: Zoo) -> None:
    """What is outside a module's layers is by the module's first and last slice."""
    made = two_stacks(zoo)
    a, b = made["a"], made["b"]
    text = """
merge_method: passthrough
base_model: a
modules:
  decoder:
    parameters: {scale: 3}
    slices:
      - sources: [{model: b, layer_range: [1, 3]}]
  encoder:
    slices:
      - sources: [{model: a, layer_range: [0, 1]}]
      - sources: [{model: b, layer_range: [0, 3], parameters: {scale: [1, 2]}}]
  shared: {models: [{model: a}]}
"""
    found, report = zoo.merge(text)
    assert not any("matches no tensor" in each for each in report["warnings"])
    layers = {"encoder": [("a", 0, 1.0), ("b", 0, 1.0), ("b", 1, 1.5), ("b", 2, 2.0)],
              "decoder": [("b", 1, 3.0), ("b", 2, 3.0)]}  # fmt: skip
    wanted = {
        "shared.weight": a["shared.weight"], "lm_head.weight": 3 * b["lm_head.weight"],
        "encoder.final_layer_norm.weight": b["encoder.final_layer_norm.weight"],
        "decoder.final_layer_norm.weight": 3 * b["decoder.final_layer_norm.weight"],
    }  # fmt: skip
    for side, taken in layers.items():
        for i, (model, was, scale) in enumerate(taken):
            for part in ("self_attention.q", "mlp.up_proj"):
                name = f"{side}.block.{was}.{part}.weight"
                wanted[f"{side}.block.{i}.{part}.weight"] = scale * made[model][name]
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor)
    config = json.loads((zoo.folder / "out/config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"]) == (4, 2)


def test_a_module_without_slices_beside_one_that_has_some(zoo: Zoo) -> None:
    made = two_stacks(zoo)
    text = """
merge_method: passthrough
base_model: b
modules:
  encoder: {slices: [{sources: [{model: a, layer_range: [1, 2], parameters: {scale: 5}}]}]}
  decoder: {models: [{model: b}]}
"""
    found, _ = zoo.merge(text)
    assert len(found) == 2 + 1 + 6 + 2  # what is in no module is left out
    for name in ("decoder.final_layer_norm.weight", "decoder.block.2.mlp.up_proj.weight",
                 "lm_head.weight"):  # fmt: skip
        assert torch.equal(found[name], made["b"][name])
    up = "encoder.block.{}.mlp.up_proj.weight"
    assert torch.equal(found[up.format(0)], 5 * made["a"][up.format(1)])


def test_slices_with_different_bases_are_nested_recipes(zoo: Zoo) -> None:
    made = zoo.family(llama(4), 3)
    for name, tensors in made.items():
        zoo.save(name, tensors, config={"model_type": "llama", "num_hidden_layers": 4})
    text = """
merge_method: task_arithmetic
base_model: base
parameters: {lambda: [{filter: layers.3., value: 1}, {value: 0.5}]}
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: a, layer_range: [0, 2], parameters: {weight: 0.5}}
  - base_model: b
    sources:
      - {model: b, layer_range: [1, 3]}
      - {model: c, layer_range: [1, 3], parameters: {weight: [1, 0.5]}}
  - sources:
      - {model: base, layer_range: [3, 4]}
      - {model: a, layer_range: [3, 4], parameters: {weight: 2}}
dtype: float32
"""
    found, _ = zoo.merge(text)
    base, a, b, c = (made[name] for name in ("base", "a", "b", "c"))
    name = "model.layers.{}.mlp.up_proj.weight"
    for out, was, low, high, weight in (
        (1, 1, base, a, 0.25), (2, 1, b, c, 0.5), (3, 2, b, c, 0.5), (4, 3, base, a, 1.0),
    ):  # fmt: skip
        old = name.format(was)
        wanted = low[old] + weight * (high[old] - low[old])
        torch.testing.assert_close(found[name.format(out)], wanted)
    head = "lm_head.weight"
    torch.testing.assert_close(found[head], a[head])
    assert json.loads((zoo.folder / "out/config.json").read_text())["num_hidden_layers"] == 5
    (zoo.folder / "k.yml").write_text(text.replace("{model: c, layer", "{modl: c, layer"))
    with pytest.raises(RecipeError, match=r"k.yml:12: 'slices.0.sources.1.model' is missing"):
        parse.load(zoo.folder / "k.yml")


def test_flags_that_are_a_gradient(zoo: Zoo) -> None:
    """The second point is reached by the last layer alone; outside the layers the first holds."""
    made = zoo.family(llama(4), 2)
    text = """
merge_method: linear
models: [{model: a, parameters: {weight: 3}}, {model: b, parameters: {weight: 1}}]
parameters:
  normalize: [{filter: mlp, value: [false, yes]}, {value: [1, 0]}]
"""
    found, _ = zoo.merge(text)
    for name, tensor in found.items():
        whole = 3 * made["a"][name] + made["b"][name]
        summed = ("layers.3" in name) != ("mlp" in name)
        torch.testing.assert_close(tensor, whole if summed else whole / 4)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_of_short_task_vectors(zoo: Zoo, filter_wise: bool) -> None:
    """There the product of two lengths is 1e-6 at least, so their cosine is less: t with it."""
    steps = {"base": (0.0, 0.0), "a": (3e-4, 4e-4), "b": (6e-4, 0.0)}
    for name, step in steps.items():
        zoo.save(name, {"w": torch.tensor([[*step]])})
    models = "base_model: base\nmodels: [{model: a}, {model: b}]\n"
    text = f"merge_method: model_stock\n{models}parameters: {{filter_wise: {filter_wise}}}\n"
    found, _ = zoo.merge(text)
    t = 2 * 0.18 / 1.18  # cosine 0.6, but 1.8e-7 over 1e-6
    torch.testing.assert_close(found["w"], torch.tensor([[4.5e-4 * t, 2e-4 * t]]))


def test_a_folder_named_base_is_not_the_base(zoo: Zoo) -> None:
    """base_model is base+lora; what takes another LoRA takes it on the folder."""
    base = zoo.save("base", {"x.q_proj.weight": torch.zeros(2, 2)})
    for name, value in (("one", 1.0), ("two", 10.0)):
        folder = zoo.folder / name
        folder.mkdir()
        save_file(
            {
                "base_model.model.x.q_proj.lora_A.weight": torch.ones(1, 2),
                "base_model.model.x.q_proj.lora_B.weight": torch.full((2, 1), value),
            }, folder / "adapter_model.safetensors",
        )  # fmt: skip
        (folder / "adapter_config.json").write_text('{"r": 1, "lora_alpha": 1}')
    text = (
        f"merge_method: task_arithmetic\nbase_model: {base.name}+one\n"
        "models: [{model: base+two, parameters: {weight: 1}}]\n"
    )
    found, _ = zoo.merge(text, hashes=True)
    assert found["x.q_proj.weight"].tolist() == [[10, 10], [10, 10]]  # 1 + (10 - 1)
    native = {
        "base": {"models": {"m": {"source": "./base", "adapter": "./one"}}, "method": "linear"},
        "models": {"on": {"source": "base", "adapter": "./two"}}, "method": "linear",
    }  # fmt: skip
    found, _ = zoo.merge(native, "native", hashes=True)
    assert found["x.q_proj.weight"].tolist() == [[11, 11], [11, 11]]
    again = api.merge(zoo.folder / "native/recipe.lock.yaml", zoo.folder / "again", locked=True)
    assert again.report["replay"]["outcome"] == "same bytes"


def test_the_dtype_of_a_document_that_gives_the_config(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    text = """
name: half
merge_method: linear
models: [{model: a, parameters: {weight: 1}}]
dtype: bfloat16
---
merge_method: slerp
base_model: half
models: [{model: half}, {model: b}]
parameters: {t: 0.5}
dtype: bfloat16
"""
    found, _ = zoo.merge(text)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert json.loads((zoo.folder / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_documents_are_nested_recipes(zoo: Zoo) -> None:
    made = zoo.family("llama", 2)
    text = """
name: half
merge_method: linear
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 1}}
---
merge_method: task_arithmetic
base_model: base
models:
  - {model: half, parameters: {weight: 0.5}}
"""
    found, _ = zoo.merge(text, name="multi")
    name = "model.norm.weight"
    mean = (made["a"][name] + made["b"][name]) / 2
    torch.testing.assert_close(found[name], (mean + made["base"][name]) / 2)
    plain = parse.native(zoo.folder / "multi.yaml")
    again, _ = zoo.merge(plain, "again", name="plain")
    assert raw(again) == raw(found)


@pytest.mark.parametrize(("text", "says"), [
    ("name: x\nmerge_method: linear\nmodels: [{model: y}]\n---\n"
     "name: y\nmerge_method: linear\nmodels: [{model: x}]\n", "use each other"),
    ("name: x\nmerge_method: linear\nmodels: [{model: z}]\n---\n"
     "name: y\nmerge_method: linear\nmodels: [{model: z}]\n", "2 documents give a model"),
    ("name: x\nmerge_method: linear\n---\nname: x\nmerge_method: linear\n", "two documents are"),
])  # fmt: skip
def test_documents_that_are_no_recipe(text: str, says: str) -> None:
    assert says in faults(text)[0]


def test_tokenizers_and_templates(tmp_path: Path) -> None:
    text = TIES.replace("org/code+me/lora@r2", "org/code") + (
        "tokenizer:\n  source: union\n  pad_to_multiple_of: 64\n  tokens:\n"
        "    <s>: {source: org/math, force: true}\n"
        "    <z>: {source: {kind: zero}}\n"
        "    <t>: {source: {kind: model_token, model: org/base@v1, token_id: 3}}\n"
    )
    assert native(text, tmp_path)["vocabulary"] == {
        "source": "union", "pad_to_multiple_of": 64,
        "tokens": {
            "<s>": {"source": {"model": "math"}, "force": True},
            "<z>": {"source": "zero"},
            "<t>": {"source": {"model": "base", "id": 3}},
        },
    }  # fmt: skip
    legacy = TIES + "tokenizer_source: %s\n"
    for asked, ours in (("union", "union"), ("base", "base"), ("org/math", "math")):
        assert native(legacy % asked, tmp_path)["vocabulary"] == {"source": ours}
    for asked in ("org/other@r", "org/math+org/lora", "org/code"):
        source = {"tokenizer": asked.partition("+")[0]}
        assert native(legacy % asked, tmp_path)["vocabulary"] == {
            "source": source, "unseen": "zero",
        }  # fmt: skip
    plain = "merge_method: karcher\nmodels: [{model: x}, {model: y}]\n"
    for more, ours in (("tokenizer_source: base", "x"), ("tokenizer: {}", "union")):
        assert native(f"{plain}{more}\n", tmp_path)["vocabulary"] == {"source": ours}


# --- what is ignored


@pytest.mark.parametrize(("more", "key", "line"), [
    ("weigth: 0.5\n", "weigth", 11),
    ("parameters_: {t: 1}\n", "parameters_", 11),
    ("name: x\n", "name", 11),
])  # fmt: skip
def test_unknown_keys_are_named(more: str, key: str, line: int) -> None:
    (told,) = ignored(TIES + more)
    assert told.startswith(f"k.yml:{line}: mergekit ignores '{key}'")


def test_of_a_key_that_is_repeated_the_last_holds(tmp_path: Path) -> None:
    text = TIES.replace("density: 0.6", "density: 0.6, density: 0.7")
    assert native(text, tmp_path)["models"]["math"]["density"] == 0.7
    (told,) = ignored(text)
    assert told.startswith(
        "k.yml:5: the key 'models.0.parameters.density' is already on line 5; the last holds"
    )


@pytest.mark.parametrize(("old", "new", "key"), [
    ("normalize: false", "normalise: false", "parameters.normalise"),
    ("density: 0.6", "densty: 0.6", "models.0.parameters.densty"),
    ("density: 0.6", "lambda: 0.6", "models.0.parameters.lambda"),
    ("model: org/math", "model: org/math\n    layer_range: [0, 2]", "models.0.layer_range"),
    ("merge_method: ties", "merge_method: task_arithmetic", "models.0.parameters.density"),
    ("model: org/math", "model: {model: org/math, override_architecture: X}",
     "models.0.model.override_architecture"),
    ("- model: org/math", "- {model: org/base@v1, parameters: {weight: 1}}\n  - model: org/math",
     "models.0.parameters.weight"),
])  # fmt: skip
def test_what_mergekit_does_not_read_is_named(old: str, new: str, key: str) -> None:
    told = ignored(TIES.replace(old, new))
    assert any(f"'{key}'" in each for each in told), told


def test_strict_makes_errors_of_them(tmp_path: Path) -> None:
    (tmp_path / "k.yml").write_text(TIES + "weigth: 1\n")
    assert api.check(tmp_path / "k.yml").method == "ties"
    with pytest.raises(RecipeError, match="mergekit ignores 'weigth'"):
        api.check(tmp_path / "k.yml", strict=True)


def test_the_command_line(zoo: Zoo) -> None:
    zoo.family("llama", 2)
    text = (
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {weight: 1}\nresidual_weight: 3\n"
    )
    (zoo.folder / "k.yml").write_text(text)
    ran = zoo.here("check", "k.yml", "--convert")
    assert (ran.rc, "residual_weight" in ran.err) == (0, True)
    assert read(ran.out, "r").data["models"] == {"a": "a", "b": "b"}
    assert zoo.here("check", "k.yml", "--strict").rc == 3
    assert zoo.here("merge", "k.yml", "out", "--strict").rc == 3
    assert not (zoo.folder / "out").exists()
    ran = zoo.here("merge", "k.yml", "out", "--json")
    assert ran.rc == 0, ran.err
    report = json.loads(ran.out)
    assert any("residual_weight" in str(each) for each in report["warnings"])
    assert (zoo.folder / "out/recipe.yaml").read_text() == parse.native(zoo.folder / "k.yml")
    ran = zoo.here(
        "merge", "k.yml", "2", "--set", "parameters.weight=[1, 2]", "--dry-run", "--json"
    )
    assert json.loads(ran.out)["tensors"][0]["parameters"]["weight"] == [1.0, 1.0]


def test_a_native_recipe_converts_to_itself(zoo: Zoo) -> None:
    zoo.family("llama", 1)
    file = zoo.recipe("models: {a: ./a}\nmethod: linear   # as it is\n")
    assert parse.native(file) == file.read_text()


# --- what is refused


@pytest.mark.parametrize(("text", "says"), [
    ("base_model: b\nexperts: [{source_model: a}]\n", "a file of mergekit-moe"),
    ("genome: {models: [a]}\ntasks: [x]\n", "a file of mergekit-evolve"),
    ("merge_method: linear\nmodels: [{model: a.safetensors}, {model: b.pt}]\n",
     "a file of mergekit-pytorch"),
    ("merge_method: tis\nmodels: [{model: a}]\n", "no method 'tis'\n  -> did you mean 'ties'"),
    ("merge_method: linear\n", "takes one of models, slices and modules, and this has none"),
    ("merge_method: linear\nmodels: [{model: a}]\nslices: [{sources: []}]\n",
     "has models and slices"),
    ("merge_method: linear\nmodels: [{model: a}]\n", "mergekit needs 'weight' here"),
    ("merge_method: slerp\nbase_model: b\nmodels: [{model: a, parameters: {t: 1}}]\n",
     "mergekit needs 't' here"),
    ("merge_method: linear\nmodels: [{parameters: {weight: 1}}]\n", "'models.0.model' is missing"),
    ("merge_method: linear\nmodels: {a: b}\n", "models must be a list"),
    ("merge_method: linear\nmodels: [{model: a, parameters: {weight: x}}]\n", "must be a number"),
    ("merge_method: linear\nmodels: [{model: a, parameters: {weight: [1, {value: 2}]}}]\n",
     "mixes values and filters"),
    ("merge_method: karcher\nmodels: [{model: a}]\ndtype: bf16\n", "dtype must be one of"),
    ("merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, -1]}]}]\n",
     "the first below the end"),
    ("merge_method: passthrough\nslices: [{sources: [{model: a}]}]\n", "the first below the end"),
    ("merge_method: karcher\nslices: [{sources: [{model: a, layer_range: [0, 2]},"
     " {model: b, layer_range: [0, 1]}]}]\n", "other numbers of layers"),
    ("merge_method: passthrough\nbase_model: b\nmodels: [{model: a}]\n", "takes exactly 1 model"),
    ("merge_method: ties\nparameters: {weight: 1}\nmodels: [{model: a}]\n", "needs a base"),
    ("merge_method: ties\nbase_model: b\nparameters: {weight: 1}\n"
     "slices: [{sources: [{model: a, layer_range: [0, 2]}]}]\n", "not among the sources of the"),
    ("merge_method: karcher\nmodels: [{model: o/a}]\n"
     "tokenizer: {tokens: {x: {source: o/z}}}\n",
     "'o/z' is none of the models that are merged\n  -> its tokens are read of a model that"),
    ("merge_method: karcher\nmodels: [{model: o/a}]\n"
     "tokenizer: {tokens: {x: {source: {kind: model_token, token: y}}}}\n", "names no model"),
    ("merge_method: nuslerp\nparameters: {weight: 1, nuslerp_flatten: [true, false],"
     " nuslerp_row_wise: [true, false]}\nmodels: [{model: a}, {model: b}]\n",
     "nuslerp_flatten and nuslerp_row_wise both depend on the tensor"),
    ("merge_method: ties\nbase_model: b\nparameters: {weight: 1}\nmodels: [{model: b}]\n",
     "nothing but the base is merged here"),
    ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\ntokenizer: union\n",
     "tokenizer must be a mapping"),
])  # fmt: skip
def test_what_is_wrong_is_said_with_its_line(text: str, says: str) -> None:
    told = faults(text)
    assert any(says in each for each in told), told
    assert all(each.startswith("k.yml:") for each in told), told


def test_what_cannot_be_converted_is_no_empty_recipe() -> None:
    (told,) = faults("merge_method: linear\nmodels: {a: b}\n")
    assert "models must be a list" in told


def test_faults_of_the_recipe_have_the_file_s_lines() -> None:
    (told,) = faults(TIES.replace("density: 0.6", "density: -0.6"))
    assert told == "k.yml:4: models.math.density must be 0..1, not -0.6"


def test_a_slice_past_the_depth_has_the_file_s_line(zoo: Zoo) -> None:
    zoo.save("a", {n: torch.ones(s) for n, s in llama(2).items()})
    text = (
        "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [0, 2]}]\n"
        "  - sources: [{model: a, layer_range: [1, 3]}]\n"
    )
    with pytest.raises(CheckpointError) as caught:
        build(parse.load(zoo.recipe(text)))
    assert "recipe.yaml:4: slices.1: layers 1..2 of 'a', which has 2" in str(caught.value)


def test_a_conversion_loads_no_torch(zoo: Zoo) -> None:
    (zoo.folder / "k.yml").write_text(TIES)
    code = (
        "import sys\nfrom mowmerge.cli.check import check\ncheck('k.yml', convert=True)\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    ran = zoo.python(code)
    assert (ran.rc, ran.err.strip()) == (0, "False")


def test_chat_templates(tmp_path: Path) -> None:
    for asked in ("auto", "'{% for m in messages %}{{ m }}{% endfor %}'"):
        found = native(f"{TIES}chat_template: {asked}\n", tmp_path)
        assert found["output"]["chat_template"] == asked.strip("'")
    assert "there is no model 'ato'" in faults(f"{TIES}chat_template: ato\n")[0]


TURNS = [("system", "Be kind."), ("user", "hi"), ("assistant", " hello "), ("user", "bye")]


@pytest.mark.parametrize(("name", "turns", "text"), [
    ("chatml", 4,
     "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
     "<|im_start|>assistant\n hello <|im_end|>\n<|im_start|>user\nbye<|im_end|>\n"
     "<|im_start|>assistant\n"),
    ("llama3", 4,
     "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
     "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\nhello<|eot_id|>"
     "<|start_header_id|>user<|end_header_id|>\n\nbye<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ("mistral", 4, "<s>[INST] Be kind.\n\nhi [/INST] hello</s>[INST] bye [/INST]"),
    ("mistral", 3, "<s>[INST] hi [/INST] hello</s>[INST] bye [/INST]"),
    ("exaone", 4,
     "[|system|]Be kind.[|endofturn|]\n[|user|]hi\n[|assistant|] hello [|endofturn|]\n"
     "[|user|]bye\n[|assistant|]"),
    ("exaone", 1, "[|system|][|endofturn|]\n[|user|]bye\n[|assistant|]"),
    ("alpaca", 4,
     "<s>Be kind.\n\n### Instruction:\nhi\n\n### Response:\nhello</s>\n\n"
     "### Instruction:\nbye\n\n### Response:\n"),
    ("alpaca", 1,
     "<s>Below is an instruction that describes a task. Write a response that appropriately"
     " completes the request.\n\n### Instruction:\nbye\n\n### Response:\n"),
])  # fmt: skip
def test_templates_that_have_a_name(tmp_path: Path, name: str, turns: int, text: str) -> None:
    import tokenizers
    import transformers as hf

    found = native(f"{TIES}chat_template: {name}\n", tmp_path)["output"]["chat_template"]
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1})),
        bos_token="<s>", eos_token="</s>",
    )  # fmt: skip
    tokenizer.chat_template = found
    told = [{"role": role, "content": content} for role, content in TURNS[-turns:]]
    shown = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
    assert shown == text


DOC = (Path(__file__).parents[2] / "docs" / "from-mergekit.md").read_text("utf-8")


def test_the_example_of_the_docs_is_what_is_printed(tmp_path: Path) -> None:
    theirs, ours = re.findall(r"```yaml\n(.*?)```", DOC, re.S)
    (tmp_path / "k.yml").write_text(theirs)
    assert parse.native(tmp_path / "k.yml") == ours


def test_the_docs_name_every_method_and_default() -> None:
    table = DOC.partition("## The methods")[2].partition("## The command line")[0]
    for name, preset in PRESETS.items():
        row = next(
            line for line in table.splitlines() if f"`{name}`" in "".join(line.split("|")[1:2])
        )
        for value in (preset.method, *preset.fixed):
            if value != "mode":
                assert value in row, (name, value)


def test_filters_that_end_nowhere_end_in_the_default(tmp_path: Path) -> None:
    text = TIES.replace("normalize: false", "normalize: [{filter: mlp, value: false}]")
    assert native(text, tmp_path)["parameters"]["aggregate"] == [
        {"match": {"tensors": "*mlp*"}, "value": "sum"}, {"value": "mean"},
    ]  # fmt: skip


WORDS = st.sampled_from(["a", "b", "base", "union", "linear", "ties", "x+y", "@", "", "{{ a }}"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats(-2, 2) | WORDS,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["model", "lora", "parameters", "weight", "t", "filter", "value", "layer_range",
             "sources", "models", "slices", "kind", "token", "source", "tokens", "default", "path"]
        ), inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.sampled_from(TOP), VALUES, max_size=5),
    st.sampled_from(["linear", "slerp", "ties", "passthrough", "nuslerp"]),
)
def test_whatever_is_in_it_is_a_recipe_or_a_fault(content: dict[str, Any], method: str) -> None:
    content.setdefault("merge_method", method)
    content.setdefault("models", [{"model": "a", "parameters": {"weight": 1}}])
    try:
        text = dump(mergekit.converted(read_all(json.dumps(content), "k.yml"))[0].data)
        parse.loads(json.dumps(content), file="k.yml")
    except RecipeError as error:
        assert error.problems
        return
    assert parse.loads(text, file="k.yml").method == PRESETS[content["merge_method"]].method
