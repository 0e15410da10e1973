"""KnOTS: trim, elect and average task vectors as coordinates in a basis that they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any, Literal

from mowmerge.methods.contracts import (
    Block,
    Draws,
    Extent,
    Matrices,
    MethodError,
    Once,
    PerModel,
    Reduction,
    Seed,
    Unit,
    anew,
)
from mowmerge.methods.ops import (
    Sum,
    added,
    agree,
    elect_sign,
    keep_above,
    majority,
    mapped,
    settle,
    spread,
    stacked,
    trim_thresholds,
    weighted_sum,
)
from mowmerge.methods.ops.blocks import CANCELLED
from mowmerge.methods.ops.spectral import NOTHING, Factors, basis_numbers, left_basis
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch


@dataclass
class State:
    """Each model's least magnitude that is kept, and the sign where the vote is even."""

    threshold: Sequence[float]
    majority: float = 1.0


def _coordinates(
    deltas: Matrices, factors: Sequence[Factors] | None, direction: str, once: Once
) -> tuple[Tensor, Iterator[Tensor]]:
    """A basis U [m,R] of the columns of all task vectors, and one by one X_i = U' D_i [R,c]."""
    if direction == "vertical":
        deltas = deltas.mT
        factors = [(right.T, left.T) for left, right in factors] if factors else None
    basis, values = once(lambda: left_basis(deltas, factors))

    def of(left: Tensor, right: Tensor | None = None) -> Tensor:
        found = basis.T @ left if right is None else (basis.T @ left) @ right
        share = found.norm(dim=-1, keepdim=True)
        return found.masked_fill_(share <= NOTHING * values[:, None], 0.0)

    return basis, starmap(of, factors) if factors else map(of, deltas)


def _kept(
    parts: Iterable[Tensor], p: Mapping[str, Any], rng: Draws, state: State
) -> Iterator[Tensor]:
    """weight_i X_i, of which a share is dropped and the rest stretched, and the small are left."""
    weight = spread(p["weight"], len(state.threshold))
    dropped = _dropped(parts, p["drop"], rng)
    for x, least, w in zip(dropped, state.threshold, weight, strict=True):
        kept = keep_above(x, least)
        yield kept if w == 1 else kept.mul_(w)


def _dropped(parts: Iterable[Tensor], drop: float, rng: Draws) -> Iterator[Tensor]:
    """DARE on coordinates: each is kept with probability 1 - drop, and then divided by that."""
    if not drop:
        yield from parts
        return
    for i, x in enumerate(parts):
        kept = rng.only(i).keep([1 - drop], x[None])[0].mul_(x)
        yield kept.div_(1 - drop) if drop < 1 else kept


def _state(
    p: Mapping[str, Any], n: int, total: int, of: Callable[[Block], Iterable[Tensor]], extra: int
) -> Reduction:
    """Thresholds, then the sign that most coordinates elect, where the options ask for them."""
    density = spread(p["density"], n)
    state = State([0.0] * n)

    def dropped(block: Block) -> Iterator[Tensor]:
        return _dropped(of(block), p["drop"], block.rng)

    state.threshold = yield from trim_thresholds(density, total, extra=extra, of=dropped)
    if p["elect"] == "mass" and p["zero_sign"] == "majority":
        state.majority = yield from majority(lambda b: [*_kept(of(b), p, b.rng, state)])
    return state


def _statistics(extents: Sequence[Extent]) -> Reduction:
    """The state over all matrices: how many coordinates there are is known when they are. That of
    one matrix is for the method, which decomposes it once."""
    p = extents[0].parameters
    if _scope(p) == "tensor":
        return None
    for word in ("density", "drop", "direction", "elect", "zero_sign"):
        if any(e.parameters[word] != p[word] for e in extents):
            raise MethodError(f"with trim: global, {word} must be the same for all tensors")

    def coordinates(block: Block) -> tuple[int, Iterator[Tensor]]:
        if block.matrices is None or not block.numel:
            return 0, iter(block.values[:, :0])
        basis, each = _coordinates(block.matrices, block.factors, p["direction"], block.once)
        rows, rank = basis.shape
        return block.numel // rows * rank, map(torch.flatten, each)

    count = yield Sum(lambda b: torch.tensor(coordinates(b)[0], dtype=torch.float64))
    n, total = len(p["weight"]), int(count.total)
    return (yield from _state(p, n, total, lambda b: coordinates(b)[1], 1))


def _scope(p: Mapping[str, Any]) -> str:
    density = p["density"]
    least = min(density) if isinstance(density, Sequence) else density
    return "model" if p["trim"] == "global" and least < 1 else "tensor"


