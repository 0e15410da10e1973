"""pem_composition: by hand, its negation, and adapters from recipe to result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import Zoo

from mowmerge import api
from mowmerge.methods.static.pem_composition import pem_composition
from mowmerge.planner import Options

Pair = tuple[Tensor, Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapters(*ranks: int) -> list[Pair]:
    return [(normal(6, r, seed=i), normal(r, 5, seed=9 + i)) for i, r in enumerate(ranks)]


def composed(factors: list[Pair], **given: Any) -> Tensor:
    deltas = torch.stack([b @ a for b, a in factors])
    left, right = pem_composition(deltas, factors=factors, **given)
    return left @ right


def test_by_hand() -> None:
    factors = [
        (torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0, 3.0]])),
        (torch.tensor([[4.0], [-8.0]]), torch.tensor([[3.0, 1.0]])),
    ]
    # B = (1.5 + 1, -2), A = (.75 + .75, 2.25 + .25)
    out = composed(factors, weight=[0.75, 0.25], scale=2.0)
    assert torch.allclose(out, torch.tensor([[7.5, 12.5], [-6.0, -10.0]]))
    # the second taken away: B = (1.5 - 1, 2), A as before
    out = composed(factors, weight=[0.75, -0.25])
    assert torch.allclose(out, torch.tensor([[0.75, 1.25], [3.0, 5.0]]))
    plain = composed(factors, weight=[0.75, -0.25], space="delta")
    assert torch.allclose(plain, torch.tensor([[-1.5, 3.5], [6.0, 2.0]]))


def test_the_sum_expands_and_is_that_of_products_where_one_factor_is_shared() -> None:
    (b1, a1), (b2, a2) = factors = adapters(3, 3)
    cross = b1 @ a1 * 0.49 + b2 @ a2 * 0.09 + (b1 @ a2 + b2 @ a1) * 0.21
    assert torch.allclose(composed(factors, weight=[0.7, 0.3]), cross)
    shared = [(b1, a1), (b2, a1)]
    both = [composed(shared, weight=[0.7, 0.3], space=space) for space in ("factor", "delta")]
    assert torch.allclose(*both)


def test_negation() -> None:
    factors = adapters(3)
    delta = factors[0][0] @ factors[0][1]
    assert torch.allclose(composed(factors, weight=1.0), delta)
    assert torch.allclose(composed(factors, weight=-1.0), -delta)
    twice = adapters(3) * 2
    for space in ("factor", "delta"):
        assert composed(twice, weight=[0.5, -0.5], space=space).abs().max() < 1e-12


def test_only_products_do_not_care_for_the_gauge() -> None:
    (first, (b, a)), turn = adapters(3, 3), normal(3, 3, seed=5)
    turned = [first, (b @ torch.linalg.inv(turn), turn @ a)]
    for space, same in (("delta", True), ("factor", False)):
        found = composed(turned, space=space), composed([first, (b, a)], space=space)
        assert torch.allclose(*found) == same


def test_what_is_no_product_is_added_up() -> None:
    deltas = normal(2, 4)
    out = pem_composition(deltas, weight=[0.5, -1.0], scale=2.0)
    assert torch.allclose(out, deltas[0] - 2 * deltas[1])
    pair = pem_composition(normal(2, 6, 5), factors=adapters(2, 3), space="delta")
    assert len(pair[1]) == 5


def test_adapters_from_recipe_to_adapter(zoo: Zoo, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft_models import adapt, merged, save
    from safetensors.torch import load_file

    base = save(tmp_path / "base", "llama")
    for i, name in enumerate("ab"):
        adapt(base, tmp_path / f"lora-{name}", seed=i, lora_alpha=3 + i)
    content: dict[str, Any] = {
        "base": "./base",
        "models": {n: {"source": "base", "adapter": f"./lora-{n}"} for n in "ab"},
        "method": "pem_composition",
        "parameters": {"weight": {"a": 0.7, "b": -0.3}},
    }
    dense, _ = zoo.merge(content, "dense")
    held = [load_file(tmp_path / f"lora-{n}/adapter_model.safetensors") for n in "ab"]
    path = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    (a1, b1), (a2, b2) = [[h[path.format(x)] for x in "AB"] for h in held]
    scaled = 0.7 * b1 * (3 / 3) - 0.3 * b2 * (4 / 3)
    name = "model.layers.1.self_attn.q_proj.weight"
    want = load_file(base / "model.safetensors")[name] + scaled @ (0.7 * a1 + 0.3 * a2)
    assert torch.allclose(dense[name], want, atol=1e-6)
    content["output"] = {"format": "adapter"}
    out = api.merge(zoo.recipe(content), tmp_path / "adapter", options=Options(workers=1))
    assert {line["rank"] for line in out.report["tensors"] if line.get("rank")} == {3}
    loaded = merged(base, [out.path], tmp_path / "loaded")
    assert all(torch.allclose(loaded[n], value, atol=1e-5) for n, value in dense.items())


def test_what_is_no_adapter_of_one_rank_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft_models import adapt, save

    base = save(tmp_path / "base", "llama")
    adapt(base, tmp_path / "lora-a", seed=1)
    adapt(base, tmp_path / "lora-b", seed=2, r=2)
    content: dict[str, Any] = {"base": "./base", "method": "pem_composition"}
    models: dict[str, Any] = {n: {"source": "base", "adapter": f"./lora-{n}"} for n in "ab"}
    ran = zoo.here("merge", zoo.recipe({**content, "models": models}), "--dry-run")
    assert ran.rc != 0
    assert "have the rank 3 in 'a', 2 in 'b'" in ran.err
    zoo.merge({**content, "models": models, "parameters": {"space": "delta"}}, "delta")
    dense = {"a": models["a"], "c": "./base"}  # the base itself adds nothing: of another rank
    ran = zoo.here("merge", zoo.recipe({**content, "models": dense}), "--dry-run")
    assert "3 in 'a', 0 in 'c'" in ran.err
    ran = zoo.here("merge", zoo.recipe({**content, "models": {"d": "./delta"}}), "--dry-run")
    assert ran.err.count("model 'd': 'pem_composition' works on the factors of") == 1


def test_signs_of_both_factors_count_in_the_factors_alone() -> None:
    (b1, a1), (b2, a2) = adapters(3, 3)
    plain, turned = [(b1, a1), (b2, a2)], [(b1, a1), (-b2, -a2)]
    assert torch.allclose(composed(plain, space="delta"), composed(turned, space="delta"))
    assert not torch.allclose(composed(plain), composed(turned), atol=0.1)
    assert torch.allclose(composed(plain, weight=[1.0, 0.0]), b1 @ a1)
    undone = [(composed([(b1, a1)], weight=-1.0), torch.eye(5, dtype=torch.float64))]
    assert torch.allclose(composed(undone, weight=-1.0), b1 @ a1)
