"""OPCM: experts merged one after another, each without what lies in the directions taken before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from mowmerge.methods.contracts import (
    Block,
    Extent,
    Matrices,
    Memo,
    MethodError,
    NonNegative,
    Once,
    Positive,
    Reduction,
    Unit,
)
from mowmerge.methods.ops import Sum, settle, square_norm
from mowmerge.methods.ops.spectral import completed, gram_numbers, spectrum
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch


@dataclass
class State:
    """The norm of the sum over the whole model, and the mean norm of the task vectors in it."""

    norm: float
    mean: float
    merged: int

    @property
    def factor(self) -> float:
        """What brings the sum to the mean norm."""
        return self.mean / self.norm if self.norm > 0 else 0.0

    @property
    def report(self) -> dict[str, float]:
        """What a recipe that goes on from this merge has to say, as its parameters."""
        return {"merged": self.merged, "stretch": self.norm / self.mean if self.mean > 0 else 1.0}


def _apart(delta: Tensor, total: Tensor, density: float, zero_diagonal: bool) -> Tensor:
    """The task vector without the block that lies in the leading directions of the sum so far."""
    found = spectrum(total)
    reached = found.values.cumsum(0)
    beyond = (reached > density * reached[-1]).nonzero() if len(reached) else reached
    rank = int(beyond[0]) if len(beyond) else len(reached)
    known = completed(total, found, len(reached) if zero_diagonal else rank)
    taken = known.cut(rank)
    block = taken.left.T @ delta @ taken.right.T
    left: Tensor = delta - taken.left @ block @ taken.right
    if zero_diagonal:
        others, across = known.left[:, rank:], known.right[rank:]
        left -= (others * ((others.T @ delta) * across).sum(1)) @ across
    return left


def _added(deltas: Matrices, p: Mapping[str, Any], *, matrix: bool) -> Tensor:
    """The sum of the task vectors, of a matrix each without what the sum before it holds."""
    each = iter(deltas)
    total: Tensor = next(each) * p["stretch"]
    for delta in each:
        total += _apart(delta, total, p["density"], p["zero_diagonal"]) if matrix else delta
    return total


def _statistics(extents: Sequence[Extent]) -> Reduction:
    """Norms over the model: of every task vector, and of the sum."""
    p = extents[0].parameters
    for word in ("merged", "stretch"):
        if any(e.parameters[word] != p[word] for e in extents):
            raise MethodError(f"{word} must be the same for all tensors")

    def squares(block: Block) -> Tensor:
        matrix = block.matrices is not None and block.numel > 0
        deltas = block.values if block.matrices is None else block.matrices
        (total,) = block.once(lambda: (_added(deltas, block.parameters, matrix=matrix),))
        return torch.stack([square_norm(value) for value in chain(deltas, [total])])

    found = yield Sum(squares)
    *norms, norm = found.total.sqrt().tolist()
    count = p["merged"] + len(norms) - 1
    return State(norm, math.fsum([p["merged"] * norms[0], *norms[1:]]) / count, count)


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """The sum, a task vector and what is left of it, and the sum's Gram matrix or its singular
    vectors, those that are closed twice."""
    vectors = 2 * sum(shape) * min(shape)
    return 3 * math.prod(shape) + max(gram_numbers(min(shape)), vectors)


@merge_method(
    paper="arXiv:2501.09522",
    scope="model",
    workspace=_workspace,
    decompositions=lambda shape, n, p: [(shape[0], shape[1])] * (n - 1),
    keeps=lambda shape, n, p: math.prod(shape),
    laws=("scale",),
    exempt={"float64": "a direction that just reaches its share does in fp64 and not in fp32"},
    reduce=_statistics,
)
def opcm(
    deltas: Matrices,
    *,
    density: Unit = 0.5,
    zero_diagonal: bool = False,
    merged: Positive = 1,
    stretch: NonNegative = 1.0,
    vocabulary: bool = False,
    scale: float = 1.0,
    once: Once | None = None,
    state: State | None = None,
) -> Tensor:
    """The sum of what each task vector adds to those before it, at their mean norm, times scale.

    D = D_1; for t = 2 .. N: D = U S V', q the first number of singular values whose sum is more
    than density * sum_j S_j, less one; D += D_t - U_q U_q' D_t V_q V_q'; out = scale * D *
    mean_i |D_i| / |D|, norms over the whole model. The order of the models counts.

    Shapes: deltas [N,m,k] -> delta [m,k]; what is no matrix is added up.

    Args:
        density: share of the sum's nuclear norm whose directions are closed to the next task
            vector, the paper's alpha; 1 closes all.
        zero_diagonal: also leave out each u_j' D_t v_j beyond them.
        merged: how many task vectors the first model stands for, where it is an earlier merge (at
            scale 1).
        stretch: the number of that name under `statistics` in that merge's report.json.
        vocabulary: whether embeddings and output heads are matrices too.
        scale: factor on the result.

    Raises:
        MethodError: merged or stretch is not the same for all tensors.

    Source: OPCM, arXiv:2501.09522, algorithm 1; reference code opcm.py.
    Differs: models are taken in the recipe's order, never shuffled. The scaling after each step
    cancels in the next, so that one at the end does: a sum lies on the disk until the norm is
    known. Where no sum of singular values exceeds its share, all directions are closed, none in the
    code. Its released form projects the block of leading directions only, and its diagonal stays
    (zero_diagonal: the later one's). Output heads are linear layers there, and projected:
    vocabulary: true for them, by a rule.
    """
    matrix = deltas.dim() == 3 and deltas.numel() > 0
    once = once or Memo()
    p = {"density": density, "zero_diagonal": zero_diagonal, "merged": merged, "stretch": stretch}
    if state is None:
        state = settle(_statistics, deltas, p, matrix=matrix, once=once)
    (total,) = once(lambda: (_added(deltas, p, matrix=matrix),))
    return total * (scale * state.factor)
