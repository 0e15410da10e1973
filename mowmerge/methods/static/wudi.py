"""WUDI: the merged task vector that interferes least with each, judged by their own row spaces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from mowmerge.methods.contracts import Count, NonNegative
from mowmerge.methods.ops import added
from mowmerge.methods.ops.descent import adam
from mowmerge.methods.ops.spectral import svd
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch

NULL = 1e-10  # share of the largest eigenvalue below which a direction is none of the experts'


def _rank(shape: Sequence[int], n: int) -> int:
    """How many triplets are leading ones."""
    return max(1, min(shape) // n)


def _terms(deltas: Tensor, interference: str) -> Iterator[tuple[Tensor, Tensor]]:
    """E_i [m,k], which T is not to differ from in the row space of R_i [r,k]."""
    mean, rank = deltas.mean(0), _rank(deltas.shape[1:], len(deltas))
    for delta in deltas:
        if interference == "full":
            yield delta, delta
        else:
            rows = svd(delta).cut(rank)
            yield mean + svd(delta - mean).cut(rank).matrix, rows.values[:, None] * rows.right


def _normal_equations(deltas: Tensor, interference: str) -> tuple[Tensor, Tensor]:
    """A = sum_i G_i, B = sum_i E_i G_i, with G_i = R_i' R_i / |D_i|^2: gradient 2(TA - B)."""
    left, right = deltas.new_zeros(deltas.shape[2], deltas.shape[2]), torch.zeros_like(deltas[0])
    for delta, (wanted, rows) in zip(deltas, _terms(deltas, interference), strict=True):
        norm = math.sqrt(delta.double().square().sum())
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
    """In fp64 the task vectors and both sides of the closed form, or Adam's moments; products of
    k x k; and two decompositions of leading triplets."""
    if len(shape) != 2:
        return 0
    wide = 2 if p["solver"] == "closed" else 1
    held = 2 * n + 6 if p["solver"] == "closed" else 9
    svds = 6 * wide * sum(shape) * min(shape) if p["interference"] == "leading" else 0
    return held * math.prod(shape) + 8 * shape[1] ** 2 + svds


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
    deltas: Tensor,
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
            the task vectors.
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
        return deltas.mean(0).mul_(scale) if rest == "mean" else torch.zeros_like(deltas[0])
    if solver == "closed":
        sides = _normal_equations(deltas.double(), interference)
        return _closed(*sides, ridge).to(deltas.dtype).mul_(scale)
    left, right = _normal_equations(deltas, interference)
    return _by_adam(added(list(deltas)), left, right, steps, rate).mul_(scale)
