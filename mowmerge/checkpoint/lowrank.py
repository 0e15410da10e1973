"""Matrices as products of two thin ones, B A, and how much of them that keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mowmerge.methods.ops.spectral import OVERSAMPLED, Svd, few, leading_svd, product_svd, svd
from mowmerge.tensors import Tensor, torch

ROWS = 256  # added up at a time, for the norm


@dataclass(frozen=True)
class Factors:
    """B [m, r] and A [r, n], or [E, m, r] and [E, r, n] for a stack of matrices; the squares of the
    norms of what was asked for and of what is kept."""

    b: Tensor
    a: Tensor
    total: float
    kept: float
    how: str

    @property
    def rank(self) -> int:
        """Columns of B."""
        return int(self.a.shape[-2])

    @property
    def energy(self) -> float:
        """Kept share of the squared norm: sum of the kept sigma^2 over all; 1 for zero."""
        return min(1.0, self.kept / self.total) if self.total else 1.0

    @property
    def error(self) -> float:
        """|D - B A| / |D| = sqrt(1 - energy)."""
        return math.sqrt(1.0 - self.energy)


def factor(delta: Tensor, rank: int | None, energy: float | None) -> Factors:
    """The best B A for D [m, n] in fp32: of a rank, or of the least rank that keeps the energy.

    By thin SVD, B = U sqrt(S), A = sqrt(S) V^T; for a small rank of a large matrix in a randomised
    basis, whose error is not guessed: what an orthonormal range keeps is measured.
    """
    parts = torch.split(delta, ROWS)
    total = math.fsum(float(part.square().sum(dtype=torch.float64)) for part in parts)
    if rank is not None and few(rank, delta.shape):
        return _cut(leading_svd(delta, rank), rank, None, total, "randomised")
    return _cut(svd(delta), rank, energy, total, "svd")


def workspace(shape: tuple[int, int], rank: int | None) -> int:
    """Elements in fp32 that `factor` holds at once, the matrix among them; measured."""
    whole, least = shape[0] * shape[1], min(shape)
    if rank is not None and few(rank, shape):
        return whole + 4 * (rank + OVERSAMPLED) * sum(shape)
    return int(6.4 * whole + 1.6 * least**2)


def joined(
    pairs: Sequence[tuple[float, Tensor, Tensor]], rank: int | None, energy: float | None
) -> Factors:
    """sum_k c_k B_k A_k as one product: exact by concatenation, or cut to a rank or an energy.

    Cut without forming the matrix: QR of both long factors, SVD of the small core between them.
    """
    b = torch.cat([c * b for c, b, _ in pairs], dim=1)
    a = torch.cat([a for _, _, a in pairs], dim=0)
    total = float(((b.T @ b).double() * (a @ a.T).double()).sum())
    if (rank is None and energy is None) or (rank is not None and rank >= len(a)):
        return Factors(b, a, total, total, "concatenated")
    found = product_svd(b, a)
    total = float(found.values.double().square().sum())
    return _cut(found, rank, energy, total, "concatenated, then cut")


def stacked(each: Sequence[Factors]) -> Factors:
    """The factors of a stack of matrices, filled up with zeros to the largest rank among them."""
    rank = max(found.rank for found in each)
    pad = torch.nn.functional.pad
    b = torch.stack([pad(found.b, (0, rank - found.rank)) for found in each])
    a = torch.stack([pad(found.a, (0, 0, 0, rank - found.rank)) for found in each])
    total, kept = (math.fsum(part) for part in zip(*((f.total, f.kept) for f in each), strict=True))
    return Factors(b, a, total, kept, each[0].how)


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """|B A - B' A'| / |B' A'| of two products of [m, r] and [r, n] in fp64, which are not formed;
    infinite for B' A' = 0 alone. What is less than 1e-8 is 0 or the rounding of it."""
    (b, a), (c, d) = ours, theirs
    apart, size = _square(torch.cat([b, -c], 1), torch.cat([a, d])), _square(c, d)
    if not size:
        return float("inf") if apart else 0.0
    return math.sqrt(max(0.0, apart) / size)


def _square(b: Tensor, a: Tensor) -> float:
    """|B A|^2 = <B^T B, A A^T>."""
    return float(((b.T @ b) * (a @ a.T)).sum())


def _cut(found: Svd, rank: int | None, energy: float | None, total: float, how: str) -> Factors:
    """The leading triplets, split evenly between the factors."""
    u, s, vh = found.left, found.values, found.right
    squares = s.double().square()
    if rank is None:
        wanted = (1.0 if energy is None else energy) * float(squares.sum())
        reached = squares.cumsum(0) >= wanted * (1 - 1e-12)
        rank = int(reached.int().argmax()) + 1 if bool(reached.any()) else len(s)
    certain = float(s[0]) * torch.finfo(s.dtype).eps * max(len(u), vh.shape[1])
    rank = max(1, min(rank, int((s > certain).sum())))
    root = s[:rank].sqrt()
    b, a = u[:, :rank] * root, root.unsqueeze(1) * vh[:rank]
    return Factors(b.contiguous(), a.contiguous(), total, float(squares[:rank].sum()), how)
