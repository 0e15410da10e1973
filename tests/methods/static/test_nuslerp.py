"""nuslerp: the great arc, whole, by row and by column, with and without a base."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mowmerge.methods import registry
from mowmerge.methods.contracts import MethodError
from mowmerge.methods.static.nuslerp import nuslerp
from mowmerge.methods.static.slerp import slerp


def pair(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(2, *(shape or (6, 4)), generator=torch.Generator().manual_seed(seed))


def test_by_hand() -> None:
    models = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # t = 1/3 of a right angle: (cos 30, sin 30)
    out = nuslerp(models, weight=[2.0, 1.0])
    assert out.tolist() == pytest.approx([math.sqrt(3) / 2, 0.5], abs=1e-6)
    base = torch.tensor([10.0, -4.0])
    assert nuslerp(models + base, base, weight=[2.0, 1.0]).tolist() == pytest.approx(
        [10 + math.sqrt(3) / 2, -3.5], abs=1e-6
    )


def test_rows_and_columns() -> None:
    models = pair()
    given: dict[str, Any] = {"weight": [0.3, 0.7]}
    rows = torch.stack([nuslerp(models[:, i], **given) for i in range(6)])
    assert torch.allclose(nuslerp(models, axis="rows", **given), rows)
    columns = torch.stack([nuslerp(models[:, :, j], **given) for j in range(4)], 1)
    assert torch.allclose(nuslerp(models, axis="columns", **given), columns)
    whole = nuslerp(models.flatten(1), **given).view(6, 4)
    assert torch.equal(nuslerp(models, **given), whole)
    assert not torch.allclose(rows, columns, atol=1e-2)
    kernel = pair(3, 2, 2, 5)
    one = nuslerp(kernel[:, 1, 0, 1], **given)
    assert torch.allclose(nuslerp(kernel, axis="rows", **given)[1, 0, 1], one)
    one = nuslerp(kernel[:, :, 0, 1, 4], **given)
    assert torch.allclose(nuslerp(kernel, axis="columns", **given)[:, 0, 1, 4], one)


@pytest.mark.parametrize("axis", ["all", "rows", "columns"])
def test_a_vector_is_one_whatever_the_axis(axis: str) -> None:
    models, base = pair(9), pair(9, seed=1)[0]
    assert torch.allclose(nuslerp(models, base, axis=axis), nuslerp(models, base))


def test_slerp_where_that_takes_an_arc() -> None:
    models = pair()
    assert torch.allclose(nuslerp(models, weight=[0.6, 0.4]), slerp(models, t=0.4))


@pytest.mark.parametrize("axis", ["all", "rows", "columns"])
def test_ends_and_ratios(axis: str) -> None:
    models, base = pair(), pair(seed=1)[0]
    for b in (None, base):
        first = nuslerp(models, b, weight=[1.0, 0.0], axis=axis)
        assert torch.allclose(first, models[0], atol=1e-6)
        last = nuslerp(models, b, weight=[0.0, 3.0], axis=axis)
        assert torch.allclose(last, models[1], atol=1e-6)
        assert torch.equal(
            nuslerp(models, b, weight=[2.0, 6.0], axis=axis),
            nuslerp(models, b, weight=[1.0, 3.0], axis=axis),
        )
    cancelling = nuslerp(models, weight=[1.0, -1.0], axis=axis)
    assert torch.equal(cancelling, nuslerp(models, axis=axis))


def test_zero_and_opposite_vectors() -> None:
    a = torch.tensor([3.0, 4.0])
    # a right angle with a zero vector: sin 45 / sin 90
    half = nuslerp(torch.stack([a, torch.zeros(2)]))
    assert half.tolist() == pytest.approx([3 / math.sqrt(2), 4 / math.sqrt(2)])
    assert nuslerp(torch.stack([a, -a])).tolist() == [0.0, 0.0]
    assert nuslerp(torch.zeros(2, 3)).tolist() == [0.0, 0.0, 0.0]
    assert torch.allclose(nuslerp(torch.stack([a, a])), a)


@pytest.mark.parametrize("axis", ["all", "rows", "columns"])
@pytest.mark.parametrize("by", [-3.0, -1.7, -0.4])
def test_opposite_vectors_of_other_lengths_are_on_a_line(axis: str, by: float) -> None:
    for seed in range(50):
        a = pair(3, 1 + seed % 7, seed=seed)[0]
        models = torch.stack([a, a * by])
        out = nuslerp(models, weight=[0.75, 0.25], axis=axis)
        assert torch.allclose(out, 0.75 * models[0] + 0.25 * models[1], atol=1e-5)


def test_two_models_only() -> None:
    with pytest.raises(MethodError, match="exactly 2"):
        registry.get("nuslerp").check({}, 3)


def test_extrapolation_is_told() -> None:
    caution = registry.get("nuslerp").caution
    assert caution is not None
    assert "extrapolates" in caution({"weight": (1.5, -0.5)}, 2)
    for weight in ((1.0, 3.0), (0.0, 1.0), (-1.0, -2.0), (1.0, -1.0)):  # the last is the middle
        assert caution({"weight": weight}, 2) == ""
