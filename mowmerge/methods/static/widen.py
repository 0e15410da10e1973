"""WIDEN: weigh each column of the task vectors by how far its length and direction moved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mowmerge.methods.contracts import Block, Extent, NonNegative, Reduction
from mowmerge.methods.ops import Listed, Sum, settle
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch


def _moments(models: Tensor, base: Tensor | None, dim: int) -> Tensor:
    """|W_i|^2, <W_i, W_0> and |W_0|^2 along a dimension of [n,*B]: [2n+1,*], in fp64."""
    assert base is not None
    wide, start = models.double(), base.double()[None]
    pairs = ((wide, wide), (wide, start), (start, start))
    return torch.cat([(one * other).sum(dim) for one, other in pairs])


def _shifts(moments: Tensor) -> Tensor:
    """How far each model's columns moved in length, and in direction (1 - cosine): [2,n,*]."""
    n = len(moments) // 2
    squares, inner, base = moments[:n], moments[n:-1], moments[-1]
    both = (squares * base).sqrt()
    turned = (1.0 - inner / both.where(both > 0, 1.0)).where(both > 0, 1.0)
    longer = (squares.sqrt() - base.sqrt()).abs()
    return torch.stack([longer, turned.where((squares > 0) | (base > 0), 0.0)])


def _score(ranks: Tensor, above: float, calibration: float) -> Tensor:
    """The softmax over the models, and `calibration` where a rank beats the mean of all, averaged
    over length and direction: of ranks [2,n,columns] a weight [n,columns]."""
    columns = ranks.shape[-1]
    share = ranks / max(1, columns)
    beats = share > above * (columns - 1) / (2 * max(1, columns))
    return share.softmax(1).where(~beats, calibration).mean(0)


def _ranks(shifts: Tensor) -> Tensor:
    """How many of a row are below each entry; of equal ones the first is."""
    order = shifts.sort(dim=-1, stable=True).indices
    places = torch.arange(shifts.shape[-1], dtype=shifts.dtype).expand_as(shifts)
    return torch.empty_like(shifts).scatter_(-1, order, places)


def _statistics(extents: Sequence[Extent]) -> Reduction:
    """The weight of each column of each task vector [n,columns], or of each token of an embedding
    [n,tokens]; of a vector's, the mean size."""
    (extent,) = extents
    p, shape = extent.parameters, extent.shape
    if len(shape) < 2:

        def sizes(block: Block) -> Tensor:
            assert block.base is not None
            return (block.values - block.base).abs().double().flatten(1).sum(1)

        found = yield Sum(sizes)
        return found.total / max(1, extent.numel)
    tokens = _by_token(extent.role, len(shape))
    if tokens:
        moments = yield Listed(lambda b: _moments(b.values, b.base, -1))
    else:
        moments = yield Sum(lambda b: _moments(b.values, b.base, 1))
    weight = _score(_ranks(_shifts(moments.total).flatten(2)), p["above"], p["calibration"])
    return weight if tokens else weight.view(len(weight), *shape[1:])


def _by_token(role: str, dimensions: int) -> bool:
    return role == "embedding" and dimensions == 2


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """Task vectors, their weights and the products."""
    return (2 * n + 1) * math.prod(shape)


@merge_method(
    paper="arXiv:2408.03092",
    scope="row",
    workspace=_workspace,
    laws=("permutation",),
    reduce=_statistics,
)
def widen(
    models: Tensor,
    base: Tensor,
    *,
    above: NonNegative = 1.0,
    calibration: NonNegative = 1.0,
    role: str = "",
    start: int = 0,
    state: Tensor | None = None,
) -> Tensor:
    """The base and the task vectors, each column weighed by the ranks of its changes.

    Of each column c of model i: m = | |W_i| - |W_0| |, o = 1 - cos(W_i, W_0); R^m and R^o their
    ranks in the matrix, equal ones in order, over the number of columns, from 0 up; s = softmax
    over the models of R, or calibration where R > above * the mean of model i; out = W_0 + sum_i
    (s^m + s^o)/2 * D_i. The columns of an embedding are its tokens, which it has as rows.

    Shapes: models [N,m,k], base [m,k] -> [m,k]; in a vector each entry's |D_i| is its R for both.

    Args:
        above: how far above its model's mean a rank must lie to count in full; none does from 2 on.
        calibration: the score of those that do.

    Source: WIDEN, arXiv:2408.03092; reference code merging_methods.py.
    Differs: a column that is zero in both has not turned, one that is zero in one only has turned
    by 1; both give NaN there. A kernel's columns run along its first dimension.
    """
    if state is None:
        options: dict[str, Any] = {"above": above, "calibration": calibration}
        state = settle(_statistics, models, options, base=base, rows=True, role=role)
    deltas = models - base
    if models.dim() < 3:
        size = deltas.abs().view(len(deltas), -1)
        beats = size > above * state.to(size)[:, None]
        weight = size.softmax(0).where(~beats, calibration).view_as(deltas)
    elif _by_token(role, models.dim() - 1):
        first = start // max(1, base.shape[1])
        weight = state[:, first : first + len(base), None].to(deltas)
    else:
        weight = state.to(deltas)[:, None]
    return base + (weight * deltas).sum(0)
