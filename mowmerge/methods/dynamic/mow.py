"""Mixture of Weights: the blocks in which experts differ most are mixed by a classifier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Annotated, Any, Literal

from mowmerge.dynamic.format import Code
from mowmerge.methods.contracts import (
    Block,
    Dynamic,
    Extent,
    Range,
    Reduction,
    Routing,
    Seed,
    Site,
    Survey,
    Unit,
)
from mowmerge.methods.gating import Classifier, Features, block_of, by_choice
from mowmerge.methods.ops import Sum, exclusive
from mowmerge.methods.ops.spectral import truncated, truncated_numbers
from mowmerge.methods.ops.tall import Turn, by_rows, cut, turns, workspace
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch

VOCABULARY = ("word_embeddings", "embed_tokens", "wte", "shared", "embed_in", "token_embedding")


def _compared(site: Site) -> bool:
    return site.role in ("attention", "mlp") and site.layer is not None


def _distances(block: Block) -> Tensor:
    """|W_i|^2 on the diagonal, |W_i - W_j|^2 beside it, [N,N] in fp64."""
    wide = block.values.double().reshape(len(block.values), -1)
    found = torch.zeros(len(wide), len(wide), dtype=torch.float64)
    for i, value in enumerate(wide):
        found[i, i] = value.square().sum()
        for j in range(i):
            found[i, j] = (value - wide[j]).square().sum()
    return found


def dissimilarity(distances: Tensor) -> float:
    """1 - the mean cosine over pairs, from `_distances`, without cancellation:
    1 - cos(a, b) = (|a - b|^2 - (|a| - |b|)^2) / (2 |a| |b|)."""
    norms = distances.diagonal().sqrt().tolist()
    pairs = [
        (float(distances[j, i]) - (norms[i] - norms[j]) ** 2) / (2 * norms[i] * norms[j])
        for i, j in combinations(range(len(norms)), 2)
        if norms[i] and norms[j]
    ]
    return math.fsum(pairs) / len(pairs) if pairs else 0.0


def _decide(
    totals: Mapping[str, Any], sites: Sequence[Site], p: Mapping[str, Any]
) -> Mapping[str, Any]:
    """1 - similarity of each block's attention and MLP, and the blocks of each that become
    dynamic: the `blocks` least similar, the first of equals."""
    summed: dict[str, dict[str, Any]] = {"attention": {}, "mlp": {}}
    for site in sites:
        if site.name in totals:
            of = summed[site.role]
            of[block_of(site)] = of.get(block_of(site), 0.0) + totals[site.name]
    table = {
        role: {block: dissimilarity(total) for block, total in of.items()}
        for role, of in summed.items()
    }
    chosen = {
        role: sorted(of, key=lambda block: -of[block])[: p["blocks"]] for role, of in table.items()
    }
    found: dict[str, Any] = {"dissimilarity": table, "dynamic": chosen}
    most = max(map(len, table.values()))
    if p["blocks"] > most:
        found["warnings"] = [f"blocks is {p['blocks']}, and there are {most}: all are dynamic"]
    return found


def _code(site: Site, p: Mapping[str, Any], found: Mapping[str, Any] | None) -> Code | None:
    if _compared(site):
        chosen = p["blocks"] and (found is None or block_of(site) in found["dynamic"][site.role])
    elif site.role == "norm":
        chosen = p["norms"] == "all" or (p["norms"] == "blocks" and site.layer is not None)
    elif site.role == "embedding":
        outside = "patch" in site.name or any(word in site.name for word in VOCABULARY)
        chosen = p["embeddings"] == "all" or (p["embeddings"] == "auto" and not outside)
    else:
        chosen = p["others"]
    if not chosen:
        return None
    matrix = site.rank > 1 and p["codec"] == "low_rank"
    codec = p["codec"] if matrix or p["codec"] != "low_rank" else "full"
    rank = min(p["rank"], site.rank) if matrix else 0
    return Code(site.name, site.shape, codec, site.models, "0", site.dtype, rank=rank)


def _routing(sites: Sequence[Site], codes: Sequence[Code], p: Mapping[str, Any]) -> Routing:
    return by_choice(sites, p, hard=p["hard"])


def _rest(p: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    return "task_arithmetic", {"scale": 0.3}


def _turns(extents: Sequence[Extent]) -> Reduction:
    """How a tall matrix that is cut to a rank turns; it is read by rows."""
    one = extents[0]
    if not one.rows:
        return None
    return (yield from turns(min(one.parameters["rank"], *one.shape), exclusive))


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """By rows; or one difference from the anchor, and the decompositions."""
    rank = min(p["rank"], *shape)
    return workspace(shape, n, rank) or math.prod(shape) + truncated_numbers(shape, n, rank)


@merge_method(
    paper="doi:10.1109/TCSVT.2025.3544680",
    at_least=2,
    scope=lambda p: "tensor" if p["codec"] == "low_rank" else "element",
    reduce=_turns,
    workspace=_workspace,
    dynamic=Dynamic(
        _code,
        _routing,
        _rest,
        Survey(lambda s: Sum(_distances) if _compared(s) else None, _decide),
        learned="adamerging_pp",
        by_rows=by_rows,
    ),
)
def mow(
    models: Tensor,
    anchor: Tensor,
    code: Code,
    *,
    blocks: Annotated[int, Range(0)] = 5,
    norms: Literal["blocks", "all", "none"] = "blocks",
    embeddings: Literal["auto", "all", "none"] = "auto",
    others: bool = False,
    codec: Literal["full_abs", "full", "low_rank"] = "full_abs",
    rank: Annotated[int, Range(1)] = 32,
    router: Classifier = "deep",
    prefix: Unit = 0.33,
    features: Features = "statistics",
    hard: Unit = 1.0,
    seed: Seed = 0,
    state: Sequence[Turn] | None = None,
) -> dict[str, Tensor]:
    """Dynamic tensors W(x) = sum_k p_k(x) W_k with p a classifier's softmax; the rest is static.

    The similarity of a block's attention, or its MLP, is the mean over pairs of experts of the
    cosine of all its weights; the `blocks` least similar of each become dynamic. p comes from the
    static model's own hidden states, a third of the way up.

    Shapes: models [N,*S], anchor [*S] -> abs [N,*S], or delta, or u, v, slot.

    Args:
        blocks: how many attention and how many MLP blocks become dynamic, the paper's m.
        norms: the normalisations that are dynamic: of the blocks, all, or none.
        embeddings: auto leaves vocabulary tables and patch convolutions static.
        others: whether what is neither in a block's attention or MLP, nor a norm or embedding, is
            dynamic: poolers, projections, an untied output matrix.
        codec: the experts' weights (a one-hot gate is bit exact), their differences from the
            anchor, or those at a rank.
        rank: of each difference, with codec low_rank; a small one of a large matrix is found in a
            randomised basis, and report.json has what it loses.
        router: two hidden layers with batch norm, a linear probe, or the distance to each task's
            mean.
        prefix: the share of the anchor's layers after which the classifier looks; 1 is the last
            hidden state.
        features: of a sample's tokens: mean and standard deviation, or the mean alone.
        hard: from this probability on, the expert alone answers; 1 never rounds.
        seed: of the router's first weights.

    Source: Mixture of Weights, doi 10.1109/TCSVT.2025.3544680; reference code main_mow_merge.py.
    Differs: gate and head are each sample's own, where the released code averages the gate over a
    batch; cosines are fp64 and free of cancellation; the router is a small network on the model's
    own hidden states instead of a MobileNet, trained on logits with data of its own.
    """
    if code.codec == "full_abs":
        return {"abs": models}
    if code.codec == "full":
        return {"delta": models - anchor}
    from mowmerge.dynamic import codecs

    deltas = ((model - anchor).flatten(1) for model in models)
    pairs, told = cut(deltas, state) if state else truncated(deltas, code.rank)
    return {**codecs.low_rank(pairs), **told}
