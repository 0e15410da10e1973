"""Zero-shot classification beside transformers' CLIP, and metrics beside scikit-learn's."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPModel,
    CLIPVisionModelWithProjection,
    ViTImageProcessorPil,
)

from mowmerge import api
from mowmerge.errors import CheckpointError, RecipeError
from mowmerge.evals.settings import Options
from mowmerge.tasks import metrics
from tests.evals.making import clips, recipe, tokenizer

CLASSES = {"pets": ["cat", "dog", "hen"], "places": ["mat", "the mat"]}
TEMPLATES = ["a photo of the {}.", "the {}"]


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Any]:
    """Two experts of a vision tower, and pictures of noise for each."""
    clips(tmp_path, "pets", "places")
    chance, tasks = Random(0), {}
    for name, classes in CLASSES.items():
        for i in range(21):
            at = tmp_path / f"data-{name}/test/{classes[i % len(classes)]}"
            at.mkdir(parents=True, exist_ok=True)
            Image.frombytes("RGB", (8, 8), chance.randbytes(192)).save(at / f"{i:02d}.png")
        tasks[name] = {
            "type": "zero-shot-image-classification", "expert": name,
            "data": {"path": "imagefolder", "data_dir": f"./data-{name}"},
            "options": {"clip": "./clip", "templates": TEMPLATES},
        }  # fmt: skip
    return tasks


def by_transformers(tmp_path: Path, tower: Any, name: str) -> dict[str, list[float]]:
    """Each picture's probabilities, by CLIP as transformers runs it."""
    whole = CLIPModel.from_pretrained(tmp_path / "clip").eval()
    tokens = AutoTokenizer.from_pretrained(tmp_path / "clip")
    processor = ViTImageProcessorPil.from_pretrained(tmp_path / "clip")
    texts = []
    for label in CLASSES[name]:
        prompts = [template.format(label) for template in TEMPLATES]
        given = tokens(prompts, padding=True, return_tensors="pt")
        each = whole.text_projection(whole.text_model(**given).pooler_output)
        mean = (each / each.norm(dim=-1, keepdim=True)).mean(0)
        texts.append(mean / mean.norm())
    found = {}
    for file in sorted((tmp_path / f"data-{name}").rglob("*.png")):
        with Image.open(file) as image, torch.no_grad():
            seen = tower(**processor(image.convert("RGB"), return_tensors="pt")).image_embeds[0]
        logits = whole.logit_scale.exp() * torch.stack(texts) @ (seen / seen.norm())
        found[f"{file.parent.name}/{file.name}"] = logits.softmax(0).tolist()
    return found


def test_zero_shot_is_transformers_own(tmp_path: Path, tasks: dict[str, Any]) -> None:
    file = recipe(tmp_path, "tower", list(CLASSES), tasks)
    out = api.merge(file, tmp_path / "out").path
    found = {(s.row, s.task): s for s in api.evaluate(out, file).scores}
    for name, classes in CLASSES.items():
        for row, folder in (("merged", "out"), ("base", "tower"), ("expert", name)):
            tower = CLIPVisionModelWithProjection.from_pretrained(tmp_path / folder).eval()
            theirs = by_transformers(tmp_path, tower, name)
            right = [classes[max(range(len(p)), key=p.__getitem__)] == f.split("/")[0]
                     for f, p in theirs.items()]  # fmt: skip
            score = found[row, name]
            assert score.value == pytest.approx(sum(right) / 21, abs=1e-9)
            assert sorted(score.confidence) == pytest.approx(
                sorted(map(max, theirs.values())), abs=1e-5
            )


def test_a_whole_clip_and_a_dynamic_tower(tmp_path: Path, tasks: dict[str, Any]) -> None:
    whole = {n: t | {"options": {"templates": TEMPLATES}} for n, t in tasks.items()}
    del whole["places"]
    whole["pets"] |= {"expert": None}
    file = recipe(tmp_path, "clip", ["clip"], whole)
    (score,) = api.evaluate({}, file, against=["base"]).scores
    tower = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "tower").eval()
    theirs = by_transformers(tmp_path, tower, "pets")
    assert sorted(score.confidence) == pytest.approx(sorted(map(max, theirs.values())), abs=1e-5)
    file = recipe(tmp_path, "tower", list(CLASSES), tasks, method="wemoe", parameters={})
    out = api.merge(file, tmp_path / "wemoe").path
    found = {(s.row, s.task): s for s in api.evaluate(out, file).scores}
    assert {row for row, _ in found} == {"merged", "merged, oracle", "base", "expert"}
    for name in CLASSES:
        assert found["merged, oracle", name].true == found["expert", name].true
        assert set(found["merged", name].routed) <= {0, 1}


