"""STAR: every task vector cut to its leading singular triplets, its nuclear norm restored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mowmerge.methods.contracts import PerModel, Unit
from mowmerge.methods.ops import spread, weighted_sum
from mowmerge.methods.ops.spectral import Factors, Svd, svds
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
    """The mean, one decomposition, and what is kept of it."""
    return 3 * shape[0] * shape[1] + 3 * sum(shape) * min(shape)


@merge_method(
    paper="arXiv:2502.10339",
    scope="tensor",
    workspace=_workspace,
    decompositions=lambda shape, n, p: [(shape[0], shape[1])] * n,
    laws=("permutation",),
    exempt={"float64": "a rank that just reaches its share does in fp64 and not in fp32"},
)
def star(
    deltas: Tensor,
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
    kept = (_truncated(found, density) for found in svds(deltas, factors))
    pairs = (
        (part.left * (part.values * (scale * w / n)), part.right)
        for part, w in zip(kept, each, strict=True)
    )
    if factors is not None:
        lefts, rights = zip(*pairs, strict=True)
        return torch.cat(lefts, 1), torch.cat(rights)
    total = torch.zeros_like(deltas[0])
    for left, right in pairs:
        total.addmm_(left, right)
    return total
