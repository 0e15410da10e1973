"""Matrices as products of two thin ones, B A, and how much of them that keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mowmerge.tensors import Tensor, torch

OVERSAMPLED = 16  # columns that the range finder draws beyond the rank
ITERATIONS = 4  # passes of its subspace iteration
WORTH = 8  # a randomised decomposition pays where the rank is below a share of the smaller side


@dataclass(frozen=True)
class Factors:
    """B [m, r] and A [r, n]; the squares of the norms of what was asked for and of what is kept."""

    b: Tensor
    a: Tensor
    total: float
    kept: float
    how: str

    @property
    def rank(self) -> int:
        """Columns of B."""
        return len(self.a)

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

    By thin SVD, B = U sqrt(S), A = sqrt(S) V^T; for a small rank of a large matrix in the range of
    D (D^T D)^4 X with X Gaussian of a fixed seed (Halko et al., arXiv:0909.4061), whose error is
    not guessed: what an orthonormal range keeps is measured.
    """
    total = float(delta.square().sum(dtype=torch.float64))
    least = min(delta.shape)
    if rank is not None and (rank + OVERSAMPLED) * WORTH < least:
        range_ = _range(delta, rank + OVERSAMPLED)
        u, s, vh = torch.linalg.svd(range_.T @ delta, full_matrices=False)
        return _cut(range_ @ u, s, vh, rank, None, total, "randomised")
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return _cut(u, s, vh, rank, energy, total, "svd")


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
    q, r = torch.linalg.qr(b)
    p, t = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r @ t.T, full_matrices=False)
    total = float(s.double().square().sum())
    return _cut(q @ u, s, vh @ p.T, rank, energy, total, "concatenated, then cut")


def _range(delta: Tensor, width: int) -> Tensor:
    """An orthonormal basis of nearly the leading left singular vectors."""
    draws = torch.Generator().manual_seed(0)
    start = torch.randn(delta.shape[1], width, generator=draws)
    q: Tensor = torch.linalg.qr(delta @ start)[0]
    for _ in range(ITERATIONS):
        p, _ = torch.linalg.qr(delta.T @ q)
        q, _ = torch.linalg.qr(delta @ p)
    return q


def _cut(
    u: Tensor, s: Tensor, vh: Tensor, rank: int | None, energy: float | None, total: float, how: str
) -> Factors:
    """The leading triplets, split evenly between the factors."""
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
