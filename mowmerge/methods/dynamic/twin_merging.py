"""Twin-Merging: one shared expert, and what is exclusive to each at low rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Literal

from mowmerge.dynamic.format import Code
from mowmerge.methods.contracts import Dynamic, Extent, Reduction, Routing, Seed, Site, Unit
from mowmerge.methods.gating import Classifier, Features, by_choice
from mowmerge.methods.ops import edges, exclusive, largest, marked
from mowmerge.methods.ops.spectral import truncated, truncated_numbers
from mowmerge.methods.ops.tall import by_rows, cut, turns, workspace
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor


def _code(site: Site, p: Mapping[str, Any], found: Any) -> Code | None:
    if site.rank < 2:
        return Code(site.name, site.shape, "full", site.models, "0", site.dtype)
    if p["keep"] == "magnitude":
        kept = _entries(site.shape, p)
        return Code(site.name, site.shape, "sparse", site.models, "0", site.dtype, kept=kept)
    rank = _pairs(site.rank, p)
    return Code(site.name, site.shape, "low_rank", site.models, "0", site.dtype, rank=rank)


def _pairs(most: int, p: Mapping[str, Any]) -> int:
    return max(1, int(p["density"] * most))


def _entries(shape: Sequence[int], p: Mapping[str, Any]) -> int:
    return int(p["density"] * prod(shape))


def _routing(sites: Sequence[Site], codes: Sequence[Code], p: Mapping[str, Any]) -> Routing:
    return by_choice(sites, p)


def _rest(p: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    return "task_arithmetic", {"scale": 0.3}


def _statistics(extents: Sequence[Extent]) -> Reduction:
    """What cuts each model's difference from the anchor: where its largest entries end, or how a
    tall matrix, which is read by rows, turns."""
    one = extents[0]
    if one.codec == "sparse":
        ranks = [_entries(one.shape, one.parameters)] * one.models
        return (yield from edges([ranks], one.numel, exclusive, zeros=True))[0]
    if one.rows:
        return (yield from turns(_pairs(min(one.shape), one.parameters), exclusive))
    return None


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """By rows; or one difference from the anchor, and the decompositions."""
    rank = _pairs(min(shape), p)
    return workspace(shape, n, rank) or prod(shape) + truncated_numbers(shape, n, rank)


@merge_method(
    paper="arXiv:2406.15479",
    scope="tensor",
    reduce=_statistics,
    workspace=_workspace,
    dynamic=Dynamic(_code, _routing, _rest, by_rows=by_rows),
)
def twin_merging(
    models: Tensor,
    anchor: Tensor,
    code: Code,
    *,
    density: Unit = 0.1,
    keep: Literal["pairs", "magnitude"] = "pairs",
    router: Classifier = "deep",
    prefix: Unit = 0.33,
    features: Features = "statistics",
    seed: Seed = 0,
    start: int = 0,
    state: Any = None,
) -> dict[str, Tensor]:
    """W(x) = W_shared + sum_k w_k(x) C(W_k - W_shared), w a classifier's softmax.

    The shared expert is the static merge of the rest. C keeps floor(density rank) singular pairs of
    a matrix, the largest, at least one; or floor(density n) entries. Vectors are kept whole. w
    comes from the shared expert's own hidden states.

    Shapes: models [N,*S], anchor [*S] -> u [rows,N rank], v [N rank,columns], slot; or occ, val [N
    kept], ptr; vectors delta.

    Args:
        density: share of each matrix's singular pairs, or entries, kept.
        keep: of a matrix the singular pairs (the paper), or the entries of the largest magnitude,
            of equal ones the first.
        router: two hidden layers with batch norm, a linear probe, or the distance to each task's
            mean.
        prefix: the share of the anchor's layers after which the classifier looks; 1 is the last
            hidden state.
        features: of a sample's tokens: mean and standard deviation, or the mean alone.
        seed: of the router's first weights.

    Source: Twin-Merging, arXiv:2406.15479, algorithm 1; reference code twin_merge.py, sparsify.py.
    Differs: heads and biases follow the router (the released evaluation gives the true task's);
    what is exclusive is truncated as a product, never factor by factor; the router looks at means
    and deviations a third of the way up, where inputs still show where they are from and a pass
    costs a third (the paper's: prefix 1, features mean). Few pairs of a large matrix are found in a
    randomised basis; report.json has what they lose. The code's third way, entries drawn at random
    and rescaled, is left out: no plan could say how many there will be.
    """
    if code.codec == "full":
        return {"delta": models - anchor}
    from mowmerge.dynamic import codecs

    if code.codec == "sparse":
        deltas = models - anchor
        masks = marked(deltas, state or largest(deltas, code.kept), start)
        return codecs.sparse(deltas, masks)
    each = ((model - anchor).flatten(1) for model in models)
    pairs, told = cut(each, state) if state else truncated(each, code.rank)
    return {**codecs.low_rank(pairs), **told}
