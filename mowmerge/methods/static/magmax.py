"""MagMax: of all task vectors, the entry of largest magnitude."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from mowmerge.methods.contracts import PerModel
from mowmerge.methods.ops import added, spread
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """The largest and what it is compared in; for a mean all magnitudes, ties and parts."""
    return (2 * n + 3 if p["tie"] == "mean" else 6) * math.prod(shape)


@merge_method(
    paper="arXiv:2407.06322",
    workspace=_workspace,
    laws={
        "idempotent": {"weight": 1.0, "scale": 1.0},
        "permutation": {"tie": "positive"},
        "scale": {},
    },
)
def magmax(
    deltas: Tensor,
    *,
    weight: PerModel[float] = 1.0,
    tie: Literal["last", "first", "positive", "mean"] = "last",
    scale: float = 0.5,
) -> Tensor:
    """The entry of largest magnitude among the task vectors, times scale.

    out = scale * T_k with k = argmax_i |T_i| for each entry, T_i = weight_i * D_i.

    Shapes: deltas [N,*S] -> delta [*S].

    Args:
        weight: coefficient of each task vector, before they are compared.
        tie: of equal magnitudes, the last model's, the first one's, the positive one or their mean.
        scale: factor on the result, the paper's lambda.

    Source: MagMax, arXiv:2407.06322, eq. 3; reference code task_vectors.py, whose scale is the
    default.
    Differs: none; weight and tie are additions. The paper's experts are fine-tuned one after
    another.
    """
    each = spread(weight, len(deltas))
    parts = [d if w == 1 else d * w for d, w in zip(deltas, each, strict=True)]
    if tie == "mean":
        size = torch.stack([part.abs() for part in parts]).amax(0)
        ties = [(part.abs() == size).to(part.dtype) for part in parts]
        shares = [part * one for part, one in zip(parts, ties, strict=True)]
        return added(shares).div_(added(ties)).mul_(scale)
    largest: Tensor = parts[0]
    for other in parts[1:]:
        size, known = other.abs(), largest.abs()
        if tie == "positive":
            other = torch.where(size == known, torch.maximum(other, largest), other)
        wins = size > known if tie == "first" else size >= known
        largest = torch.where(wins, other, largest)
    return largest * scale
