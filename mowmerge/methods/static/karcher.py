"""Karcher mean: the point of the sphere nearest to the models' directions, at their mean length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mowmerge.methods.contracts import Count, Extent, MethodError, NonNegative, PerModel, Reduction
from mowmerge.methods.ops import Sum, directions, gram, one_block, settle, spread, weighted_sum
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch

CANCELLED = 1e-7  # length of a mean of unit vectors that counts as 0
OPPOSITE = 1e-6  # radians from the opposite point within which there is no way to the mean


def _inner_products(extents: Sequence[Extent]) -> Reduction:
    products = yield Sum(gram)
    return products.total


def _validate(parameters: Mapping[str, Any], n: int) -> None:
    if math.fsum(spread(parameters["weight"], n)) <= 0:
        raise MethodError("every weight is 0")


def _mean(cosines: Tensor, share: Tensor, max_iter: int, tol: float) -> Tensor:
    """The Karcher mean of unit vectors, as coefficients on them: every step stays in their span."""

    def length(of: Tensor) -> float:
        return math.sqrt(max(0.0, float(of @ cosines @ of)))

    mean = share.clone()
    if length(mean) <= max(tol, CANCELLED):  # they cancel: start at the first of the heaviest
        mean = torch.zeros_like(share)
        mean[int(share.argmax())] = 1.0
    mean = mean / length(mean)
    for _ in range(max_iter):
        along = (cosines @ mean).clamp(-1.0, 1.0)
        angle = along.acos()
        used = (angle > 0) & (angle >= tol) & (math.pi - angle >= OPPOSITE)
        pull = (share * angle / angle.sin().where(used, 1.0)).where(used, 0.0)
        step = pull - (pull @ along) * mean
        turn = length(step)
        if turn <= tol:
            break
        mean = math.cos(turn) * mean + math.sin(turn) / turn * step
        mean = mean / length(mean)
    return mean


@merge_method(
    paper="Karcher 1977, doi:10.1002/cpa.3160300502",
    scope="tensor",
    workspace=one_block,
    laws={"idempotent": {}, "permutation": {}, "scale": {"eps": 0.0}},
    reduce=_inner_products,
    validate=_validate,
)
def karcher(
    models: Tensor,
    *,
    weight: PerModel[NonNegative] = 1.0,
    max_iter: Count = 10,
    tol: NonNegative = 1e-5,
    eps: NonNegative = 0.0,
    state: Tensor | None = None,
) -> Tensor:
    """The Riemannian mean of the models' directions on the unit sphere, times their mean length.

    With x_i a tensor as one vector, u_i = x_i / |x_i|, a_i = weight_i / sum_j weight_j: from the
    normalised sum_i a_i u_i, steps along T = sum_i a_i log_m(u_i), with log_m(u) = O/sin O *
    (u - cos O m) and cos O = <m,u>: m <- cos|T| m + sin|T| T/|T|. out = sum_i a_i |x_i| * m.

    Shapes: models [N,*S] -> [*S].

    Args:
        weight: share of each model in the mean.
        max_iter: the most steps taken; 0 gives the normalised mean direction.
        tol: a step or an angle below it is none, in radians.
        eps: length up to which a tensor has no direction, as a vector of zeros has none.

    Raises:
        MethodError: every weight is 0.

    Source: Karcher 1977; mergekit's karcher.
    Differs: the steps are taken in the span of the models, from their inner products in fp64, so
    that two passes will do whatever max_iter. Its tol is eps too there, and where no tensor is
    longer the result is 0, here their mean. A direction opposite to the mean is left out of a step.
    """
    if state is None:
        state = settle(_inner_products, models, {})
    norms, cosines = directions(state)
    given = torch.tensor([float(w) for w in spread(weight, len(models))], dtype=norms.dtype)
    given /= given.sum()
    share = given.where(norms > eps, 0.0)
    if share.sum() <= 0:
        return weighted_sum(models, given.tolist())
    mean = _mean(cosines, share / share.sum(), max_iter, tol)
    scaled = (given @ norms) * mean / norms.where(norms > 0, 1.0)
    return weighted_sum(models, scaled.tolist())
