"""Singular values and vectors: what the methods on matrices share.

A thin SVD is in the dtype of its matrix, after a QR where that is long or wide; what needs no more
than a polar factor or the leading vectors of the shorter side has them from the Gram matrix of that
side in fp64, which knows singular values down to 1e-8 of the largest: LAPACK in fp32 to 1e-7.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import starmap

from mowmerge.methods.contracts import Matrices
from mowmerge.methods.ops.blocks import stacked
from mowmerge.tensors import Tensor, torch

NOTHING = 1e-6  # share of the largest singular value up to which one is the rounding of none
LONG = 2  # from this ratio of the sides on a QR comes first
COLUMNS = 1024  # worked on at a time in fp64
ROWS = 256  # of a Gram matrix worked out at a time
OVERSAMPLED = 16  # columns that the range finder draws beyond the rank
ITERATIONS = 4  # passes of its subspace iteration
WORTH = 8  # a randomised decomposition pays where the rank is below a share of the shorter side

Factors = tuple[Tensor, Tensor]
"""B [m,r] and A [r,k] of a matrix that is known as their product."""


@dataclass(frozen=True)
class Svd:
    """left [m,r] diag(values [r]) right [r,k], the values in descending order."""

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def matrix(self) -> Tensor:
        """The product [m,k]."""
        found: Tensor = (self.left * self.values) @ self.right
        return found

    @property
    def pair(self) -> Factors:
        """The product as two factors that share the values evenly."""
        root = self.values.sqrt()
        return self.left * root, root[:, None] * self.right

    @property
    def rank(self) -> int:
        """How many singular values are more than the rounding of none.

        What LAPACK has in the place of 0 grows with the matrix: in fp32 up to 0.13 eps times its
        longer side, of rank 1, and a twentieth of that of higher ranks.
        """
        if not len(self.values):
            return 0
        side = max(len(self.left), self.right.shape[1])
        share = max(NOTHING, torch.finfo(self.values.dtype).eps * side / 4)
        return int((self.values > share * self.values[0]).sum())

    def cut(self, rank: int) -> Svd:
        """The leading triplets, without the memory of the others."""
        left, right = self.left[:, :rank], self.right[:rank]
        return Svd(left.clone(), self.values[:rank].clone(), right.clone())

    def only(self, used: Tensor) -> Svd:
        """Those triplets; itself where that is all."""
        if used.all():
            return self
        return Svd(self.left[:, used], self.values[used], self.right[used])


def svd(matrix: Tensor) -> Svd:
    """The thin SVD of [m,k], with min(m,k) triplets."""
    rows, columns = matrix.shape
    if rows < columns:
        turned = svd(matrix.T)
        return Svd(turned.right.T, turned.values, turned.left.T)
    if rows < LONG * columns:
        return _svd(matrix)
    basis, core = torch.linalg.qr(matrix)
    found = _svd(core)
    return Svd(basis @ found.left, found.values, found.right)


def _svd(matrix: Tensor) -> Svd:
    """By LAPACK; in fp64 where the driver does not converge, or gives what is not finite."""
    try:
        found = Svd(*torch.linalg.svd(matrix, full_matrices=False))
        if found.values.isfinite().all():
            return found
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        pass
    again = torch.linalg.svd(matrix.double().cpu(), full_matrices=False)
    return Svd(*(part.to(matrix) for part in again))


def svd_numbers(shape: Sequence[int]) -> int:
    """How many numbers of fp32 `svd` takes at once, its matrix and the triplets among them, with
    LAPACK's copy and workspace; of a long one a basis, and then the core's or the product."""
    whole, core = math.prod(shape), min(shape) ** 2
    if max(shape) < LONG * min(shape):
        return 3 * whole + 5 * core
    return 2 * whole + max(whole, 4 * core) + 3 * core


def gram_numbers(side: int) -> int:
    """How many of fp32 a Gram matrix and its eigenvectors take, with LAPACK's workspace."""
    return 8 * side**2


