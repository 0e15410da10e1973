"""PEM composition: arithmetic on adapters' factors, in which a negative weight unlearns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mowmerge.methods.contracts import Matrices, PerModel
from mowmerge.methods.ops import spread, weighted_sum
from mowmerge.methods.ops.spectral import Factors
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch


@merge_method(
    paper="arXiv:2306.14870",
    scope="tensor",
    decompositions=lambda shape, n, p: [],
    needs_factors=lambda p: p["space"] == "factor",
    laws=("permutation", "scale", "propagates"),
)
def pem_composition(
    deltas: Matrices,
    *,
    weight: PerModel[float] = 0.5,
    space: Literal["factor", "delta"] = "factor",
    vocabulary: bool = True,
    scale: float = 1.0,
    factors: Sequence[Factors] | None = None,
) -> Tensor | Factors:
    """The weighted sum of adapters of one rank, factor by factor, times scale.

    D_i = B_i A_i; B = sum_i weight_i B_i, A = sum_i |weight_i| A_i, out = scale * B A. Of two
    adapters at weights l and 1 - l it is the paper's sum; a weight below 0 adds the negation of an
    adapter, whose B has the other sign. Space delta: out = scale * sum_i weight_i B_i A_i, of the
    sum of the ranks.

    Shapes: deltas [N,m,k] -> delta [m,k], as a product; of what is no matrix, and without factors,
    scale * sum_i weight_i D_i.

    Args:
        weight: coefficient of each adapter, the paper's lambda; negative to take one away.
        space: factors on their own, which means adapters trained from one initialisation, or the
            products, which no other start can spoil.
        vocabulary: whether the adapters of embeddings and output heads are taken by factors too.
        scale: factor on the result.

    Source: PEM composition, arXiv:2306.14870, section 3; reference code negation.py.
    Differs: B is negated everywhere, where the code has A in two of its scripts: the same on its
    own, and another sum. An adapter's scale, alpha / r, is in B, where the code takes all to be
    equal. LoRA only; IA3 adapters are not read.
    """
    each = [float(w) for w in spread(weight, len(deltas))]
    if factors is None or deltas.dim() != 3:
        return weighted_sum(deltas, [scale * w for w in each])
    pairs = list(zip(factors, each, strict=True))
    if space == "delta":
        lefts = [left * (scale * w) for (left, _), w in pairs]
        return torch.cat(lefts, 1), torch.cat([right for _, right in factors])
    left = weighted_sum([left for left, _ in factors], [scale * w for w in each])
    return left, weighted_sum([right for _, right in factors], [abs(w) for w in each])
