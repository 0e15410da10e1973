"""WIDEN: weigh each column of the task vectors by how far its length and direction moved."""

from __future__ import annotations

from collections.abc import Sequence

from mowmerge.methods.contracts import Block, Extent, NonNegative, Reduction
from mowmerge.methods.ops import Sum, settle
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch


def _moments(block: Block) -> Tensor:
    """Of each column |W_i|^2, <W_i, W_0>, |W_0|^2: [2n+1, columns] in fp64."""
    assert block.base is not None
    models, base = block.values.double(), block.base.double()
    return torch.cat([
        (models * models).sum(1), (models * base).sum(1), (base * base).sum(0)[None]
    ])  # fmt: skip


def _shifts(moments: Tensor) -> tuple[Tensor, Tensor]:
    """How far each model's columns moved in length, and in direction (1 - cosine)."""
    n = len(moments) // 2
    lengths, inner, base = moments[:n].sqrt(), moments[n:-1], moments[-1].sqrt()
    both = lengths * base
    turned = (1.0 - inner / both.where(both > 0, 1.0)).where(both > 0, 1.0)
    return (lengths - base).abs(), turned.where((lengths > 0) | (base > 0), 0.0)


def _importance(scores: Tensor, above: float, calibration: float) -> Tensor:
    """The softmax over the models [n,c], and `calibration` where a score beats its model's mean."""
    beats = scores > above * scores.mean(1, keepdim=True)
    return scores.softmax(0).where(~beats, calibration)


def _ranks(shift: Tensor) -> Tensor:
    """The rank of each entry of a row, from 0 up, over how many there are."""
    order = shift.sort(dim=1, stable=True).indices
    places = torch.arange(shift.shape[1], dtype=shift.dtype).expand_as(shift)
    return torch.empty_like(shift).scatter_(1, order, places) / shift.shape[1]


def _weights(extents: Sequence[Extent]) -> Reduction:
    """The weight of each column of each task vector [n,columns]; of a vector's, the mean size."""
    (extent,) = extents
    p = extent.parameters
    if len(extent.shape) < 2:

        def sizes(block: Block) -> Tensor:
            assert block.base is not None
            return (block.values - block.base).abs().double().flatten(1).sum(1)

        found = yield Sum(sizes)
        return found.total / max(1, extent.numel)
    moments = yield Sum(_moments)
    each = [
        _importance(_ranks(shift.flatten(1)), p["above"], p["calibration"]).view_as(shift)
        for shift in _shifts(moments.total)
    ]
    return (each[0] + each[1]) / 2


@merge_method(
    paper="arXiv:2408.03092",
    scope="row",
    laws=("permutation",),
    reduce=_weights,
)
def widen(
    models: Tensor,
    base: Tensor,
    *,
    above: NonNegative = 1.0,
    calibration: NonNegative = 1.0,
    state: Tensor | None = None,
) -> Tensor:
    """The base and the task vectors, each column weighed by the ranks of its changes.

    Of each column c of model i: m = | |W_i| - |W_0| |, o = 1 - cos(W_i, W_0); R^m and R^o their
    ranks in the matrix over the number of columns, from 0 up; s = softmax over the models of R, or
    calibration where R > above * the mean of model i; out = W_0 + sum_i (s^m + s^o)/2 * D_i.

    Shapes: models [N,m,k], base [m,k] -> [m,k]; in a vector each entry's |D_i| is its R for both.

    Args:
        above: how far above its model's mean a rank must lie to count in full; none does from 2 on.
        calibration: the score of those that do.

    Source: WIDEN, arXiv:2408.03092; reference code merging_methods.py.
    Differs: a column that is zero in both has not turned, one that is zero in one only has turned
    by 1; both give NaN there. A kernel's columns run along its first dimension. The code transposes
    the token embedding, so that its columns are tokens; here they are its features.
    """
    if state is None:
        options = {"above": above, "calibration": calibration}
        state = settle(_weights, models, options, base=base, rows=True)
    deltas = models - base
    if models.dim() < 3:
        size = deltas.abs().view(len(deltas), -1)
        beats = size > above * state.to(size)[:, None]
        weight = size.softmax(0).where(~beats, calibration).view_as(deltas)
    else:
        weight = state.to(deltas)[:, None]
    return base + (weight * deltas).sum(0)
