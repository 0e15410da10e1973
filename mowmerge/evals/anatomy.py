"""What a merge did to its tensors, from its own report.json: a row a stack, layer and role."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from math import fsum, prod, sqrt
from typing import Any

from mowmerge.checkpoint import naming
from mowmerge.evals.schema import LayerPart, Merge

Tensor = Mapping[str, Any]
Place = tuple[str, int, str]  # stack, layer (-1 outside the layers), role


def anatomy(report: Mapping[str, Any]) -> Merge:
    """The merge in as many rows as the model has layers and roles, however many tensors it has."""
    groups: dict[Place, list[Tensor]] = defaultdict(list)
    for tensor in report["tensors"]:
        stack, layer = naming.stack(tensor["name"]) or ("", -1)
        groups[stack.rstrip("."), layer, naming.role(tensor["name"])].append(tensor)
    used = Counter(t["method"] for t in report["tensors"] if t["method"])
    survey = report.get("survey") or {}
    return Merge(
        method=", ".join(name for name, _ in used.most_common()),
        experts=[name for name in report["models"] if name != report["base"]],
        layers=[_row(place, tensors) for place, tensors in groups.items()],
        codecs=Counter(t["codec"] for t in report["tensors"] if t.get("codec")),
        similarity={
            role: {block: 1 - value for block, value in of.items()}
            for role, of in survey.get("dissimilarity", {}).items()
        },
        seconds=report["seconds"],
        peak_bytes=report["planned_peak_bytes"],
        read_bytes=report["read_bytes"],
        written_bytes=report["written_bytes"],
        warnings=report["warnings"],
    )


def _row(place: Place, tensors: Sequence[Tensor]) -> LayerPart:
    stack, layer, role = place
    squares: dict[str, list[float]] = defaultdict(list)
    for tensor in tensors:
        for model, norm in zip(tensor["models"], tensor.get("delta_norms", ()), strict=False):
            squares[model].append(norm * norm)
    total = sum(_elements(tensor) for tensor in tensors)
    return LayerPart(
        stack=stack,
        layer=None if layer < 0 else layer,
        role=role,
        tensors=len(tensors),
        elements=total,
        dynamic=_did(tensors, "dynamic") / max(1, total),
        copied=_did(tensors, "copied") / max(1, total),
        norms={model: sqrt(fsum(held)) for model, held in squares.items()},
        cosine=_weighted(tensors, "mean_cosine"),
        sign_conflict=_weighted(tensors, "sign_conflict"),
        kept=_weighted(tensors, "kept_share"),
    )


def _elements(tensor: Tensor) -> int:
    return prod(tensor["shape"])


def _did(tensors: Sequence[Tensor], action: str) -> int:
    return sum(_elements(tensor) for tensor in tensors if tensor["action"] == action)


def _weighted(tensors: Sequence[Tensor], figure: str) -> float | None:
    """The mean of a figure over the tensors that have it, weighted by their elements."""
    held = [(t[figure], _elements(t)) for t in tensors if t.get(figure) is not None]
    weight = sum(count for _, count in held)
    return fsum(value * count for value, count in held) / weight if weight else None
