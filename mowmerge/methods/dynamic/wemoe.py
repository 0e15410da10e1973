"""WEMoE: every block's MLP mixed for each sample by a router on the tokens that enter it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from mowmerge.dynamic.format import Code
from mowmerge.methods.contracts import Dynamic, Range, Routing, Seed, Site
from mowmerge.methods.gating import block_of, by_block, in_mlp, of_sum
from mowmerge.methods.ops import weighted_sum
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor


def _code(site: Site, p: Mapping[str, Any], found: Any) -> Code | None:
    if not in_mlp(site):
        return None
    return Code(site.name, site.shape, "full", site.models, block_of(site), site.dtype)


def _routing(sites: Sequence[Site], codes: Sequence[Code], p: Mapping[str, Any]) -> Routing:
    return by_block(sites, codes, offset=p["scale"], depth=p["depth"], seed=p["seed"])


@merge_method(paper="arXiv:2402.00433", dynamic=Dynamic(_code, _routing, of_sum))
def wemoe(
    deltas: Tensor,
    base: Tensor,
    *,
    scale: float = 0.3,
    depth: Annotated[int, Range(0, 2)] = 2,
    seed: Seed = 0,
) -> dict[str, Tensor]:
    """MLPs W_0 + sum_k g_k(x) D_k, g the mean over tokens of a router; the rest is task arithmetic.

    g_b = mean_t (W_2 relu(W_1 h_bt + b_1) + b_2), one router a block, its h what enters the MLP.
    The anchor is W_0 + scale sum_k D_k, the offset scale: untrained routers (W_2 near 0, b_2 =
    scale) give task arithmetic.

    Shapes: deltas [N,*S], base [*S] -> anchor [*S], delta [N,*S].

    Args:
        scale: coefficient of every task vector before training, and outside the MLPs.
        depth: layers of a router: 2, 1, or 0 for a constant.
        seed: of the routers' first weights, N(0, 0.01^2).

    Source: WEMoE, arXiv:2402.00433, section 3; reference code we_moe.py.
    Differs: gates are each sample's own (the released evaluation averages them over the batch), and
    padding does not enter their mean. Routers are trained to say what the experts say, on the same
    unlabelled inputs; `train-router --objective entropy` minimises the paper's entropy, which may
    fall while answers become wrong.
    """
    return {"anchor": weighted_sum(deltas, [scale] * len(deltas)).add_(base), "delta": deltas}
