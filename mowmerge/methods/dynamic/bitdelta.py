"""BitDelta: a fine-tune as the base plus one bit a weight, many tenants on one base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mowmerge.dynamic.format import Code
from mowmerge.methods.contracts import Dynamic, Extent, Reduction, Routing, Seed, Site, Unit
from mowmerge.methods.gating import Chooser, Features, by_choice, in_block_matrix, of_base
from mowmerge.methods.ops import Sum, l1_norms, settle
from mowmerge.methods.registry import merge_method
from mowmerge.methods.tables import COUNTED, kept_whole
from mowmerge.tensors import Tensor


def _code(site: Site, p: Mapping[str, Any], found: Any) -> Code | None:
    if not in_block_matrix(site):
        return kept_whole(site, found)
    return Code(site.name, site.shape, "one_bit", site.models, "0", site.dtype, fitted=True)


def _routing(sites: Sequence[Site], codes: Sequence[Code], p: Mapping[str, Any]) -> Routing:
    return by_choice(sites, p)


def _scales(extents: Sequence[Extent]) -> Reduction:
    """The mean magnitude of each task vector that is quantised."""
    if extents[0].codec in ("full", "row_sparse"):
        return None
    total = yield Sum(lambda block: l1_norms(block.values))
    return total.total / max(1, sum(e.numel for e in extents))


@merge_method(
    paper="arXiv:2402.10193",
    scope="tensor",
    reduce=_scales,
    dynamic=Dynamic(_code, _routing, of_base, COUNTED),
)
def bitdelta(
    deltas: Tensor,
    base: Tensor,
    code: Code,
    *,
    router: Chooser = "task_id",
    prefix: Unit = 0.33,
    features: Features = "statistics",
    seed: Seed = 0,
    state: Tensor | None = None,
) -> dict[str, Tensor]:
    """Tenant k is W_0 + f_k a_k sgn(D_k), a_k the mean magnitude of D_k and sgn(0) = 1.

    Only the matrices of attention and MLPs are quantised; all other tensors are tenant k's own, and
    of a table only the rows that tenant k changed are stored, where these are fewer. f_k
    is 1 at first; train-router by distillation finds those with which tenant k answers as the
    fine-tune does.

    Shapes: deltas [N,*S], base [*S] -> anchor [*S], sign [N,rows,bytes], scale and factor [N]; or
    delta; or rowidx, rowval, ptr.

    Args:
        router: who says whose sample it is: the caller (task_id), or a classifier: two hidden
            layers with batch norm, a linear probe, the distance to each task's mean.
        prefix: the share of the anchor's layers after which the classifier looks; 1 is the last
            hidden state.
        features: of a sample's tokens: mean and standard deviation, or the mean alone.
        seed: of the classifier's first weights.

    Source: BitDelta, arXiv:2402.10193, eq. 2 and section 3.
    Differs: scales are distilled by the divergence of answers, not the squared distance of logits,
    on the tasks' own data, and nothing but scales learns; a classifier may choose the tenant.
    """
    if code.codec == "full":
        return {"anchor": base, "delta": deltas}
    from mowmerge.dynamic import codecs

    if code.codec == "row_sparse":
        return {"anchor": base, **codecs.row_sparse(deltas)}
    if state is None:
        state = settle(_scales, deltas, {})
    return {"anchor": base, **codecs.one_bit(deltas, state, fitted=code.fitted)}
