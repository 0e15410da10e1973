"""PCB-Merging: entries of the task vectors compete, within their model and with the others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from mowmerge.methods.contracts import Block, Extent, MethodError, PerModel, Range, Reduction, Unit
from mowmerge.methods.ops import Most, added, kth_largest, settle, spread
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch

Clamp = Annotated[float, Range(0.0, 0.5)]


@dataclass
class State:
    """Of each task vector: the magnitudes it is clamped to, the score that starts to count, the
    highest score."""

    low: Sequence[float]
    high: Sequence[float]
    floor: Sequence[float] = ()
    top: Sequence[float] = ()


def _size(delta: Tensor, low: float, high: float) -> Tensor:
    """|D|, clamped and brought to 0..1; all 0 where it is constant."""
    size = delta.abs().clamp_(low, high).sub_(low)
    return size.div_(high - low) if high > low else size.zero_()


def _scores(deltas: Tensor, state: State, competition: str) -> Iterator[Tensor]:
    """Model by model exp(N size^2), times how far the entry agrees with the others."""
    given = list(zip(deltas, state.low, state.high, strict=True))
    if competition == "sum":
        whole = added(list(deltas))
    else:
        signed = [_size(*each).mul_(each[0].sign()) for each in given]
    for i, each in enumerate(given):
        if competition == "sum":
            agree = (each[0] * whole).tanh_()
        else:
            agree = added([(signed[i] * other).tanh_() for other in signed])
        yield _size(*each).square_().mul_(len(deltas)).exp_().mul_(agree)


def _statistics(extents: Sequence[Extent]) -> Reduction:
    """Order statistics of the magnitudes, then of the scores that they decide."""
    p, total = extents[0].parameters, sum(e.numel for e in extents)
    for word in ("density", "clamp", "competition"):
        if any(e.parameters[word] != p[word] for e in extents):
            raise MethodError(f"with trim: global, {word} must be the same for all tensors")
    n = len(p["weight"])
    if not total:
        return State([0.0] * n, [0.0] * n, [0.0] * n, [0.0] * n)
    first = int(total * p["clamp"])
    last = max(first, int(total * (1 - p["clamp"]) - 1))
    low = yield from kth_largest([total - first] * n, total)
    high = yield from kth_largest([total - last] * n, total)
    state = State(low, high)

    def scores(block: Block) -> Iterator[Tensor]:
        return _scores(block.values, state, p["competition"])

    rank = total - int(total * (1 - p["density"]))
    state.floor = yield from kth_largest([rank] * n, total, scores, signed=True)
    most = yield Most(lambda b: torch.stack([s.max() for s in scores(b)]))
    state.top = most.total.tolist()
    return state


def _shares(score: Tensor, floor: float, top: float) -> Tensor:
    """0 up to the floor, 1 at the top, linear between them."""
    if top > floor:
        return (score - floor).relu_().div_(top - floor)
    return (score >= top).to(score.dtype) if top == floor else torch.zeros_like(score)


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """Sums, a score and what goes into it; against each other those of all."""
    return (9 if p["competition"] == "sum" else 2 * n + 7) * math.prod(shape)


@merge_method(
    paper="arXiv:2410.02396",
    scope=lambda p: "model" if p["trim"] == "global" else "tensor",
    workspace=_workspace,
    laws=("permutation",),
    exempt={"float64": "tanh saturates on large values: what is a tie in fp32 is none in fp64"},
    reduce=_statistics,
)
def pcb_merging(
    deltas: Tensor,
    *,
    weight: PerModel[float] = 1.0,
    density: Unit = 0.1,
    clamp: Clamp = 1e-4,
    competition: Literal["sum", "pairs"] = "sum",
    trim: Literal["global", "tensor"] = "global",
    scale: float = 1.0,
    state: State | None = None,
) -> Tensor:
    """The mean of the clamped task vectors, each entry weighed by how it fares in the competition.

    s_i = |D_i| clamped to its quantiles clamp and 1 - clamp, and brought to 0..1; b_i =
    exp(N s_i^2) * tanh(D_i * sum_j D_j); B_i = b_i from its quantile 1 - density (0) to its maximum
    (1), 0 below; out = scale * sum_i weight_i B_i C_i / sum_i B_i, C_i the clamped D_i.

    Shapes: deltas [N,*S] -> delta [*S].

    Args:
        weight: coefficient of each task vector, the paper's lambda_i.
        density: share of entries of each task vector that survive.
        clamp: share of entries clamped at either end of the magnitudes.
        competition: against the sum of the task vectors, or the sum over j of tanh(n_i n_j) with
            n_i = sgn(D_i) s_i (the second released script; its clamp is 0.01).
        trim: quantiles over the whole model, or for each tensor.
        scale: factor on the result.

    Raises:
        MethodError: trim is global, and density, clamp or competition is not the same for all
            tensors.

    Source: PCB-Merging, arXiv:2410.02396; reference code pcb-merging.py (competition: sum) and
    pcb_ES.py (pairs).
    Differs: as the code, where the paper writes softmax, and squares before it normalises. A task
    vector of zeros, which gives NaN there, takes no part. One whose scores are all equal keeps all.
    """
    each = spread(weight, len(deltas))
    if state is None:
        options = {
            "weight": each, "density": density, "clamp": clamp, "competition": competition,
        }  # fmt: skip
        state = settle(_statistics, deltas, options)
    scores = _scores(deltas, state, competition)
    total, share = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for i, score in enumerate(scores):
        if state.high[i] == 0:
            continue
        part = _shares(score, state.floor[i], state.top[i])
        share += part
        clamped = deltas[i].abs().clamp_(state.low[i], state.high[i]).mul_(deltas[i].sign())
        total += clamped.mul_(part).mul_(each[i])
    return total.div_(share.clamp_(min=1e-12)).mul_(scale)
