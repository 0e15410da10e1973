"""Pure functions on blocks, and on the few numbers that go with them.

Arithmetic stays in floating point, in place where the temporary is ours: comparisons that make
boolean tensors cost several times as much.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from mowmerge.methods.contracts import Block, Matrices, MethodError
from mowmerge.tensors import Tensor, torch

SHORT = 1e-30
CANCELLED = 1e-6  # share of all weights up to which a sum of some is the rounding of 0
Elect = Literal["none", "mass", "count", "normfrac", "normmass"]


def spread(value: Any, n: int) -> list[Any]:
    """One value a model: a scalar n times, or the sequence itself."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != n:
            raise ValueError(f"{len(value)} values for {n} models")
        return list(value)
    return [value] * n


def shares(weight: Any, normalize: bool, n: int) -> list[float]:
    """The weight of each model, over their sum if they are normalized.

    Raises:
        MethodError: they sum to zero (below 1e-12) and are to be normalized.
    """
    each = [float(w) for w in spread(weight, n)]
    total = math.fsum(each) if normalize else 1.0
    if abs(total) < 1e-12:
        raise MethodError(f"the weights {each} sum to zero, so they cannot be normalized")
    return [w / total for w in each]


def one_block(shape: tuple[int, ...], n: int, parameters: Mapping[str, Any]) -> int:
    """The `workspace` of a method that makes nothing but its result."""
    return math.prod(shape)


def weighted_sum(values: Sequence[Tensor] | Matrices, weight: Sequence[float]) -> Tensor:
    """sum_i weight[i] * values[i], in index order, as a new tensor; reads one at a time."""
    each = iter(values)
    total = next(each) * weight[0]
    for value, w in zip(each, weight[1:], strict=True):
        total.add_(value, alpha=w)
    return total


def added(values: Sequence[Tensor] | Matrices) -> Tensor:
    """sum_i values[i], in index order, as a new tensor; reads one at a time."""
    each = iter(values)
    total = next(each) + next(each) if len(values) > 1 else next(each).clone()
    for value in each:
        total += value
    return total


def stacked(values: Iterable[Tensor], n: int) -> Tensor:
    """n tensors as one [n,*S], each put there before the next is asked for."""
    each = iter(values)
    first = next(each)
    found = first.new_empty(n, *first.shape)
    found[0] = first
    del first
    for i in range(1, n):
        found[i] = next(each)
    return found


def keep_above(value: Tensor, threshold: float) -> Tensor:
    """value where |value| >= threshold, else 0, as a new tensor."""
    if threshold <= 0.0:
        return value.clone()
    if math.isinf(threshold):
        return value - value  # what is not finite stays so
    return torch.hardshrink(value, _below(threshold, value.element_size()))


@functools.lru_cache(64)
def _below(threshold: float, itemsize: int) -> float:
    """The next number towards 0 in floats of that many bytes."""
    import numpy as np

    kind = np.dtype(f"f{itemsize}").type
    return float(np.nextafter(kind(threshold), kind(0)))


def elect_sign(
    values: Sequence[Tensor], elect: Elect, zero: float | None, power: Sequence[float] = ()
) -> Tensor:
    """The elected sign of each entry: +1 or -1, or `zero` where the vote is even; None: the sign
    that most of these entries elect, or -1.

    mass: sgn(sum_i v_i). count: sgn(sum_i sgn v_i). normfrac: the sign of the entry with the
    largest v_i^2 / power[i], several of them voting by number. normmass: sgn(sum_i sgn(v_i) *
    v_i^2 / power[i]). Source: TIES, eq. of the elect step; the last two are variants of its
    released code.
    """
    if elect == "count":
        vote = values[0].sign()
        for value in values[1:]:
            vote += value.sign()
    elif elect in ("normfrac", "normmass"):
        wide = [v.double() for v in values]
        share = torch.stack([v * v / (p or 1.0) for v, p in zip(wide, power, strict=True)])
        if elect == "normfrac":
            share = (share == share.amax(0)).double()
        vote = (torch.stack(wide).sign_() * share).sum(0).sign_().to(values[0].dtype)
    else:
        vote = added(values)
    if zero is None:
        zero = 1.0 if vote.sign().sum().item() > 0 else -1.0
    if zero == 0.0:
        return vote.sign_()
    positive = vote.ge_(0.0) if zero > 0 else vote.gt_(0.0)
    return positive.mul_(2.0).sub_(1.0)


