"""STAR: every task vector cut to its leading singular triplets, its nuclear norm restored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mowmerge.methods.contracts import Matrices, PerModel, Unit
from mowmerge.methods.ops import spread, weighted_sum
from mowmerge.methods.ops.spectral import Factors, Svd, svd_numbers, svds
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch


def _truncated(found: Svd, density: float) -> Svd:
    """The least rank that reaches the share of the nuclear norm, stretched to all of it."""
    reached = found.values.double().cumsum(0)
    if not len(reached) or not reached[-1] > 0:
        return found.cut(0)
    rank = min(len(reached), 1 + int((reached < reached[-1] * density).sum()))
    kept = found.cut(rank)
    return Svd(kept.left, kept.values * float(reached[-1] / reached[rank - 1]), kept.right)


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """The mean, one decomposition, and what is kept of the one before."""
    return math.prod(shape) + svd_numbers(shape) + sum(shape) * min(shape)


@merge_method(
    paper="arXiv:2502.10339",
    scope="tensor",
    workspace=_workspace,
    decompositions=lambda shape, n, p: [(shape[0], shape[1])] * n,
    laws=("permutation",),
    exempt={"float64": "a rank that just reaches its share does in fp64 and not in fp32"},
)
def star(
    deltas: Matrices,
    *,
    weight: PerModel[float] = 1.0,
    density: Unit = 0.4,
    vocabulary: bool = False,
    scale: float = 1.0,
    factors: Sequence[Factors] | None = None,
) -> Tensor | Factors:
    """The mean of the task vectors, each cut to its leading singular triplets and stretched.

    D_i = U S V'; q the least rank with sum_{j<=q} S_j >= density * sum_j S_j; T_i = U_q S' V_q'
    with S' = S_q * sum_j S_j / sum_{j<=q} S_j; out = scale * mean_i weight_i T_i.

    Shapes: deltas [N,m,k] -> delta [m,k]; of what is no matrix scale * the mean of weight_i D_i.

    Args:
        weight: coefficient of each truncated task vector.
        density: share of the nuclear norm that the kept triplets reach, the paper's eta / 100; 1
            keeps all, 0 the first.
        vocabulary: whether embeddings and output heads are matrices too.
        scale: factor on the result.

    Source: STAR, arXiv:2502.10339, section 3; reference code STAR.py.
    Differs: a task vector of zeros is one, NaN there. Adapters on the base are decomposed as the
    products that they are, exactly, where the code draws a random basis; others whole, for the rank
    and the norm need all singular values. What is no matrix, and vocabulary tables, have the mean:
    the code only sees matrices of adapters.
    """
    n, each = len(deltas), [float(w) for w in spread(weight, len(deltas))]
    if deltas.dim() != 3 or not deltas.numel():
        return weighted_sum(deltas, [scale * w / n for w in each])

    def pair(found: Svd, w: float) -> Factors:
        part = _truncated(found, density)
        return part.left * (part.values * (scale * w / n)), part.right

    pairs = map(pair, svds(deltas, factors), each)
    if factors is not None:
        lefts, rights = zip(*pairs, strict=True)
        return torch.cat(lefts, 1), torch.cat(rights)
    left, right = next(pairs)
    total = left @ right
    for left, right in pairs:
        total.addmm_(left, right)
    return total
