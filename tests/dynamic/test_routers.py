"""Routers give what their formulas say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mowmerge.dynamic.format import FormatError, Router
from mowmerge.dynamic.routers import RouterModule, keep_top, layer_code, pool, projections

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0]])
KINDS = ("linear", "mlp", "constant", "twin", "centroid")


def made(kind: str, **more: object) -> RouterModule:
    found = RouterModule(replace(Router(kind, 8, 4, init=0.3), **more)).fresh().eval()
    with torch.no_grad():
        for value in found.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value))
    return found


@pytest.mark.parametrize(
    ("kind", "pool"), [*((k, "mean") for k in KINDS), ("linear", "statistics"),
                       ("twin", "statistics"), ("centroid", "statistics")],
)  # fmt: skip
def test_padding_and_other_samples_do_not_count(kind: str, pool: str) -> None:
    router = made(kind, pool=pool)
    found = router(X, MASK)
    for b in range(3):
        alone = router(X[b : b + 1, MASK[b].bool()])
        assert torch.allclose(found[b], alone[0], atol=1e-5)


def test_mlp_has_its_nonlinearity_on_each_token() -> None:
    router = made("mlp", hidden=6)
    tokens = router.last(torch.relu(router.first(X)))
    assert torch.allclose(router(X), tokens.mean(1), atol=1e-5)


def test_centroid_is_minus_the_squared_distance() -> None:
    router = made("centroid")
    want = -(X.mean(1)[:, None] - router.centroids).square().sum(-1)
    assert torch.allclose(router(X), want, atol=1e-5)


def test_twin_in_eval_mode_is_deterministic_and_normed_by_its_buffers() -> None:
    router = made("twin", hidden=6)
    router.norm1.running_mean.fill_(0.5)
    assert torch.equal(router(X), router(X))
    h = (router.first(X.mean(1)) - 0.5) / (1 + 1e-5) ** 0.5
    h = torch.nn.functional.leaky_relu(h * router.norm1.weight + router.norm1.bias)
    h = router.second(h) / (1 + 1e-5) ** 0.5
    h = torch.nn.functional.leaky_relu(h * router.norm2.weight + router.norm2.bias)
    assert torch.allclose(router(X), router.last(h), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_router_says_init_and_the_same_each_time(kind: str) -> None:
    asked = Router(kind, 8, 4, init=0.3, seed=5)
    first, second = RouterModule(asked).fresh().eval(), RouterModule(asked).fresh().eval()
    assert torch.equal(first(X), second(X))
    assert all(v.dtype in (torch.float32, torch.int64) for v in first.state_dict().values())
    if kind != "centroid":
        assert torch.allclose(first(X), torch.tensor(0.3), atol=0.05)


def test_layer_code_goes_in_front() -> None:
    router = made("linear", code=4)
    code = layer_code(3, 4)
    want = torch.tensor([3.0, 3.0 / 100]).sin(), torch.tensor([3.0, 3.0 / 100]).cos()
    assert torch.allclose(code, torch.cat(want))
    joined = torch.cat([code.expand(3, 5, 4), X], -1).mean(1)
    assert torch.allclose(router(X, index=3), router.last(joined), atol=1e-5)
    assert not torch.allclose(router(X, index=3), router(X, index=4))


def test_coefficients_soften_harden_and_keep_the_top() -> None:
    raw = torch.tensor([[4.0, 0.0, -1.0], [0.2, 0.1, 0.0]])
    warm = RouterModule(Router("constant", 8, 3)).fresh()
    warm.temperature.data.fill_(2.0)
    assert torch.allclose(warm.coefficients(raw), torch.softmax(raw / 2, -1))
    assert torch.equal(
        RouterModule(Router("constant", 8, 3, activation="none")).coefficients(raw), raw
    )
    hard = RouterModule(Router("constant", 8, 3, hard=0.9)).fresh().coefficients(raw)
    assert torch.equal(hard[0], torch.tensor([1.0, 0, 0]))
    assert torch.allclose(hard[1], torch.softmax(raw[1], -1))
    top = RouterModule(Router("constant", 8, 3, top_k=1, rest=-0.5)).fresh().coefficients(raw)
    assert torch.equal(top[0], torch.tensor([1.0, -0.5, -0.5]))


def test_keep_top_shares_sum_to_one() -> None:
    c = torch.softmax(X, -1)
    kept = keep_top(c, 2)
    assert torch.allclose(kept.sum(-1), torch.ones(3, 5))
    assert int((kept > 0).sum()) == 3 * 5 * 2


def test_projections_are_norms_on_each_slots_rows() -> None:
    gate = torch.randn(6, 8)
    found = projections(X, gate, 3)
    assert torch.allclose(found[..., 1], (X @ gate[2:4].T).norm(dim=-1), atol=1e-5)


def test_pool_takes_features_without_tokens() -> None:
    assert torch.equal(pool(X[:, 0], None), X[:, 0])


def test_statistics_are_the_mean_and_the_standard_deviation() -> None:
    found = pool(X, MASK, "statistics")
    for b in range(3):
        kept = X[b, MASK[b].bool()]
        want = torch.cat([kept.mean(0), kept.std(0, correction=0)])
        assert torch.allclose(found[b], want, atol=1e-6)
    assert torch.equal(found[2, 8:], torch.zeros(8))  # one token does not vary
    router = made("linear", pool="statistics")
    assert torch.allclose(router(X, MASK), router.last(found), atol=1e-6)
    assert torch.equal(router(found), router.last(found))


def test_outputs_that_are_no_probabilities_stay_or_vanish() -> None:
    raw = torch.tensor([[0.3, -2.0, 0.5, 0.31]], requires_grad=True)
    router = RouterModule(Router("constant", 8, 4, activation="none", top_k=2)).fresh()
    router.eval()
    assert torch.equal(router.coefficients(raw), torch.tensor([[0.0, 0.0, 0.5, 0.31]]))
    router.train()
    soft = router.coefficients(raw)
    want = [0.3 / (1 + math.exp(1)), 0.0, 0.5, 0.31 / 2]  # 100 (0.3 - 0.31) = -1
    assert soft[0].tolist() == pytest.approx(want, abs=1e-6)
    soft.sum().backward()
    assert raw.grad is not None
    assert raw.grad[0, 0] > 0.2  # what was not chosen learns too


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(FormatError, match="no router of kind 'oracle'"):
        RouterModule(Router("oracle", 8, 4))
