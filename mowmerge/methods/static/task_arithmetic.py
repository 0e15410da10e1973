"""Task arithmetic: add, subtract and scale task vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mowmerge.methods.contracts import Extent, MethodError, PerModel, Reduction
from mowmerge.methods.ops import Sum, one_block, settle, spread, weighted_sum
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor


def _energies(extents: Sequence[Extent]) -> Reduction:
    """Each task vector's share of their squared norms over the whole model."""
    how = {e.parameters["coefficients"] for e in extents}
    if len(how) > 1:
        raise MethodError("coefficients must be the same for all tensors")
    if how == {"given"}:
        return None
    squares = yield Sum(lambda b: b.values.double().square().flatten(1).sum(1))
    total = squares.total.sum()
    return (squares.total / total.where(total > 0, 1.0)).tolist()


def _caution(p: Mapping[str, Any], n: int) -> str:
    total = p["scale"] * sum(p["weight"])
    if n == 1 or total <= 1 or p["normalize"] or p["coefficients"] == "metagpt":
        return ""
    return (
        f"task_arithmetic adds up {total:g} task vectors (scale times the weights); above 1 results"
        " often break: the paper tunes scale between 0 and 1"
    )


@merge_method(
    paper="arXiv:2212.04089",
    scope=lambda p: "model" if p["coefficients"] == "metagpt" else "element",
    workspace=one_block,
    laws={
        "identity": {},
        "permutation": {},
        "scale": {},
        "propagates": {"coefficients": "given"},
    },
    reduce=_energies,
    caution=_caution,
)
def task_arithmetic(
    deltas: Tensor,
    *,
    weight: PerModel[float] = 1.0,
    scale: float = 1.0,
    normalize: bool = False,
    coefficients: Literal["given", "metagpt"] = "given",
    state: Sequence[float] | None = None,
) -> Tensor:
    """The scaled sum of the task vectors: scale * sum_i weight_i * D_i.

    Shapes: deltas [N,*S] -> delta [*S].

    Args:
        weight: coefficient of each task vector; negative ones forget (negation, analogy).
        scale: factor on the sum, the paper's lambda; it takes 0 to 1, chosen on validation data.
        normalize: divide by the sum of the weights (by 1 where that is below 1e-8).
        coefficients: the weights as given, or each times the task vector's share of the squared
            norms over the whole model, which then is its MetaGPT coefficient.

    Source: Editing Models with Task Arithmetic, arXiv:2212.04089, section 2; MetaGPT,
    arXiv:2406.11385, eq. 18.
    Differs: none; weights and normalize are additions, off by default.
    """
    if coefficients == "metagpt":
        if state is None:
            state = settle(_energies, deltas, {"coefficients": coefficients})
        weight = [w * share for w, share in zip(spread(weight, len(deltas)), state, strict=True)]
    each = [float(w) for w in spread(weight, len(deltas))]
    total = math.fsum(each) if normalize else 1.0
    return weighted_sum(deltas, [scale * w / (total if abs(total) >= 1e-8 else 1.0) for w in each])
