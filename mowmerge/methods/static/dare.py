"""DARE: drop most of each task vector at random, rescale the rest, then add or elect and merge."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, Literal

from mowmerge.methods.contracts import Draws, Extent, PerModel, Reduction, Seed, Unit
from mowmerge.methods.ops import (
    Sum,
    fused,
    kth_largest,
    l1_norms,
    restoring,
    settle,
    spread,
)
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch

State = tuple[Sequence[float], Sequence[float]]


def _dropped(deltas: Tensor, density: Sequence[float], threshold: Any, rng: Draws) -> list[Tensor]:
    """New D_i with the dropped entries at 0: up to the largest that is dropped, or drawn."""
    if threshold:
        pairs = zip(deltas, threshold, strict=True)
        return [torch.nn.functional.hardshrink(d, 0.0 if t == inf else t) for d, t in pairs]
    return list(deltas.clone() if min(density) == 1 else rng.keep(density, deltas).mul_(deltas))


def _statistics(extents: Sequence[Extent]) -> Reduction:
    """Thresholds of the magnitude mask and factors of the L1 rescale, where they are asked for."""
    p, total = extents[0].parameters, sum(e.numel for e in extents)
    density = p["density"]
    threshold: Sequence[float] = ()
    if p["mask"] == "magnitude":
        dropped = [int(round((1 - d) * total, 6)) for d in density]  # 1 - 0.9 is not quite 0.1
        threshold = yield from kth_largest([total - k + 1 if k else 0 for k in dropped], total)
    nothing = 2.0**-33  # a density that rounds to 0 draws nothing, and 1 over it may overflow
    factor: Sequence[float] = [
        1 / d if d > nothing and p["rescale"] == "density" else 1.0 for d in density
    ]
    if p["rescale"] == "l1":
        masses = yield Sum(
            lambda b: torch.stack(
                [l1_norms(b.values), l1_norms(_dropped(b.values, density, threshold, b.rng))]
            )
        )
        factor = restoring(*masses.total)
    return threshold, factor


@merge_method(
    paper="arXiv:2311.03099",
    scope=lambda p: "tensor" if p["mask"] == "magnitude" or p["rescale"] == "l1" else "element",
    laws=("permutation", "scale"),
    reduce=_statistics,
)
def dare(
    deltas: Tensor,
    *,
    weight: PerModel[float] = 1.0,
    density: PerModel[Unit] = 0.5,
    elect: Literal["none", "mass", "count"] = "none",
    aggregate: Literal["mean", "sum"] = "sum",
    mask: Literal["random", "magnitude"] = "random",
    rescale: Literal["density", "l1", "none"] = "density",
    scale: float = 1.0,
    seed: Seed = 0,
    rng: Draws | None = None,
    state: State | None = None,
) -> Tensor:
    """The sum of task vectors of which each entry was kept with probability density, rescaled.

    T_i = weight_i * B_i * D_i / density_i with B_i ~ Bernoulli(density_i) for each entry;
    out = scale * sum_i T_i, or with elect only over the T_i of the elected sign.

    Shapes: deltas [N,*S] -> delta [*S].

    Args:
        weight: coefficient of each task vector.
        density: share of entries kept; 1 drops none and draws nothing, 0 drops all.
        elect: add everything (none), or elect a sign by the sum (mass) or by number (count) and
            keep what agrees, as TIES does; an even vote counts as plus.
        aggregate: sum, or mean by weight (of the entries that agree, after an election).
        mask: drop at random, or drop the smallest magnitudes of each tensor.
        rescale: divide by density, restore each tensor's L1 norm, or leave as it is.
        scale: factor on the result.
        seed: which draws; the same seed drops the same entries.

    Source: DARE, arXiv:2311.03099, section 3; reference code mask_weights_utils.py.
    Differs: draws depend on seed, model name, tensor name and element only. The released variant
    with an election also trims (TIES at a fifth); this one does not, like mergekit's. The L1
    rescale is mergekit's, and not unbiased.
    """
    n, rng = len(deltas), rng or Draws(seed)
    each, weights = spread(density, n), spread(weight, n)
    if state is None:
        options = {"density": each, "mask": mask, "rescale": rescale}
        state = settle(_statistics, deltas, options, rng)
    threshold, factor = state
    kept = _dropped(deltas, each, threshold, rng)
    return fused(kept, factor, weights, elect, aggregate, scale)
