"""TSV-M: the leading singular triplets of every task vector, their directions made orthogonal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mowmerge.methods.contracts import Matrices, PerModel, Unit
from mowmerge.methods.ops import spread, weighted_sum
from mowmerge.methods.ops.spectral import (
    NOTHING,
    Factors,
    Svd,
    beside,
    gram_numbers,
    polar,
    svd_numbers,
    svds,
)
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor


def _rank(most: int, n: int, density: float) -> int:
    """How many of a matrix's triplets are kept of each task vector."""
    return max(1, int(most * density) if density else most // n)


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """All kept triplets, and one decomposition; or those twice, and a Gram matrix."""
    least = min(shape)
    kept = sum(shape) * min(least, n * _rank(least, n, p["density"]))
    return kept + max(svd_numbers(shape), kept + gram_numbers(least))


def _decompositions(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> list[tuple[int, int]]:
    rows, columns = shape
    kept = n * _rank(min(shape), n, p["density"])
    return [(rows, columns)] * n + [(rows, kept), (kept, columns)]


@merge_method(
    paper="arXiv:2412.00081",
    scope="tensor",
    workspace=_workspace,
    decompositions=_decompositions,
    laws=("permutation", "scale"),
    exempt={"float64": "fp32's rounding turns directions whose singular values are close"},
)
def tsv_m(
    deltas: Matrices,
    *,
    weight: PerModel[float] = 1.0,
    density: Unit = 0.0,
    vocabulary: bool = False,
    scale: float = 1.0,
    factors: Sequence[Factors] | None = None,
) -> Tensor | Factors:
    """The sum of the task vectors' leading singular triplets, with directions made orthogonal.

    D_i = U_i S_i V_i', of each the first q triplets; U = polar([U_1 .. U_N]) and V =
    polar([V_1 .. V_N]) with polar(A) = P Q' for A = P S Q'; out = scale * U diag(weight_i S_i) V'.

    Shapes: deltas [N,m,k] -> delta [m,k]; of what is no matrix scale * the mean of weight_i D_i.

    Args:
        weight: coefficient of each task vector.
        density: share of a matrix's triplets kept of each task vector, at least one; 0 shares them
            out: 1/N.
        vocabulary: whether embeddings and output heads are matrices too.
        scale: factor on the result, the paper's alpha.

    Source: Task Singular Vectors, arXiv:2412.00081, TSV-M; reference code TSVM_utils.py.
    Differs: triplets without a singular value (1e-6 of the largest, or rounding) take no part, and
    polar is of the rank that there is: a task vector of zeros, of low rank, or there twice does not
    bend the others' directions by arbitrary ones. More models than triplets keep one each, the code
    none. The code decomposes all matrices but text_projection, vocabulary tables too.
    Adapters on the base are decomposed as the products that they are, all others whole, however few
    triplets are kept: a drawn basis has other directions near the cut, and they are all turned.
    """
    n, each = len(deltas), [float(w) for w in spread(weight, len(deltas))]
    if deltas.dim() != 3 or not deltas.numel():
        return weighted_sum(deltas, [scale * w / n for w in each])
    rank = _rank(min(deltas.shape[1:]), n, density)

    def leading(found: Svd, w: float) -> Svd:
        part = found.cut(min(rank, found.rank))
        return replace(part, values=part.values * w)

    kept = beside(map(leading, svds(deltas, factors), each))
    size = kept.values.abs()
    kept = kept.only(size > NOTHING * size.amax()) if len(size) else kept
    left, right = polar(kept.left)[0].mul_(kept.values * scale), polar(kept.right)[0]
    return (left, right) if factors is not None else left @ right