def basis_numbers(shape: Sequence[int], n: int) -> int:
    """How many `left_basis` of N matrices takes, and then it and the coordinates of all of them in
    it, with one matrix or what is made of them all."""
    rows, columns = shape
    rank, whole = min(rows, n * columns), rows * columns
    held = n * whole if rows > n * columns else 0
    coordinates = (n + 2) * rank * columns + 2 * rows * rank
    return whole + max(held + whole + gram_numbers(rank), coordinates)


def product_svd(left: Tensor, right: Tensor) -> Svd:
    """The thin SVD of left [m,r] right [r,k], which is never formed.

    QR of both, SVD of the small core between them: O((m + k) r^2).
    """
    q, r = torch.linalg.qr(left)
    p, t = torch.linalg.qr(right.T)
    core = _svd(r @ t.T)
    return Svd(q @ core.left, core.values, core.right @ p.T)


def svds(deltas: Matrices, factors: Sequence[Factors] | None = None) -> Iterator[Svd]:
    """The thin SVD of each of [N,m,k]; from their factors, of those ranks, where they are known."""
    return map(svd, deltas) if factors is None else starmap(product_svd, factors)


def beside(parts: Iterable[Svd]) -> Svd:
    """All their triplets, beside each other."""
    each = [(part.left, part.values, part.right) for part in parts]
    left, values, right = zip(*each, strict=True)
    return Svd(torch.cat(left, 1), torch.cat(values), torch.cat(right))


def few(rank: int, shape: Sequence[int]) -> bool:
    """Whether a randomised decomposition pays for that many triplets of a matrix."""
    return (rank + OVERSAMPLED) * WORTH < min(shape)


def leading_svd(matrix: Tensor, rank: int) -> Svd:
    """The leading `rank` triplets of [m,k]; where that is few of many, in a randomised basis.

    In the range of D (D' D)^4 X with X Gaussian of a fixed seed (Halko et al., arXiv:0909.4061).
    The error is not guessed: |D|^2 less the squares of the values is what was lost.
    """
    if not few(rank, matrix.shape):
        return svd(matrix).cut(rank)
    draws = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], rank + OVERSAMPLED, generator=draws, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ start.to(matrix.device))[0]
    for _ in range(ITERATIONS):
        across = torch.linalg.qr(matrix.T @ basis)[0]
        basis = torch.linalg.qr(matrix @ across)[0]
    found = _svd(basis.T @ matrix)
    return Svd(basis @ found.left, found.values, found.right).cut(rank)


def truncated(deltas: Iterable[Tensor], rank: int) -> tuple[list[Factors], dict[str, Tensor]]:
    """Each of N times [m,k] as B [m,rank] A [rank,k], its leading triplets with the values shared
    evenly; a loop that makes them holds one.

    And what a method tells of it: `lost` [N], |D - B A| / |D|, and whether a basis was `drawn`.
    """
    pairs, lost, drawn = [], [], False
    for delta in deltas:
        pairs.append(leading_svd(delta, rank).pair)
        lost.append(_lost(delta, *pairs[-1]))
        drawn = few(rank, delta.shape)
        del delta
    return pairs, {"lost": torch.stack(lost), "drawn": torch.tensor(drawn)}


def truncated_numbers(shape: Sequence[int], n: int, rank: int) -> int:
    """How many numbers `truncated` of N matrices takes beside them: the pairs, a decomposition."""
    rows, columns = shape
    pairs = n * rank * (rows + columns)
    if few(rank, shape):
        return pairs + 5 * (rank + OVERSAMPLED) * (rows + columns)
    return pairs + svd_numbers(shape) - rows * columns


