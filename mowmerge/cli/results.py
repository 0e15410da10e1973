"""How merges end in a terminal: where the checkpoint or the adapter is, and what it took."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from mowmerge.cli import output

if TYPE_CHECKING:
    from mowmerge.api import Result
    from mowmerge.evals.schema import Report


def show(result: Result, *, as_json: bool, quiet: bool, evaluation: Report | None = None) -> None:
    """Where the checkpoint is and what it took; in JSON with its evaluation."""
    summary = {k: v for k, v in result.report.items() if k != "tensors"}
    if as_json:
        scored = {"evaluation": evaluation.model_dump(mode="json")} if evaluation else {}
        print(json.dumps({"path": str(result.path), **summary, **scored}))
        return
    if quiet:
        return
    if "replay" in summary:
        print(_replayed(summary["replay"]), file=sys.stderr)
    if "kept_energy" in summary:
        print(_adapter(result))
        return
    tensors = result.report["tensors"]
    did = Counter(t["action"] for t in tensors)
    dynamic = f"{did['dynamic']} tensors dynamic, " if did["dynamic"] else ""
    merged = f"{did['merged']} {'' if dynamic else 'tensors '}merged"
    print(
        f"{result.path}: {dynamic}{merged}, {did['copied']} copied,"
        f" {output.size(summary['written_bytes'])} in {summary['seconds']:.1f} s"
    )


def _replayed(told: dict[str, Any]) -> str:
    """How a lock's second run compares with the first, in a line."""
    here, then = (f"torch {told[k]['torch']} on {told[k]['device']}" for k in ("here", "then"))
    where = f"as on {then}" if told["same_build"] else f"on {here}, where {then} made the lock"
    if told["outcome"] == "not compared":
        return (
            f"replayed {where}: not compared, for the first run's weights are not beside the lock"
        )
    if "distance" in told:
        far = f", '{told['tensor']}' is {told['distance']:.2g} of its norm away"
        alarm = "warning: " if told["same_build"] or told["outcome"] == "beyond tolerance" else ""
        return f"{alarm}replayed {where}: {told['outcome']}{far}"
    alarm = "warning: " if told["outcome"] == "beyond tolerance" else ""
    return f"{alarm}replayed {where}: {told['outcome']}"


def _adapter(result: Result) -> str:
    """An adapter and what it keeps, in a line; what is lost on a second."""
    told, ranks = result.report, result.report["ranks"]
    did = Counter(t["action"] for t in told["tensors"])
    of = " to ".join(dict.fromkeys(str(rank) for rank in (ranks[:1] + ranks[-1:])))
    head = (
        f"{result.path}: {did['low rank']} low-rank updates of rank {of or 0},"
        f" {did['bias'] + did['modules_to_save']} tensors as they are;"
        f" {told['kept_energy']:.2%} of the squared norm is kept, in {told['seconds']:.1f} s"
    )
    return f"{head}\nlost: {', '.join(told['lost'])}" if told["lost"] else head
