"""The multi-task vector that TALL-masks and consensus merging look at: a sum, or a TIES merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mowmerge.methods.contracts import Block, Extent, MethodError, Reduction
from mowmerge.methods.ops.blocks import added, agree, elect_sign, keep_above
from mowmerge.methods.ops.folds import majority
from mowmerge.methods.ops.selection import trim_thresholds
from mowmerge.tensors import Tensor


@dataclass
class Trim:
    """What TIES needs to know of the whole model: thresholds, and the sign of an even vote."""

    threshold: Sequence[float]
    majority: float = 1.0

    def kept(self, deltas: Tensor) -> list[Tensor]:
        """New D_i with what is below its threshold at 0."""
        return [keep_above(d, t) for d, t in zip(deltas, self.threshold, strict=True)]


def trim(extents: Sequence[Extent]) -> Reduction:
    """Returns the Trim of the models' `density` largest entries; None where `merge` is sum."""
    p, total = extents[0].parameters, sum(e.numel for e in extents)
    if p["merge"] == "sum":
        return None
    if any(e.parameters["density"] != p["density"] for e in extents):
        raise MethodError("with merge: ties, density must be the same for all tensors")
    density = [p["density"]] * len(p["threshold"])
    found = Trim((yield from trim_thresholds(density, total, extra=1)))

    def kept(block: Block) -> list[Tensor]:
        return found.kept(block.values)

    found.majority = yield from majority(kept)
    return found


def multitask(deltas: Tensor, state: Trim | None) -> Tensor:
    """sum_i D_i, or with a state the D_i trimmed, sign-elected and added up as TIES does [*S]."""
    if state is None:
        return added(list(deltas))
    kept = state.kept(deltas)
    return agree(kept, elect_sign(kept, "mass", state.majority), "sum", [1.0] * len(deltas))
