"""How many bytes of files lie behind each tensor of a source."""

from __future__ import annotations

from mowmerge.placement import MEAN, Placed, Rows
from mowmerge.plan import Adapted, Plan, Source, Stored


def reads(source: Source) -> dict[str, int]:
    """Bytes of files that are read when each tensor is read once, by name.

    An fp8 weight's are it and its scales, an adapted tensor's the model's and what adapters have
    for it, a nested recipe's all that the job which makes it reads.
    """
    if isinstance(source, Plan):
        return {job.output.name: job.read_bytes for job in source.jobs}
    if isinstance(source, Adapted):
        return _adapted(source)
    if isinstance(source, Placed):
        return _placed(source)
    return _stored(source)


def _stored(stored: Stored) -> dict[str, int]:
    found = {name: location.spec.nbytes for name, location in stored.tensors.items()}
    for name, scale in stored.scales.items():
        found[name] += scale.location.spec.nbytes
    return found


def _adapted(adapted: Adapted) -> dict[str, int]:
    """What is `added` an adapter has whole; of anything else the model's own is read too."""
    each = [_stored(adapter) for adapter in adapted.adapters]
    found = {n: size for n, size in reads(adapted.model).items() if n not in adapted.added}
    for name, patches in adapted.patches.items():
        whole = [p for p in patches if not p.rows] if name in adapted.added else []
        taken = [p for p in patches if p.rows or not whole or p is whole[-1]]
        parts = sum(each[p.adapter][part] for p in taken for part in p.parts.values())
        found[name] = found.get(name, 0) + parts
    return found


def _placed(placed: Placed) -> dict[str, int]:
    """Each row as often as it is placed, and for a mean the model's own tensor once."""
    each = [reads(lender) for lender in placed.lenders]

    def size(rows: Rows) -> int:
        total = 0
        for (number, name), index in zip(rows.inputs, rows.index, strict=True):
            whole, height = each[number][name], placed.lenders[number].specs[name].shape[0]
            total += whole * int((index >= 0).sum()) // max(1, height)
        return total + each[0][rows.inputs[0][1]] * bool((rows.index[0] == MEAN).any())

    return {**reads(placed.model), **{name: size(rows) for name, rows in placed.rows.items()}}
