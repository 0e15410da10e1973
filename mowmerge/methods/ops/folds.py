"""Folds over tensors and models, and what runs a reduction on a tensor in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from mowmerge.methods.contracts import Block, Draws, Extent, Matrices, Once, Reduction, anew
from mowmerge.methods.ops.blocks import Elect, elect_sign
from mowmerge.plan import RUN
from mowmerge.tensors import Tensor, torch


def settle(
    reduce: Callable[[Sequence[Extent]], Reduction],
    values: Tensor | Matrices,
    parameters: Mapping[str, Any],
    rng: Draws | None = None,
    *,
    base: Tensor | None = None,
    rows: bool = False,
    matrix: bool = False,
    role: str = "",
    once: Once = anew,
) -> Any:
    """Runs a reduction on one tensor in memory and returns its state: what the engine streams.

    rows: in whole rows, as for scope row. matrix: whole, as for a method on matrices; `once`: of
    what is worked out for it.
    """
    extent = Extent(
        tuple(values.shape[1:]), parameters, role=role, matrix=matrix, models=len(values)
    )
    rounds, rng = reduce([extent]), rng or Draws()
    if matrix:
        nothing = torch.empty(len(values), 0)
        whole = Block(nothing, parameters, rng, extent.numel, matrices=values, once=once)
    else:
        shape = values.shape[1:] if rows and values.dim() > 2 else (1, -1) if rows else (-1,)
        flat = cast(Tensor, values).reshape(len(values), *shape)
        below = None if base is None else base.reshape(shape)
        whole = Block(flat, parameters, rng, extent.numel, below)
    try:
        fold = next(rounds)
        while True:
            fold = fold.fresh()
            step = 1 if matrix or rows else max(1, int(1 / fold.share))  # of a sample
            for block in whole.runs():
                fold.observe(block if step == 1 else replace(block, values=block.values[:, ::step]))
            fold = rounds.send(fold)
    except StopIteration as done:
        return done.value


def mapped(fn: Callable[[Block], Tensor], values: Tensor, rng: Draws | None = None) -> Tensor:
    """fn of every entry, of [N,*S] a new tensor [*S], in runs of 65,536: what fn makes of all
    models on the way is never there at once."""
    flat = values.flatten(1)
    whole = Block(flat, {}, rng or Draws(), flat.shape[1])
    found, at = torch.empty_like(flat[0]), 0
    for block in whole.runs():
        part = fn(block)
        found[at : at + len(part)] = part
        at += len(part)
    return found.view(values.shape[1:])


class Sum:
    """Adds fn(block) over runs of 65,536 elements or as many whole rows, in index order, in fp64.

    `exact` says that fn's own sums are exact, as those of signs are: then whole blocks will do.
    """

    share = 1.0

    def __init__(self, fn: Callable[[Block], Tensor], *, exact: bool = False) -> None:
        self.fn, self.exact = fn, exact
        self.total: Tensor | float = 0.0

    def fresh(self) -> Sum:
        """An empty sum of the same function."""
        return Sum(self.fn, exact=self.exact)

    def observe(self, block: Block) -> None:
        """Adds a block, run by run; what a device found of all of them comes from there at once."""
        parts = [block] if self.exact else block.runs()
        for found in torch.stack([self.fn(part).double() for part in parts]).cpu():
            self.total = self.total + found

    def merge(self, other: Sum) -> None:
        """Adds another tensor's total."""
        self.total = self.total + other.total


class Listed:
    """fn(block) [n,rows] of all blocks side by side, in index order."""

    share, exact = 1.0, False

    def __init__(self, fn: Callable[[Block], Tensor]) -> None:
        self.fn = fn
        self.found: list[Tensor] = []

    def fresh(self) -> Listed:
        """An empty list of the same function."""
        return Listed(self.fn)

    def observe(self, block: Block) -> None:
        """Appends a block's."""
        self.found.append(self.fn(block).cpu())

    def merge(self, other: Listed) -> None:
        """Appends another tensor's."""
        self.found += other.found

    @property
    def total(self) -> Tensor:
        """All of it, [n,rows]."""
        return torch.cat(self.found, 1)


class Most:
    """The largest of fn(block), entry by entry, over all blocks."""

    share, exact = 1.0, True

    def __init__(self, fn: Callable[[Block], Tensor]) -> None:
        self.fn = fn
        self.total: Tensor | None = None

    def fresh(self) -> Most:
        """No entry yet of the same function."""
        return Most(self.fn)

    def observe(self, block: Block) -> None:
        """Takes in a block; an empty one says nothing."""
        if block.values.numel() or block.matrices is not None:
            self._take(self.fn(block).double().cpu())

    def merge(self, other: Most) -> None:
        """Takes in another tensor's largest."""
        if other.total is not None:
            self._take(other.total)

    def _take(self, found: Tensor) -> None:
        self.total = found if self.total is None else torch.maximum(self.total, found)


def inner_products(values: Tensor) -> Tensor:
    """The inner products <v_i, v_j> of [N,*B], each one vector: [N,N], in fp64."""
    wide = values.reshape(len(values), -1).double()
    return wide @ wide.T


def square_norm(value: Tensor) -> Tensor:
    """The sum of squares of all entries, in fp64, over runs of 65,536: in one place, since what is
    freed beside a sum that stays finds no use."""
    flat = value.flatten()
    wide = flat.new_empty(min(RUN, len(flat)), dtype=torch.float64)
    runs = torch.split(flat, RUN)
    return torch.stack([wide[: len(run)].copy_(run).square_().sum() for run in runs]).sum()


def gram(block: Block) -> Tensor:
    """The inner products of a block's values."""
    return inner_products(block.values)


def majority(
    kept: Callable[[Block], Sequence[Tensor]], elect: Elect = "mass", power: Sequence[float] = ()
) -> Reduction:
    """Returns the sign that most entries of `kept(block)` elect: 1.0, or -1.0 where it is even."""
    balance = yield Sum(lambda b: elect_sign(kept(b), elect, 0.0, power).sum(), exact=True)
    return 1.0 if balance.total > 0 else -1.0
