"""Spherical interpolation between two models."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mowmerge.methods.contracts import Extent, NonNegative, Reduction, Unit
from mowmerge.methods.ops import Sum, gram, one_block, settle, weighted_sum
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor


def _inner_products(extents: Sequence[Extent]) -> Reduction:
    products: Sum = yield Sum(gram)
    return products.total


@merge_method(
    paper="Shoemake 1985, doi:10.1145/325334.325242",
    scope="tensor",
    models=2,
    workspace=one_block,
    laws=("idempotent", "scale", "propagates"),
    reduce=_inner_products,
)
def slerp(
    models: Tensor,
    *,
    t: float = 0.5,
    dot_threshold: Unit = 0.9995,
    eps: NonNegative = 1e-8,
    state: Tensor | None = None,
) -> Tensor:
    """The point at share t of the great arc from the first model's tensor a to the second's b.

    cos O = <a,b> / (|a| |b|); out = sin((1-t) O)/sin O * a + sin(t O)/sin O * b, with each tensor
    flattened to one vector; (1-t) a + t b where |cos O| > dot_threshold, or > 1 - 1e-9.

    Shapes: models [2,*S] -> [*S].

    Args:
        t: 0 gives the first model, 1 the second; outside 0..1 extrapolates.
        dot_threshold: |cosine| above which interpolation is linear.
        eps: a norm at or below it counts as zero: that vector is not normalised.

    Source: Shoemake 1985, applied to tensors as the community does.
    Differs: norms and the cosine are fp64 sums over fixed runs. As in the known tools the vectors
    combined are the unnormalised ones, so the result lies on a sphere only where |a| = |b|.
    """
    products = settle(_inner_products, models, {}) if state is None else state
    (aa, ab), (_, bb) = products.tolist()
    norms = [math.sqrt(s) if math.sqrt(s) > eps else 1.0 for s in (aa, bb)]
    cosine = max(-1.0, min(1.0, ab / (norms[0] * norms[1])))
    if abs(cosine) > min(dot_threshold, 1.0 - 1e-9):
        return weighted_sum(models, [1.0 - t, t])
    angle = math.acos(cosine)
    ends = [math.sin((1.0 - t) * angle), math.sin(t * angle)]
    return weighted_sum(models, [end / math.sin(angle) for end in ends])
