"""Heads that are kept per task: planned, written, and loaded with a merged backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import mowmerge
from mowmerge import api
from mowmerge.checkpoint import naming
from mowmerge.errors import CheckpointError, RecipeError
from mowmerge.planner import Options
from mowmerge.tensors import TensorSpec
from tests.zoo import load, raw

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32}
VIT = {"image_size": 8, "patch_size": 4} | SIZES
BERT = {"vocab_size": 30, "max_position_embeddings": 16} | SIZES
LABELS = {"pets": ["cat", "dog", "hen"], "sky": ["clear", "grey"]}
HEADS = "heads: {match: 'classifier.*'}\n"


def config(kind: type, sizes: dict[str, Any], labels: list[str]) -> Any:
    return kind(
        **sizes, id2label=dict(enumerate(labels)), label2id={v: i for i, v in enumerate(labels)}
    )


def vits(folder: Path) -> dict[str, Any]:
    """A bare backbone and an expert a label set, each with a head of its own width."""
    torch.manual_seed(0)
    ViTModel(ViTConfig(**VIT), add_pooling_layer=False).save_pretrained(folder / "base")
    return save(
        folder, {n: ViTForImageClassification(config(ViTConfig, VIT, v)) for n, v in LABELS.items()}
    )


def berts(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    BertModel(BertConfig(**BERT)).save_pretrained(folder / "base")
    made = {
        n: BertForSequenceClassification(config(BertConfig, BERT, v)) for n, v in LABELS.items()
    }
    return save(folder, made)


def save(folder: Path, models: dict[str, Any]) -> dict[str, Any]:
    for name, model in models.items():
        model.eval().save_pretrained(folder / name)
    return models


def recipe(folder: Path, *, base: bool = True, more: str = HEADS) -> Path:
    file = folder / "recipe.yaml"
    first = "base: ./base\nmethod: task_arithmetic\nparameters: {scale: 0.5}\n" if base else ""
    file.write_text(
        f"version: 1\n{first or 'method: linear'}\nmodels: {{pets: ./pets, sky: ./sky}}\n{more}"
    )
    return file


IMAGES = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)}
WORDS = {"input_ids": torch.arange(12).view(2, 6)}


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize(("build", "given"), [(vits, IMAGES), (berts, WORDS)])
def test_each_head_on_the_merged_backbone_equals_one_made_by_hand(
    tmp_path: Path, build: Any, given: dict[str, Any], base: bool
) -> None:
    models = build(tmp_path)
    out = api.merge(recipe(tmp_path, base=base), tmp_path / "out").path
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in models.values()]
    stem = models["pets"].base_model_prefix + "."
    bare = type(models["pets"].base_model)
    starts = {k: v.double() for k, v in load_base(bare, tmp_path / "base").items()}
    for name, model in models.items():
        mean: dict[str, torch.Tensor] = {}
        for key, own in model.state_dict().items():
            tensors = [s[key].double() for s in states if s[key].shape == own.shape]
            if not key.startswith(stem):
                mean[key] = own
            elif base:
                start = starts[key.removeprefix(stem)]
                mean[key] = start + 0.5 * sum(t - start for t in tensors)
            else:
                mean[key] = sum(tensors) / len(tensors)
        model.load_state_dict(mean)
        loaded = mowmerge.load(out, task=name)
        assert type(loaded) is type(model)
        assert list(loaded.config.id2label.values()) == LABELS[name]
        with torch.inference_mode():
            assert torch.allclose(loaded(**given).logits, model(**given).logits, atol=1e-6)


def load_base(kind: Any, folder: Path) -> Any:
    extra = {"add_pooling_layer": False} if kind is ViTModel else {}
    return kind.from_pretrained(folder, **extra).state_dict()


def test_what_is_written(tmp_path: Path) -> None:
    models = vits(tmp_path)
    result = api.merge(recipe(tmp_path), tmp_path / "out")
    out = result.path
    assert sorted(p.name for p in (out / "heads").iterdir()) == [
        "pets.json", "pets.safetensors", "sky.json", "sky.safetensors",
    ]  # fmt: skip
    head = load_file(out / "heads/pets.safetensors")
    assert head.keys() == {"classifier.weight", "classifier.bias"}
    assert torch.equal(head["classifier.weight"], models["pets"].classifier.weight)
    kept = json.loads((out / "heads/sky.json").read_text())
    assert kept["id2label"] == {"0": "clear", "1": "grey"}
    assert set(load(out)) == set(load(tmp_path / "base"))
    sums = (out / "SHA256SUMS").read_text()
    assert all(f"  heads/{name}" in sums for name in ("pets.json", "sky.safetensors"))


def test_without_a_base_the_config_is_the_backbones(tmp_path: Path) -> None:
    berts(tmp_path)
    out = api.merge(recipe(tmp_path, base=False), tmp_path / "out").path
    settings = json.loads((out / "config.json").read_text())
    assert settings["architectures"] == ["BertModel"]
    assert not {"id2label", "label2id"} & settings.keys()
    _, info = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(mowmerge.load(out)) is BertModel


def test_the_plan_says_which_prefix_sets_the_names_apart(tmp_path: Path) -> None:
    vits(tmp_path)
    plan = api.plan(recipe(tmp_path))
    told = [w for w in plan.warnings if "differ by a prefix ('vit." in w]
    assert len(told) == 1  # of all models that differ alike
    assert "'pets', 'sky' differ" in told[0]
    assert {m: s.file for m, s in plan.heads.items()} == {
        "pets": "heads/pets.safetensors",
        "sky": "heads/sky.safetensors",
    }
    written = api.merge(recipe(tmp_path), tmp_path / "out").path
    assert plan.write_bytes == sum(p.stat().st_size for p in written.rglob("*.safetensors"))


def test_a_base_with_a_head_takes_bare_experts(tmp_path: Path) -> None:
    models = vits(tmp_path)
    models["pets"].save_pretrained(tmp_path / "headed")
    (tmp_path / "r.yaml").write_text(
        "version: 1\nbase: ./headed\nmodels: {a: ./base}\nmethod: passthrough\n"
        "rules: [{match: {tensors: 'classifier.*'}, drop: true}]\n"
    )
    out = load(api.merge(tmp_path / "r.yaml", tmp_path / "out").path)
    given = load(tmp_path / "base")
    assert {name.removeprefix("vit."): name for name in out}.keys() == given.keys()
    assert all(torch.equal(out["vit." + name], value) for name, value in given.items())


def test_tasks_of_the_recipe_name_their_experts_head(tmp_path: Path) -> None:
    vits(tmp_path)
    tasks = "tasks: {animals: {expert: pets, type: image-classification, data: {path: x}}}\n"
    out = api.merge(recipe(tmp_path, more=HEADS + tasks), tmp_path / "out").path
    assert mowmerge.load(out, task="animals").config.num_labels == 3
    with pytest.raises(CheckpointError, match=r"(?s)no head for 'animal'.*did you mean 'animals'"):
        mowmerge.load(out, task="animal")


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    vits(tmp_path)
    with pytest.raises(RecipeError, match=r"no model has a tensor that matches head\.\*"):
        api.plan(recipe(tmp_path, more="heads: {match: 'head.*'}\n"))


def test_a_nested_recipe_brings_its_backbone_and_says_that_its_heads_stay(tmp_path: Path) -> None:
    vits(tmp_path)
    inner = recipe(tmp_path).rename(tmp_path / "inner.yaml")
    (tmp_path / "outer.yaml").write_text(
        "version: 1\nmodels: {both: ./inner.yaml}\nmethod: passthrough\n"
    )
    assert api.plan(tmp_path / "outer.yaml").warnings[-1].startswith("both: the heads its recipe")
    whole = api.merge(inner, tmp_path / "one").path
    outer = load(api.merge(tmp_path / "outer.yaml", tmp_path / "two").path)
    assert raw(outer) == raw(load(whole))


def test_different_heads_without_the_policy_are_refused(tmp_path: Path) -> None:
    vits(tmp_path)
    with pytest.raises(CheckpointError, match=r"classifier\.weight"):
        api.merge(recipe(tmp_path, more=""), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merge_without_heads_has_none_to_load(tmp_path: Path) -> None:
    berts(tmp_path)
    more = "rules: [{match: {tensors: 'classifier.*'}, drop: true}]\n"
    out = api.merge(recipe(tmp_path, more=more), tmp_path / "out").path
    with pytest.raises(CheckpointError, match=r"(?s)no head for 'pets'.*heads: \{match"):
        mowmerge.load(out, task="pets")


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    vits(tmp_path)
    out = api.merge(recipe(tmp_path), tmp_path / "out").path
    file = out / "heads/pets.safetensors"
    save_file({"classifier.weight": torch.zeros(3, 8), "classifier.bias": torch.zeros(3)}, file)
    with pytest.raises(CheckpointError, match=r"is \[3, 8\], and ViTForImageClassification has"):
        mowmerge.load(out, task="pets")
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError):
        mowmerge.load(out, task="pets")


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    vits(tmp_path)
    out = api.merge(recipe(tmp_path), tmp_path / "out").path
    (out / "heads/sky.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"sky\.json: the config does not load"):
        mowmerge.load(out, task="sky")
    (out / "heads/sky.json").unlink()
    with pytest.raises(CheckpointError, match=r"sky\.json: the config does not load"):
        mowmerge.load(out, task="sky")
    shard = out / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        mowmerge.load(out, task="pets")


def test_a_lost_tensor_is_an_error_and_never_made_up(tmp_path: Path) -> None:
    vits(tmp_path)
    out = api.merge(recipe(tmp_path), tmp_path / "out").path
    held = load(out)
    held.pop("layernorm.weight")
    save_file(held, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: .*layernorm\.weight"):
        mowmerge.load(out, task="pets")


ALONE = "parameters={scale: 1, weight: {pets: 1, sky: 0}}"
WHOLE = "parameters={blocks: 2, norms: all, embeddings: all}"


@pytest.mark.parametrize(("how", "given"), [
    (["method=task_arithmetic", ALONE], {}),
    (["method=mow", WHOLE], {"task_ids": torch.tensor([0, 0])}),
    (["method=twin_merging", "parameters={density: 1}"], {"task_ids": torch.tensor([0, 0])}),
])  # fmt: skip
def test_a_pooler_that_the_class_with_a_head_leaves_out_is_no_fault(
    tmp_path: Path, how: list[str], given: dict[str, Any]
) -> None:
    models = vits(tmp_path)
    ViTModel(ViTConfig(**VIT)).save_pretrained(tmp_path / "base")  # as backbones are published
    file = recipe(tmp_path, more=HEADS + "missing: base\n")
    out = api.merge(file, tmp_path / "out", overrides=how).path
    assert torch.equal(
        load(out)["pooler.dense.weight"], load(tmp_path / "base")["pooler.dense.weight"]
    )
    loaded = mowmerge.load(out, task="pets")
    with torch.inference_mode():
        want = models["pets"](**IMAGES).logits
        assert torch.allclose(loaded(**IMAGES, **given).logits[:, :3], want, atol=1e-5)


def test_a_layer_that_the_config_does_not_count_is_still_a_fault(tmp_path: Path) -> None:
    vits(tmp_path)
    out = api.merge(recipe(tmp_path), tmp_path / "out").path
    held = load(out)
    for name in [name for name in held if "layer.1." in name]:
        held[name.replace("layer.1.", "layer.2.")] = held[name].clone()
    save_file(held, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected: .*layers?\.2\."):
        mowmerge.load(out, task="pets")


def test_one_worker_and_two_write_the_same_bytes(tmp_path: Path) -> None:
    vits(tmp_path)
    outs = [
        api.merge(recipe(tmp_path), tmp_path / f"out{n}", options=Options(workers=n)).path
        for n in (1, 2)
    ]
    first, second = ((out / "SHA256SUMS").read_text() for out in outs)
    assert first == second


@pytest.mark.parametrize(
    ("held", "names", "expected"),
    [
        (["vit.a", "vit.b", "classifier.w"], ["a", "b"], ["a", "b", "classifier.w"]),
        (["a", "b"], ["vit.a", "vit.b", "classifier.w"], ["vit.a", "vit.b"]),
        (["a", "b", "c"], ["a", "b"], ["a", "b", "c"]),
        (["x.a", "y.b"], ["a", "c", "d", "e"], ["a", "y.b"]),
        (["x.a", "y.b", "y.c"], ["d.a", "e.f", "e.g"], ["x.a", "y.b", "y.c"]),
        (["m.a", "a"], ["a"], ["m.a", "a"]),
    ],
)
def test_names_apart_by_a_prefix(held: list[str], names: list[str], expected: list[str]) -> None:
    view = naming.aligned({name: TensorSpec(name, "F32", (1,)) for name in held}, names)
    assert list(view) == expected
    assert [spec.name for spec in view.values()] == held
