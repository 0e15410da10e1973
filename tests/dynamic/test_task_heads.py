"""Heads of different widths, one a task, chosen for each sample."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from making import CAUSAL, IMAGE, TEXT, K, Made, alike, inputs, seeded, write
from safetensors.torch import load_file, save_file

import mowmerge.hf  # noqa: F401
from mowmerge.checkpoint import dynamic
from mowmerge.dynamic import modeling, names
from mowmerge.dynamic.format import Head, Router

torch.set_num_threads(1)
WIDTHS = (3, 5, 2)
CASES = {
    "vit": (hf.ViTForImageClassification, hf.ViTConfig, IMAGE, hf.AutoModelForImageClassification),
    "llama": (
        hf.LlamaForSequenceClassification,
        hf.LlamaConfig,
        CAUSAL,
        hf.AutoModelForSequenceClassification,
    ),
    "bert": (
        hf.BertForSequenceClassification,
        hf.BertConfig,
        {**TEXT, "max_position_embeddings": 64},
        hf.AutoModelForSequenceClassification,
    ),
}
IDS = torch.tensor([0, 2, 1, 2])


def _head(name: str) -> str:
    return "score" if name == "llama" else "classifier"


def _made(folder: Path, name: str, *, bare: bool) -> tuple[Made, list[Any]]:
    """A checkpoint with heads of 3, 5 and 2 labels over a backbone saved bare or in its class."""
    cls, config, asked, _ = CASES[name]
    plain, heads = seeded(cls, config(**asked)), []
    for k, width in enumerate(WIDTHS):
        labels = {i: f"{'abc'[k]}{i}" for i in range(width)}
        own = config(**asked, id2label=labels, label2id={v: i for i, v in labels.items()})
        torch.manual_seed(k + 10)
        head = torch.nn.Linear(32, width, bias=name != "llama").state_dict()
        heads.append((Head("abc"[k], own.to_dict()), head))
    held = plain.base_model if bare else plain
    made = write(
        folder, held, heads=heads, head_class=cls.__name__, drop=_head(name),
        routers={"0": Router("linear", 32, K, layer=1, hard=0.0001)},
    )  # fmt: skip
    return Made(made.folder, plain, made.experts, made.manifest), heads


def _want(made: Made, heads: list[Any], name: str, batch: Any, bare: bool) -> list[Any]:
    """Each expert's logits, with its backbone and its head."""
    found = []
    prefix = f"{made.plain.base_model_prefix}." if bare else ""
    for k, (_, tensors) in enumerate(heads):
        own = {f"{prefix}{n}": v for n, v in made.experts[k].items()}
        own |= {f"{_head(name)}.{n}": v for n, v in tensors.items()}
        with torch.no_grad():
            found.append(torch.func.functional_call(made.plain, own, kwargs=dict(batch)).logits)
    return found


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "in its class"])
@pytest.mark.parametrize("name", CASES)
def test_each_sample_gets_its_own_tasks_logits(name: str, bare: bool, tmp_path: Path) -> None:
    made, heads = _made(tmp_path, name, bare=bare)
    batch = inputs(name)
    dynamic = CASES[name][3].from_pretrained(made.folder)
    assert type(dynamic).__name__ == f"Mowmerge{CASES[name][0].__name__}"
    want = _want(made, heads, name, batch, bare)
    with torch.no_grad():
        for kwargs in ({"task_ids": IDS}, {}):
            out = dynamic(**batch, **kwargs)
            chosen = out.gates.argmax(1)
            assert torch.equal(out.task, chosen)
            assert out.logits.shape == (4, 5)
            for b, k in enumerate(chosen.tolist()):
                width = WIDTHS[k]
                assert torch.allclose(out.logits[b, :width], want[k][b], atol=2e-5)
                assert (out.logits[b, width:] == -torch.inf).all()
    assert torch.equal(dynamic(**batch, task_ids=IDS).task, IDS)
    dynamic.save_pretrained(tmp_path / "again")
    again = CASES[name][3].from_pretrained(tmp_path / "again")
    assert again.config.mowmerge == dynamic.config.mowmerge
    assert alike(again, dynamic, batch)


def test_labels_give_a_loss_over_the_widest_head(tmp_path: Path) -> None:
    made, _ = _made(tmp_path, "vit", bare=False)
    dynamic, batch = made.load(), inputs("vit")
    out = dynamic(**batch, task_ids=IDS, labels=torch.tensor([2, 1, 4, 0]))
    want = torch.nn.functional.cross_entropy(out.logits, torch.tensor([2, 1, 4, 0]))
    assert torch.allclose(out.loss, want)


def test_backbone_alone_leaves_the_heads(tmp_path: Path) -> None:
    made, _ = _made(tmp_path, "vit", bare=False)
    made_class = modeling.dynamic_class(hf.ViTModel)
    config = modeling.MowmergeConfig.from_pretrained(made.folder)
    with pytest.raises(ValueError, match=r"missing keys: pooler\.dense\.bias"):
        modeling.load(made_class, made.folder, config)
    model, _ = modeling.load(made_class, made.folder, config, add_pooling_layer=False)
    with torch.no_grad():
        assert model(**inputs("vit")).last_hidden_state.shape == (4, 5, 32)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_names_are_those_of_the_format_and_earlier_ones_are_read(tmp_path: Path, name: str) -> None:
    made, _ = _made(tmp_path, name, bare=False)
    batch, file = inputs(name), "dynamic-00001-of-00001.safetensors"
    model = CASES[name][3].from_pretrained(made.folder)
    model.save_pretrained(tmp_path / "saved")
    new, saved = load_file(made.folder / file), load_file(tmp_path / "saved/model.safetensors")
    assert new.keys() <= saved.keys()
    heads = {n for n in new if n.startswith("mow_heads.")}
    assert heads == {f"mow_heads.{k}.{part}" for k in "abc" for part in ("weight", "bias")}
    assert any(".bias.dyn_" in n for n in new) and not any("bias_dyn_" in n for n in new)
    again = CASES[name][3].from_pretrained(tmp_path / "saved")
    assert alike(again, model, batch)

    old = Path(shutil.copytree(made.folder, tmp_path / "old"))
    earlier = {names.head(made.manifest.experts, i): names.head_in_memory(i) for i in range(K)}
    earlier |= {c.part_name(p): names.part_in_memory(c.name, p)
                for c in made.manifest.codes for p in c.parts}  # fmt: skip

    def called(n: str) -> str:
        prefix = next((p for p in earlier if p.endswith(".") and n.startswith(p)), "")
        return earlier[prefix] + n.removeprefix(prefix) if prefix else earlier.get(n, n)

    save_file({called(n): v for n, v in new.items()}, old / file, {"format": "pt"})
    index = json.loads((old / "model.safetensors.index.json").read_text())
    index["weight_map"] = {called(n): f for n, f in index["weight_map"].items()}
    (old / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {called(n) for n in new} != set(new)
    assert alike(CASES[name][3].from_pretrained(old), model, batch)
    one, two = dynamic.held(made.folder), dynamic.held(old)
    assert one.specs.keys() == two.specs.keys() and one.head(2).keys() == two.head(2).keys()
    assert two.specs["mow_heads.c.bias"].name == "mow_heads.2.bias"
