"""DELLA: drop the small of each task vector more often than the large, then elect and merge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mowmerge.methods.contracts import (
    Draws,
    Extent,
    MethodError,
    PerModel,
    Reduction,
    Seed,
    Unit,
)
from mowmerge.methods.ops import Sum, fused, l1_norms, restoring, settle, spread
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch

LEAST = 2.0**-32  # the grain of a draw: below it nothing is kept, and 1 over it may overflow


def _order(size: Tensor) -> Tensor:
    """The places of each row's entries from the least to the largest, equal ones by index.

    Bits of numbers that are not negative order as they do: with the index below them they are
    codes of which no two are equal, and any sort of those is stable. numpy's is the fastest.
    """
    if size.dtype != torch.float32 or size.device.type != "cpu":
        return size.sort(dim=-1, stable=True).indices
    codes = size.view(torch.int32).long().bitwise_left_shift_(32)
    codes |= torch.arange(size.shape[-1])
    codes.numpy().sort(axis=-1)
    return codes.bitwise_and_(0xFFFFFFFF)


def _chances(deltas: Tensor, density: Sequence[float], epsilon: Sequence[float]) -> Tensor:
    """The probability of each entry to be kept, from its rank by magnitude in its row."""
    chances = torch.empty_like(deltas)
    rows = len(deltas[0]) if deltas.dim() > 2 else 1
    count = deltas[0].numel() // max(1, rows)
    for delta, out, center, half in zip(deltas, chances, density, epsilon, strict=True):
        if center in (0.0, 1.0) or count < 2:
            out.fill_(center)
            continue
        size = delta.abs().reshape(rows, count)
        table = center + half * torch.linspace(-1.0, 1.0, count, dtype=torch.float64)
        out.view(rows, count).scatter_(-1, _order(size), table.to(size).expand_as(size))
    return chances


def _kept(deltas: Tensor, p: Mapping[str, Any], rng: Draws) -> list[Tensor]:
    """New D_i with the dropped entries at 0, over their chances where the rescale is that."""
    chances = _chances(deltas, p["density"], p["epsilon"])
    kept = rng.keep_each(chances).mul_(deltas)
    return list(kept.div_(chances.clamp_(min=LEAST)) if p["rescale"] == "probability" else kept)


def _factors(extents: Sequence[Extent]) -> Reduction:
    """What restores the L1 norm of each task vector, where that is asked for."""
    p = extents[0].parameters
    if p["rescale"] != "l1":
        return [1.0] * len(p["density"])
    masses = yield Sum(
        lambda b: torch.stack([l1_norms(b.values), l1_norms(_kept(b.values, p, b.rng))])
    )
    return restoring(*masses.total)


def _validate(parameters: Mapping[str, Any], n: int) -> None:
    each = (spread(parameters[word], n) for word in ("density", "epsilon"))
    for density, epsilon in zip(*each, strict=True):
        if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            raise MethodError(
                f"density {density:g} and epsilon {epsilon:g} give probabilities from"
                f" {density - epsilon:g} to {density + epsilon:g}: they must lie between 0 and 1"
            )


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """Chances, what is drawn by them, and the order of one model's entries."""
    return (2 * n + 1) * math.prod(shape)


@merge_method(
    paper="arXiv:2406.11617",
    scope="row",
    workspace=_workspace,
    laws=("permutation", "scale"),
    reduce=_factors,
    validate=_validate,
)
def della(
    deltas: Tensor,
    *,
    weight: PerModel[float] = 1.0,
    density: PerModel[Unit] = 0.7,
    epsilon: PerModel[Unit] = 0.07,
    elect: Literal["none", "mass", "count"] = "mass",
    aggregate: Literal["mean", "sum"] = "mean",
    rescale: Literal["probability", "l1", "none"] = "probability",
    scale: float = 1.0,
    seed: Seed = 0,
    rng: Draws | None = None,
    state: Sequence[float] | None = None,
) -> Tensor:
    """The elected mean of task vectors whose entries were kept more likely the larger they are.

    In a row of c entries the one of rank r by magnitude (1 the smallest) is kept with probability
    p = density - epsilon + 2 epsilon (r-1)/(c-1), density where c is 1; T_i = weight_i B_i D_i / p
    with B_i ~ Bernoulli(p). out = scale * the T_i of the elected sign over their weights.

    Shapes: deltas [N,*S] -> delta [*S]; a vector is one row, a kernel's rows are out x the rest.

    Args:
        weight: coefficient of each task vector.
        density: mean share of entries kept; 1 drops none, 0 drops all.
        epsilon: how far the probability rises and falls over a row, half the window of the paper.
        elect: add everything (none), or elect a sign by the sum (mass) or by number (count) and
            keep what agrees; an even vote counts as plus.
        aggregate: mean by weight (of the entries that agree, after an election), or sum.
        rescale: divide each entry by its probability, restore each tensor's L1 norm, or leave it.
        scale: factor on the result.
        seed: which draws; the same seed drops the same entries.

    Raises:
        MethodError: density - epsilon or density + epsilon is not between 0 and 1.

    Source: DELLA, arXiv:2406.11617, section 3; reference code sparsify.py, whose example gives the
    defaults of density and epsilon.
    Differs: the step between ranks is over c - 1, as in the code, and not over c. Equal magnitudes
    rank by index. Draws depend on seed, model name, tensor name and element only. The L1 rescale is
    mergekit's, and not unbiased.
    """
    n, rng = len(deltas), rng or Draws(seed)
    p = {"density": spread(density, n), "epsilon": spread(epsilon, n), "rescale": rescale}
    factor = settle(_factors, deltas, p, rng, rows=True) if state is None else state
    return fused(_kept(deltas, p, rng), factor, spread(weight, n), elect, aggregate, scale)
