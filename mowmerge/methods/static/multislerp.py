"""MultiSLERP: the mean direction of several models or task vectors, at their mean length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mowmerge.methods.contracts import Block, Extent, NonNegative, PerModel, Reduction
from mowmerge.methods.ops import Sum, directions, inner_products, settle, shares, weighted_sum
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch

CANCELLED = 1e-6  # length of the mean of unit vectors, relative to the weights, that counts as 0


def _inner_products(extents: Sequence[Extent]) -> Reduction:
    def products(block: Block) -> Tensor:
        return inner_products(block.values if block.base is None else block.values - block.base)

    found = yield Sum(products)
    return found.total


def _validate(parameters: Mapping[str, Any], n: int) -> None:
    shares(parameters["weight"], parameters["normalize"], n)


def _coefficients(products: Tensor, weight: list[float], mode: str, eps: float) -> list[float]:
    """What each vector is multiplied by: the result lies in their span."""
    norms, cosines = directions(products)
    given = torch.tensor(weight, dtype=norms.dtype)
    p = given * (norms / (norms + eps).where(norms > 0, 1.0))
    length = (p @ cosines @ p).clamp(min=0.0).sqrt()
    if length <= max(eps, CANCELLED * float(given.abs().sum())):
        return weight
    mean = p / length  # the mean direction, in the unit vectors
    if mode == "one_step":
        along = (cosines @ mean).clamp(-1.0, 1.0)
        angle = along.acos()
        p = p * (angle / angle.sin()).where((angle > 0) & (math.pi - angle > 1e-6), 1.0)
        tangent = p - (p @ along) * mean
        turn = (tangent @ cosines @ tangent).clamp(min=0.0).sqrt()
        mean = mean * turn.cos() + tangent * torch.sinc(turn / math.pi)
    return list((given @ norms * mean / norms.where(norms > 0, 1.0)).tolist())


@merge_method(
    paper="mergekit, multislerp",
    scope="tensor",
    laws={
        "idempotent": {"normalize": True},
        "permutation": {},
        "scale": {"eps": 0.0},
    },
    reduce=_inner_products,
    validate=_validate,
)
def multislerp(
    models: Tensor,
    base: Tensor | None = None,
    *,
    weight: PerModel[float] = 1.0,
    normalize: bool = True,
    mode: Literal["mean_direction", "one_step"] = "mean_direction",
    eps: NonNegative = 0.0,
    state: Tensor | None = None,
) -> Tensor:
    """The weighted mean direction of the models' tensors, times the weighted mean of their lengths.

    With x_i the models, or with a base their task vectors, each one vector, u_i = x_i / |x_i| and
    p_i the weights: s = sum_i p_i u_i; out = sum_i p_i |x_i| * s / |s| (+ base).

    Shapes: models [N,*S], base [*S] -> [*S].

    Args:
        weight: coefficient of each direction and length.
        normalize: divide the weights by their sum.
        mode: the mean direction as it is, or moved on the sphere by one step towards the Karcher
            mean.
        eps: added to each |x_i| in u_i, so that what is hardly longer has less of a direction; and
            |s| up to which the directions cancel.

    Raises:
        MethodError: the weights sum to zero (below 1e-12) and normalize is true.

    Source: mergekit's multislerp.
    Differs: the tangent step of mergekit's code is zero in exact arithmetic, and left out; one_step
    takes the step that was meant. eps is 1e-8 there. Where the directions cancel (|s| up to eps, or
    to 1e-6 of the weights) the result is the weighted mean for any number of models; mergekit
    refuses more than two, and so any recipe in which three models left a tensor as it was. A zero
    vector has no direction but counts in the mean length.
    """
    if state is None:
        state = settle(_inner_products, models, {}, base=base)
    vectors = models if base is None else models - base
    each = shares(weight, normalize, len(models))
    out = weighted_sum(vectors, _coefficients(state, each, mode, eps))
    return out if base is None else out.add_(base)
