"""Rank-One MoE: a pool of rank-one experts in each MLP matrix, a coefficient for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Annotated, Any

from mowmerge.dynamic.format import Code
from mowmerge.methods.contracts import Count, Dynamic, Range, Routing, Seed, Site
from mowmerge.methods.gating import block_of, by_block, in_mlp, of_sum
from mowmerge.methods.ops.spectral import truncated, truncated_numbers
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch


def _code(site: Site, p: Mapping[str, Any], found: Any) -> Code | None:
    if not in_mlp(site) or len(site.shape) != 2:
        return None
    slots = site.models * min(p["rank"], site.rank)
    return Code(site.name, site.shape, "low_rank", slots, block_of(site), site.dtype, rank=1)


def _routing(sites: Sequence[Site], codes: Sequence[Code], p: Mapping[str, Any]) -> Routing:
    return by_block(
        sites, codes, offset=p["scale"], depth=p["depth"], seed=p["seed"],
        hidden=2 * codes[0].slots if p["depth"] == 2 else 0, top_k=p["top_k"],
    )  # fmt: skip


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """The decompositions; or their pairs, those together, and two matrices towards the anchor."""
    rank: int = min(p["rank"], *shape)
    return max(truncated_numbers(shape, n, rank), 2 * (n * rank * sum(shape) + prod(shape)))


@merge_method(
    paper="https://github.com/EnnengYang/RankOne-MoE",
    scope="tensor",
    workspace=_workspace,
    dynamic=Dynamic(_code, _routing, of_sum),
)
def rank_one_moe(
    deltas: Tensor,
    base: Tensor,
    code: Code,
    *,
    rank: Annotated[int, Range(1)] = 32,
    scale: float = 0.3,
    top_k: Count = 0,
    depth: Annotated[int, Range(0, 2)] = 1,
    seed: Seed = 0,
) -> dict[str, Tensor]:
    """MLP matrices W_0 + sum_kj c_kj(x) u_kj v_kj^T over each task vector's largest singular pairs.

    c_b is the mean over tokens of a router's N rank outputs, task by task; the two matrices of an
    MLP share it. Biases are b_0 + scale sum_k (b_k - b_0). The anchor has c = scale.

    Shapes: deltas [N,out,in], base [out,in] -> anchor, u [out,N rank], v [N rank,in], slot.

    Args:
        rank: singular pairs of each task vector, at most the matrix's rank.
        scale: every coefficient before training, and outside the MLPs.
        top_k: how many coefficients of a sample and block stay, the largest; 0 for all.
        depth: layers of a router: 1, 2, or 0 for a constant.
        seed: of the routers' first weights.

    Source: Rank-One MoE, reference code rankone_moe.py.
    Differs: the selection of the largest coefficients is exact, and soft, as the reference's, only
    in training; a task vector that is zero has zero factors where the reference stops; routers
    are trained by distillation, as wemoe's; few pairs of a large matrix are found in a randomised
    basis, and report.json has what they lose.
    """
    from mowmerge.dynamic import codecs

    pairs, told = truncated(deltas, code.slots // len(deltas))
    parts = codecs.low_rank(pairs)
    parts["slot"] = torch.arange(code.slots, dtype=torch.int32)
    return {"anchor": base + scale * (parts["u"] @ parts["v"]), **parts, **told}
