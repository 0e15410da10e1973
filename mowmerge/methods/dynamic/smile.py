"""SMILE: every Linear a mixture of low-rank experts, chosen for each token by projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from mowmerge.dynamic.format import Code, Gate, Router
from mowmerge.methods.contracts import Dynamic, MethodError, Range, Routing, Site
from mowmerge.methods.gating import in_block_matrix, of_base
from mowmerge.methods.ops.spectral import truncated, truncated_numbers
from mowmerge.methods.registry import merge_method
from mowmerge.tensors import Tensor, torch


def _code(site: Site, p: Mapping[str, Any], found: Any) -> Code | None:
    if in_block_matrix(site):
        rank, gate = (min(p[word], site.rank) for word in ("rank", "gate_rank"))
        return Code(
            site.name, site.shape, "low_rank", site.models, "0", site.dtype,
            rank=rank, gate_rank=gate, gate_width=site.shape[0] if site.transposed else 0,
        )  # fmt: skip
    biased = site.role in ("attention", "mlp") and site.name.endswith(".bias")
    if biased and site.layer is not None:
        return Code(site.name, site.shape, "full", site.models, "0", site.dtype)
    return None


def _routing(sites: Sequence[Site], codes: Sequence[Code], p: Mapping[str, Any]) -> Routing:
    gated = {code.name for code in codes if code.gate_rank}
    for code in codes:
        if code.name not in gated and code.name.removesuffix("bias") + "weight" not in gated:
            raise MethodError(
                f"'{code.name}' is chosen by the gate of its matrix, which is not coded: a rule"
                " that takes out the matrix has to take out the bias too"
            )
    router = Router("projection", 0, codes[0].slots, top_k=p["top_k"])
    return {"0": Gate("module", "0")}, {"0": router}


def _workspace(shape: tuple[int, ...], n: int, p: Mapping[str, Any]) -> int:
    """The decompositions; or their pairs, those together, and right factors of one length."""
    rank: int = min(max(p["rank"], p["gate_rank"]), *shape)
    return max(truncated_numbers(shape, n, rank), n * rank * (2 * sum(shape) + max(shape)))


@merge_method(
    paper="arXiv:2408.10174",
    scope="tensor",
    workspace=_workspace,
    dynamic=Dynamic(_code, _routing, of_base),
)
def smile(
    deltas: Tensor,
    base: Tensor,
    code: Code,
    *,
    rank: Annotated[int, Range(1)] = 128,
    gate_rank: Annotated[int, Range(1)] = 1,
    top_k: Annotated[int, Range(1)] = 1,
) -> dict[str, Tensor]:
    """y = W_0 x + b_0 + sum over the top k experts of l_i (U_i S_i V_i^T x + b_i - b_0), by token.

    r_i = |V_i[:, :gate_rank]^T x|, l = softmax(r) renormalised over the top k: a token goes to the
    expert whose task vector it excites. Nothing is trained. Matrices and biases of attention and
    MLPs; the rest is the base's.

    Shapes: deltas [N,out,in], base [out,in] -> anchor, u, v, slot, gate [N gate_rank,in]; or all
    [in,out], where the layer stores them so (GPT-2), with V in W = U S V^T of its transpose.

    Args:
        rank: singular pairs of each expert, at most the matrix's rank.
        gate_rank: right singular vectors that a token is projected on.
        top_k: experts a token and matrix.

    Source: SMILE, arXiv:2408.10174, section 3; reference code smile_moe.
    Differs: an expert that did not change a matrix has a zero gate there and is never preferred.
    Few pairs of a large matrix are found in a randomised basis; report.json has what they lose. The
    code's other gate, on singular vectors of the experts' weights (routing_use_diff: false), is
    left out: fine-tunes of one base have all but the same.
    """
    if code.codec == "full":
        return {"anchor": base, "delta": deltas}
    from mowmerge.dynamic import codecs

    n, (rows, columns), most = len(deltas), code.matrix, max(code.rank, code.gate_rank)
    pairs, told = truncated(deltas.view(n, rows, columns), most)
    parts = codecs.low_rank(pairs)
    left, right = parts["u"].view(rows, n, most), parts["v"].view(n, most, columns)
    into = left.permute(1, 2, 0) if code.gate_width else right  # a weight stored [in,out]: U
    length = into.norm(dim=2, keepdim=True)  # a direction that moved nothing has none
    gate = (into / length.where(length > 0, 1.0))[:, : code.gate_rank]
    return {
        "anchor": base,
        "gate": gate.flatten(0, 1),
        "u": left[..., : code.rank].reshape(rows, -1),
        "v": right[:, : code.rank].reshape(-1, columns),
        "slot": torch.arange(n, dtype=torch.int32).repeat_interleave(code.rank),
        **told,
    }
