"""mow: the similarity without cancellation, what it selects, and its three codecs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mowmerge.dynamic.format import Code
from mowmerge.methods import registry
from mowmerge.methods.contracts import Block, Draws, Site
from mowmerge.methods.dynamic.mow import dissimilarity, mow

SPEC = registry.get("mow")
assert SPEC.dynamic is not None
DYNAMIC = SPEC.dynamic


def distances(values: torch.Tensor) -> torch.Tensor:
    assert DYNAMIC.survey is not None
    fold: Any = DYNAMIC.survey.measure(site("layers.0.mlp.up.weight", "mlp", 0))
    fold = fold.fresh()
    fold.observe(Block(values, {}, Draws(), values[0].numel()))
    return fold.total


def site(name: str, role: str, layer: int | None) -> Site:
    stack = None if layer is None else "layers."
    return Site(name, (4, 4), "F32", role, stack, layer, 3, 4, 2)


def test_by_hand() -> None:
    # cos((3,4), (4,3)) = 24/25, cos((3,4), (3,4)) = 1, cos((4,3), (3,4)) = 24/25
    values = torch.tensor([[3.0, 4.0], [4.0, 3.0], [3.0, 4.0]])
    found = distances(values)
    assert found.tolist() == [[25.0, 0, 0], [2.0, 25.0, 0], [0.0, 2.0, 25.0]]
    assert dissimilarity(found) == pytest.approx(2 / 3 * (1 - 24 / 25), rel=1e-15)


def test_no_cancellation() -> None:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(20_000, generator=g)
    values = torch.stack([base, base + 1e-6 * torch.randn(20_000, generator=g)])
    wide = values.double()
    a, b = wide / wide.norm(dim=1, keepdim=True)
    assert dissimilarity(distances(values)) == pytest.approx(float((a - b).square().sum()) / 2)
    naive = 1 - float(torch.cosine_similarity(values[0], values[1], dim=0))
    assert abs(naive) > 1e3 * dissimilarity(distances(values)) or naive == 0


def test_an_expert_of_zeros_counts_for_nothing() -> None:
    values = torch.tensor([[3.0, 4.0], [4.0, 3.0], [0.0, 0.0]])
    assert dissimilarity(distances(values)) == pytest.approx(1 - 24 / 25)
    assert dissimilarity(distances(torch.zeros(2, 3))) == 0.0


def test_the_least_similar_are_chosen_and_the_first_of_equals() -> None:
    assert DYNAMIC.survey is not None
    sites = [site(f"layers.{i}.mlp.up.weight", "mlp", i) for i in range(3)]
    apart = {0: 1.0, 1: 4.0, 2: 1.0}
    totals = {
        s.name: torch.tensor([[9.0, 0], [apart[s.layer or 0], 9.0]], dtype=torch.float64)
        for s in sites
    }
    found = DYNAMIC.survey.decide(totals, sites, SPEC.complete({"blocks": 2}))
    assert found["dynamic"] == {"attention": [], "mlp": ["layers.1", "layers.0"]}
    assert "warnings" not in found
    more = DYNAMIC.survey.decide(totals, sites, SPEC.complete({"blocks": 4}))
    assert len(more["dynamic"]["mlp"]) == 3
    assert more["warnings"] == ["blocks is 4, and there are 3: all are dynamic"]


@pytest.mark.parametrize(
    ("name", "role", "layer", "way", "coded"),
    [
        ("layers.0.norm.weight", "norm", 0, {}, True),
        ("norm.weight", "norm", None, {}, False),
        ("norm.weight", "norm", None, {"norms": "all"}, True),
        ("layers.0.norm.weight", "norm", 0, {"norms": "none"}, False),
        ("embeddings.position_embeddings.weight", "embedding", None, {}, True),
        ("embeddings.word_embeddings.weight", "embedding", None, {}, False),
        ("embed_tokens.weight", "embedding", None, {"embeddings": "all"}, True),
        ("embeddings.patch_embeddings.projection.weight", "embedding", None, {}, False),
        ("layers.0.mlp.up.weight", "mlp", 0, {}, True),
        ("layers.0.mlp.up.weight", "mlp", 0, {"blocks": 0}, False),
        ("pooler.dense.weight", "other", None, {}, False),
        ("pooler.dense.weight", "other", None, {"others": True}, True),
        ("lm_head.weight", "head", None, {"embeddings": "all"}, False),
    ],
)
def test_what_may_be_dynamic(
    name: str, role: str, layer: int | None, way: dict[str, Any], coded: bool
) -> None:
    code = DYNAMIC.code(site(name, role, layer), SPEC.complete(way), None)
    assert (code is not None) == coded


def test_codecs() -> None:
    models = torch.arange(8.0).view(2, 2, 2)
    anchor = models.mean(0)
    code = Code("w", (2, 2), "full_abs", 2, "0")
    assert torch.equal(mow(models, anchor, code)["abs"], models)
    full = mow(models, anchor, Code("w", (2, 2), "full", 2, "0"))
    assert torch.equal(full["delta"], models - anchor)
    low = mow(models, anchor, Code("w", (2, 2), "low_rank", 2, "0", rank=2))
    first = low["u"][:, low["slot"] == 0] @ low["v"][low["slot"] == 0]
    torch.testing.assert_close(first, models[0] - anchor)
