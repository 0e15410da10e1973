"""1bit-Merging: task vectors as signs and a scale, the most relevant chosen by a router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mowmerge.dynamic.format import Code
from mowmerge.methods.contracts import Block, Dynamic, Extent, Reduction, Routing, Seed, Site, Unit
from mowmerge.methods.gating import Classifier, Features, by_choice, in_block_matrix, of_base
from mowmerge.methods.ops import Sum, l1_norms, settle
from mowmerge.methods.registry import merge_method
from mowmerge.methods.tables import COUNTED, kept_whole
from mowmerge.tensors import Tensor, torch


def _code(site: Site, p: Mapping[str, Any], found: Any) -> Code | None:
    if not in_block_matrix(site) or site.role == p["whole"]:
        return kept_whole(site, found)
    zeros = p["zeros"] == "marked"
    return Code(site.name, site.shape, "one_bit", site.models, "0", site.dtype, zeros=zeros)


def _routing(sites: Sequence[Site], codes: Sequence[Code], p: Mapping[str, Any]) -> Routing:
    return by_choice(sites, p, top_k=1, rest=p["rest"])


def _scales(extents: Sequence[Extent]) -> Reduction:
    """The mean magnitude of each task vector that is quantised, over its non-zero entries where
    zeros are marked."""
    if extents[0].codec in ("full", "row_sparse"):
        return None
    marked = extents[0].parameters["zeros"] == "marked"

    def masses(block: Block) -> Tensor:
        entries = block.values.reshape(len(block.values), -1)
        count = (entries != 0).sum(1) if marked else torch.full((len(entries),), entries.shape[1])
        return torch.stack([l1_norms(entries), count.double().to(entries.device)])

    total = yield Sum(masses)
    return total.total[0] / total.total[1].clamp_min(1)


@merge_method(
    paper="arXiv:2502.10743",
    scope="tensor",
    reduce=_scales,
    dynamic=Dynamic(_code, _routing, of_base, COUNTED),
)
def one_bit(
    deltas: Tensor,
    base: Tensor,
    code: Code,
    *,
    whole: Literal["none", "attention", "mlp"] = "none",
    zeros: Literal["plus", "marked"] = "plus",
    rest: float = 0.0,
    router: Classifier = "deep",
    prefix: Unit = 0.33,
    features: Features = "statistics",
    seed: Seed = 0,
    state: Tensor | None = None,
) -> dict[str, Tensor]:
    """W(x) = W_0 + D'_k + rest sum_{j != k} D'_j for the k that a classifier chooses.

    D'_k = a_k sgn(D_k), and a_k is the mean magnitude of a matrix's task vector, the scale with the
    least squared error. Matrices of attention and MLPs have one bit an entry; all other tensors are
    kept whole, and of a table only the rows that an expert changed, where these are fewer.

    Shapes: deltas [N,*S], base [*S] -> anchor [*S], sign [N,rows,bytes], scale [N]; or delta; or
    rowidx, rowval, ptr.

    Args:
        whole: a component that is not quantised.
        zeros: the sign of an entry that did not change: plus, or marked by a second bit.
        rest: coefficient of the task vectors that were not chosen.
        router: two hidden layers with batch norm, a linear probe, or the distance to each task's
            mean.
        prefix: the share of the anchor's layers after which the classifier looks; 1 is the last
            hidden state.
        features: of a sample's tokens: mean and standard deviation, or the mean alone.
        seed: of the router's first weights.

    Source: 1bit-Merging, arXiv:2502.10743; the quantiser is BitDelta's, arXiv:2402.10193, eq. 2.
    Differs: no code is published and the paper's choice of components could not be checked: all
    matrices by default. The others are added by task arithmetic, not by TIES, whose result is no
    sum over them and would have to be stored whole for each k.
    """
    if code.codec == "full":
        return {"anchor": base, "delta": deltas}
    from mowmerge.dynamic import codecs

    if code.codec == "row_sparse":
        return {"anchor": base, **codecs.row_sparse(deltas)}
    if state is None:
        state = settle(_scales, deltas, {"zeros": zeros})
    return {"anchor": base, **codecs.one_bit(deltas, state, zeros=code.zeros)}
