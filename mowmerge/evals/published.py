"""What a model card says of an evaluation: figures for its model index, and a table."""

from __future__ import annotations

import json
import re
from typing import Any

from mowmerge.evals import markdown, words
from mowmerge.evals.schema import Report

PIPELINES = {
    "multiple-choice": "text-generation", "causal-lm": "text-generation",
    "generation": "text-generation", "lm-eval": "text-generation",
}  # fmt: skip


def figures(report: Report) -> list[dict[str, Any]]:
    """The fields of huggingface_hub.EvalResult for the subject's score on each task."""
    found = []
    for task, data in report.data.items():
        part = words.part_of(report, report.subject, task)
        if part is not None:
            found.append({
                "task_type": PIPELINES.get(data.type, data.type), "dataset_type": task,
                "dataset_name": task, "dataset_split": data.split, "metric_type": data.metric,
                "metric_value": part.value, "metric_name": data.metric, "verified": False,
            })  # fmt: skip
    return found


def benchmarks(report: Report) -> list[dict[str, Any]]:
    """The entries of a file in .eval_results for the tasks that are benchmarks of the Hub.

    The value is the metric's own: a share is one of 1. The revision is given where the data's is a
    commit. Nothing says that anybody verified it.
    """
    found = []
    for task, data in report.data.items():
        part = words.part_of(report, report.subject, task)
        if part is None or not data.benchmark:
            continue
        dataset, _, name = data.benchmark.partition(":")
        revision = _revision(data.source)
        where = {"id": dataset, "task_id": name} | ({"revision": revision} if revision else {})
        notes = f"{data.metric} on {data.n} items of {data.split}, by mowmerge eval"
        found.append({"dataset": where, "value": part.value, "notes": notes})
    return found


def _revision(source: str) -> str:
    """The commit that a data set's arguments name; empty where they name none."""
    try:
        named = str(json.loads(source).get("revision", ""))
    except ValueError:
        return ""
    return named if re.fullmatch("[0-9a-f]{40}", named) else ""


def lines(report: Report) -> list[str]:
    """The sentence, the table of scores and how to read it."""
    run = report.run
    sure = f"{100 * run.level:.0f} % intervals by {run.resamples:,} resamples of the items"
    return [
        f"{words.headline(report)} Self-reported, by `mowmerge eval`.", "",
        *markdown.scores(report), "",
        f"Scores in hundredths where they have a top; {sure}. \\* p < 0.05, \\*\\* p < 0.01,"
        f" \\*\\*\\* p < 0.001 for a difference from {report.subject}, adjusted for all tests.",
    ]  # fmt: skip
