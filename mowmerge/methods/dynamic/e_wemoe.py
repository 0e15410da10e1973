"""E-WEMoE: WEMoE with pruned task vectors and one router for all blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Annotated, Any, Literal

from mowmerge.dynamic.format import Code
from mowmerge.methods.contracts import (
    Dynamic,
    Extent,
    Range,
    Reduction,
    Routing,
    Seed,
    Site,
    Unit,
)
from mowmerge.methods.gating import block_of, by_block, in_mlp, of_sum
from mowmerge.methods.ops import Edge, edges, largest, marked
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor


def _code(site: Site, p: Mapping[str, Any], found: Any) -> Code | None:
    if not in_mlp(site):
        return None
    kept = int(p["density"] * prod(site.shape))
    return Code(site.name, site.shape, "sparse", site.models, block_of(site), site.dtype, kept=kept)


def _routing(sites: Sequence[Site], codes: Sequence[Code], p: Mapping[str, Any]) -> Routing:
    return by_block(
        sites, codes, offset=p["scale"], depth=p["depth"], seed=p["seed"],
        shared=p["router"] == "shared", layer_code=p["layer_code"],
    )  # fmt: skip


def _edges(extents: Sequence[Extent]) -> Reduction:
    """Where the entries of each task vector that are kept end."""
    one = extents[0]
    kept = int(one.parameters["density"] * one.numel)
    return (yield from edges([[kept] * one.models], one.numel, zeros=True))[0]


@merge_method(
    paper="arXiv:2410.21804",
    scope="tensor",
    reduce=_edges,
    dynamic=Dynamic(_code, _routing, of_sum),
)
def e_wemoe(
    deltas: Tensor,
    base: Tensor,
    code: Code,
    *,
    scale: float = 0.3,
    density: Unit = 0.1,
    router: Literal["shared", "block"] = "shared",
    layer_code: Annotated[int, Range(0)] = 0,
    depth: Annotated[int, Range(0, 2)] = 2,
    seed: Seed = 0,
    start: int = 0,
    state: Sequence[Edge] | None = None,
) -> dict[str, Tensor]:
    """WEMoE's MLPs with only the largest entries of each task vector, mixed by one shared router.

    W = W_0 + sum_k g_k(x) P(D_k), P keeping floor(density n) entries of each tensor, the first of
    equals. The anchor is W_0 + scale sum_k P(D_k).

    Shapes: deltas [N,*S], base [*S] -> anchor [*S], occ, val [N kept], ptr.

    Args:
        scale: coefficient before training, and of the unpruned task vectors outside the MLPs.
        density: share of each tensor's entries kept.
        router: one for each stack of layers (E-WEMoE), or one a block (sparse WEMoE).
        layer_code: width of a code of the layer's number put in front of the router's input.
        depth: layers of a router: 2, 1, or 0 for a constant.
        seed: of the routers' first weights.

    Source: Efficient WEMoE, arXiv:2410.21804; reference code sparse_we_moe.py.
    Differs: an exact count is kept instead of what exceeds a quantile; each sample has its own
    gates; what is pruned is not stored; routers are trained by distillation, as wemoe's.
    """
    from mowmerge.dynamic import codecs

    masks = marked(deltas, state or largest(deltas, code.kept), start)
    anchor = base.clone()
    for delta, mask in zip(deltas, masks, strict=True):
        anchor.add_(delta * mask, alpha=scale)
    return {"anchor": anchor, **codecs.sparse(deltas, masks)}
