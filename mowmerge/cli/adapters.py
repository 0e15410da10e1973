"""How the plan of an adapter looks: its updates with their ranks or bounds, then the totals."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mowmerge.cli import output

if TYPE_CHECKING:
    from mowmerge.lora import Merge
    from mowmerge.outline import Update
    from mowmerge.tensors import TensorSpec

BESIDE = (
    "adapter_config.json", "recipe.yaml", "recipe.lock.yaml", "report.json", "README.md",
    "SHA256SUMS",
)  # fmt: skip


def show(merge: Merge, *, as_json: bool) -> None:
    """What will be written: a line for each update, what goes along, bytes, files and memory."""
    if as_json:
        print(json.dumps(plain(merge)))
        return
    found = merge.outline
    rows: list[tuple[str, ...]] = [("tensor", "rank", "A", "B", "how", "from", "method")]
    rows += [
        (u.name, _rank(u), *(_shape(part) for part in u.parts), _how(u), *_origin(merge, u.name))
        for u in found.updates
    ]
    print(output.table(rows))
    if found.whole:
        nbytes = sum(spec.nbytes for spec in found.whole.values())
        print(f"\nas they are, if they differ: {len(found.whole)} tensors, {output.size(nbytes)}")
    bound = "" if found.exact else "at most "
    print(
        f"\n{bound}{len(found.updates)} updates in adapter_model.safetensors; read"
        f" {output.size(merge.read_bytes)}, write {bound}{output.size(found.nbytes)}, peak memory"
        f" {output.size(found.peak_bytes)} with {found.workers} worker(s)"
    )
    print(f"beside it: {', '.join(BESIDE)}")
    if not found.exact:
        print("which tensors differ, and to what rank, is decided by their values")
    for name, rule in found.lost.items():
        print(f"lost if it differs: {name}, {rule}")
    output.warn(merge.plan.warnings)


def plain(merge: Merge) -> dict[str, Any]:
    """The same as plain data."""
    found = merge.outline
    return {
        "version": 1,
        "format": "adapter",
        "fingerprint": merge.plan.fingerprint,
        "exact": found.exact,
        "read_bytes": merge.read_bytes,
        "write_bytes": found.nbytes,
        "peak_bytes": found.peak_bytes,
        "workers": found.workers,
        "cut": vars(merge.cut),
        "files": ["adapter_model.safetensors", *BESIDE],
        "tensors": [
            {
                "name": update.name,
                "module": update.module,
                "rank": update.rank,
                "exact": update.exact,
                "how": _how(update),
                "method": _origin(merge, update.name)[1],
                "bytes": update.nbytes,
                "parts": [
                    {"name": p.name, "dtype": p.dtype, "shape": list(p.shape), "bytes": p.nbytes}
                    for p in update.parts
                ],
            }
            for update in found.updates
        ],
        "whole": [{"name": name, "bytes": s.nbytes} for name, s in found.whole.items()],
        "lost": [{"name": name, "rule": rule} for name, rule in found.lost.items()],
        "warnings": list(merge.plan.warnings),
    }


def _rank(update: Update) -> str:
    return str(update.rank) if update.exact else f"at most {update.rank}"


def _shape(part: TensorSpec) -> str:
    return "x".join(map(str, part.shape))


def _how(update: Update) -> str:
    if not update.joined:
        return "zero" if update.exact else "decomposed"
    return "joined" if update.exact else "joined, then cut"


def _origin(merge: Merge, name: str) -> tuple[str, str]:
    """The models that a tensor is made of, and the method."""
    job = next(job for job in merge.plan.jobs if job.output.name == name)
    return ",".join(given.model for given in job.models), job.method or "copy"
