"""Model Stock: how far to go from the base to the experts' mean, from the angle between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

from mowmerge.methods.contracts import Extent, NonNegative, Reduction
from mowmerge.methods.ops import Sum, gram, settle, weighted_sum
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch


def _inner_products(extents: Sequence[Extent]) -> Reduction:
    if extents[0].parameters["filter_wise"]:
        return None
    products: Sum = yield Sum(gram)
    return products.total


def _row_products(rows: Tensor) -> Tensor:
    """<D_i, D_j> of every row: [N,rows,k] -> [rows,N,N] in fp64."""
    wide = rows.double()
    return torch.stack([torch.stack([(a * b).sum(-1) for b in wide], -1) for a in wide], -2)


def _share(products: Tensor, average: str, clamp: bool, floor: float) -> Tensor:
    """t of each group: [groups,N,N] -> [groups]; equation 4 of the paper."""
    n, norms = products.shape[-1], products.diagonal(dim1=-2, dim2=-1).sqrt()
    pairs = []
    for i, j in combinations(range(n), 2):
        length = (norms[:, i] * norms[:, j]).clamp(min=floor)
        pairs.append(products[:, i, j] / length.where(length > 0, 1.0))
    cosines = torch.stack(pairs).clamp(-1.0, 1.0)
    c = cosines.mean(0) if average == "cosine" else cosines.acos().mean(0).cos()
    c = c.clamp(min=0.0) if clamp else c
    below = 1.0 + (n - 1) * c
    return (n * c / below).where(below.abs() > 1e-6, 0.0)


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """The sum; of rows all in fp64."""
    return (2 * n + 2 if p["filter_wise"] else 1) * math.prod(shape)


@merge_method(
    paper="arXiv:2403.19522",
    scope=lambda p: "row" if p["filter_wise"] else "tensor",
    workspace=_workspace,
    at_least=2,
    laws={
        "idempotent": {"floor": 0.0},
        "permutation": {},
        "scale": {"floor": 0.0},
        "propagates": {},
    },
    reduce=_inner_products,
)
def model_stock(
    deltas: Tensor,
    *,
    filter_wise: bool = False,
    clamp: bool = True,
    average: Literal["cosine", "angle"] = "cosine",
    floor: NonNegative = 0.0,
    state: Tensor | None = None,
) -> Tensor:
    """The share t of the mean task vector: t = N c / (1 + (N-1) c), c the mean pairwise cosine.

    Shapes: deltas [N,*S] -> delta [*S]; N >= 2.

    Args:
        filter_wise: one t a row (output filter) instead of one a tensor; 1-D tensors are one row.
        clamp: keep t in 0..1; without it a negative c extrapolates, more and more towards
            c = -1/(N-1), within 1e-6 of which t is 0.
        average: the mean over pairs, of the cosines or of the angles.
        floor: least product of two lengths: the cosine of shorter task vectors is smaller.

    Source: Model Stock, arXiv:2403.19522, eq. 4; no reference code was released.
    Differs: t is clamped by default, as the paper assumes c > 0. The cosine with a zero task vector
    is 0, decided by exact zero in fp64 and not by a small constant, which mergekit has: its floor
    is 1e-6, which shrinks t where task vectors of a tensor are shorter than 1e-3.
    """
    n = len(deltas)
    if not filter_wise:
        if state is None:
            state = settle(_inner_products, deltas, {"filter_wise": False})
        share = float(_share(state[None], average, clamp, floor)) / n
        return weighted_sum(deltas, [share] * n)
    rows = deltas.flatten(2) if deltas.dim() > 2 else deltas.reshape(n, 1, -1)
    t = _share(_row_products(rows), average, clamp, floor) / n
    total = weighted_sum(rows, [1.0] * n)
    merged: Tensor = total * t.to(total.dtype)[:, None]
    return merged.reshape(deltas.shape[1:])
