"""The evaluator beside a loop written by hand, and what it refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, ViTModel

import mowmerge
from mowmerge import api
from mowmerge.errors import CheckpointError, RecipeError, SourceError
from mowmerge.evals import classes, evaluator
from mowmerge.evals.kinds import image_classification
from mowmerge.evals.settings import Options
from mowmerge.tasks import heads

SIZES: dict[str, Any] = {
    "image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
LABELS = {"pets": ["cat", "dog", "hen"], "sky": ["grey", "clear"]}
COUNT = 70  # more than a batch


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two experts on pictures of noise, merged into `out`; returns the recipe."""
    torch.manual_seed(0)
    chance = random.Random(0)
    ViTModel(ViTConfig(**SIZES), add_pooling_layer=False).save_pretrained(tmp_path / "base")
    tasks = {}
    for name, labels in LABELS.items():
        maps = {
            "id2label": dict(enumerate(labels)),
            "label2id": {v: i for i, v in enumerate(labels)},
        }
        ViTForImageClassification(ViTConfig(**SIZES, **maps)).save_pretrained(tmp_path / name)
        ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / name)
        for i in range(COUNT):
            at = tmp_path / f"data-{name}" / "test" / labels[i % len(labels)]
            at.mkdir(parents=True, exist_ok=True)
            Image.frombytes("RGB", (8, 8), chance.randbytes(192)).save(at / f"{i:03d}.png")
        tasks[name] = {
            "expert": name, "type": "image-classification", "splits": {"eval": "test"},
            "data": {"path": "imagefolder", "data_dir": f"./data-{name}"},
        }  # fmt: skip
    tasks["sky"]["metric"] = "macro_f1"
    content = {
        "version": 1, "base": "./base", "models": {n: f"./{n}" for n in LABELS},
        "method": "task_arithmetic", "parameters": {"scale": 0.3},
        "heads": {"match": "classifier.*"}, "tasks": tasks,
    }  # fmt: skip
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(content))
    api.merge(file, tmp_path / "out")
    return file


def by_hand(folder: Path, name: str, model: Any) -> dict[str, int]:
    """What the model says of each file, one at a time."""
    processor = ViTImageProcessorPil.from_pretrained(folder / name)
    said = {}
    for file in sorted((folder / f"data-{name}").rglob("*.png")):
        with Image.open(file) as image, torch.inference_mode():
            given = processor(image.convert("RGB"), return_tensors="pt")
            said[str(file)] = int(model(**given).logits[0].argmax())
    return said


def test_the_figures_are_those_of_a_plain_loop(tmp_path: Path, recipe: Path) -> None:
    scores = {(s.model, s.task): s for s in api.evaluate(tmp_path / "out", recipe).scores}
    assert len(scores) == 6
    for name, labels in LABELS.items():
        models = {
            "expert": ViTForImageClassification.from_pretrained(tmp_path / name),
            "merged": mowmerge.load(tmp_path / "out", task=name),
        }
        for which, model in models.items():
            said = by_hand(tmp_path, name, model.eval())
            true = {file: labels.index(Path(file).parent.name) for file in said}
            right = sum(said[f] == true[f] for f in said)
            score = scores[which, name]
            assert sum(p == t for p, t in zip(score.predicted, score.true, strict=True)) == right
            assert sorted(score.predicted) == sorted(said.values())
            if name == "pets":
                assert score.value == pytest.approx(right / COUNT, abs=1e-6)
    base, pets = scores["base", "pets"], scores["expert", "pets"]
    assert len(base.predicted) == COUNT and base.true == pets.true


def test_one_trunk_answers_for_all_tasks_in_one_batch(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, set[str]]] = []

    def watched(loaded: Any, way: str, places: Any, given: Any) -> Any:
        seen.append((loaded.entry.row, {place.job.name for place in places}))
        return classes.answer(loaded, way, places, given)

    monkeypatch.setattr(image_classification, "answer", watched)
    api.evaluate(tmp_path / "out", recipe, options=Options(batch=32))
    mixed = {row for row, tasks in seen if tasks == {"pets", "sky"}}
    assert mixed == {"merged", "base"}
    assert heads.joined(heads.load(tmp_path / name, None) for name in LABELS) is None


def test_the_batch_decides_nothing(tmp_path: Path, recipe: Path) -> None:
    one, many = (
        api.evaluate(tmp_path / "out", recipe, against=(), options=Options(batch=batch)).scores
        for batch in (1, 64)
    )
    assert [s.predicted for s in one] == [s.predicted for s in many]
    assert [s.nll for s in one] == [pytest.approx(s.nll, abs=1e-6) for s in many]


def test_the_table_by_hand() -> None:
    values = [
        ("merged", "a", 0.6),
        ("merged", "b", 0.2),
        ("expert", "a", 0.8),
        ("expert", "b", 0.4),
    ]
    rows = evaluator.table([evaluator.Score(m, "", t, "accuracy", v, [], []) for m, t, v in values])
    assert rows[0] == {"model": "merged", "a": 0.6, "b": 0.2, "mean": pytest.approx(0.4),
                       "normalised": pytest.approx((0.75 + 0.5) / 2)}  # fmt: skip
    assert rows[1]["normalised"] == 1


def change(recipe: Path, **task: Any) -> Path:
    content = json.loads(recipe.read_text())
    content["tasks"]["pets"] |= task
    recipe.write_text(json.dumps(content))
    return recipe


def test_what_is_refused(tmp_path: Path, recipe: Path) -> None:
    out, before = tmp_path / "out", recipe.read_text()
    for task, error, message in (
        ({"metric": "acuracy"}, RecipeError, "(?s)no metric 'acuracy'.*did you mean 'accuracy'"),
        ({"type": "causal-lm"}, RecipeError, "no column 'text'"),
        ({"options": {"stop": "x"}}, RecipeError, "takes no 'stop' in options"),
        ({"splits": {"router": "test", "eval": "test"}}, RecipeError, r"share 70 sample\(s\)"),
        ({"data": {"path": "imagefolder", "data_dir": "./data-sky"}}, RecipeError, "does not know"),
    ):
        recipe.write_text(before)
        with pytest.raises(error, match=message):
            api.evaluate(out, change(recipe, **task))
    recipe.write_text(before)
    (tmp_path / "pets/preprocessor_config.json").unlink()
    with pytest.raises(SourceError, match="no image processor that loads"):
        api.evaluate(out, recipe)
    (out / "heads/pets.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no head for 'pets'"):
        api.evaluate(out, recipe)
