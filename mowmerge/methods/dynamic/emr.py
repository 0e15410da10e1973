"""EMR-Merging: one elected task vector, and for each expert a mask and a factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mowmerge.dynamic.format import Code
from mowmerge.methods.contracts import Block, Dynamic, Extent, Reduction, Routing, Seed, Site, Unit
from mowmerge.methods.gating import Chooser, Features, by_choice, of_base
from mowmerge.methods.ops import Sum, l1_norms, settle
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch


def _code(site: Site, p: Mapping[str, Any], found: Any) -> Code:
    return Code(site.name, site.shape, "mask", site.models, "0", site.dtype)


def _routing(sites: Sequence[Site], codes: Sequence[Code], p: Mapping[str, Any]) -> Routing:
    return by_choice(sites, p)


def _elected(deltas: Tensor) -> tuple[Tensor, Tensor]:
    """The unified task vector [*S] and the masks [N,*S]: the largest magnitude that agrees with
    the sign of the sum (an even sum counts as minus)."""
    sign = torch.where(deltas.sum(0) > 0, 1.0, -1.0).to(deltas)
    agreeing = (deltas * sign).clamp_min(0)
    return sign * agreeing.amax(0), agreeing > 0


def _factors(extents: Sequence[Extent]) -> Reduction:
    """lambda_k = |D_k|_1 / |M_k D_u|_1 over the model; 0 where the mask is empty."""
    means = extents[0].parameters["rescale"] == "tensor_mean"

    def masses(block: Block) -> Tensor:
        unified, masks = _elected(block.values)
        both = torch.stack([l1_norms(block.values), l1_norms(masks * unified)])
        return both / block.numel if means else both

    total = yield Sum(masses)
    before, after = total.total
    return torch.where(after > 0, before / after, torch.zeros_like(after))


@merge_method(
    paper="arXiv:2405.17461",
    scope="model",
    reduce=_factors,
    dynamic=Dynamic(_code, _routing, of_base),
)
def emr(
    deltas: Tensor,
    base: Tensor,
    *,
    rescale: Literal["global", "tensor_mean"] = "global",
    router: Chooser = "task_id",
    prefix: Unit = 0.33,
    features: Features = "statistics",
    seed: Seed = 0,
    state: Tensor | None = None,
) -> dict[str, Tensor]:
    """Expert k is W_0 + lambda_k M_k D_u, with D_u the elected task vector and M_k a bit mask.

    s = sgn(sum_k D_k) (0 counts as minus); D_u = s max_k |D_k| over the k that agree with s; M_k
    marks where D_k agrees; lambda_k = |D_k|_1 / |M_k D_u|_1 over all tensors.

    Shapes: deltas [N,*S], base [*S] -> anchor [*S], unified [*S], mask [N,rows,bytes], scale [N].

    Args:
        rescale: sums over the whole model (the paper), or over the means of each tensor (the code
            behind the published logs, in which a small tensor weighs as much as a large one).
        router: who says whose sample it is: the caller (task_id), or a classifier: two hidden
            layers with batch norm, a linear probe, the distance to each task's mean.
        prefix: the share of the anchor's layers after which the classifier looks; 1 is the last
            hidden state.
        features: of a sample's tokens: mean and standard deviation, or the mean alone.
        seed: of the classifier's first weights.

    Source: EMR-Merging, arXiv:2405.17461, section 3; reference code main_emr_30_vits.py.
    Differs: weights are rebuilt from the base for each batch, never switched in place; a classifier
    may choose the expert.
    """
    from mowmerge.dynamic import codecs

    if state is None:
        state = settle(_factors, deltas, {"rescale": rescale})
    unified, masks = _elected(deltas)
    return {"anchor": base, **codecs.mask(unified, masks, state)}
