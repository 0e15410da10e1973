"""Consensus: of the merged task vector, keep the entries that matter to several tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mowmerge.methods.contracts import (
    Block,
    Count,
    Extent,
    MethodError,
    NonNegative,
    PerModel,
    Reduction,
    Unit,
)
from mowmerge.methods.ops import (
    added,
    agree,
    elect_sign,
    keep_above,
    majority,
    settle,
    spread,
    trim_thresholds,
)
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor


@dataclass
class State:
    """What TIES needs to know of the whole model: thresholds, and the sign of an even vote."""

    threshold: Sequence[float]
    majority: float = 1.0


def _trimmed(deltas: Tensor, state: State) -> list[Tensor]:
    return [keep_above(d, t) for d, t in zip(deltas, state.threshold, strict=True)]


def _statistics(extents: Sequence[Extent]) -> Reduction:
    p, total = extents[0].parameters, sum(e.numel for e in extents)
    if p["merge"] == "sum":
        return None
    if any(e.parameters["density"] != p["density"] for e in extents):
        raise MethodError("with merge: ties, density must be the same for all tensors")
    state = State(
        (yield from trim_thresholds([p["density"]] * len(p["threshold"]), total, extra=1))
    )

    def kept(block: Block) -> list[Tensor]:
        return _trimmed(block.values, state)

    state.majority = yield from majority(kept)
    return state


@merge_method(
    paper="arXiv:2405.07813",
    scope=lambda p: "model" if p["merge"] == "ties" else "element",
    laws=("permutation", "scale"),
    reduce=_statistics,
)
def consensus_ta(
    deltas: Tensor,
    *,
    threshold: PerModel[NonNegative] = 0.4,
    agreement: Count = 2,
    merge: Literal["sum", "ties"] = "sum",
    density: Unit = 0.2,
    scale: float = 0.3,
    state: State | None = None,
) -> Tensor:
    """The merged task vector where at least `agreement` task vectors stand out against the others.

    M = sum_i D_i, or their TIES merge; m_i = [|D_i| > threshold_i * |M - D_i|];
    out = scale * M where sum_i m_i >= agreement, else 0.

    Shapes: deltas [N,*S] -> delta [*S].

    Args:
        threshold: how much larger than the rest of M an entry must be to matter to its task; the
            paper chooses each from 0.2 to 0.6 on validation data.
        agreement: tasks to which an entry must matter; 0 keeps all of M, 1 drops what matters to
            none, 2 also what matters to one only.
        merge: M is the sum, or the task vectors trimmed, sign-elected and added up as TIES does.
        density: share of the whole model's entries that TIES keeps of each task vector.
        scale: factor on the result; the paper chooses it from 0 to 1 on validation data, and has no
            value without: 0.3 is one for about eight models.

    Raises:
        MethodError: merge is ties, and density is not the same for all tensors.

    Source: Consensus merging, arXiv:2405.07813, eq. 3 and 5; reference code tallmask_utils.py.
    Differs: none. The comparison is strict, as in the code, and M is not scaled before it.
    """
    n = len(deltas)
    if merge == "ties":
        if state is None:
            options = {"merge": merge, "density": density, "threshold": spread(threshold, n)}
            state = settle(_statistics, deltas, options)
        kept = _trimmed(deltas, state)
        whole = agree(kept, elect_sign(kept, "mass", state.majority), "sum", [1.0] * n)
    else:
        whole = added(list(deltas))
    votes = [
        (d.abs() > (whole - d).abs_().mul_(t)).to(whole.dtype)
        for d, t in zip(deltas, spread(threshold, n), strict=True)
    ]
    return whole.mul_(scale).mul_((added(votes) >= agreement).to(whole.dtype))