def _lost(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """|D - B A| / |D|, measured some rows at a time; 0 of a matrix of zeros."""
    apart = whole = matrix.new_zeros((), dtype=torch.float64)
    for rows, part in zip(torch.split(matrix, ROWS), torch.split(left, ROWS), strict=True):
        apart = apart + (rows - part @ right).square().sum(dtype=torch.float64)
        whole = whole + rows.square().sum(dtype=torch.float64)
    return (apart / whole.where(whole > 0, 1.0)).sqrt()


@dataclass(frozen=True)
class Spectrum:
    """Of a matrix the singular values [r], in descending order, and the singular vectors [s,r] of
    its shorter side s, both in fp64; r is the number of values above NOTHING."""

    values: Tensor
    vectors: Tensor


def spectrum(matrix: Tensor) -> Spectrum:
    """Singular values and left vectors of [m,k], right ones where it is longer than wide."""
    return _of_gram(_gram([_wide(matrix)]))


def _gram(side: Iterable[Tensor]) -> Tensor:
    """The inner products of the rows of matrices side by side, in fp64: the lower triangle, which
    is all that is read of it."""
    total = None
    for wide in side:
        if total is None:
            total = wide.new_zeros(len(wide), len(wide), dtype=torch.float64)
        for start in range(0, wide.shape[1], COLUMNS):
            part = wide[:, start : start + COLUMNS].double()
            for first in range(0, len(wide), ROWS):
                last = first + ROWS
                total[first:last, :last].addmm_(part[first:last], part[:last].T)
    assert total is not None
    return total


def _of_gram(products: Tensor) -> Spectrum:
    """Singular values and vectors from the inner products of a matrix's rows, lower triangle."""
    squares, vectors = torch.linalg.eigh(products)
    values = squares.clamp_(min=0.0).sqrt_().flip(0)
    used = values > NOTHING * values.amax() if len(values) else values > 0
    return Spectrum(values[used], vectors.flip(1)[:, used])


def completed(matrix: Tensor, found: Spectrum, rank: int) -> Svd:
    """The leading `rank` triplets of [m,k], from its spectrum: V' = U' D / S, in fp64."""
    wide, inner = _wide(matrix), found.vectors[:, :rank]
    turn = (inner / found.values[:rank]).T
    outer = torch.empty(turn.shape[0], wide.shape[1], dtype=matrix.dtype, device=matrix.device)
    for start in range(0, wide.shape[1], COLUMNS):
        outer[:, start : start + COLUMNS] = turn @ wide[:, start : start + COLUMNS].double()
    values, inner = found.values[:rank].to(matrix), inner.to(matrix)
    long = len(matrix) > matrix.shape[1]
    return Svd(outer.T, values, inner.T) if long else Svd(inner, values, outer)


def polar(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The polar factor U V' of [m,k] = U S V', of the rank that it has, and S in fp64.

    Directions with S_j <= 1e-6 S_1 are left out: there U and V are whatever LAPACK returns.
    """
    found = spectrum(matrix)
    values, root = found.values, (found.vectors / found.values) @ found.vectors.T
    del found
    wide = _wide(matrix)
    factor = torch.empty_like(wide)
    for start in range(0, wide.shape[1], COLUMNS):
        factor[:, start : start + COLUMNS] = root @ wide[:, start : start + COLUMNS].double()
    return (factor.T if len(matrix) > matrix.shape[1] else factor), values


def left_basis(deltas: Matrices, factors: Sequence[Factors] | None = None) -> tuple[Tensor, Tensor]:
    """The left singular vectors [m,R] and the singular values [R] of [D_1 .. D_N], side by side.

    R counts the values above NOTHING. Through Gram matrices: the long right vectors, U' D_i over S,
    are never formed, and of the D_i there is one at a time, or all where m is more than N k. From
    factors D_i = L_i R_i through one QR of [L_1 .. L_N].
    """
    if factors is not None:
        return _basis_of_products(factors)
    n, rows, columns = deltas.shape
    if rows > n * columns:
        every = stacked((delta.T for delta in deltas), n).flatten(0, 1).T
        leading = completed(every, spectrum(every), n * columns)
        return leading.left, leading.values
    found = _of_gram(_gram(deltas))
    return found.vectors.to(deltas.dtype), found.values.to(deltas.dtype)


def _basis_of_products(factors: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    turn, core = torch.linalg.qr(torch.cat([left for left, _ in factors], 1).double())
    products = core.new_zeros(len(core), len(core))
    for (_, right), part in zip(
        factors, core.split([len(right) for _, right in factors], 1), strict=True
    ):
        wide = right.double()
        products += part @ (wide @ wide.T) @ part.T
    found, like = _of_gram(products), factors[0][0]
    return (turn @ found.vectors).to(like), found.values.to(like)


def _wide(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose where it is longer than wide."""
    return matrix.T if len(matrix) > matrix.shape[1] else matrix