def agree(
    values: Sequence[Tensor],
    sign: Tensor,
    aggregate: Literal["mean", "sum", "max"],
    weight: Sequence[float],
) -> Tensor:
    """Aggregates the entries whose sign is the elected one (TIES, disjoint merge).

    sum: their sum. mean: their sum over the sum of their weights, over 1 where that is 0: where
    weights of both signs cancel, to 1e-6 of all. max: the largest magnitude, with the elected sign.
    Overwrites the values.
    """
    masses = [value.mul_(sign).relu_() for value in values]
    if aggregate == "max":
        return functools.reduce(torch.maximum, masses).mul(sign)
    total = added(masses)
    if aggregate == "mean":
        share = masses[0].gt_(0.0)
        if weight[0] != 1:
            share.mul_(weight[0])
        for mass, w in zip(masses[1:], weight[1:], strict=True):
            share.add_(mass.gt_(0.0), alpha=w)
        if min(weight) > 0:  # a share is 0, where total is 0 too, or at least the smallest weight
            share.clamp_min_(min(weight))
        else:
            if min(weight) < 0:
                share = torch.hardshrink(share, CANCELLED * math.fsum(map(abs, weight)))
            share += 1.0 - share.sign().abs_()
        total /= share
    return total.mul_(sign)


def fused(
    kept: Sequence[Tensor],
    factor: Sequence[float],
    weight: Sequence[float],
    elect: Elect,
    aggregate: Literal["mean", "sum"],
    scale: float,
) -> Tensor:
    """scale * sum_i factor_i weight_i kept_i, over all i or with elect over the elected sign's.

    mean: over the sum of their weights (1 where that is 0, or below 1e-8 without an election). An
    even vote counts as plus. Overwrites the values.
    """
    factors = [f * w for f, w in zip(factor, weight, strict=True)]
    if elect == "none":
        total = weighted_sum(kept, [scale * f for f in factors])
        share = math.fsum(weight)
        return total.div_(share) if aggregate == "mean" and abs(share) >= 1e-8 else total
    if factors[0] > 0 and len(set(factors)) == 1:  # elects the same, so one product will do
        scale *= factors[0]
    else:
        kept = [k.mul_(f) for k, f in zip(kept, factors, strict=True)]
    return agree(kept, elect_sign(kept, elect, 1.0), aggregate, weight).mul_(scale)


def l1_norms(values: Sequence[Tensor] | Tensor) -> Tensor:
    """The sum of magnitudes of each value, [N] in fp64."""
    return torch.stack([v.abs().sum(dtype=torch.float64) for v in values])


def restoring(before: Tensor, after: Tensor) -> list[float]:
    """before / after, one factor a model; 1 where either norm is below 1e-7."""
    pairs = zip(before.tolist(), after.tolist(), strict=True)
    return [b / a if b >= 1e-7 and a >= 1e-7 else 1.0 for b, a in pairs]


def directions(products: Tensor) -> tuple[Tensor, Tensor]:
    """The norms [N] of vectors and their cosines [N,N], from their inner products.

    With a zero vector every cosine is 0; with itself that of any other is 1. One shorter than 1e-30
    counts as zero: a length over its own overflows fp32.
    """
    norms = products.diagonal().sqrt()
    norms = norms.where(norms >= SHORT, 0.0)
    length = norms.outer(norms)
    cosines = (products / length.where(length > 0, 1.0)).clamp(-1.0, 1.0)
    cosines.fill_diagonal_(1.0).mul_((length > 0).to(cosines))
    return norms, cosines


def exclusive(block: Block) -> list[Tensor]:
    """What each model of a block has beside the anchor."""
    return [model - block.anchor for model in block.values]
