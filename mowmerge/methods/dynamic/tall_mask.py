"""TALL-masks: the sum of task vectors, and for each expert the entries that are its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mowmerge.dynamic.format import Code
from mowmerge.methods.contracts import Dynamic, NonNegative, PerModel, Routing, Seed, Site, Unit
from mowmerge.methods.gating import Chooser, Features, by_choice, of_base
from mowmerge.methods.ops import settle, spread
from mowmerge.methods.ops.multitask import Trim, multitask, trim
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch


def _code(site: Site, p: Mapping[str, Any], found: Any) -> Code:
    return Code(site.name, site.shape, "mask", site.models, "0", site.dtype)


def _routing(sites: Sequence[Site], codes: Sequence[Code], p: Mapping[str, Any]) -> Routing:
    return by_choice(sites, p)


@merge_method(
    paper="arXiv:2405.07813",
    scope=lambda p: "model" if p["merge"] == "ties" else "element",
    reduce=trim,
    dynamic=Dynamic(_code, _routing, of_base),
)
def tall_mask(
    deltas: Tensor,
    base: Tensor,
    *,
    threshold: PerModel[NonNegative] = 0.4,
    merge: Literal["sum", "ties"] = "sum",
    density: Unit = 0.2,
    router: Chooser = "task_id",
    prefix: Unit = 0.33,
    features: Features = "statistics",
    seed: Seed = 0,
    state: Trim | None = None,
) -> dict[str, Tensor]:
    """Expert k is W_0 + M_k D with D = sum_j D_j and M_k = [|D_k| > threshold_k |D - D_k|].

    D may also be the TIES merge of the D_j, which are trimmed over the whole model, and added up
    where they agree with the elected sign; those of the masks stay whole.

    Shapes: deltas [N,*S], base [*S] -> anchor [*S], unified [*S], mask [N,rows,bytes], scale [N].

    Args:
        threshold: of each expert, the paper's lambda, chosen on validation data from 0.2 to 0.6;
            a larger one keeps fewer entries.
        merge: D is the sum, or the task vectors trimmed, sign-elected and added up as TIES does.
        density: share of the whole model's entries that TIES keeps of each task vector.
        router: who says whose sample it is: the caller (task_id), or a classifier: two hidden
            layers with batch norm, a linear probe, the distance to each task's mean.
        prefix: the share of the anchor's layers after which the classifier looks; 1 is the last
            hidden state.
        features: of a sample's tokens: mean and standard deviation, or the mean alone.
        seed: of the classifier's first weights.

    Raises:
        MethodError: merge is ties, and density is not the same for all tensors.

    Source: TALL-masks, arXiv:2405.07813, eq. 4; reference code tallmask_utils.py.
    Differs: a classifier may choose the expert.
    """
    from mowmerge.dynamic import codecs

    limits = spread(threshold, len(deltas))
    if state is None:
        state = settle(trim, deltas, {"merge": merge, "density": density, "threshold": limits})
    total = multitask(deltas, state)
    masks = [d.abs() > t * (total - d).abs() for d, t in zip(deltas, limits, strict=True)]
    return {"anchor": base, **codecs.mask(total, torch.stack(masks), torch.ones(len(deltas)))}
