"""Breadcrumbs: drop the largest and the smallest of each task vector, then merge the rest."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, inf
from typing import Any, Literal

from mowmerge.methods.contracts import Extent, PerModel, Reduction, Unit
from mowmerge.methods.ops import (
    Sum,
    fused,
    keep_above,
    kth_largest,
    l1_norms,
    restoring,
    settle,
    spread,
)
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch

Band = tuple[Sequence[float], Sequence[float]]  # the least and the largest magnitude kept
State = tuple[Band, Sequence[float]]


def _counts(density: float, gamma: float, total: int) -> tuple[int, int]:
    """How many entries of `total` are kept, and how many above them are dropped; a single number is
    not ranked."""
    keep = int(density * total) if total > 1 else ceil(density)
    return keep, min(int(gamma * total), total - keep)


def _by_tensor(deltas: Tensor, band: Band) -> list[Tensor]:
    """New D_i with what lies outside the band at 0."""
    found = []
    for delta, least, largest in zip(deltas, *band, strict=True):
        kept = keep_above(delta, least)
        if largest < inf:
            kept -= torch.nn.functional.hardshrink(delta, largest)
        found.append(kept)
    return found


def _by_row(deltas: Tensor, density: Sequence[float], gamma: Sequence[float]) -> list[Tensor]:
    """The same with a band for each vector along the last dimension."""
    found = []
    for delta, d, g in zip(deltas, density, gamma, strict=True):
        keep, above = _counts(d, g, delta.shape[-1] if delta.dim() else 1)
        if not keep or not delta.numel():
            found.append(torch.zeros_like(delta))
            continue
        size = delta.abs().reshape(-1, delta.shape[-1] if delta.dim() else 1)
        order = size.sort(-1, descending=True).values
        inside = (size <= order[:, above, None]) & (size >= order[:, above + keep - 1, None])
        found.append(delta * inside.view(delta.shape))
    return found


def _kept(deltas: Tensor, p: Any, band: Band) -> list[Tensor]:
    if p["group"] == "row":
        return _by_row(deltas, p["density"], p["gamma"])
    return _by_tensor(deltas, band)


def _statistics(extents: Sequence[Extent]) -> Reduction:
    """The bands of the tensor, and factors of the L1 rescale, where they are asked for."""
    p, total = extents[0].parameters, extents[0].numel
    n = len(p["density"])
    band, factor = ([0.0] * n, [inf] * n), [1.0] * n
    if p["group"] == "tensor" and total and min(p["density"]) < 1:
        counts = [_counts(d, g, total) for d, g in zip(p["density"], p["gamma"], strict=True)]
        largest = yield from kth_largest([a + 1 if a and k else 0 for k, a in counts], total)
        least = yield from kth_largest([a + k if k else 0 for k, a in counts], total)
        band = least, largest
    if p["rescale"]:
        masses = yield Sum(
            lambda b: torch.stack([l1_norms(b.values), l1_norms(_kept(b.values, p, band))])
        )
        factor = restoring(*masses.total)
    return band, factor


@merge_method(
    paper="arXiv:2312.06795",
    scope=lambda p: "row" if p["group"] == "row" else "tensor",
    laws=("permutation", "scale"),
    reduce=_statistics,
)
def breadcrumbs(
    deltas: Tensor,
    *,
    weight: PerModel[float] = 1.0,
    density: PerModel[Unit] = 0.2,
    gamma: PerModel[Unit] = 0.1,
    elect: Literal["none", "mass", "count"] = "none",
    aggregate: Literal["mean", "sum"] = "sum",
    group: Literal["tensor", "row"] = "tensor",
    rescale: bool = False,
    scale: float = 1.0,
    state: State | None = None,
) -> Tensor:
    """The sum of task vectors of which neither the largest nor the smallest entries are kept.

    Of N entries by magnitude the floor(gamma_i N) largest are dropped, the next floor(density_i N)
    kept, the rest dropped: T_i. out = scale * sum_i weight_i T_i, or with elect only over the
    weight_i T_i of the elected sign.

    Shapes: deltas [N,*S] -> delta [*S].

    Args:
        weight: coefficient of each task vector.
        density: share of entries kept, of a single number all; 1 keeps all, 0 none.
        gamma: share of entries dropped as outliers above them; what density leaves, at most.
        elect: add everything (none), or elect a sign by the sum (mass) or by number (count) and
            keep what agrees, as TIES does; an even vote counts as plus.
        aggregate: sum, or mean by weight (of the entries that agree, after an election).
        group: what is ranked together: a tensor, or each vector along its last dimension.
        rescale: multiply each task vector that is left so that its L1 norm is what it was.
        scale: factor on the result.

    Source: Model Breadcrumbs, arXiv:2312.06795; reference code task_vectors.py, whose example gives
    the defaults of density and gamma.
    Differs: a tensor is ranked as a whole, as in the paper; the released code ranks rows, which
    empties small kernels (group: row). Entries equal to the first or the last kept are kept too.
    mergekit before 0.1.5 zeroes tensors in which floor(gamma N) is 0; this does not.
    """
    n = len(deltas)
    p = {
        "density": spread(density, n), "gamma": spread(gamma, n), "group": group,
        "rescale": rescale,
    }  # fmt: skip
    if state is None:
        state = settle(_statistics, deltas, p, rows=group == "row")
    band, factor = state
    return fused(_kept(deltas, p, band), factor, spread(weight, n), elect, aggregate, scale)
