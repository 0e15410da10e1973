"""passthrough: one model's values, as they are or scaled."""

from __future__ import annotations

import pytest
import torch

from mowmerge.methods import registry
from mowmerge.methods.contracts import MethodError
from mowmerge.methods.static.passthrough import passthrough

MODEL = torch.tensor([[[1.0, -2.0], [0.0, 1e-30]]])


def test_by_hand() -> None:
    # half of 1, -2, 0
    assert passthrough(MODEL, scale=0.5)[0].tolist() == [0.5, -1.0]
    assert passthrough(MODEL, scale=[-3.0])[0].tolist() == [-3.0, 6.0]


def test_as_it_is() -> None:
    assert torch.equal(passthrough(MODEL), MODEL[0])
    assert torch.equal(passthrough(MODEL, scale=1.0), MODEL[0])


def test_scale_zero_switches_off() -> None:
    assert not passthrough(MODEL, scale=0.0).any()


def test_scales_multiply() -> None:
    twice = passthrough(passthrough(MODEL, scale=0.25)[None], scale=8.0)
    assert torch.equal(twice, passthrough(MODEL, scale=2.0))


def test_one_model_only() -> None:
    with pytest.raises(MethodError, match="exactly 1"):
        registry.get("passthrough").check({}, 2)
