"""Iso-C: the sum of the task vectors with all its singular values made equal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mowmerge.methods.contracts import Matrices
from mowmerge.methods.ops import added, weighted_sum
from mowmerge.methods.ops.spectral import COLUMNS, gram_numbers, polar
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """The sum and one task vector, then its Gram matrix, or the polar factor and what makes it."""
    least = min(shape)
    factor = math.prod(shape) + 2 * least**2 + 4 * COLUMNS * least
    return math.prod(shape) + max(2 * math.prod(shape), gram_numbers(least), factor)


@merge_method(
    paper="arXiv:2502.04959",
    scope="tensor",
    workspace=_workspace,
    decompositions=lambda shape, n, p: [(shape[0], shape[1])],
    laws=("permutation", "scale"),
)
def iso_c(deltas: Matrices, *, vocabulary: bool = False, scale: float = 1.0) -> Tensor:
    """The sum of the task vectors, isotropic: each of its directions as strong as the mean.

    sum_i D_i = U S V'; out = scale * mean(S) * U V'.

    Shapes: deltas [N,m,k] -> delta [m,k]; of what is no matrix scale * the mean of D_i.

    Args:
        vocabulary: whether embeddings and output heads are matrices too.
        scale: factor on the result, the paper's alpha; it is tuned there, to 1.3 with 8 models and
            less with more.

    Source: Iso-C, arXiv:2502.04959, section 4; reference code iso.py.
    Differs: directions without a singular value (below 1e-6 of the largest) take no part, neither
    in U V' nor in the mean: of a sum of low rank the code strengthens arbitrary ones. The
    code decomposes all matrices but text_projection, vocabulary tables too.
    """
    if deltas.dim() != 3 or not deltas.numel():
        return weighted_sum(deltas, [scale / len(deltas)] * len(deltas))
    factor, values = polar(added(deltas))
    return factor.mul_(scale * float(values.mean()) if len(values) else 0.0)