def whole(tmp_path: Path, tasks: dict[str, Any], method: str, **parameters: Any) -> Path:
    """A recipe over experts of a whole CLIP, text tower and all."""
    base = CLIPModel.from_pretrained(tmp_path / "clip")
    for i, name in enumerate(CLASSES):
        model = copy.deepcopy(base)
        torch.manual_seed(i + 1)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value) * 0.05)
        shutil.rmtree(tmp_path / name)
        model.save_pretrained(tmp_path / name)
        tokenizer(tmp_path / name)
        ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / name)
    own = {n: t | {"options": {"templates": TEMPLATES}} for n, t in tasks.items()}
    return recipe(tmp_path, "clip", list(CLASSES), own, method=method, parameters=parameters)


@pytest.mark.parametrize("method", ["wemoe", "smile", "emr"])
def test_a_whole_dynamic_clip_told_its_expert_is_that_expert_extracted(
    tmp_path: Path, tasks: dict[str, Any], method: str
) -> None:
    file = whole(tmp_path, tasks, method)
    out = api.merge(file, tmp_path / "out").path
    found = {(s.row, s.task): s for s in api.evaluate(out, file).scores}
    assert ("merged" in {row for row, _ in found}) == (method != "emr")  # which has to be told
    for name in CLASSES:
        dense = api.extract(out, tmp_path / f"{name}-again", expert=name).path
        (alone,) = [s for s in api.evaluate(dense, file, against=()).scores if s.task == name]
        told = found["merged, oracle", name]
        assert told.predicted == alone.predicted
        assert told.confidence == pytest.approx(alone.confidence, abs=1e-5)
        base = found["base", name]
        assert told.confidence != pytest.approx(base.confidence, abs=1e-4)


def test_each_tower_of_a_whole_dynamic_clip_mixes_by_its_own_input(
    tmp_path: Path, tasks: dict[str, Any]
) -> None:
    file = whole(tmp_path, tasks, "wemoe")
    out = api.merge(file, tmp_path / "out").path
    one, many = (
        {s.task: s for s in api.evaluate(out, file, against=(), options=Options(batch=b)).scores
         if s.row == "merged"}
        for b in (1, 64)
    )  # fmt: skip
    model = api.load(out)
    for name, classes in CLASSES.items():
        assert one[name].nll == pytest.approx(many[name].nll, abs=1e-5)
        given = AutoTokenizer.from_pretrained(tmp_path / "clip")(
            [t.format(c) for c in classes for t in TEMPLATES], padding=True, return_tensors="pt"
        )
        file_ = sorted((tmp_path / f"data-{name}").rglob("*.png"))[0]
        processor = ViTImageProcessorPil.from_pretrained(tmp_path / "clip")
        with Image.open(file_) as image, torch.no_grad():
            seen = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
            # as many pictures as prompts, so that forward itself can answer
            both = model(**given, pixel_values=seen.repeat(len(given["input_ids"]), 1, 1, 1))
        texts = both.text_embeds.view(len(classes), len(TEMPLATES), -1).mean(1)
        texts = texts / texts.norm(dim=-1, keepdim=True)
        logits = model.logit_scale.exp() * texts @ both.image_embeds[0]
        best = float(logits.softmax(0).max())
        assert min(abs(best - c) for c in many[name].confidence) < 1e-5


def test_a_router_for_both_towers_is_refused(tmp_path: Path, tasks: dict[str, Any]) -> None:
    file = whole(tmp_path, tasks, "mow", blocks=1)
    out = api.merge(file, tmp_path / "out").path
    with pytest.raises(CheckpointError, match="(?s)one router for both towers.*as wemoe"):
        api.evaluate(out, file)


def test_a_tower_alone_needs_a_clip(tmp_path: Path, tasks: dict[str, Any]) -> None:
    del tasks["pets"]["options"]["clip"]
    file = recipe(tmp_path, "tower", list(CLASSES), tasks)
    with pytest.raises(RecipeError, match=r"needs a text tower, and CLIPVisionModelWithProjection"):
        api.evaluate({}, file, against=["base"])


@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_scikit_learns(seed: int) -> None:
    from scipy.stats import spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    chance = Random(seed)
    p, t = ([chance.randrange(4) for _ in range(50)] for _ in range(2))
    t[:20] = p[:20]
    assert metrics.accuracy(p, t) == pytest.approx(accuracy_score(t, p), abs=1e-6)
    assert metrics.macro_f1(p, t) == pytest.approx(f1_score(t, p, average="macro"), abs=1e-6)
    assert metrics.matthews(p, t) == pytest.approx(matthews_corrcoef(t, p), abs=1e-6)
    x = [chance.gauss(0, 1) + v for v in t]
    assert metrics.spearman(x, t) == pytest.approx(spearmanr(x, t).statistic, abs=1e-6)
    assert metrics.matthews([1] * 50, t) == metrics.spearman([1] * 50, t) == 0
