"""Consensus: of the merged task vector, keep the entries that matter to several tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from mowmerge.methods.contracts import Count, NonNegative, PerModel, Unit
from mowmerge.methods.ops import added, settle, spread
from mowmerge.methods.ops.multitask import Trim, multitask, trim
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor


def _caution(p: Mapping[str, Any], n: int) -> str:
    if p["agreement"] <= n:
        return ""
    return (
        f"consensus_ta keeps what matters to {p['agreement']} tasks, and there are {n}: the result"
        " is the base"
    )


@merge_method(
    paper="arXiv:2405.07813",
    scope=lambda p: "model" if p["merge"] == "ties" else "element",
    laws=("permutation", "scale"),
    reduce=trim,
    caution=_caution,
)
def consensus_ta(
    deltas: Tensor,
    *,
    threshold: PerModel[NonNegative] = 0.4,
    agreement: Count = 2,
    merge: Literal["sum", "ties"] = "sum",
    density: Unit = 0.2,
    scale: float = 0.3,
    state: Trim | None = None,
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
    if state is None:
        options = {"merge": merge, "density": density, "threshold": spread(threshold, n)}
        state = settle(trim, deltas, options)
    whole = multitask(deltas, state)
    votes = [
        (d.abs() > (whole - d).abs_().mul_(t)).to(whole.dtype)
        for d, t in zip(deltas, spread(threshold, n), strict=True)
    ]
    return whole.mul_(scale).mul_((added(votes) >= agreement).to(whole.dtype))
