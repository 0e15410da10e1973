"""The largest entries of a tensor, exactly so many: equal ones are told apart by their index."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mowmerge.methods.contracts import Block, Reduction
from mowmerge.methods.ops.blocks import keep_above
from mowmerge.methods.ops.folds import settle
from mowmerge.methods.ops.selection import Ranked, Scores, ranked
from mowmerge.tensors import Tensor, torch

Place = tuple[int, int]


class Edge(NamedTuple):
    """Where the largest entries of a tensor end: all above a magnitude are among them, and those
    equal to it from element `since` up to element `until`."""

    least: float
    since: int = 0
    until: int = sys.maxsize


def keep_beyond(value: Tensor, edge: Edge, start: int) -> Tensor:
    """value where it is among the largest, else 0, as a new tensor; its first element is the
    tensor's element `start`."""
    above = torch.nn.functional.hardshrink
    since, until = (min(max(0, at - start), value.numel()) for at in edge[1:])
    if until - since == value.numel():
        return keep_above(value, edge.least)
    if until == since:
        return above(value, edge.least)
    first, equal, last = value.reshape(-1).tensor_split((since, until))
    parts = above(first, edge.least), keep_above(equal, edge.least), above(last, edge.least)
    return torch.cat(parts).view_as(value)


def beyond(value: Tensor, edge: Edge, start: int) -> Tensor:
    """Where it is among the largest, zeros too if the edge lies among them."""
    size = value.abs()
    found = size > edge.least
    equal = (size == edge.least).reshape(-1)
    since, until = (min(max(0, at - start), equal.numel()) for at in edge[1:])
    equal[:since], equal[until:] = False, False
    return found.logical_or_(equal.view_as(found))


def edges(
    ranks: Sequence[Sequence[int]],
    total: int,
    of: Scores = lambda block: block.values,
    *,
    last: bool = False,
    zeros: bool = False,
) -> Reduction:
    """Returns, for each list of ranks and each model i, the Edge of the ranks[i] largest of a
    tensor's `total` magnitudes.

    Exactly so many: of equal ones the first count as the larger, or with `last` the last. A pass
    more where an edge lies among equal ones; with `zeros` also where it lies among those. `of`:
    see `kth_largest`.
    """
    made: list[list[Edge]] = []
    least, before = {}, {}  # of edges among equal ones: these, and how many come before the edge
    for row, wanted in enumerate(ranks):
        inner = [rank if rank < total else 0 for rank in wanted]  # the others keep none, or all
        found = [Ranked()] * len(inner)
        if any(inner):
            found = yield from ranked(inner, total, of)
        made.append([
            Edge(0.0 if rank >= total else one.value)
            for rank, one in zip(wanted, found, strict=True)
        ])  # fmt: skip
        for i, (rank, one) in enumerate(zip(inner, found, strict=True)):
            kept = rank - one.larger
            if kept < one.equal and (zeros or one.value > 0):
                least[row, i], before[row, i] = one.value, one.equal - kept if last else kept
    if before:
        places = yield _Places(least, before, of)
        for (row, i), at in places.found.items():
            edge = made[row][i]
            made[row][i] = edge._replace(since=at) if last else edge._replace(until=at)
    return made


def marked(values: Tensor, ends: Sequence[Edge], start: int) -> Tensor:
    """`beyond` of each [N,*S]."""
    return torch.stack([beyond(v, edge, start) for v, edge in zip(values, ends, strict=True)])


def largest(values: Tensor, rank: int) -> list[Edge]:
    """The Edge of each tensor's `rank` largest entries, zeros among them, of [N,*S] in memory."""
    n, total = len(values), values[0].numel()
    found: list[list[Edge]] = settle(lambda _: edges([[rank] * n], total, zeros=True), values, {})
    return found[0]


class _Places:
    """The index of the entry before which so many equal a magnitude, by row and model."""

    share, exact = 1.0, False

    def __init__(self, value: Mapping[Place, float], before: Mapping[Place, int], of: Scores):
        self.value, self.before, self.of = value, before, of
        self.left, self.found = dict(before), dict[Place, int]()

    def fresh(self) -> _Places:
        return _Places(self.value, self.before, self.of)

    def observe(self, block: Block) -> None:
        if not self.left:
            return
        scores = [one.reshape(-1).abs() for one in self.of(block)]
        for place in [*self.left]:
            equal = scores[place[1]] == self.value[place]
            number = int(equal.count_nonzero())
            if number > self.left[place]:
                at = int(equal.nonzero()[self.left.pop(place)])
                self.found[place] = block.rng.start + at
            else:
                self.left[place] -= number

    def merge(self, other: _Places) -> None:
        raise TypeError("an index is one tensor's")
