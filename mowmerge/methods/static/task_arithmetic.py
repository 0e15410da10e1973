"""Task arithmetic: add, subtract and scale task vectors."""

from __future__ import annotations

import math

from mowmerge.methods.contracts import PerModel
from mowmerge.methods.ops import spread, weighted_sum
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor


@merge_method(paper="arXiv:2212.04089", laws=("identity", "permutation", "scale", "propagates"))
def task_arithmetic(
    deltas: Tensor,
    *,
    weight: PerModel[float] = 1.0,
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """The scaled sum of the task vectors: scale * sum_i weight_i * D_i.

    Shapes: deltas [N,*S] -> delta [*S].

    Args:
        weight: coefficient of each task vector; negative ones forget (negation, analogy).
        scale: factor on the sum, the paper's lambda; it takes 0 to 1, chosen on validation data.
        normalize: divide by the sum of the weights (by 1 where that is below 1e-8).

    Source: Editing Models with Task Arithmetic, arXiv:2212.04089, section 2.
    Differs: none; weights and normalize are additions, off by default.
    """
    each = [float(w) for w in spread(weight, len(deltas))]
    total = math.fsum(each) if normalize else 1.0
    return weighted_sum(deltas, [scale * w / (total if abs(total) >= 1e-8 else 1.0) for w in each])
