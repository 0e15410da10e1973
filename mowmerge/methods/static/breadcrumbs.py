"""Breadcrumbs: drop the largest and the smallest of each task vector, then merge the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, inf, prod
from typing import Any, Literal

from mowmerge.methods.contracts import Block, Extent, PerModel, Reduction, Unit
from mowmerge.methods.ops import (
    Edge,
    Sum,
    edges,
    fused,
    keep_beyond,
    l1_norms,
    restoring,
    settle,
    spread,
)
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch

Band = Sequence[Sequence[Edge]]  # where what is kept, and what is dropped above, ends
State = tuple[Band, Sequence[float]]


def _counts(density: float, gamma: float, total: int) -> tuple[int, int]:
    """How many entries of `total` are kept, and how many above them are dropped; a single number is
    not ranked."""
    keep = int(density * total) if total > 1 else ceil(density)
    return keep, min(int(gamma * total), total - keep)


def _by_tensor(deltas: Tensor, start: int, band: Band) -> list[Tensor]:
    """New D_i with what lies outside the band at 0."""
    found = []
    for delta, kept, above in zip(deltas, *band, strict=True):
        found.append(keep_beyond(delta, kept, start))
        if above.least < inf:
            found[-1] -= keep_beyond(delta, above, start)
    return found


def _by_row(deltas: Tensor, density: Sequence[float], gamma: Sequence[float]) -> list[Tensor]:
    """The same with a band for each vector along the last dimension."""
    found, width = [], max(1, deltas.shape[-1]) if deltas.dim() > 1 else 1
    for delta, d, g in zip(deltas, density, gamma, strict=True):
        rows = delta.reshape(-1, width)
        keep, above = _counts(d, g, width)
        order = rows.abs().argsort(dim=-1, stable=True)
        inside = order[:, width - above - keep : width - above]
        kept = torch.zeros_like(rows).scatter_(-1, inside, rows.gather(-1, inside))
        found.append(kept.view(delta.shape))
    return found


def _kept(deltas: Tensor, start: int, p: Any, band: Band) -> list[Tensor]:
    if p["group"] == "row":
        return _by_row(deltas, p["density"], p["gamma"])
    return _by_tensor(deltas, start, band)


def _statistics(extents: Sequence[Extent]) -> Reduction:
    """The bands of the tensor, and factors of the L1 rescale, where they are asked for."""
    p, total = extents[0].parameters, extents[0].numel
    n = len(p["density"])
    band, factor = [[Edge(0.0)] * n, [Edge(inf)] * n], [1.0] * n
    if p["group"] == "tensor" and total:
        counts = [_counts(d, g, total) for d, g in zip(p["density"], p["gamma"], strict=True)]
        above = [a if keep else 0 for keep, a in counts]
        ranks = [a + keep for a, (keep, _) in zip(above, counts, strict=True)], above
        band = yield from edges(ranks, total, last=True)

    def masses(block: Block) -> Tensor:
        inside = _kept(block.values, block.rng.start, p, band)
        return torch.stack([l1_norms(block.values), l1_norms(inside)])

    if p["rescale"]:
        found = yield Sum(masses)
        factor = restoring(*found.total)
    return band, factor


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """What is kept, and sums; by rows the order of one model's entries, as 8 bytes."""
    return (n + (5 if p["group"] == "row" else 2)) * prod(shape)


@merge_method(
    paper="arXiv:2312.06795",
    scope=lambda p: "row" if p["group"] == "row" else "tensor",
    workspace=_workspace,
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
    start: int = 0,
    state: State | None = None,
) -> Tensor:
    """The sum of task vectors of which neither the largest nor the smallest entries are kept.

    Of N entries by magnitude the floor(gamma_i N) largest are dropped, the next floor(density_i N)
    kept, the rest dropped: T_i; of equal ones the later by index counts as the larger. out = scale
    * sum_i weight_i T_i, or with elect only over the weight_i T_i of the elected sign.

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
    empties small kernels (group: row).
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
    return fused(_kept(deltas, start, p, band), factor, spread(weight, n), elect, aggregate, scale)
