"""Weighted average of models: model soups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mowmerge.methods.contracts import PerModel
from mowmerge.methods.ops import one_block, shares, weighted_sum
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor


def _validate(parameters: Mapping[str, Any], n: int) -> None:
    shares(parameters["weight"], parameters["normalize"], n)


@merge_method(
    paper="arXiv:2203.05482",
    workspace=one_block,
    laws={
        "identity": {},
        "idempotent": {"normalize": True},
        "permutation": {},
        "scale": {},
        "propagates": {},
    },
    validate=_validate,
)
def linear(models: Tensor, *, weight: PerModel[float] = 1.0, normalize: bool = True) -> Tensor:
    """The weighted average of the models: sum_i weight_i * W_i / sum_i weight_i.

    Shapes: models [N,*S] -> [*S].

    Args:
        weight: coefficient of each model; may be negative.
        normalize: divide by the sum of the weights; false gives the plain weighted sum.

    Raises:
        MethodError: the weights sum to zero (below 1e-12) and normalize is true.

    Source: Model Soups, arXiv:2203.05482 (uniform soup: equal weights).
    Differs: weights and sums are fp32 whatever the models' dtype; the reference scripts use the
    storage dtype, in which 0.3 is another number.
    """
    return weighted_sum(models, shares(weight, normalize, len(models)))
