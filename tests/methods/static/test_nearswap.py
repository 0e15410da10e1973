"""nearswap: a step of at most t, by hand, bit for bit where it reaches, and mergekit's floor."""

from __future__ import annotations

import pytest
import torch

from mowmerge.methods import registry
from mowmerge.methods.contracts import MethodError
from mowmerge.methods.static.nearswap import nearswap


def test_by_hand() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, -2.0])
    model = torch.tensor([[1.25, 3.0, 0.0, -2.0]])
    assert nearswap(model, base, t=0.5).tolist() == [1.25, 1.5, 0.5, -2.0]
    assert torch.equal(nearswap(model, base, t=0.0), base)
    assert torch.equal(nearswap(model, base, t=5.0), model[0])


def test_what_is_near_is_the_models_own() -> None:
    base, model = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(0))
    out = nearswap(model[None], base, t=0.3)
    near = (model - base).abs() <= 0.3
    assert 0.1 < near.float().mean() < 0.3
    assert torch.equal(out[near], model[near])
    assert not torch.equal((base + (model - base))[near], model[near])  # as adding would not be
    assert ((out - base).abs() <= 0.3 + 1e-6).all()
    twice = nearswap(model[None], out, t=0.2)
    assert torch.allclose(twice, nearswap(model[None], base, t=0.5), atol=1e-6)


def test_mergekits_floor() -> None:
    base, model = torch.zeros(3), torch.tensor([[1e-7, -5e-7, 2e-6]])
    # t / floor = 1/100 below the floor, t above it
    out = nearswap(model, base, t=1e-8, floor=1e-6)
    assert out.tolist() == pytest.approx([1e-9, -5e-9, 1e-8])
    assert nearswap(model, base, t=1e-8).tolist() == pytest.approx([1e-8, -1e-8, 1e-8])
    assert torch.equal(nearswap(model, base, t=1e-6, floor=1e-6), nearswap(model, base, t=1e-6))


def test_one_model_and_no_negative_step() -> None:
    spec = registry.get("nearswap")
    with pytest.raises(MethodError, match="exactly 1"):
        spec.check({}, 2)
    assert spec.needs_base
    assert spec.parameters["t"].fault(-1e-4)


def test_moves_and_grows_with_the_models() -> None:
    base, model = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)).double()
    out = nearswap(model[None], base, t=0.3)
    assert torch.allclose(nearswap(model[None] + 5.0, base + 5.0, t=0.3), out + 5.0)
    assert torch.allclose(nearswap(4.0 * model[None], 4.0 * base, t=1.2), 4.0 * out)
