"""KnOTS: trim, elect and average task vectors as coordinates in a basis that they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mowmerge.methods.contracts import (
    Block,
    Draws,
    Extent,
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
    settle,
    spread,
    trim_thresholds,
    weighted_sum,
)
from mowmerge.methods.ops.spectral import NOTHING, Factors, left_basis
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch


@dataclass
class State:
    """Each model's least magnitude that is kept, and the sign where the vote is even."""

    threshold: Sequence[float]
    majority: float = 1.0


def _coordinates(
    deltas: Tensor, factors: Sequence[Factors] | None, direction: str, once: Once
) -> tuple[Tensor, Tensor]:
    """A basis U [m,R] of the columns of all task vectors, and X_i = U' D_i [N,R,c]."""
    if direction == "vertical":
        deltas = deltas.mT
        factors = [(right.T, left.T) for left, right in factors] if factors else None
    basis, values = once(lambda: left_basis(deltas, factors))
    if factors:
        parts = torch.stack([(basis.T @ left) @ right for left, right in factors])
    else:
        parts = basis.T @ deltas
    shares = parts.norm(dim=-1, keepdim=True)
    return basis, parts.where(shares > NOTHING * values[:, None], 0.0)


def _kept(parts: Tensor, p: Mapping[str, Any], rng: Draws, state: State) -> list[Tensor]:
    """weight_i X_i, of which a share is dropped and the rest stretched, and the small are left."""
    weight = spread(p["weight"], len(parts))
    parts = _dropped(parts, p["drop"], rng)
    kept = [keep_above(x, least) for x, least in zip(parts, state.threshold, strict=True)]
    return [k if w == 1 else k.mul_(w) for k, w in zip(kept, weight, strict=True)]


def _dropped(parts: Tensor, drop: float, rng: Draws) -> Tensor:
    """DARE on coordinates: each is kept with probability 1 - drop, and then divided by that."""
    if not drop:
        return parts
    mask = rng.keep([1 - drop] * len(parts), parts)
    return parts * mask / (1 - drop) if drop < 1 else torch.zeros_like(parts)


def _state(
    p: Mapping[str, Any], n: int, total: int, of: Callable[[Block], Tensor], extra: int
) -> Reduction:
    """Thresholds, then the sign that most coordinates elect, where the options ask for them."""
    density = spread(p["density"], n)
    state = State([0.0] * n)

    def dropped(block: Block) -> Tensor:
        return _dropped(of(block), p["drop"], block.rng)

    state.threshold = yield from trim_thresholds(density, total, extra=extra, of=dropped)
    if p["elect"] == "mass" and p["zero_sign"] == "majority":
        state.majority = yield from majority(lambda b: _kept(of(b), p, b.rng, state))
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

    def of(block: Block) -> Tensor:
        if not block.matrix or not block.values.numel():
            return block.values.flatten(1)[:, :0]
        found = _coordinates(block.values, block.factors, p["direction"], block.once)
        return found[1].flatten(1)

    count = yield Sum(lambda b: torch.tensor(of(b).shape[1], dtype=torch.float64))
    return (yield from _state(p, len(p["weight"]), int(count.total), of, 1))


def _scope(p: Mapping[str, Any]) -> str:
    density = p["density"]
    least = min(density) if isinstance(density, Sequence) else density
    return "model" if p["trim"] == "global" and least < 1 else "tensor"


def _decomposed(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> list[tuple[int, int]]:
    """All task vectors side by side, or stacked."""
    rows, columns = shape
    return [(n * rows, columns) if p["direction"] == "vertical" else (rows, n * columns)]


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """All task vectors beside each other, the basis of the longer side in fp64, coordinates as they
    are, dropped and trimmed, and the Gram matrix of the shorter side in fp64."""
    if len(shape) != 2:
        return 0
    rows, columns = reversed(shape) if p["direction"] == "vertical" else shape
    rank = min(rows, n * columns)
    each = 3 if p["drop"] else 1
    return 3 * n * math.prod(shape) + rank * (4 * rows + each * n * columns) + 8 * rank**2


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
    deltas: Tensor,
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
        return deltas.mean(0).mul_(scale) if rest == "mean" else torch.zeros_like(deltas[0])
    options = {
        "weight": weight, "density": density, "drop": drop, "elect": elect, "zero_sign": zero_sign
    }  # fmt: skip
    rng = rng or Draws(seed)
    basis, parts = _coordinates(deltas, factors, direction, once)
    if state is None:
        flat = parts.flatten(1)

        def own(extents: Sequence[Extent]) -> Reduction:
            return _state(options, n, flat.shape[1], lambda b: b.values, int(trim == "global"))

        state = settle(own, flat, options, rng)
    zero = {"majority": state.majority, "plus": 1.0, "drop": 0.0}[zero_sign]
    kept = _kept(parts.flatten(1), options, rng, state)
    merged = _aggregated(kept, elect, zero, aggregate, spread(weight, n)).view_as(parts[0])
    left, right = basis * scale, merged
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
        total /= share.where(share.abs() > 1e-8, 1.0)
    return total
