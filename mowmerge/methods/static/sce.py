"""SCE: select where task vectors vary, calculate a coefficient each, erase minority signs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mowmerge.methods.contracts import Block, Extent, NonNegative, Reduction, Unit
from mowmerge.methods.ops import (
    TALLY,
    Edge,
    Sum,
    agree,
    edges,
    elect_sign,
    keep_beyond,
    settle,
    weighted_sum,
)
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch


@dataclass(frozen=True)
class State:
    """Which variances are selected, and each model's coefficient."""

    edge: Edge
    coefficient: Sequence[float]


def _variance(deltas: Tensor) -> Tensor:
    """The population variance over the models [*S]; exactly 0 where they agree.

    Of D_i - D_0, whose mean square is at most N times it: nothing is lost in the difference.
    """
    n, total = len(deltas), torch.zeros_like(deltas[0])
    squares = torch.zeros_like(total)
    for delta in deltas[1:]:
        apart = delta - deltas[0]
        total += apart
        squares.addcmul_(apart, apart)
    return squares.addcmul_(total, total, value=-1 / n).div_(n)


def _selected(deltas: Tensor, start: int, edge: Edge) -> Tensor:
    """The task vectors where their variance is among the largest, else 0."""
    if edge.least == 0:
        return deltas
    return deltas * (keep_beyond(_variance(deltas), edge, start) > 0)


def _statistics(extents: Sequence[Extent]) -> Reduction:
    """How many entries vary, which of them are selected, the masses over those."""
    p, total = extents[0].parameters, max(1, extents[0].numel)
    edge = Edge(0.0)
    if p["mode"] != "varm" and p["density"] < 1:
        vary = yield Sum(lambda b: (_variance(b.values) > 0).sum(), exact=True)
        rank = int(p["density"] * float(vary.total))
        ((edge,),) = yield from edges([[rank]], total, lambda b: [_variance(b.values)])

    def masses(block: Block) -> Tensor:
        chosen = _selected(block.values, block.rng.start, edge)
        return torch.stack([v.double().square().sum() for v in chosen])

    found = yield Sum(masses)
    mass = found.total
    even, share = torch.full_like(mass, 1 / len(mass)), float(mass.sum()) / total
    coefficient = mass / mass.sum() if share > 0 and share >= p["floor"] else even
    return State(edge, coefficient.tolist())


def _caution(p: Mapping[str, Any], n: int) -> str:
    if n > 1 or p["density"] == 1 or p["mode"] != "paper":
        return ""
    return "sce selects nothing of a single model below density 1: the result is the base"


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """What is selected, and sums; its variance, its count, and it by its coefficients."""
    size = math.prod(shape)
    return (2 * n + 2) * size + TALLY if p["density"] < 1 else (n + 2) * size


@merge_method(
    paper="arXiv:2408.07990",
    scope="tensor",
    workspace=_workspace,
    laws={
        "idempotent": {"density": 1.0, "scale": 1.0},
        "permutation": {},
        "scale": {"floor": 0.0},
    },
    reduce=_statistics,
    caution=_caution,
)
def sce(
    deltas: Tensor,
    *,
    density: Unit = 1.0,
    mode: Literal["paper", "fusechat", "varm"] = "paper",
    floor: NonNegative = 0.0,
    scale: float = 1.0,
    start: int = 0,
    state: State | None = None,
) -> Tensor:
    """The coefficient-weighted mean of the task vectors where they vary and agree with the sign.

    S: of the entries whose variance over the models is not 0, the share density with the largest.
    c_i = sum over S of D_i^2 / sum_j sum over S of D_j^2; s = sgn(sum_i D_i), plus where even;
    out = scale * sum over {i: sgn D_i = s} of c_i D_i / sum of their c_i on S, 0 elsewhere.

    Shapes: deltas [N,*S] -> delta [*S].

    Args:
        density: share of the varying entries that is selected; 1 selects every entry, 0 none. One
            model, or equal ones, vary nowhere: below 1 nothing of them is selected.
        mode: paper, fusechat (S decides the coefficients only: everything is merged) or varm (no
            selection and no signs: sum_i c_i D_i).
        floor: mean square of the selected entries, summed over the models, below which the
            coefficients are equal.
        scale: factor on the result.

    Source: FuseChat, arXiv:2408.07990, section 3.3; reference code sce_merging.py (mode: fusechat);
    VaRM is the earlier variant of the same authors.
    Differs: of equal variances the first by index are selected. mergekit's floor is 1e-6, which the
    task vectors of many fine-tunes do not reach.
    """
    if state is None:
        state = settle(_statistics, deltas, {"density": density, "mode": mode, "floor": floor})
    if mode == "varm":
        return weighted_sum(deltas, [scale * c for c in state.coefficient])
    chosen = list(deltas if mode == "fusechat" else _selected(deltas, start, state.edge))
    sign = elect_sign(chosen, "mass", 1.0)
    weighed = [v * c for v, c in zip(chosen, state.coefficient, strict=True)]
    return agree(weighed, sign, "mean", state.coefficient).mul_(scale)
