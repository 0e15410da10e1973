"""DOGE-TA: norm-balanced task vectors and a change that spares each from the others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mowmerge.methods.contracts import (
    Block,
    Count,
    Extent,
    Matrices,
    MethodError,
    NonNegative,
    PerModel,
    Positive,
    Reduction,
    Unit,
)
from mowmerge.methods.ops import (
    Sum,
    added,
    settle,
    spread,
    square_norm,
    trim_thresholds,
    weighted_sum,
)
from mowmerge.methods.ops.descent import adam
from mowmerge.methods.ops.spectral import Svd, svd, svd_numbers
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch


@dataclass
class State:
    """Each task vector's least magnitude that is kept, over all matrices."""

    threshold: Sequence[float]


def _statistics(extents: Sequence[Extent]) -> Reduction:
    """Thresholds over all matrices: how many entries those have is counted first."""
    p = extents[0].parameters
    if any(e.parameters["density"] != p["density"] for e in extents):
        raise MethodError("density must be the same for all tensors")
    if p["density"] == 1:
        return State([0.0] * len(p["weight"]))

    def of(block: Block) -> Iterator[Tensor]:
        if block.matrices is None:
            return iter(block.values[:, :0])
        return map(torch.flatten, block.matrices)

    def entries(block: Block) -> Tensor:
        return torch.tensor(0 if block.matrices is None else block.numel, dtype=torch.float64)

    count = yield Sum(entries, exact=True)
    density, total = [p["density"]] * len(p["weight"]), int(count.total)
    return State((yield from trim_thresholds(density, total, extra=1, of=of)))


def _shared(deltas: Sequence[Tensor], subspace: int) -> Tensor:
    """An orthonormal basis of the leading directions of all task vectors' leading directions."""
    least = min(deltas[0].shape)

    def leading(found: Svd) -> Tensor:
        return found.left[:, : min(found.rank, least // len(deltas))].clone()

    found = svd(torch.cat([*map(leading, map(svd, deltas))], 1))
    return found.left[:, : min(found.rank, least // subspace)].clone()


def _change(deltas: Sequence[Tensor], share: Sequence[float], p: Mapping[str, Any]) -> Tensor:
    """The change that brings V_j . (V_j - sum_i l_i V_i - sum_i l_i change) of each row to 0."""
    total, merged = math.fsum(share), weighted_sum(deltas, share)
    basis = _shared(deltas, p["subspace"])
    gaps = [((v - merged).mul_(v)).sum(-1, keepdim=True) for v in deltas]

    def outside(step: Tensor) -> Tensor:
        return step.sub_(basis @ (basis.T @ step))

    def slope(moved: Tensor) -> Tensor:
        steep = torch.zeros_like(moved)
        for v, gap in zip(deltas, gaps, strict=True):
            rest = gap - total * (v * moved).sum(-1, keepdim=True)
            steep.addcmul_(v, rest, value=-2 * total)
        return outside(steep)

    if p["project"] == "step":
        return adam(slope, deltas[0], p["steps"], p["rate"], outside)
    return adam(slope, deltas[0], p["steps"], p["rate"])


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """All task vectors, and one decomposition with the leading directions of all, or the change
    with Adam's moments and what makes a step."""
    leading = 2 * shape[0] * min(shape)
    return n * math.prod(shape) + max(leading + svd_numbers(shape), 7 * math.prod(shape))


def _decompositions(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> list[tuple[int, int]]:
    leading = max(1, n * (min(shape) // n))
    return [(shape[0], shape[1])] * n + [(shape[0], leading)]


@merge_method(
    paper="arXiv:2501.01230",
    scope=lambda p: "model" if p["density"] < 1 else "tensor",
    workspace=_workspace,
    decompositions=_decompositions,
    laws=("permutation",),
    exempt={
        "float64": "Adam's first steps have the size of the rate, whichever way rounding points"
    },
    reduce=_statistics,
)
def doge(
    deltas: Matrices,
    *,
    weight: PerModel[float] = 1.0,
    eta: NonNegative = 0.07,
    density: Unit = 0.3,
    subspace: Positive = 6,
    steps: Count = 400,
    rate: NonNegative = 1e-4,
    project: Literal["gradient", "step"] = "gradient",
    rest: Literal["base", "mean"] = "base",
    vocabulary: bool = False,
    state: State | None = None,
) -> Tensor:
    """The sum of task vectors of one length, each with a change that spares it from the others.

    l_i = eta * weight_i / |D_i|, S = sum_i l_i D_i, L = sum_i l_i; c minimises sum_j sum over rows
    of (D_j . (D_j - S - L c))^2, by Adam from 0 and outside U U', U the min(m,k) / subspace leading
    left singular vectors of the min(m,k) / N leading ones of every D_i; out = sum_i l_i (D_i + c)
    where |D_i| is among the largest.

    Shapes: deltas [N,m,k] -> delta [m,k]; of what is no matrix as rest says.

    Args:
        weight: coefficient of each task vector's l_i.
        eta: the norm that each task vector gets in the sum, the paper's eta.
        density: share of the entries of each task vector that count, the largest of all matrices; 1
            keeps all.
        subspace: the shared subspace has one in so many of the directions that there are.
        steps: of Adam.
        rate: of Adam, absolute: an entry moves by about rate x steps at most.
        project: keep the gradient out of the shared subspace, as released, where Adam's scaling
            brings some of it back, or each step that was made.
        rest: what is not a matrix stays at the base, or takes the mean task vector.
        vocabulary: whether embeddings and output heads are matrices too.

    Raises:
        MethodError: density is not the same for all tensors.

    Source: DOGE, arXiv:2501.01230; reference code doge_ta.py.
    Differs: as the code, the mask is of the task vectors as they were, and the subspace is what the
    change keeps out of. A task vector of zeros, NaN there, has no weight; directions without a
    singular value are none of its leading ones. The code takes the layers' matrices of an encoder.
    """
    if deltas.dim() != 3 or not deltas.numel():
        return added(deltas).div_(len(deltas)) if rest == "mean" else torch.zeros_like(deltas[0])
    each = spread(weight, len(deltas))
    p = {
        "weight": each, "density": density, "subspace": subspace, "steps": steps, "rate": rate,
        "project": project,
    }  # fmt: skip
    if state is None:
        state = settle(_statistics, deltas, p, matrix=True)
    held = list(deltas)  # every step needs them all
    lengths = [math.sqrt(square_norm(delta)) for delta in held]
    balanced = [eta * w / d if d else 0.0 for w, d in zip(each, lengths, strict=True)]
    change, total = _change(held, balanced, p), torch.zeros_like(held[0])
    for delta, share, least in zip(held, balanced, state.threshold, strict=True):
        total += (delta + change).mul_(share).mul_(delta.abs() >= least)
    return total
