"""magmax: the largest entry, by hand, and which of two equal ones."""

from __future__ import annotations

import pytest
import torch

from mowmerge.methods.static.magmax import magmax
from mowmerge.methods.static.task_arithmetic import task_arithmetic

DELTAS = torch.tensor([[1.0, -4.0, 2.0, 0.0], [-3.0, 3.0, -2.0, 0.0], [2.0, 1.0, 0.5, 0.0]])


def test_by_hand() -> None:
    assert magmax(DELTAS, scale=1.0).tolist() == [-3.0, -4.0, -2.0, 0.0]
    assert magmax(DELTAS).tolist() == [-1.5, -2.0, -1.0, 0.0]
    # halved, the second no longer leads; times -3 the third does
    out = magmax(DELTAS, weight=[1.0, 0.5, -3.0], scale=1.0)
    assert out.tolist() == [-6.0, -4.0, 2.0, 0.0]


@pytest.mark.parametrize(("tie", "value"), [("last", -2.0), ("first", 2.0), ("positive", 2.0)])
def test_ties(tie: str, value: float) -> None:
    assert magmax(DELTAS, tie=tie, scale=1.0)[2].item() == value
    back = magmax(DELTAS.flip(0), tie=tie, scale=1.0)[2].item()
    assert back == (value if tie == "positive" else -value)


def test_the_mean_of_ties() -> None:
    deltas = torch.tensor([[2.0, 3.0, 1.0], [-2.0, -3.0, 4.0], [2.0, 1.0, 0.0]])
    out = magmax(deltas, tie="mean", scale=3.0)
    assert out.tolist() == [2.0, 0.0, 12.0]  # 3 (2 - 2 + 2) / 3, 3 (3 - 3) / 2, 3 * 4
    assert torch.equal(magmax(deltas.flip(0), tie="mean", scale=3.0), out)


def test_a_fold() -> None:
    deltas = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    two = magmax(deltas[:2], scale=1.0)
    assert torch.equal(magmax(torch.stack([two, deltas[2]])), magmax(deltas))
    assert torch.equal(magmax(torch.cat([deltas, torch.zeros(1, 50)])), magmax(deltas))
    assert torch.equal(magmax(deltas, scale=1.0).abs(), deltas.abs().amax(0))


def test_task_vectors_that_do_not_meet_are_added_up() -> None:
    deltas = torch.block_diag(*torch.arange(1.0, 7.0).view(3, 2))
    assert torch.equal(magmax(deltas, scale=0.7), task_arithmetic(deltas, scale=0.7))