def _decomposed(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> list[tuple[int, int]]:
    """All task vectors side by side, or stacked."""
    rows, columns = shape
    return [(n * rows, columns) if p["direction"] == "vertical" else (rows, n * columns)]


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """A basis and all coordinates."""
    return basis_numbers(shape[::-1] if p["direction"] == "vertical" else shape, n)


def _kept_numbers(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """A basis and its singular values."""
    rows, columns = reversed(shape) if p["direction"] == "vertical" else shape
    return (rows + 1) * min(rows, n * columns)


@merge_method(
    paper="arXiv:2410.19735",
    scope=_scope,
    workspace=_workspace,
    decompositions=_decomposed,
    keeps=_kept_numbers,
    laws={"permutation": {"drop": 0.0}, "scale": {"drop": 0.0}},
    exempt={
        "seed": "nothing is drawn by default",
        "float64": "coordinates near the trim's threshold move with the rounding of fp32",
    },
    reduce=_statistics,
)
def knots(
    deltas: Matrices,
    *,
    weight: PerModel[float] = 1.0,
    density: PerModel[Unit] = 1.0,
    drop: Unit = 0.0,
    direction: Literal["horizontal", "vertical"] = "horizontal",
    trim: Literal["global", "tensor"] = "global",
    elect: Literal["mass", "none"] = "mass",
    aggregate: Literal["mean", "sum"] = "mean",
    zero_sign: Literal["majority", "plus", "drop"] = "majority",
    rest: Literal["base", "mean"] = "base",
    vocabulary: bool = False,
    scale: float = 1.0,
    seed: Seed = 0,
    factors: Sequence[Factors] | None = None,
    rng: Draws | None = None,
    once: Once = anew,
    state: State | None = None,
) -> Tensor | Factors:
    """The TIES merge of the task vectors' coordinates in a basis that they share, times scale.

    U S [V_1' .. V_N'] = svd([D_1 .. D_N]); X_i = S V_i' = U' D_i; T_i = weight_i X_i where |X_i| is
    among the largest, else 0; s = sgn(sum_i T_i); out = scale * U (sum over {i: sgn T_i = s} of T_i
    / sum of their weights). Vertical: of transposes.

    Shapes: deltas [N,m,k] -> delta [m,k]; of what is no matrix as rest says.

    Args:
        weight: coefficient of each task vector's coordinates; a negative one turns its vote.
        density: share of coordinates kept, the largest by magnitude; 1 keeps all.
        drop: share of coordinates dropped at random before that, the others stretched (DARE).
        direction: task vectors side by side, with a basis of outputs, or stacked, one of inputs.
        trim: one threshold over all matrices, until which their bases lie on the disk, or one for
            each matrix.
        elect: the sign of the sum, or none, which keeps every coordinate.
        aggregate: weighted mean or sum of the coordinates that agree; the mean is over those that
            are not 0.
        zero_sign: where the vote is even, the sign most coordinates elected, plus, or drop it.
        rest: what is not a matrix stays at the base, or takes the mean task vector.
        vocabulary: whether embeddings and output heads are matrices too.
        scale: factor on the result; the paper tunes it, to 0.5 or 0.6.
        seed: of the random drops.

    Raises:
        MethodError: trim is global and density, drop, direction, elect or zero_sign is not the same
            for all tensors.

    Source: KnOTS, arXiv:2410.19735; reference code task_merger.py, masking_ops.py.
    Differs: directions up to 1e-6 of the largest singular value are left out, where the code has
    1e-5 absolute, and so is a model's share of a direction that is rounding. An adapter's scale,
    alpha / r, counts. With density 1 or trim: tensor the majority sign is each matrix's own.
    Adapters on the base are decomposed as the products that they are. Its max loses signs: left
    out.
    """
    n = len(deltas)
    if deltas.dim() != 3 or not deltas.numel():
        if rest == "base":
            return torch.zeros_like(deltas[0])
        return added(deltas).div_(n).mul_(scale)
    options = {
        "weight": weight, "density": density, "drop": drop, "elect": elect, "zero_sign": zero_sign
    }  # fmt: skip
    rng = rng or Draws(seed)
    basis, each = _coordinates(deltas, factors, direction, once)
    parts = stacked(each, n)
    if state is None:

        def own(extents: Sequence[Extent]) -> Reduction:
            return _state(options, n, parts[0].numel(), lambda b: b.values, int(trim == "global"))

        state = settle(own, parts, options, rng)
    settled, zero = state, {"majority": state.majority, "plus": 1.0, "drop": 0.0}[zero_sign]

    def merged(block: Block) -> Tensor:
        kept = [*_kept(block.values, options, block.rng, settled)]
        return _aggregated(kept, elect, zero, aggregate, spread(weight, n))

    left, right = basis * scale, mapped(merged, parts, rng)
    if direction == "vertical":
        left, right = right.T, left.T
    return (left, right) if factors is not None else left @ right


def _aggregated(
    kept: list[Tensor], elect: str, zero: float, aggregate: Any, weight: Sequence[float]
) -> Tensor:
    """The coordinates that agree with the elected sign, or all, added up or averaged."""
    if elect == "mass":
        return agree(kept, elect_sign(kept, "mass", zero), aggregate, weight)
    total = added(kept)
    if aggregate == "mean":
        share = weighted_sum([(k != 0).to(k.dtype) for k in kept], weight)
        least = CANCELLED * math.fsum(map(abs, weight))
        total /= share.where(share.abs() > least, 1.0)
    return total
