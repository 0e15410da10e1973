"""AdaMerging++: AdaMerging on task vectors trimmed and sign-elected as TIES does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mowmerge.methods.contracts import (
    Count,
    Extent,
    MethodError,
    NonNegative,
    PerModel,
    Positive,
    Reduction,
    Seed,
    Unit,
)
from mowmerge.methods.ops import (
    agree,
    elect_sign,
    keep_above,
    majority,
    settle,
    spread,
    trim_thresholds,
)
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor

State = tuple[Sequence[float], float]  # each model's threshold, and the majority sign


def _trimmed(deltas: Tensor, threshold: Sequence[float]) -> list[Tensor]:
    return [keep_above(d, t) for d, t in zip(deltas, threshold, strict=True)]


def _statistics(extents: Sequence[Extent]) -> Reduction:
    density = extents[0].parameters["density"]
    if any(e.parameters["density"] != density for e in extents):
        raise MethodError("density must be the same for all tensors")
    shares = spread(density, len(extents[0].parameters["weight"]))
    threshold = yield from trim_thresholds(shares, sum(e.numel for e in extents), extra=1)
    sign = yield from majority(lambda block: _trimmed(block.values, threshold))
    return threshold, sign


@merge_method(
    paper="arXiv:2310.02575",
    scope="model",
    fit="weight",
    laws={"identity": {"weight": 1.0, "density": 1.0}, "permutation": {}, "scale": {}},
    reduce=_statistics,
)
def adamerging_pp(
    deltas: Tensor,
    *,
    weight: PerModel[Unit] = 0.3,
    density: Unit = 0.2,
    granularity: Literal["tensor", "task"] = "tensor",
    steps: Count = 500,
    rate: NonNegative = 1e-3,
    batch: Positive = 16,
    balance: bool = False,
    seed: Seed = 0,
    state: State | None = None,
) -> Tensor:
    """The sum of trimmed, sign-elected task vectors, by coefficients that a fit pass finds.

    T_i = D_i where |D_i| is among the largest of the model, else 0; s = sgn(sum_i T_i);
    out = sum_i weight_i * T_i * [sgn T_i = s]. The fit pass is that of `adamerging`.

    Shapes: deltas [N,*S] -> delta [*S].

    Args:
        weight: coefficient of each processed task vector: where the fit starts, and its bounds.
        density: share of each model's entries kept, the largest by magnitude; 1 keeps all.
        granularity: fit one coefficient a model and tensor (the papers' "layer-wise"), or one a
            model (task-wise).
        steps: updates of the coefficients (Adam); 0 leaves them at weight.
        rate: Adam's learning rate.
        batch: samples of each task an update sees.
        balance: divide each task's entropy by the log of its number of classes, the most it can be.
        seed: which order the samples come in.

    Raises:
        MethodError: density is not the same for all tensors.

    Source: AdaMerging, arXiv:2310.02575, section 3.2.2; reference code ties_merging_utils.py,
    main_layer_wise_adamergingpp.py.
    Differs: as `adamerging`. Weights have no part in the trimming and the vote, and what agrees is
    added, as in the reference: `ties` weighs first and takes the mean.
    """
    n = len(deltas)
    weights = [float(w) for w in spread(weight, n)]
    if state is None:
        state = settle(_statistics, deltas, {"weight": weights, "density": density})
    threshold, zero = state
    kept = _trimmed(deltas, threshold)
    sign = elect_sign(kept, "mass", zero)
    kept = [k.mul_(w) for k, w in zip(kept, weights, strict=True)]
    return agree(kept, sign, "sum", weights)
