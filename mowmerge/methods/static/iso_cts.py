"""Iso-CTS: an isotropic merge in what the task vectors share, and in what is each one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mowmerge.methods.contracts import Matrices, Unit
from mowmerge.methods.ops import added, weighted_sum
from mowmerge.methods.ops.spectral import (
    NOTHING,
    Svd,
    beside,
    gram_numbers,
    polar,
    svd,
    svd_numbers,
)
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch

ROUNDING = 1e-5  # share of a task vector beside shared directions that is the rounding of none


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """All kept triplets, and one decomposition; or those three times, and a Gram matrix."""
    kept, least = sum(shape) * min(shape), min(shape)
    return kept + max(svd_numbers(shape), 2 * kept + gram_numbers(least))


def _decompositions(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> list[tuple[int, int]]:
    rows, columns = shape
    return [(rows, columns)] * (n + 1) + [(rows, min(shape)), (min(shape), columns)]


def _ranks(rank: int, n: int, common: float) -> tuple[int, int]:
    """How many directions are shared, and how many each model's own: c + n s = rank."""
    own = min(round((rank - int(rank * common)) / n), rank // n)
    return rank - n * own, own


def _leading(matrix: Tensor, rank: int, least: float) -> Svd:
    """The leading triplets, as many as that and none up to the least."""
    found = svd(matrix)
    return found.cut(min(rank, found.rank, int((found.values > least).sum())))


@merge_method(
    paper="arXiv:2502.04959",
    scope="tensor",
    workspace=_workspace,
    decompositions=_decompositions,
    laws=("permutation", "scale"),
    exempt={"float64": "fp32's rounding turns directions whose singular values are close"},
)
def iso_cts(
    deltas: Matrices, *, common: Unit = 0.8, vocabulary: bool = False, scale: float = 1.0
) -> Tensor:
    """The isotropic merge in shared and in own directions, made orthogonal, times scale.

    r = min(m,k) directions, c of them the leading ones of sum_i D_i = U S V', s of each model those
    of D_i - U_c U_c' D_i, with c + N s = r; out = scale * mean(all their singular values) * P Q'
    with P and Q the polar factors of all left and of all right directions.

    Shapes: deltas [N,m,k] -> delta [m,k]; of what is no matrix scale * the mean of D_i.

    Args:
        common: share of the directions that are the sum's, rounded so that each model gets as many
            of its own.
        vocabulary: whether embeddings and output heads are matrices too.
        scale: factor on the result, the paper's alpha, which is tuned there.

    Source: Iso-CTS, arXiv:2502.04959, algorithm 2; reference code iso.py.
    Differs: directions without a singular value (1e-6 of the largest, or rounding; own ones 1e-5 of
    the task vector) take no part, neither in P Q' nor in the mean, where the code has arbitrary
    ones. No more own directions than there are: the code's count can leave less than none to the
    sum. The code decomposes all matrices but text_projection, vocabulary tables too. Matrices are
    decomposed whole, however few own directions are kept: a drawn basis has others near the cut,
    and all are made as strong.
    """
    n = len(deltas)
    if deltas.dim() != 3 or not deltas.numel():
        return weighted_sum(deltas, [scale / n] * n)
    shared, own = _ranks(min(deltas.shape[1:]), n, common)
    sizes = [float(delta.norm()) for delta in deltas]
    common_part = _leading(added(deltas), shared, NOTHING * max(sizes))
    basis = common_part.left

    def apart(delta: Tensor) -> Tensor:
        return delta - basis @ (basis.T @ delta)

    def leading(rest: Tensor, size: float) -> Svd:
        return _leading(rest, own, ROUNDING * size)

    found = beside([common_part, *(map(leading, map(apart, deltas), sizes) if own else ())])
    if not found.values.any():
        return torch.zeros_like(deltas[0])
    kept = found.only(found.values > NOTHING * found.values.amax())
    turned: Tensor = polar(kept.left)[0] @ polar(kept.right)[0]
    return turned.mul_(scale * float(kept.values.double().mean()))
