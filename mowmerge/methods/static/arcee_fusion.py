"""Arcee Fusion: take from the other model only the weights whose change stands out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mowmerge.methods.contracts import Block, Extent, NonNegative, Reduction
from mowmerge.methods.ops import TALLY, kth_largest, settle
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor

EPS = 1e-8  # added to probabilities, so that their logarithm is finite


def _importance(model: Tensor, base: Tensor) -> Tensor:
    """|W - base| times the divergence of the softmax of its row from that of the base's."""
    rows = model[None] if model.dim() == 0 else model
    p = rows.double().softmax(-1).add_(EPS)
    q = base.view_as(rows).double().softmax(-1).add_(EPS)
    divergence = (p * (p / q).log_()).sum(-1, keepdim=True)
    return (rows - base.view_as(rows)).abs_().mul_(divergence.to(model.dtype)).view_as(model)


def _threshold(extents: Sequence[Extent]) -> Reduction:
    """The median of the importance, and iqr times what lies between its quartiles above that."""
    total = extents[0].numel
    if not total:
        return 0.0
    ranks = [total - int(q * (total - 1)) for q in (0.25, 0.5, 0.75)]

    def scores(block: Block) -> list[Tensor]:
        assert block.base is not None
        return [_importance(block.values[0], block.base)] * 3

    low, middle, high = yield from kth_largest(ranks, total, scores, signed=True)
    return middle + extents[0].parameters["iqr"] * (high - low)


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """Probabilities of both in fp64, their ratio and what comes of it; or three counts."""
    size = math.prod(shape)
    return max(8 * size, 4 * size + 3 * TALLY)


@merge_method(
    paper="mergekit, arcee_fusion",
    scope="row",
    workspace=_workspace,
    models=1,
    reduce=_threshold,
)
def arcee_fusion(
    models: Tensor, base: Tensor, *, iqr: NonNegative = 1.5, state: float | None = None
) -> Tensor:
    """The base, with the model's own weight where the importance of its change is an outlier.

    importance = |W - base| * KL(softmax(W's row) || softmax(base's row)), rows along the last
    dimension; taken where it reaches median + iqr * (upper - lower quartile) of the tensor.

    Shapes: models [1,*S], base [*S] -> [*S].

    Args:
        iqr: how many interquartile ranges above the median the threshold lies.

    Source: mergekit's arcee_fusion.
    Differs: quantiles are exact (the value at floor(q (N-1)) in order); mergekit samples a million
    entries, twice, without a seed. Weights are selected and not added up. Where three quarters of
    the importances are 0 the threshold is 0, and the whole tensor is the model's, as in mergekit.
    """
    if state is None:
        state = settle(_threshold, models, {"iqr": iqr}, base=base, rows=True)
    (model,) = models
    out: Tensor = model.where(_importance(model, base) >= state, base)
    return out
