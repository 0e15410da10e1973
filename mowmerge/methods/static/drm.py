"""Decom-Renorm-Merge: trim and elect task vectors in a shared basis, with rows of one length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from mowmerge.methods.contracts import Block, Extent, Matrices, PerModel, Range, Reduction, Unit
from mowmerge.methods.ops import (
    Sum,
    added,
    elect_sign,
    keep_above,
    kth_largest,
    mapped,
    settle,
    spread,
    stacked,
    weighted_sum,
)
from mowmerge.methods.ops.spectral import basis_numbers, left_basis
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor

Tolerance = Annotated[float, Range(0.0, 1.0)]
NOTHING = 1e-6  # of the largest singular value: coordinates that are the rounding of none


def _coordinates(deltas: Matrices, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """A basis U [m,R] of the columns of all task vectors, and each one's coordinates in it as rows
    of length 1 [N,R,c] and their lengths [N,R,1]."""
    basis, values = left_basis(deltas)
    used = values > tol * values[0] if len(values) else values > 0
    basis, values = basis[:, used], values[used]
    turn = (basis / values).T
    rows = stacked((turn @ delta for delta in deltas), len(deltas))
    shares = rows.norm(dim=-1, keepdim=True)
    lengths = shares * values[:, None]
    least = NOTHING * float(values[0]) if len(values) else 0.0
    lengths = lengths.where(lengths > least, 0.0)
    rows.div_(shares.where(lengths > 0, 1.0)).masked_fill_(lengths == 0, 0.0)
    return basis, rows, lengths


def _least(rows: Tensor, density: float) -> float:
    """The least magnitude kept: of all rows together as many as density says, and one more."""
    total = rows.numel()
    rank = round(total * density) + 1
    if rank > total:
        return 0.0
    (least,) = settle(lambda extents: kth_largest([rank], total), rows.reshape(1, -1), {})
    return float(least)


def _balance(extents: Sequence[Extent]) -> Reduction:
    """The sign that most entries of what is no matrix elect; a matrix has that of coordinates."""
    (extent,) = extents
    if extent.matrix or not extent.parameters["elect"]:
        return 0.0
    balance = yield Sum(lambda b: elect_sign(list(b.values), "mass", 0.0).sum(), exact=True)
    total = float(balance.total)
    return math.copysign(1.0, total) if total else 0.0


def _merged(parts: Sequence[Tensor], weight: Sequence[float], sign: Any, mean: str) -> Tensor:
    """The parts of the elected sign, or all, times their weights: over how many, or over all."""
    if sign is not None:
        parts = [part * (part * sign > 0) for part in parts]
    total = weighted_sum(parts, weight)
    if mean == "all":
        return total.div_(len(parts))
    taken = [(part != 0).to(total.dtype) for part, w in zip(parts, weight, strict=True) if w]
    return total.div_(added(taken).clamp_(min=1.0)) if taken else total


def _decomposed(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> list[tuple[int, int]]:
    """All task vectors side by side, or stacked."""
    rows, columns = shape
    return [(n * rows, columns) if p["direction"] == "vertical" else (rows, n * columns)]


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """A basis and all coordinates."""
    return basis_numbers(shape[::-1] if p["direction"] == "vertical" else shape, n)


@merge_method(
    paper="arXiv:2505.23117",
    scope="tensor",
    workspace=_workspace,
    decompositions=_decomposed,
    laws=("permutation", "scale"),
    exempt={"float64": "entries near the trim's threshold move with the rounding of an fp32 SVD"},
    reduce=_balance,
)
def drm(
    deltas: Matrices,
    *,
    weight: PerModel[float] = 1.0,
    density: Unit = 0.2,
    direction: Literal["horizontal", "vertical"] = "horizontal",
    tol: Tolerance = 0.01,
    elect: bool = True,
    mean: Literal["agreeing", "all"] = "agreeing",
    vocabulary: bool = False,
    scale: float = 1.0,
    state: float | None = None,
) -> Tensor:
    """The merge of the task vectors' coordinates in a basis that they share, times scale.

    U S [V_1' .. V_N'] = svd([D_1 .. D_N]), directions with S_j > tol * S_1; B_ij = row j of V_i'
    over its length; the share density of all entries of all B is kept; X_ij = S_j |V_ij| B_ij; of
    those of the sign that most mass has, the mean M; out = scale * U M. Vertical: of transposes.

    Shapes: deltas [N,m,k] -> delta [m,k]; other tensors are merged as they are, without the trim.

    Args:
        weight: coefficient of each X_i in the mean.
        density: share of the normalised entries kept, of all models together; 1 keeps all.
        direction: task vectors side by side, with a basis of outputs, or stacked, one of inputs.
        tol: singular value, as a share of the largest, up to which a direction is dropped; 1e-6 at
            least.
        elect: leave out what disagrees with the sign of the sum; an even sum takes the sign that
            most entries have.
        mean: over the entries that are left, or over all models.
        vocabulary: whether embeddings and output heads are matrices too.
        scale: factor on the result.

    Source: Decom-Renorm-Merge, arXiv:2505.23117; reference code _decom_renorm_merge.py.
    Differs: density 1 runs every other step, where the code averages the task vectors. A model
    without a share in a direction (X_ij below 1e-6 S_1), NaN or noise there, has a zero row. Fused
    matrices are one, and what is no matrix is not trimmed: options of the code that are off by
    default.
    """
    each = [float(w) for w in spread(weight, len(deltas))]
    if deltas.dim() != 3 or not deltas.numel():
        if state is None:
            state = settle(_balance, deltas, {"elect": elect})
        sign = elect_sign(list(deltas), "mass", state) if elect else None
        return _merged(list(deltas), each, sign, mean).mul_(scale)
    vertical = direction == "vertical"
    basis, parts, lengths = _coordinates(deltas.mT if vertical else deltas, tol)
    least = _least(parts, density)
    for rows, length in zip(parts, lengths, strict=True):
        rows.copy_(keep_above(rows, least)).mul_(length)

    even = 0.0
    if elect:
        even = float(mapped(lambda b: elect_sign([*b.values], "mass", 0.0), parts).sum().sign())

    def merged(block: Block) -> Tensor:
        values = [*block.values]
        sign = elect_sign(values, "mass", even) if elect else None
        return _merged(values, each, sign, mean)

    out = (basis @ mapped(merged, parts)).mul_(scale)
    return out.T.contiguous() if vertical else out
