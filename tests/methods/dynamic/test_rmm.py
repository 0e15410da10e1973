"""rmm: by hand, every model back, what a smaller basis loses, adapters from recipe to extract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import Zoo, load

import mowmerge
from mowmerge import api
from mowmerge.dynamic import codecs
from mowmerge.dynamic.format import Code
from mowmerge.methods.dynamic.rmm import rmm

Pair = tuple[Tensor, Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(n: int, rank: int = 4, rows: int = 9, columns: int = 7) -> list[Pair]:
    return [(normal(rows, rank, seed=i), normal(rank, columns, seed=50 + i)) for i in range(n)]


def coded(n: int, rank: int, basis: int, rows: int = 9, columns: int = 7) -> Code:
    return Code("w", (rows, columns), "basis", n, "0", "F64", rank=rank, basis=basis)


def back(code: Code, parts: dict[str, Tensor]) -> list[Tensor]:
    anchor = torch.zeros(code.shape, dtype=torch.float64)
    return [codecs.slot(code, parts, s, anchor) for s in range(code.slots)]


def reversed_(factors: list[Pair], basis: int, **given: Any) -> list[Tensor]:
    deltas = torch.stack([left @ right for left, right in factors])
    code = coded(len(factors), factors[0][0].shape[1], basis)
    return back(code, rmm(deltas, torch.zeros_like(deltas[0]), code, factors=factors, **given))


def test_by_hand() -> None:
    # one row of three experts, of rank 2: (1, 0), (3, 0), (2, 3): mean (2, 1), moved (-1, -1),
    # (1, -1), (0, 2): variance 2 along the first axis, 6 along the second
    lefts = [torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, 3.0]])]
    rights = [torch.tensor([[5.0], [5.0]])] * 3
    parts = codecs.basis(list(zip(lefts, rights, strict=True)), 1)
    assert parts["left_mean"].tolist() == [[2.0, 1.0]]
    direction = parts["left_basis"][0, :, 0]
    assert torch.allclose(direction.abs(), torch.tensor([0.0, 1.0]), atol=1e-6)
    shares = parts["left_share"][0, 0] * direction[1].sign()
    assert torch.allclose(shares, torch.tensor([-1.0, -1.0, 2.0]), atol=1e-6)
    assert not parts["right_basis"].any()  # all have the same column
    code = Code("w", (1, 1), "basis", 3, "0", rank=2, basis=1)
    each = [codecs.slot(code, parts, s, torch.zeros(1, 1)).item() for s in range(3)]
    assert each == pytest.approx([10.0, 10.0, 25.0])  # (2 0).(5 5), twice, and (2 3).(5 5)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_every_model_comes_back(n: int) -> None:
    factors = pairs(n)
    for delta, (left, right) in zip(reversed_(factors, n - 1), factors, strict=True):
        assert torch.allclose(delta, left @ right, atol=1e-10)
    for delta, (left, right) in zip(reversed_(factors, n - 1, factor="svd"), factors, strict=True):
        assert torch.allclose(delta, left @ right, atol=1e-10)


def test_the_loss_of_a_row_is_what_its_dropped_directions_held() -> None:
    factors, before = pairs(5), float("inf")
    rows = torch.stack([left for left, _ in factors], 2)
    values = torch.linalg.svdvals(rows - rows.mean(2, keepdim=True))
    for size in range(5):
        parts = codecs.basis(factors, size)
        kept = parts["left_mean"].unsqueeze(2) + parts["left_basis"] @ parts["left_share"]
        lost = (rows - kept).square().sum((1, 2))
        assert torch.allclose(lost, values[:, size:].square().sum(1), atol=1e-10)
        assert float(lost.sum()) <= before
        before = float(lost.sum())
        numbers = sum(part.numel() for part in parts.values())
        assert numbers == (9 + 7) * (size * (4 + 5) + 4)


def test_equal_experts_need_no_basis_and_order_only_moves_shares() -> None:
    one = pairs(1) * 3
    for delta in reversed_(one, 0):
        assert torch.allclose(delta, one[0][0] @ one[0][1])
    factors = pairs(4)
    turned = [factors[i] for i in (2, 0, 3, 1)]
    found, moved = reversed_(factors, 2), reversed_(turned, 2)
    assert all(torch.allclose(moved[k], found[i]) for k, i in enumerate((2, 0, 3, 1)))


def test_aligned_factors_keep_the_product_and_need_a_smaller_basis() -> None:
    (left, right), turn = pairs(1)[0], torch.linalg.qr(normal(4, 4, seed=3)).Q
    same = [(left, right), (left @ turn, turn.T @ right), (left @ turn.T, turn @ right)]
    assert all(torch.allclose(d, left @ right) for d in reversed_(same, 0, align=True))
    assert not torch.allclose(reversed_(same, 0)[0], left @ right, atol=0.1)
    for delta, (a, b) in zip(reversed_(pairs(3), 2, align=True), pairs(3), strict=True):
        assert torch.allclose(delta, a @ b, atol=1e-10)


def test_adapters_of_other_ranks_are_filled_up_or_cut() -> None:
    factors = [pairs(1, 2)[0], pairs(2, 6)[1]]
    deltas = torch.stack([left @ right for left, right in factors])
    found = back(coded(2, 4, 1), rmm(deltas, deltas[0], coded(2, 4, 1), factors=factors))
    assert torch.allclose(found[0], deltas[0])
    u, s, vh = torch.linalg.svd(deltas[1], full_matrices=False)
    assert torch.allclose(found[1], (u[:, :4] * s[:4]) @ vh[:4])


def test_adapters_from_recipe_to_extract(zoo: Zoo, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft_models import adapt, merged, save

    base = save(tmp_path / "base", "llama")
    names = "abcd"
    for i, name in enumerate(names):
        adapt(base, tmp_path / f"lora-{name}", seed=i, target_modules=["q_proj", "up_proj"])
    models = {n: {"source": "base", "adapter": f"./lora-{n}"} for n in names}
    content: dict[str, Any] = {
        "base": "./base", "models": models, "method": "rmm",
        "parameters": {"rank": 3, "basis": 3},
    }  # fmt: skip
    tensors, report = zoo.merge(content)
    told = {t["name"] for t in report["tensors"] if t["action"] == "dynamic"}
    assert len(told) == 4  # of two layers q and up; the rest stays as it is in the base
    assert any("% of their factors" in line for line in report["warnings"])
    assert tensors["model.layers.0.self_attn.q_proj.dyn_left_share"].shape == (16, 3, 4)
    for name in names:
        api.extract(tmp_path / "out", tmp_path / f"back-{name}", expert=name)
        found = load(tmp_path / f"back-{name}")
        want = merged(base, [tmp_path / f"lora-{name}"], tmp_path / f"want-{name}")
        assert all(torch.allclose(found[key], value, atol=2e-6) for key, value in want.items())
    small, report = zoo.merge({**content, "parameters": {"rank": 3}}, "small")
    assert not report["warnings"]
    sizes = [sum(v.numel() for n, v in t.items() if "dyn_" in n) for t in (tensors, small)]
    per = {3: 3 * (3 + 4) + 3, 1: (3 + 4) + 3}  # numbers a row or column; the factors have 12
    assert sizes[0] / sizes[1] == per[3] / per[1]


def test_the_model_runs_as_its_experts(zoo: Zoo, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft_models import adapt, held, save

    base = save(tmp_path / "base", "llama")
    for i, name in enumerate("ab"):
        adapt(base, tmp_path / f"lora-{name}", seed=i)
        zoo.merge({"models": {name: {"source": "./base", "adapter": f"./lora-{name}"}},
                   "method": "passthrough"}, f"dense-{name}")  # fmt: skip
    models = {n: {"source": "base", "adapter": f"./lora-{n}"} for n in "ab"}
    zoo.merge({"base": "./base", "models": models, "method": "rmm", "parameters": {"rank": 3}})
    model = mowmerge.load(tmp_path / "out").eval()
    ids = torch.tensor([[3, 5, 7], [2, 4, 6]])
    with torch.no_grad():
        mixed = model(input_ids=ids, task_ids=torch.tensor([0, 1])).logits
        for k, name in enumerate("ab"):
            alone = held(tmp_path / f"dense-{name}").eval()(input_ids=ids[k : k + 1]).logits
            assert torch.allclose(mixed[k : k + 1], alone, atol=1e-4)


def test_one_turn_of_all_factors_changes_nothing_and_sizes_scale() -> None:
    factors, turn = pairs(4), torch.linalg.qr(normal(4, 4, seed=3)).Q
    turned = [(left @ turn, turn.T @ right) for left, right in factors]
    larger = [(3 * left, 2 * right) for left, right in factors]
    for size in range(4):
        found = reversed_(factors, size)
        assert all(map(torch.allclose, reversed_(turned, size), found))
        assert all(
            torch.allclose(a, 6 * b) for a, b in zip(reversed_(larger, size), found, strict=True)
        )
