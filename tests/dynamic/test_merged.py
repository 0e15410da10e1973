"""SMILE merged from whole models and loaded again: each token in each layer, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from made import made
from making import apart, first, inputs, model
from safetensors.torch import load_file
from torch import Tensor
from zoo import Zoo

import mowmerge
from mowmerge.dynamic.loading import locator

torch.set_num_threads(1)
EXPERTS = "abc"


def family(folder: Path, name: str) -> Any:
    """A base and experts a step away; the base, in float64."""
    base = model(name)
    base.save_pretrained(folder / "base")
    draw = torch.Generator().manual_seed(3)
    for expert in EXPERTS:
        moved = model(name)
        with torch.no_grad():
            for value in moved.parameters():
                value.add_(0.05 * torch.randn(value.shape, generator=draw))
        moved.save_pretrained(folder / expert)
    return base.double()


def chosen(x: Tensor, deltas: Tensor, biases: Tensor | None, rank: int, top: int) -> Tensor:
    """What the `top` experts add to y = x W^T for each token, those whose first `rank` right
    singular vectors hold most of it.

    Shapes: x [B,...,in], deltas [K,out,in], biases [K,out] -> [B,...,out].
    """
    v = torch.linalg.svd(deltas, full_matrices=False)[2][:, :rank]
    p = torch.einsum("kri,...i->...kr", v, x).norm(dim=-1).softmax(-1)
    best = p.topk(top, -1)
    share = torch.zeros_like(p).scatter(-1, best.indices, best.values)
    each = torch.einsum("koi,...i->...ko", deltas, x)
    each = each if biases is None else each + biases
    return (share / share.sum(-1, keepdim=True)).unsqueeze(-1).mul(each).sum(-2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit", "clip"])
def test_smile_is_its_formula_in_every_architecture(zoo: Zoo, name: str) -> None:
    """GPT-2 stores its weights [in,out]: its tokens are projected on U, not on V."""
    plain = family(zoo.folder, name)
    zoo.merge({"method": "smile", "parameters": {"rank": 32, "gate_rank": 2, "top_k": 2}})
    dynamic, held = mowmerge.load(zoo.folder / "out"), made(zoo.folder / "out")
    located, across = locator(dynamic), name == "gpt2"
    base, *experts = (load_file(zoo.folder / m / "model.safetensors") for m in ("base", *EXPERTS))
    modules: dict[str, dict[str, Tensor]] = {}
    for code in held.codes:
        path, _, leaf = located(code).rpartition(".")
        each = torch.stack([expert[code] for expert in experts]).double()
        modules.setdefault(path, {})[leaf] = each - base[code].double()
    assert len(modules) >= 8
    for path, deltas in modules.items():
        weight = deltas["weight"].mT if across else deltas["weight"]

        def add(layer: Any, given: Any, y: Tensor, w: Any = weight, d: Any = deltas) -> Tensor:
            return y + chosen(given[0], w, d.get("bias"), 2, 2)

        plain.get_submodule(path).register_forward_hook(add)
    batch = inputs(name)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    with torch.no_grad():
        assert apart(first(dynamic(**batch)).double(), first(plain(**wide)), batch) < 2e-5
