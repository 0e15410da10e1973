"""What a dynamic checkpoint holds, or a plan would write, in figures; loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from mowmerge.checkpoint import naming
from mowmerge.dynamic.format import ROUTER, Code, Head, Manifest
from mowmerge.dynamic.names import HEADS
from mowmerge.plan import Plan, Stored
from mowmerge.tensors import TensorSpec


def contents(
    manifest: Manifest, specs: Mapping[str, TensorSpec], encoder: Stored | None = None
) -> dict[str, Any]:
    """Method, experts, bytes by kind and as a multiple of the anchor, codes by role, gates,
    routers, heads and what classifiers look at, as plain data. `specs` are all tensors by the
    manifest's names."""
    sizes = {"anchor": 0, "codes": 0, "routers": 0, "heads": 0}
    beside = {"encoder": sum(s.nbytes for s in encoder.specs.values())} if encoder else {}
    parts = {code.part_name(part) for code in manifest.codes for part in code.parts}
    for name, spec in specs.items():
        sizes[_kind(name, parts)] += spec.nbytes
    total = sum(sizes.values()) + sum(beside.values())
    return {
        "method": manifest.method,
        "experts": list(manifest.experts),
        "bytes": {**sizes, **beside, "total": total},
        "multiple": round(total / max(1, sizes["anchor"]), 4),
        "codes": _codes(manifest.codes, specs),
        "gates": {
            name: {**asdict(gate), "slots": manifest.slots(name)}
            for name, gate in manifest.gates.items()
        },
        "routers": {name: asdict(router) for name, router in manifest.routers.items()},
        **({"encoder": asdict(manifest.encoder)} if manifest.encoder else {}),
        "heads": [
            {"expert": h.expert, "class": manifest.head_class, "labels": labels(h)}
            for h in manifest.heads
        ],
    }


def labels(head: Head) -> int:
    """How many labels a head has."""
    named = head.config.get("id2label") or {}
    return len(named) or int(head.config.get("num_labels", 2))


def planned(plan: Plan) -> dict[str, TensorSpec]:
    """Every tensor that a plan would write, by the manifest's names."""
    specs = dict(plan.specs)
    specs |= {part.name: part for job in plan.jobs for part in job.parts}
    for name, (model, source) in plan.head_names.items():
        specs[name] = replace(plan.sources[model].specs[source], name=name)
    for id, router in plan.manifest.routers.items() if plan.manifest else ():
        for key, part in router.parts.items():
            name = f"{ROUTER}.{id}.{key}"
            specs[name] = TensorSpec(name, part.dtype, part.shape)
    return specs


def _kind(name: str, parts: set[str]) -> str:
    if name.startswith(f"{HEADS}."):
        return "heads"
    if name.startswith(f"{ROUTER}."):
        return "routers"
    return "codes" if name in parts else "anchor"


def _codes(codes: Iterable[Code], specs: Mapping[str, TensorSpec]) -> list[dict[str, Any]]:
    """A row for each role, stack of layers and codec: which layers, how many tensors and bytes."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for code in codes:
        stack, layer = naming.stack(code.name) or ("", None)
        role = naming.role(code.name)
        row = rows.setdefault(
            (role, stack, code.codec),
            {"role": role, "stack": stack.rstrip("."), "layers": [], "codec": code.codec,
             "tensors": 0, "bytes": 0},
        )  # fmt: skip
        row["tensors"] += 1
        row["bytes"] += sum(specs[code.part_name(part)].nbytes for part in code.parts)
        if layer is not None and layer not in row["layers"]:
            row["layers"] = sorted([*row["layers"], layer])
    return list(rows.values())
