"""Tall matrices at a rank, vocabulary tables above all: read by rows, and never whole.

The right singular vectors of D [m,k] are the eigenvectors of D'D [k,k], which is a sum over rows;
with them each row of the left factor is a matter of that row alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from mowmerge.dynamic.format import Code
from mowmerge.methods.contracts import Block, Reduction
from mowmerge.methods.ops.spectral import NOTHING, Factors
from mowmerge.plan import run_length
from mowmerge.tensors import Tensor, torch

TALL = 8  # rows a column from which on a matrix is tall
BATCH = 1024  # rows whose products are added at a time
BAND = 256  # rows of a Gram matrix worked out at a time

Deltas = Callable[[Block], Iterable[Tensor]]


def tall(shape: Sequence[int]) -> bool:
    """Whether the products of the columns are little beside the matrix."""
    return len(shape) == 2 and shape[0] >= TALL * shape[1] > 0


def by_rows(code: Code) -> bool:
    """Whether a code is made of a tall matrix some rows at a time."""
    return code.codec == "low_rank" and tall(code.shape)


def workspace(shape: Sequence[int], n: int, rank: int) -> int:
    """Elements of 4 bytes that n tall matrices cut to a rank take beside a block: the products in
    fp64, a batch of rows, a decomposition, the factors; 0 of others."""
    if not tall(shape):
        return 0
    columns = shape[1]
    return columns * (n * (2 * columns + BATCH + 2 * rank) + 6 * columns + 2 * BATCH)


class Turn(NamedTuple):
    """A tall matrix D [m,k] at rank r: (D across) right, with across [k,r] and right [r,k]; and
    what is lost, |D - D across right| / |D|."""

    across: Tensor
    right: Tensor
    lost: Tensor

    def left(self, rows: Tensor) -> Tensor:
        """Rows of D as rows of the left factor, in the runs of which every block is made: a product
        of more or fewer rows may differ in its last bits."""
        runs = torch.split(rows, run_length(rows.shape[1]) // rows.shape[1])
        return torch.cat([run @ self.across for run in runs])


def cut(deltas: Iterable[Tensor], turns: Sequence[Turn]) -> tuple[list[Factors], dict[str, Tensor]]:
    """Whole rows of each D as B [m,r] and A [r,k], and what `spectral.truncated` tells."""
    pairs = [(turn.left(rows), turn.right) for rows, turn in zip(deltas, turns, strict=True)]
    told = {"lost": torch.stack([turn.lost for turn in turns]), "drawn": torch.tensor(False)}
    return pairs, told


def turns(rank: int, of: Deltas) -> Reduction:
    """Returns a Turn of each of the matrices whose rows `of` gives of a block of whole rows."""
    found = yield _Products(of)
    return [_turn(products, rank, found.dtype) for products in found.each()]


def _turn(products: Tensor, rank: int, dtype: Any) -> Turn:
    """From D'D, lower triangle. A D that is not finite has nothing: whoever reads it next says so.

    Singular values up to NOTHING of the largest are taken for 0.
    """
    whole = products.diagonal().sum()
    if not whole.isfinite():
        products, whole = torch.zeros_like(products), torch.zeros_like(whole)
    squares, vectors = torch.linalg.eigh(products)
    squares, vectors = squares.flip(0)[:rank].clamp_min(0), vectors.flip(1)[:, :rank]
    used = squares > NOTHING**2 * squares.amax()
    squares = squares.where(used, 0.0)
    root = squares.sqrt().sqrt()
    lost = ((whole - squares.sum()).clamp_min(0) / whole.where(whole > 0, 1.0)).sqrt()
    across = (vectors / root.where(used, 1.0)).where(used, 0.0)
    return Turn(across.to(dtype), (vectors * root).T.to(dtype), lost)


class _Products:
    """D'D [k,k] of each D, in fp64, added up over batches of rows that no block decides."""

    share, exact = 1.0, False

    def __init__(self, of: Deltas) -> None:
        self.of = of
        self.dtype: Any = None  # of D
        self._totals: list[Tensor] = []
        self._waiting: list[Tensor] = []  # [BATCH,k] each, of which the first rows are filled
        self._filled = 0

    def fresh(self) -> _Products:
        return _Products(self.of)

    def observe(self, block: Block) -> None:
        deltas = list(self.of(block))
        if not self._totals:
            columns, self.dtype = deltas[0].shape[1], deltas[0].dtype
            self._waiting = [d.new_empty(BATCH, columns) for d in deltas]
            self._totals = [d.new_zeros(columns, columns, dtype=torch.float64) for d in deltas]
        at, rows = 0, len(deltas[0])
        while at < rows:
            taken = min(rows - at, BATCH - self._filled)
            for waiting, delta in zip(self._waiting, deltas, strict=True):
                waiting[self._filled : self._filled + taken] = delta[at : at + taken]
            at, self._filled = at + taken, self._filled + taken
            if self._filled == BATCH:
                self._add()

    def merge(self, other: _Products) -> None:
        raise TypeError("the rows of a matrix are read in order, by one worker")

    def each(self) -> Iterable[Tensor]:
        """Each D's, which is then forgotten."""
        self._add()
        self._waiting.clear()
        while self._totals:
            yield self._totals.pop(0)

    def _add(self) -> None:
        for total, waiting in zip(self._totals, self._waiting, strict=True):
            rows = waiting[: self._filled].double()
            for first in range(0, len(total), BAND):
                last = first + BAND
                total[first:last, :last].addmm_(rows[:, first:last].T, rows[:, :last])
        self._filled = 0
