"""What a merge did to each tensor: norms, cosines, sign conflicts, kept share, bytes, seconds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from mowmerge.plan import RUN, Plan, TensorJob
from mowmerge.tensors import Tensor, torch


class DeltaStats:
    """Running figures over the blocks of one tensor's task vectors."""

    def __init__(self, n: int) -> None:
        self.n, self.numel = n, 0
        self.conflicts: Any = 0.0
        self.kept: Any = 0.0
        self.products: Any = torch.zeros(n, n, dtype=torch.float64)

    def update(self, deltas: Tensor, merged: Tensor) -> None:
        """Takes in a block: deltas [N,*B] and the merged delta [*B]."""
        flat = deltas.reshape(self.n, -1)
        if self.products.is_cpu and not flat.is_cpu:
            self.products = self.products.to(flat.device)
        for products in _products(flat):
            self.products += products
        self.numel += flat.shape[1]
        self.kept += _number(torch.count_nonzero(merged))
        if self.n > 1:
            highest, lowest = flat.amax(0).sign_(), flat.amin(0).sign_()
            conflicts = highest.mul_(lowest).lt_(0.0).sum(dtype=torch.float64)
            self.conflicts += _number(conflicts)

    def figures(self) -> dict[str, Any]:
        """delta_norms, mean_cosine (over pairs of non-zero deltas), sign_conflict, kept_share."""
        products = self.products.tolist()
        norms = [math.sqrt(products[i][i]) for i in range(self.n)]
        cosines = [
            products[i][j] / (norms[i] * norms[j])
            for i, j in combinations(range(self.n), 2)
            if norms[i] and norms[j]
        ]
        count = max(self.numel, 1)
        return {
            "delta_norms": norms,
            "mean_cosine": math.fsum(cosines) / len(cosines) if cosines else None,
            "sign_conflict": float(self.conflicts) / count if self.n > 1 else None,
            "kept_share": float(self.kept) / count,
        }


def _number(value: Tensor) -> Any:
    """A number; on a device it stays there, where nobody waits for it."""
    return float(value) if value.is_cpu else value


def _products(flat: Tensor) -> Iterator[Tensor]:
    """Sums of inner products [N,N] over runs of 65,536 elements of [N,B], in fp64.

    A processor has a run in its cache; a device is given whole runs at once, since there each call
    costs.
    """
    if flat.is_cpu:
        for start in range(0, flat.shape[1], RUN):
            run = flat[:, start : start + RUN]
            yield (run @ run.T).double()
        return
    n, count = len(flat), flat.shape[1] // RUN
    whole, rest = flat[:, : count * RUN], flat[:, count * RUN :]
    runs = whole.view(n, count, RUN).transpose(0, 1)
    yield torch.bmm(runs, runs.mT).double().sum(0)
    yield (rest @ rest.T).double()


@dataclass
class TensorReport:
    """One output tensor's line in report.json."""

    name: str
    action: str  # merged | copied | dynamic
    method: str | None
    read_bytes: int
    written_bytes: int
    seconds: float
    figures: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def report(
    plan: Plan, tensors: Sequence[TensorReport], seconds: float, extra: dict[str, Any]
) -> dict[str, Any]:
    """The content of report.json."""
    jobs: dict[str, TensorJob] = {job.output.name: job for job in plan.jobs}
    return {
        "version": 1,
        **extra,
        "fingerprint": plan.fingerprint,
        "models": list(plan.sources),
        "base": plan.base,
        "warnings": list(plan.warnings) + [f"{t.name}: {n}" for t in tensors for n in t.notes],
        "dropped": list(plan.dropped),
        **({"vocabulary": plan.vocabulary.told()} if plan.vocabulary else {}),
        **({"survey": plan.surveyed} if plan.surveyed is not None else {}),
        "read_bytes": plan.read_bytes,
        "written_bytes": plan.write_bytes,
        "planned_peak_bytes": plan.peak_bytes,
        **(
            {"devices": list(plan.devices), "planned_device_bytes": plan.device_bytes}
            if (plan.device_bytes)
            else {}
        ),
        "seconds": round(seconds, 3),
        "tensors": [
            {
                "name": t.name,
                "dtype": jobs[t.name].stored[0].dtype,
                "shape": list(jobs[t.name].output.shape),
                "action": t.action,
                "method": t.method,
                "models": [i.model for i in jobs[t.name].models],
                "parameters": dict(jobs[t.name].parameters),
                **_coded(jobs[t.name]),
                **t.figures,
                "read_bytes": t.read_bytes,
                "written_bytes": t.written_bytes,
                "seconds": round(t.seconds, 4),
            }
            for t in tensors
        ],
    }


def text(content: Mapping[str, Any]) -> str:
    """A report as JSON, a line a tensor."""
    head = json.dumps({k: v for k, v in content.items() if k != "tensors"}, indent=1)
    tensors = ",\n".join(json.dumps(each) for each in content["tensors"])
    return f'{head.removesuffix("}").rstrip()},\n "tensors": [\n{tensors}\n ]\n}}\n'


def _coded(job: TensorJob) -> dict[str, Any]:
    """How a dynamic tensor is stored, and who made its anchor."""
    if job.code is None:
        return {}
    anchor = job.anchor.method if job.anchor else None
    return {"codec": job.code.codec, "gate": job.code.gate, "anchor": anchor}
