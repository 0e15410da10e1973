"""Twin-Merging: one shared expert, and what is exclusive to each at low rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mowmerge.dynamic.format import Code
from mowmerge.methods.contracts import Dynamic, Extent, Reduction, Routing, Seed, Site, Unit
from mowmerge.methods.gating import Classifier, Features, by_choice
from mowmerge.methods.ops.spectral import truncated
from mowmerge.methods.ops.tall import Turn, by_rows, cut, from_anchor, workspace
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor


def _code(site: Site, p: Mapping[str, Any], found: Any) -> Code | None:
    if site.rank < 2:
        return Code(site.name, site.shape, "full", site.models, "0", site.dtype)
    rank = _rank(site.rank, p)
    return Code(site.name, site.shape, "low_rank", site.models, "0", site.dtype, rank=rank)


def _rank(most: int, p: Mapping[str, Any]) -> int:
    return max(1, int(p["density"] * most))


def _routing(sites: Sequence[Site], codes: Sequence[Code], p: Mapping[str, Any]) -> Routing:
    return by_choice(sites, p)


def _rest(p: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    return "task_arithmetic", {"scale": 0.3}


def _turns(extents: Sequence[Extent]) -> Reduction:
    one = extents[0]
    return (yield from from_anchor(extents, _rank(min(one.shape, default=0), one.parameters)))


@merge_method(
    paper="arXiv:2406.15479",
    scope="tensor",
    reduce=_turns,
    workspace=lambda shape, n, p: workspace(shape, n, _rank(min(shape, default=0), p)),
    dynamic=Dynamic(_code, _routing, _rest, by_rows=by_rows),
)
def twin_merging(
    models: Tensor,
    anchor: Tensor,
    code: Code,
    *,
    density: Unit = 0.1,
    router: Classifier = "deep",
    prefix: Unit = 0.33,
    features: Features = "statistics",
    seed: Seed = 0,
    state: Sequence[Turn] | None = None,
) -> dict[str, Tensor]:
    """W(x) = W_shared + sum_k w_k(x) SVD_density(W_k - W_shared), w a classifier's softmax.

    The shared expert is the static merge of the rest. Matrices keep their floor(density rank)
    largest singular pairs, at least one; vectors are kept whole. w comes from the shared expert's
    own hidden states.

    Shapes: models [N,*S], anchor [*S] -> u [rows,N rank], v [N rank,columns], slot; vectors delta.

    Args:
        density: share of each matrix's singular pairs kept.
        router: two hidden layers with batch norm, a linear probe, or the distance to each task's
            mean.
        prefix: the share of the anchor's layers after which the classifier looks; 1 is the last
            hidden state.
        features: of a sample's tokens: mean and standard deviation, or the mean alone.
        seed: of the router's first weights.

    Source: Twin-Merging, arXiv:2406.15479, algorithm 1; reference code twin_merge.py.
    Differs: heads and biases follow the router (the released evaluation gives the true task's);
    what is exclusive is truncated as a product, never factor by factor; the router looks at means
    and deviations a third of the way up, where inputs still show where they are from and a pass
    costs a third (the paper's: prefix 1, features mean). Few pairs of a large matrix are found in a
    randomised basis; report.json has what they lose.
    """
    if code.codec == "full":
        return {"delta": models - anchor}
    from mowmerge.dynamic import codecs

    deltas = ((model - anchor).flatten(1) for model in models)
    pairs, told = cut(deltas, state) if state else truncated(deltas, code.rank)
    return {**codecs.low_rank(pairs), **told}
