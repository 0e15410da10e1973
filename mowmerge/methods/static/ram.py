"""RAM: add what one task vector alone changed, average what several changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mowmerge.methods.contracts import Block, Extent, MethodError, NonNegative, Reduction
from mowmerge.methods.ops import Sum, added, settle
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch


def _touched(deltas: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """1.0 where each |D_i| > eps, and how many are [*S]."""
    touched = (deltas.abs() > eps).to(deltas.dtype)
    return touched, touched.sum(0)


def _statistics(extents: Sequence[Extent]) -> Reduction:
    """Each model's factor on what it alone changed: 1 + boost * min(shared / alone, cap)."""
    p = extents[0].parameters
    if any(e.parameters["eps"] != p["eps"] for e in extents):
        raise MethodError("with counts: global, eps must be the same for all tensors")
    if p["boost"] == 0:
        return None

    def counts(block: Block) -> Tensor:
        touched, number = _touched(block.values, block.parameters["eps"])
        alone = (touched * (number == 1)).flatten(1).sum(1, dtype=torch.float64)
        return torch.stack([alone, touched.flatten(1).sum(1, dtype=torch.float64) - alone])

    found = yield Sum(counts, exact=True)
    alone, shared = found.total
    return (shared / alone.clamp(min=1.0)).tolist()


def _scope(parameters: Mapping[str, Any]) -> str:
    if parameters["boost"] == 0:
        return "element"
    return "model" if parameters["counts"] == "global" else "tensor"


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """What is touched, and that of it; with a boost its count, in 8 bytes."""
    return (2 * n + 2 if p["boost"] == 0 else 4 * n + 1) * math.prod(shape)


@merge_method(
    paper="arXiv:2601.13572",
    scope=_scope,
    workspace=_workspace,
    laws={"permutation": {}, "scale": {"eps": 0.0}},
    reduce=_statistics,
)
def ram(
    deltas: Tensor,
    *,
    eps: NonNegative = 1e-5,
    boost: NonNegative = 0.0,
    cap: NonNegative = 0.2,
    counts: Literal["global", "tensor"] = "global",
    state: Sequence[float] | None = None,
) -> Tensor:
    """The sum of task vectors where one alone changed an entry, their mean where several did.

    M_i = entries with |D_i| > eps, c = how many M hold the entry; out = sum over {i: entry in M_i}
    of D_i / c, where c = 1 times f_i = 1 + boost * min(shared_i / alone_i, cap), with shared_i and
    alone_i the entries of M_i with c > 1 and c = 1.

    Shapes: deltas [N,*S] -> delta [*S].

    Args:
        eps: magnitude up to which an entry counts as unchanged.
        boost: strength of the factor on what a model alone changed; 0 is RAM, more is RAM+.
        cap: largest ratio of shared to own entries that the factor takes into account.
        counts: entries are counted over the whole model, or for each tensor.

    Raises:
        MethodError: counts is global, boost is not 0, and eps is not the same for all tensors.

    Source: RAM and RAM+, arXiv:2601.13572; mergekit's ram and ramplus_tl.
    Differs: none. mergekit's ramplus_tl is boost: 0.1 with counts: tensor.
    """
    touched, number = _touched(deltas, eps)
    if boost == 0:
        return (touched * deltas).sum(0).div_(number.clamp_(min=1.0))
    if state is None:
        state = settle(_statistics, deltas, {"eps": eps, "boost": boost})
    alone = (number == 1).to(deltas.dtype)
    out = (touched * deltas).div_(number.clamp(min=1.0))
    for value, ratio in zip(out, state, strict=True):
        value *= alone * (boost * min(ratio, cap)) + 1.0
    return added(list(out))
