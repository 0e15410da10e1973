"""Scales of one-bit deltas learn from the experts themselves: what falls, and what stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mowmerge
from mowmerge import api
from mowmerge.errors import MowmergeError
from mowmerge.tasks.data import load
from mowmerge.tasks.inputs import encode, processor
from mowmerge.training.settings import Options
from tests.training import checkpoints as make

NAMES = make.EXPERTS
QUICK = Options(steps=60, batch=8)


def family(root: Path, kind: str = "vit", method: str = "bitdelta", **parameters: Any) -> Path:
    """A base, three experts with a body and a head of their own, tasks and a recipe."""
    made = make.base(kind)
    if kind == "vit":
        made = T.ViTForImageClassification(made.config)
        made.config.architectures = ["ViTForImageClassification"]
    made.save_pretrained(root / "base")
    make._tool(root / "base", kind)
    held = load_file(root / "base" / "model.safetensors")
    for k, name in enumerate(NAMES):
        shutil.copytree(root / "base", root / name)
        draw = torch.Generator().manual_seed(k)
        far = {n: 0.05 * torch.randn(t.shape, generator=draw).exp() for n, t in held.items()}
        moved = {n: t + far[n] * torch.randn(t.shape, generator=draw) for n, t in held.items()}
        if kind == "vit":
            wide = torch.randn(held["classifier.weight"].shape, generator=draw)
            moved["classifier.weight"] = wide
        save_file(moved, root / name / "model.safetensors", {"format": "pt"})
    recipe = make._tasks(root, kind)
    content = json.loads(recipe.read_text()) | {
        "base": "./base", "method": method, "parameters": parameters,
    }  # fmt: skip
    content |= {"heads": {"match": "classifier.*"}} if kind == "vit" else {}
    recipe.write_text(json.dumps(content))
    return recipe


def divergence(model: Any, recipe: Path, kind: str) -> float:
    """KL from each expert's answers to the model's, over the eval splits, summed over tasks."""
    asked, total = api.check(recipe), 0.0
    for k, name in enumerate(NAMES):
        items = load(asked, f"t{name}", "eval", labelled=False)
        tool = processor(recipe.parent / "base", asked.tasks[f"t{name}"].type)
        if kind != "vit":
            tool.pad_token = tool.pad_token or tool.eos_token
        given = encode(tool, [items.input(i) for i in range(len(items))], model.config)
        auto = {"vit": T.AutoModelForImageClassification, "llama": T.AutoModelForCausalLM}[kind]
        expert = auto.from_pretrained(recipe.parent / name).eval()
        with torch.no_grad():
            p = expert(**given).logits.log_softmax(-1)
            told = model(**given, task_ids=torch.full((len(items),), k)).logits
            q = told[..., : p.shape[-1]].log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(-1).mean())
    return total


@pytest.mark.parametrize(("kind", "share"), [("vit", 0.8), ("llama", 0.96)])
def test_the_checkpoint_comes_nearer_to_its_experts_and_stays_there(
    tmp_path: Path, kind: str, share: float
) -> None:
    recipe = family(tmp_path, kind)
    out = api.merge(recipe, tmp_path / "out").path
    before = {f.name: f.read_bytes() for f in out.iterdir() if f.is_file()}
    first = mowmerge.load(out)
    factors = set(load_file(out / "router.safetensors"))
    assert factors and all(n.endswith("dyn_factor") for n in factors)
    assert all(bool((v == 1).all()) for v in load_file(out / "router.safetensors").values())
    far = divergence(first, recipe, kind)
    report = api.train_router(out, recipe, QUICK).report
    assert report["scales"] == 3 * len(factors) and report["routers"] == {}
    changed = {n for n in before if (out / n).read_bytes() != before[n]}
    assert changed == {"router.safetensors", "report.json", "SHA256SUMS", "README.md"}
    assert not api.verify(out).problems
    learned = load_file(out / "router.safetensors")
    assert set(learned) == factors and all(v.dtype == torch.float32 for v in learned.values())
    model = mowmerge.load(out)
    near = divergence(model, recipe, kind)
    assert near < share * far, (near, far)
    model.save_pretrained(tmp_path / "again")
    assert divergence(mowmerge.load(tmp_path / "again"), recipe, kind) == pytest.approx(near)


def test_each_experts_dense_model_has_the_learned_scales(tmp_path: Path) -> None:
    recipe = family(tmp_path)
    out = api.merge(recipe, tmp_path / "out").path
    api.train_router(out, recipe, QUICK)
    api.extract(out, tmp_path / "dense", expert="b")
    dense = T.AutoModelForImageClassification.from_pretrained(tmp_path / "dense").eval()
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = mowmerge.load(out)(pixel_values=x, task_ids=torch.tensor([1, 1, 1])).logits
        found = dense(pixel_values=x).logits
    torch.testing.assert_close(found, want[:, : found.shape[1]], rtol=1e-4, atol=1e-4)


def test_gradients_of_factors_are_those_of_finite_differences(tmp_path: Path) -> None:
    recipe = family(tmp_path)
    model = mowmerge.load(api.merge(recipe, tmp_path / "out").path).double()
    from mowmerge.training.checkpoint import factors

    held = factors(model)
    for p in held.values():
        p.data.copy_(torch.tensor([0.9, 1.2, 1.1]))
        p.requires_grad_(True)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 8, 8, generator=draw, dtype=torch.float64)

    def told() -> Any:
        return model(pixel_values=x, task_ids=torch.tensor([0, 1, 1, 0])).logits[:, 0].sum()

    found = torch.autograd.grad(told(), list(held.values()))
    for p, g in list(zip(held.values(), found, strict=True))[::5]:
        assert g[2] == 0
        for s in (0, 1):
            ends = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    p[s] += step
                    ends.append(float(told()))
                    p[s] -= step
            assert float(g[s]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("method", ["bitdelta", "one_bit"])
def test_with_a_classifier_both_learn_and_keep_each_other(tmp_path: Path, method: str) -> None:
    recipe = family(tmp_path, method=method, router="linear")
    out = api.merge(recipe, tmp_path / "out").path
    file = out / "router.safetensors"

    def held(kind: str) -> dict[str, bytes]:
        tensors = load_file(file)
        return {n: v.numpy().tobytes() for n, v in tensors.items() if kind in n}

    def trained() -> bool:
        with safe_open(file, "pt") as opened:
            return opened.metadata()["trained"] == "true"

    fresh = held("mow_router")
    api.train_router(out, recipe, Options("distill", steps=10, batch=4))
    assert held("mow_router") == fresh and not trained()
    factors = held("factor")
    assert any(v != b"\0\0\x80?" * 3 for v in factors.values())
    api.train_router(out, recipe, Options(steps=20, batch=8))
    assert held("factor") == factors and held("mow_router") != fresh and trained()
    api.train_router(out, recipe, Options("distill", steps=2, batch=4))
    assert trained()


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    recipe = family(tmp_path)
    out = api.merge(recipe, tmp_path / "out").path
    with pytest.raises(MowmergeError, match="has scales to learn alone"):
        api.train_router(out, recipe, Options("task"))
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(MowmergeError, match="learn from the expert 'b' itself: there is no folder"):
        api.train_router(out, recipe, QUICK)
    assert api.plan_training(out, recipe, QUICK)["scales"] == 36
