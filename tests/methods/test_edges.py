"""The largest of a tensor, exactly so many: against a stable sort, cut anywhere, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from zoo import Zoo

from mowmerge import planner
from mowmerge.methods import ops
from mowmerge.methods.contracts import Block, Draws
from mowmerge.methods.ops import Edge
from mowmerge.plan import RUN

torch.set_num_threads(1)


def largest(value: Tensor, rank: int, *, last: bool = False) -> Tensor:
    """The rank largest of a vector by a stable sort, the others at 0."""
    flipped = value.flip(0) if last else value
    kept = torch.zeros_like(value)
    order = flipped.abs().sort(descending=True, stable=True).indices[:rank]
    kept[order] = flipped[order]
    return kept.flip(0) if last else kept


def of(values: Tensor, ranks: list[int], **how: Any) -> tuple[list[Edge], int]:
    """The edges, and in how many passes."""
    passes, rounds = 0, ops.edges([ranks], values.shape[1], **how)
    try:
        fold = next(rounds)
        while True:
            passes, fold = passes + 1, fold.fresh()
            for block in Block(values, {}, Draws(), values.shape[1]).runs():
                fold.observe(block)
            fold = rounds.send(fold)
    except StopIteration as done:
        return done.value[0], passes


@st.composite
def coarse(draw: Any) -> Tensor:
    """Vectors in which most numbers occur several times, 0 among them."""
    n, size = draw(st.integers(1, 3)), draw(st.integers(1, 300))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(n, size, generator=g, dtype=draw(st.sampled_from([torch.float32] * 2)))
    return values.mul(draw(st.sampled_from([0.0, 0.5, 3.0, 40.0]))).round()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(coarse(), st.booleans(), st.data())
def test_as_many_as_asked_for_and_of_equal_ones_by_index(
    values: Tensor, last: bool, data: st.DataObject
) -> None:
    n, size = values.shape
    ranks = [data.draw(st.integers(0, size)) for _ in range(n)]
    found, _ = of(values, ranks, last=last)
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=3)))
    for value, rank, edge in zip(values, ranks, found, strict=True):
        want = largest(value, rank, last=last)
        assert torch.equal(ops.keep_beyond(value, edge, 0), want)
        pieces = [
            ops.keep_beyond(value[a:b], edge, a)
            for a, b in zip([0, *cuts], [*cuts, size], strict=True)
        ]
        assert torch.equal(torch.cat(pieces), want)


@pytest.mark.parametrize("last", [False, True])
def test_of_many(last: bool) -> None:
    g = torch.Generator().manual_seed(1)
    values = torch.randn(2, 3 * RUN + 5, generator=g).bfloat16().float()
    ranks = [30_000, 150_001]
    found, passes = of(values, ranks, last=last)
    for value, rank, edge in zip(values, ranks, found, strict=True):
        assert torch.equal(ops.keep_beyond(value, edge, 0), largest(value, rank, last=last))
    assert passes <= 4
    # without equal ones at the edge no pass looks for their places
    apart = torch.arange(1.0, 1001)[None]
    assert of(apart, [300], last=last) == ([Edge(701.0)], 1)
    assert of(apart, [0], last=last) == ([Edge(float("inf"))], 0)
    assert of(apart, [1000], last=last) == ([Edge(0.0)], 0)


def test_by_hand() -> None:
    values = torch.tensor([[2.0, -1.0, 1.0, 3.0, -1.0, 1.0]])
    assert of(values, [4]) == ([Edge(1.0, until=4)], 2)
    assert of(values, [4], last=True) == ([Edge(1.0, since=4)], 2)
    kept = ops.keep_beyond(values[0], Edge(1.0, until=4), 0)
    assert kept.tolist() == [2.0, -1.0, 1.0, 3.0, 0.0, 0.0]
    kept = ops.keep_beyond(values[0], Edge(1.0, since=4), 0)
    assert kept.tolist() == [2.0, 0.0, 0.0, 3.0, -1.0, 1.0]
    assert ops.keep_beyond(values[0, 2:], Edge(1.0, until=4), 2).tolist() == [1.0, 3.0, 0.0, 0.0]
    # an edge among zeros keeps them all: they are nothing to keep
    assert of(torch.tensor([[0.0, 0.0, 5.0]]), [2]) == ([Edge(0.0)], 1)


WAYS = {
    "ties": {"method": "ties", "parameters": {"trim": "tensor", "density": 0.3}},
    "breadcrumbs": {"method": "breadcrumbs", "parameters": {"density": 0.3, "rescale": True}},
    "sce": {"method": "sce", "parameters": {"density": 0.3}},
}


@pytest.mark.parametrize("way", WAYS)
def test_blocks_and_workers_change_nothing_between_coarse_models(
    zoo: Zoo, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Differences of bf16 numbers are often the same few: many lie at the edge."""
    zoo.family({"a": (3, RUN - 7), "b": (50, 3)}, 2, dtype=torch.bfloat16, step=0.01)
    recipe = {**WAYS[way], "output": {"dtype": "float32"}}
    whole, _ = zoo.merge(recipe, "whole", workers=1)
    monkeypatch.setattr(planner, "BLOCK", RUN)
    cut, _ = zoo.merge(recipe, "cut", workers=2)
    for name, value in whole.items():
        assert torch.equal(cut[name], value), name


@pytest.mark.parametrize("rank", [0, 1, 3, 5, 8])
def test_zeros_are_entries_where_they_are_asked_for(rank: int) -> None:
    values = torch.tensor([[0.0, -2.0, 0.0, 2.0, 1.0, 0.0, -2.0, 0.0]])
    order = values[0].abs().argsort(descending=True, stable=True)[:rank]
    ends = ops.largest(values, rank)
    found = ops.marked(values, ends, 0)
    assert found[0].nonzero().flatten().tolist() == sorted(order.tolist())
    parts = [ops.marked(values[:, at : at + 3], ends, at) for at in range(0, 8, 3)]
    assert torch.equal(torch.cat(parts, 1), found)
