"""Experts that are adapters on the base: scored, fitted and distilled as if they were merged."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from mowmerge import api
from mowmerge.errors import CheckpointError, RecipeError
from mowmerge.evals.settings import Options as Scoring
from mowmerge.sources import adapted
from mowmerge.tasks import adapters, heads
from mowmerge.training.settings import Options as Training
from tests.peft_models import adapt

SIZES: dict[str, Any] = {
    "image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
LABELS = {"pets": ["cat", "dog", "hen"], "sky": ["cat", "dog", "hen"]}
COUNT = 12


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A classifier, two adapters on it with heads of their own, and the same two merged."""
    torch.manual_seed(0)
    chance = random.Random(0)
    maps = {"id2label": dict(enumerate(LABELS["pets"])),
            "label2id": {v: i for i, v in enumerate(LABELS["pets"])}}  # fmt: skip
    ViTForImageClassification(ViTConfig(**SIZES, **maps)).save_pretrained(tmp_path / "base")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "base")
    for i, (name, labels) in enumerate(LABELS.items()):
        adapt(tmp_path / "base", tmp_path / f"{name}-lora", seed=i + 1,
              target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])  # fmt: skip
        for split in ("train", "test"):
            for j in range(COUNT):
                at = tmp_path / f"data-{name}" / split / labels[j % len(labels)]
                at.mkdir(parents=True, exist_ok=True)
                Image.frombytes("RGB", (8, 8), chance.randbytes(192)).save(at / f"{j:03d}.png")
        content = {"base": "./base", "method": "passthrough",
                   "models": {name: {"source": "base", "adapter": f"./{name}-lora"}}}  # fmt: skip
        (tmp_path / "one.yaml").write_text(json.dumps(content))
        api.merge(tmp_path / "one.yaml", tmp_path / name)
    return tmp_path


def recipe(zoo: Path, *, lora: bool, method: str = "task_arithmetic", **more: Any) -> Path:
    tasks = {
        name: {"expert": name, "type": "image-classification",
               "splits": {"router": "train", "eval": "test"},
               "data": {"path": "imagefolder", "data_dir": f"./data-{name}"}}
        for name in LABELS
    }  # fmt: skip
    models: dict[str, Any] = {name: f"./{name}" for name in LABELS}
    if lora:
        models = {n: {"source": "base", "adapter": f"./{n}-lora"} for n in LABELS}
    content = {
        "base": "./base", "models": models, "method": method, "tasks": tasks,
        "heads": {"match": "classifier.*"}, **more,
    }  # fmt: skip
    name = "adapted" if lora else "merged"
    file = zoo / f"{method}-{name}.yaml"
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return file


def both(zoo: Path, **more: Any) -> list[tuple[Path, Path]]:
    """The recipe over adapters and over merged experts, and what each makes."""
    files = [recipe(zoo, lora=lora, **more) for lora in (True, False)]
    return [(file, api.merge(file, zoo / f"out-{file.stem}").path) for file in files]


def test_what_is_loaded_is_the_merged_expert(zoo: Path) -> None:
    origin = adapted(api.check(recipe(zoo, lora=True)), "pets")
    ours, theirs = heads.load(origin, None), heads.load(zoo / "pets", None)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert adapters.folders(origin) == [zoo / "base", zoo / "pets-lora"]


def test_a_base_without_a_head_has_the_adapters(zoo: Path) -> None:
    held = load_file(zoo / "base/model.safetensors")
    base = {name: value for name, value in held.items() if "classifier" not in name}
    save_file(base, zoo / "base/model.safetensors", {"format": "pt"})
    origin = adapted(api.check(recipe(zoo, lora=True)), "pets")
    theirs = heads.load(zoo / "pets", None).state_dict()
    for name, value in heads.load(origin, None).state_dict().items():
        assert torch.equal(value, theirs[name]), name
    under = heads.load(zoo / "base", "pets", keeping=origin).state_dict()
    assert torch.equal(under["classifier.weight"], theirs["classifier.weight"])
    place = next(name for name in under if name.endswith("q_proj.weight"))
    assert not torch.equal(under[place], theirs[place])


@pytest.mark.parametrize("kept", [{"match": "classifier.*"}, None])
def test_scores_are_those_of_the_merged_expert(zoo: Path, kept: Any) -> None:
    found = []
    for file, out in both(zoo, heads=kept):
        done = api.evaluate(out, file)
        found.append({(s.model, s.task): (s.nll, s.predicted) for s in done.scores})
        assert {"base", "merged", "expert"} <= {s.model for s in done.scores}
        told = done.models["expert pets"]
        assert told.source == ("base + ./pets-lora" if "adapted" in file.stem else "./pets")
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    for key, (nll, predicted) in ours.items():
        assert nll == pytest.approx(theirs[key][0], abs=1e-6), key
        assert predicted == theirs[key][1], key
    assert ours["expert", "pets"] != ours["base", "pets"]


def test_another_adapter_is_scored_anew(zoo: Path) -> None:
    ((file, out),) = both(zoo)[:1]
    options = Scoring(cache=zoo / "kept")
    one = {(s.model, s.task): s.nll for s in api.evaluate(out, file, options=options).scores}
    adapt(zoo / "base", zoo / "pets-lora", seed=9, target_modules=["q_proj", "v_proj"],
          modules_to_save=["classifier"])  # fmt: skip
    two = {(s.model, s.task): s.nll for s in api.evaluate(out, file, options=options).scores}
    assert one["expert", "pets"] != two["expert", "pets"]
    assert one["expert", "sky"] == two["expert", "sky"]


def test_fitted_coefficients_are_those_of_the_merged_experts(zoo: Path) -> None:
    fit = {"method": "adamerging", "parameters": {"steps": 2, "batch": 4, "rate": 0.02}}
    found = [
        json.loads((out / "coefficients.json").read_text())["tensors"]
        for _, out in both(zoo, **fit)
    ]
    assert found[0] == found[1]
    assert any(value != 0.3 for row in found[0].values() for value in row.values())


def test_routers_learn_from_adapters_as_from_merged_experts(zoo: Path) -> None:
    """The teacher is the expert inside the dynamic checkpoint, whatever it came from."""
    asked, losses = Training(objective="distill", steps=3, batch=4, device="cpu"), []
    for file, out in both(zoo, method="wemoe"):
        trained = api.train_router(out, file, asked)
        losses.append(trained.report["metrics"]["select_loss"])
    assert losses[0] == losses[1]


def test_what_has_no_head_or_no_class_for_it_is_told(zoo: Path) -> None:
    settings = json.loads((zoo / "base/config.json").read_text())
    settings["architectures"] = ["ViTModel"]
    origin = adapted(api.check(recipe(zoo, lora=True)), "pets")
    (zoo / "base/config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="classifier"):
        heads.load(origin, None)
    file = recipe(zoo, lora=True)
    content = json.loads(file.read_text())
    inner = {"base": "./base", "method": "passthrough", "models": {"a": "./pets"}}
    content["models"]["pets"]["source"] = inner
    file.write_text(json.dumps(content))
    with pytest.raises(RecipeError, match="is itself a recipe"):
        api.evaluate(zoo / "sky", file, against=["experts"])
