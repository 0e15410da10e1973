"""RMM: every expert's low-rank update in a basis that all share, from which each comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mowmerge.dynamic.format import Code
from mowmerge.methods.contracts import (
    Block,
    Count,
    Dynamic,
    Positive,
    Routing,
    Seed,
    Site,
    Survey,
    Unit,
)
from mowmerge.methods.gating import Chooser, Features, by_choice, of_base
from mowmerge.methods.ops import Sum
from mowmerge.methods.ops.spectral import Factors, polar, product_svd, truncated, truncated_numbers
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch


def _code(site: Site, p: Mapping[str, Any], found: Mapping[str, Any] | None) -> Code | None:
    if found and site.name in found["unchanged"]:
        return None
    table = site.role in ("embedding", "head") and not p["vocabulary"]
    if len(site.shape) != 2 or table or site.rank < 2:
        return Code(site.name, site.shape, "full", site.models, "0", site.dtype)
    rank = min(p["rank"], site.rank)
    return Code(
        site.name, site.shape, "basis", site.models, "0", site.dtype,
        rank=rank, basis=min(p["basis"], site.models - 1, rank),
    )  # fmt: skip


def _routing(sites: Sequence[Site], codes: Sequence[Code], p: Mapping[str, Any]) -> Routing:
    return by_choice(sites, p)


def _squares(block: Block) -> Tensor:
    return block.values.double().square().sum()


def _decide(
    totals: Mapping[str, Any], sites: Sequence[Site], p: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Which tensors no model changes: they stay static, unless that is all of them."""
    unchanged = sorted(name for name, total in totals.items() if not float(total) > 0)
    n, rank, size = sites[0].models, p["rank"], min(p["basis"], sites[0].models - 1, p["rank"])
    told = []
    if size * (rank + n) + rank >= rank * n:
        told = [
            f"a basis of {size} for {n} models of rank {rank} stores"
            f" {(size * (rank + n) + rank) / (rank * n):.0%} of their factors"
        ]
    return {"unchanged": unchanged if len(unchanged) < len(totals) else [], "warnings": told}


def _of_rank(pair: Factors, rank: int, factor: str) -> Factors:
    """L [m,rank] and R [rank,k] of an adapter: its own, or balanced, with zeros behind."""
    own = factor == "given" and len(pair[1]) <= rank
    left, right = pair if own else product_svd(*pair).cut(rank).pair
    behind = rank - len(right)
    pad = torch.nn.functional.pad
    return pad(left, (0, behind)), pad(right, (0, 0, 0, behind))


def _aligned(pairs: Sequence[Factors]) -> list[Factors]:
    """Each pair turned, L G and G' R, as near the first as a rotation brings it (Procrustes)."""
    (first, across), found = pairs[0], [pairs[0]]
    for left, right in pairs[1:]:
        turn, values = polar(left.T @ first + right @ across.T)
        full = len(values) == len(turn)  # of full rank: else no rotation, and part would be lost
        found.append((left @ turn, turn.T @ right) if full else (left, right))
    return found


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """The decompositions; or their pairs, and one side of them in fp64 while a basis is found."""
    rank: int = min(p["rank"], *shape)
    return max(truncated_numbers(shape, n, rank), n * rank * (sum(shape) + 6 * max(shape)))


@merge_method(
    paper="arXiv:2510.14163",
    scope="tensor",
    at_least=2,
    workspace=_workspace,
    decompositions=lambda shape, n, p: [(shape[0], shape[1])] * n,
    dynamic=Dynamic(
        _code, _routing, of_base, Survey(lambda site: Sum(_squares, exact=False), _decide)
    ),
)
def rmm(
    deltas: Tensor,
    base: Tensor,
    code: Code,
    *,
    rank: Positive = 16,
    basis: Count = 1,
    factor: Literal["given", "svd"] = "given",
    align: bool = False,
    vocabulary: bool = False,
    router: Chooser = "task_id",
    prefix: Unit = 0.33,
    features: Features = "statistics",
    seed: Seed = 0,
    factors: Sequence[Factors] | None = None,
) -> dict[str, Tensor]:
    """Expert i is W_0 + L_i R_i, each row of L and column of R in a basis that the experts share.

    D_i = L_i R_i of the rank; of a row x_i of the L_i: x_i = mean + U c_i with U its first `basis`
    principal directions over the experts, and so for each column of the R_i. p (r + N) + r numbers
    in place of r N. `mowmerge extract` gives each expert back: exactly with basis N - 1.

    Shapes: deltas [N,m,k], base [m,k] -> anchor, left_mean [m,r], left_basis [m,r,p], left_share
    [m,p,N], right_mean [k,r] ...; what is no matrix, and changes, is kept whole: delta.

    Args:
        rank: r, of each task vector; an adapter of a lower one has zeros behind, of a higher one is
            cut.
        basis: p, the directions kept for each row and column, at most N - 1; 0 keeps the mean.
        factor: an adapter's own factors (given), or U sqrt(S) and sqrt(S) V' of every task vector,
            which is what others than adapters have.
        align: turn each expert's factors towards the first's; their product stays.
        vocabulary: whether embeddings and output heads are matrices too.
        router: who says whose sample it is: the caller (task_id), or a classifier: two hidden
            layers with batch norm, a linear probe, the distance to each task's mean.
        prefix: the share of the anchor's layers after which the classifier looks; 1 is the last
            hidden state.
        features: of a sample's tokens: mean and standard deviation, or the mean alone.
        seed: of the classifier's first weights.

    Source: Reversible Model Merging, arXiv:2510.14163; no released code. The mean and one basis a
    position are read from the numbers that the paper counts.
    Differs: a survey finds what no expert changes, which stays static. A small rank of a large
    matrix is found in a randomised basis, and report.json has what it loses. align is an extension:
    what a small basis keeps depends on how factors are turned, and their product does not say.
    """
    if code.codec == "full":
        return {"anchor": base, "delta": deltas}
    from mowmerge.dynamic import codecs

    if factors is None:
        pairs, told = truncated(deltas, code.rank)
    else:
        pairs, told = [_of_rank(pair, code.rank, factor) for pair in factors], {}
    parts = codecs.basis(_aligned(pairs) if align else pairs, code.basis)
    return {"anchor": base, **parts, **told}
