"""TALL-masks: the sum of task vectors, and for each expert the entries that are its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mowmerge.dynamic.format import Code
from mowmerge.methods.contracts import Dynamic, NonNegative, PerModel, Routing, Site
from mowmerge.methods.gating import by_task, of_base
from mowmerge.methods.ops import spread
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch


def _code(site: Site, p: Mapping[str, Any], found: Any) -> Code:
    return Code(site.name, site.shape, "mask", site.models, "0", site.dtype)


def _routing(sites: Sequence[Site], codes: Sequence[Code], p: Mapping[str, Any]) -> Routing:
    return by_task()


@merge_method(paper="arXiv:2405.07813", dynamic=Dynamic(_code, _routing, of_base))
def tall_mask(
    deltas: Tensor, base: Tensor, *, threshold: PerModel[NonNegative] = 0.4
) -> dict[str, Tensor]:
    """Expert k is W_0 + M_k D with D = sum_j D_j and M_k = [|D_k| > threshold_k |D - D_k|].

    Shapes: deltas [N,*S], base [*S] -> anchor [*S], unified [*S], mask [N,rows,bytes], scale [N].

    Args:
        threshold: of each expert, the paper's lambda, chosen on validation data from 0.2 to 0.6;
            a larger one keeps fewer entries.

    Source: TALL-masks, arXiv:2405.07813, eq. 4; reference code tallmask_utils.py.
    Differs: none; the multi-task vector is the plain sum.
    """
    from mowmerge.dynamic import codecs

    total = deltas.sum(0)
    limits = spread(threshold, len(deltas))
    masks = [d.abs() > t * (total - d).abs() for d, t in zip(deltas, limits, strict=True)]
    return {"anchor": base, **codecs.mask(total, torch.stack(masks), torch.ones(len(deltas)))}
