"""TIES: trim each task vector, elect a sign for each entry, average what agrees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mowmerge.methods.contracts import Block, Extent, MethodError, PerModel, Reduction, Unit
from mowmerge.methods.ops import (
    Edge,
    Sum,
    agree,
    edges,
    elect_sign,
    keep_beyond,
    l1_norms,
    majority,
    restoring,
    settle,
    spread,
    trim_ranks,
    trim_thresholds,
)
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch


@dataclass
class State:
    """What the map needs to know of a whole tensor or model, one value a model."""

    edge: Sequence[Edge]
    factor: Sequence[float]
    power: Sequence[float] = ()
    majority: float | None = None  # that of the block


def _trimmed(deltas: Tensor, start: int, state: State, weight: Any) -> list[Tensor]:
    """weight_i * factor_i * D_i where |D_i| is among the largest, else 0."""
    factors = [f * w for f, w in zip(state.factor, spread(weight, len(deltas)), strict=True)]
    kept = [keep_beyond(d, edge, start) for d, edge in zip(deltas, state.edge, strict=True)]
    return [k if f == 1 else k.mul_(f) for k, f in zip(kept, factors, strict=True)]


def _statistics(extents: Sequence[Extent]) -> Reduction:
    """Edges, then what the options ask for: L1 factors, squared norms, the majority sign, unless
    all entries meet in one block."""
    p = extents[0].parameters
    density, total = p["density"], sum(e.numel for e in extents)
    for word in ("density", "elect", "zero_sign", "rescale"):
        if any(e.parameters[word] != p[word] for e in extents):
            raise MethodError(f"with trim: global, {word} must be the same for all tensors")
    state = State([], [1.0] * len(density))

    def kept(block: Block, weight: Any = None) -> list[Tensor]:
        weight = weight or block.parameters["weight"]
        return _trimmed(block.values, block.rng.start, state, weight)

    if p["trim"] == "global":  # the released code keeps one above nominal, and all that equal it
        least = yield from trim_thresholds(density, total, extra=1)
        state.edge = [Edge(one) for one in least]
    else:
        (state.edge,) = yield from edges([trim_ranks(density, total)], total)
    if p["rescale"]:
        masses = yield Sum(lambda b: torch.stack([l1_norms(b.values), l1_norms(kept(b, 1.0))]))
        state.factor = restoring(*masses.total)
    if p["elect"] in ("normfrac", "normmass"):
        squares = yield Sum(lambda b: torch.stack([v.double().square().sum() for v in kept(b)]))
        state.power = squares.total.tolist()
    if p["zero_sign"] == "majority" and (p["trim"] == "global" or not extents[0].undivided):
        state.majority = yield from majority(kept, p["elect"], state.power)
    return state


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """What is kept, and sums; of a vote by squares all of it in fp64."""
    return (9 * n if p["elect"].startswith("norm") else n + 2) * math.prod(shape)


@merge_method(
    paper="arXiv:2306.01708",
    scope=lambda p: "model" if p["trim"] == "global" else "tensor",
    workspace=_workspace,
    laws={"permutation": {}, "scale": {}, "propagates": {"elect": "mass"}},
    reduce=_statistics,
)
def ties(
    deltas: Tensor,
    *,
    weight: PerModel[float] = 1.0,
    density: PerModel[Unit] = 0.2,
    trim: Literal["global", "tensor"] = "global",
    elect: Literal["mass", "count", "normfrac", "normmass"] = "mass",
    aggregate: Literal["mean", "sum", "max"] = "mean",
    zero_sign: Literal["majority", "plus", "drop"] = "majority",
    rescale: bool = False,
    scale: float = 1.0,
    start: int = 0,
    state: State | None = None,
) -> Tensor:
    """The trimmed, sign-elected and disjointly merged task vectors.

    T_i = weight_i * D_i where |D_i| is among the largest, else 0; s = sgn(sum_i T_i);
    out = scale * sum over {i: sgn T_i = s} of T_i / sum of their weights.

    Shapes: deltas [N,*S] -> delta [*S].

    Args:
        weight: coefficient of each trimmed task vector; a negative one turns its vote.
        density: share of entries kept, the largest by magnitude; 1 keeps all, 0 none.
        trim: one threshold over the whole model, or one for each tensor.
        elect: the sign of the sum (mass), of the number of signs (count), of the entry largest
            relative to its task vector (normfrac), or of the sum weighted by that (normmass).
        aggregate: weighted mean, sum or largest of the entries that agree.
        zero_sign: where the vote is even, the sign most entries elected, plus, or drop the entry.
        rescale: multiply each trimmed task vector so that its L1 norm is what it was.
        scale: factor on the result, the paper's lambda.

    Raises:
        MethodError: trim is global and density, elect, zero_sign or rescale is not the same for all
            tensors.

    Source: TIES-Merging, arXiv:2306.01708, algorithm 1; reference code merge_utils.py.
    Differs: density is a share, never a percentage. The global threshold keeps floor(K D) + 1
    entries and all that equal the last, as the reference does; trim: tensor floor(K d), at least 1,
    as mergekit does, of equal ones the first by index. Weights, rescale: mergekit's.
    Where several shares are the largest, normfrac takes their majority; the reference the first.
    """
    n = len(deltas)
    if state is None:
        options = {
            "weight": spread(weight, n), "density": spread(density, n), "trim": trim,
            "elect": elect, "zero_sign": zero_sign, "rescale": rescale,
        }  # fmt: skip
        state = settle(_statistics, deltas, options)
    kept = _trimmed(deltas, start, state, weight)
    zero = {"majority": state.majority, "plus": 1.0, "drop": 0.0}[zero_sign]
    sign = elect_sign(kept, elect, zero, state.power)
    merged = agree(kept, sign, aggregate, spread(weight, n))
    return merged if scale == 1 else merged.mul_(scale)
