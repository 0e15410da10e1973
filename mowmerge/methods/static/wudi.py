"""WUDI: the merged task vector that interferes least with each, judged by their own row spaces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from mowmerge.methods.contracts import Count, Matrices, NonNegative
from mowmerge.methods.ops import added, square_norm
from mowmerge.methods.ops.descent import adam
from mowmerge.methods.ops.spectral import svd, svd_numbers
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch

NULL = 1e-10  # share of the largest eigenvalue below which a direction is none of the experts'


def _rank(shape: Sequence[int], n: int) -> int:
    """How many triplets are leading ones."""
    return max(1, min(shape) // n)


def _terms(deltas: Matrices, interference: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """|D_i|, and E_i [m,k], which T is not to differ from in the row space of R_i [r,k]."""
    rank = _rank(deltas.shape[1:], len(deltas))
    mean = added(deltas).div_(len(deltas)) if interference == "leading" else None
    for delta in deltas:
        norm = square_norm(delta).sqrt()
        if mean is None:
            yield norm, delta, delta
        else:
            rows = svd(delta).cut(rank)
            wanted = mean + svd(delta - mean).cut(rank).matrix
            yield norm, wanted, rows.values[:, None] * rows.right


def _normal_equations(deltas: Matrices, interference: str) -> tuple[Tensor, Tensor]:
    """A = sum_i G_i, B = sum_i E_i G_i, with G_i = R_i' R_i / |D_i|^2: gradient 2(TA - B)."""
    right = torch.zeros_like(deltas[0])
    left = right.new_zeros(right.shape[1], right.shape[1])
    for norm, wanted, rows in _terms(deltas, interference):
        if norm > 0:
            unit = rows / norm
            product = unit.T @ unit
            left += product
            right += wanted @ product
    return left, right


def _by_adam(start: Tensor, left: Tensor, right: Tensor, steps: int, rate: float) -> Tensor:
    def slope(moved: Tensor) -> Tensor:
        return ((start + moved) @ left).sub_(right).mul_(2.0)

    return start + adam(slope, start, steps, rate)


def _closed(left: Tensor, right: Tensor, ridge: float) -> Tensor:
    """B A^+: the stationary point without a part outside the experts' row spaces."""
    values, vectors = torch.linalg.eigh(left)
    used = values > NULL * values[-1].clamp(min=0.0)
    inverse = (1.0 / (values + ridge * values.mean()).where(used, 1.0)).where(used, 0.0)
    found: Tensor = right @ (vectors * inverse) @ vectors.T
    return found


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """A task vector and its parts, with both sides of the normal equations; then Adam's moments and
    what makes a step, or the closed form. In fp64 for that."""
    if len(shape) != 2:
        return 0
    closed, leading = p["solver"] == "closed", p["interference"] == "leading"
    whole, side = math.prod(shape), shape[1] ** 2
    parts = 3 * whole + _rank(shape, n) * shape[0] + svd_numbers(shape)
    terms = (parts if leading else 7 * whole // 2) + 2 * side
    solved = max(terms, 3 * side + 2 * whole if closed else 8 * whole)
    return (2 if closed else 1) * (whole + side + solved)


def _decompositions(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> list[tuple[int, int]]:
    return [(shape[0], shape[1])] * (2 * n if p["interference"] == "leading" else 0)


@merge_method(
    paper="arXiv:2503.08099",
    scope="tensor",
    workspace=_workspace,
    decompositions=_decompositions,
    laws={law: {"solver": "closed", "interference": "full"} for law in ("permutation", "scale")},
)
def wudi(
    deltas: Matrices,
    *,
    solver: Literal["adam", "closed"] = "adam",
    interference: Literal["full", "leading"] = "full",
    steps: Count = 300,
    rate: NonNegative = 1e-5,
    ridge: NonNegative = 0.0,
    rest: Literal["base", "mean"] = "base",
    vocabulary: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """For matrices the T of least interference sum_i |(T - E_i) R_i'|^2 / |D_i|^2, times scale.

    E_i = R_i = D_i; of leading triplets, of which the first 1/N are taken, E_i = M + [D_i - M] with
    M the mean of the D_i, and R_i = S V' of [D_i]. From T = sum_i D_i by Adam, or T = B A^+ with
    A = sum_i G_i, B = sum_i E_i G_i and G_i = R_i' R_i / |D_i|^2.

    Shapes: deltas [N,m,k] -> delta [m,k]; other tensors as rest says.

    Args:
        solver: Adam's steps from the sum, as published, or the minimum itself (closed): one
            eigendecomposition of a k x k matrix instead of `steps` products with one.
        interference: with task vectors as they are, or with their leading triplets: the second
            version, known as v2.
        steps: of Adam.
        rate: of Adam, absolute: an entry moves by about rate x steps at most, whatever the size of
            the task vectors. v2 was published with 1e-6.
        ridge: of the closed form: added to A's eigenvalues, in units of their mean. Leading
            triplets need not agree, so that their minimum may lie far off without.
        rest: what is not a matrix stays at the base, or takes the mean task vector.
        vocabulary: whether embeddings and output heads are matrices too.
        scale: factor on the result.

    Source: WUDI-Merging, arXiv:2503.08099; reference code wudi_main.py; of leading
    triplets wudi_merging2.
    Differs: a task vector of zeros, which gives NaN there, is left out. The code optimises matrices
    of attention and MLP only; here those of other roles too, but for vocabulary tables.
    """
    if deltas.dim() != 3 or not deltas.numel():
        if rest == "base":
            return torch.zeros_like(deltas[0])
        return added(deltas).div_(len(deltas)).mul_(scale)
    if solver == "closed":
        sides = _normal_equations(deltas.double(), interference)
        return _closed(*sides, ridge).to(deltas.dtype).mul_(scale)
    left, right = _normal_equations(deltas, interference)
    return _by_adam(added(deltas), left, right, steps, rate).mul_(scale)
