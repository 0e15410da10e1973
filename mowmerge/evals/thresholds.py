"""Figures that may be asked to reach a value: `--fail-under avg_normalized=0.95`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mowmerge.errors import Problem, RecipeError, ThresholdError, did_you_mean
from mowmerge.evals import words
from mowmerge.evals.aggregates import HELD_OUT
from mowmerge.evals.schema import Report

FIGURES = {
    "avg": "mean over the experts' tasks",
    "avg_normalized": "mean over tasks of score / expert's score",
    "ratio_of_means": "mean score / the experts' mean score",
    "worst_normalized": "the lowest score / expert's score",
    "at_least_expert": "number of tasks on which the expert's score is reached",
    "avg_recovery": "mean of (score - base) / (expert - base)",
    "routing_accuracy": "share of items that are sent to their task's own expert",
    "held_out": "mean difference from the base on tasks without an expert",
}


def known(tasks: Sequence[str]) -> list[str]:
    """Every figure that can be named: those of all tasks, TASK and TASK.normalized."""
    return [*FIGURES, *(each for task in tasks for each in (task, f"{task}.normalized"))]


def check(asked: Mapping[str, float], tasks: Sequence[str]) -> None:
    """Raises RecipeError for a figure that there is not: before anything is scored."""
    names = known(tasks)
    problems = [
        Problem(f"there is no figure '{name}'", "--fail-under", did_you_mean(name, names))
        for name in asked
        if name not in names
    ]
    if problems:
        raise RecipeError(problems)


def require(report: Report, asked: Mapping[str, float]) -> None:
    """Raises ThresholdError where a figure of the subject is below what was asked, or absent."""
    problems = []
    for name, least in asked.items():
        value, why = _value(report, name)
        if value is None:
            problems.append(Problem(f"{name} is absent: {why}", "--fail-under"))
        elif value < least:
            problems.append(
                Problem(f"{name} of {report.subject} is {value:.4g}, below {least:g}",
                        "--fail-under")
            )  # fmt: skip
    if problems:
        raise ThresholdError(problems)


def _value(report: Report, name: str) -> tuple[float | None, str]:
    """A figure of the subject; where there is none, why."""
    found = words.summary_of(report, report.subject)
    values = {
        "avg": found.mean, "avg_normalized": found.normalised,
        "ratio_of_means": found.ratio_of_means, "worst_normalized": found.worst,
        "at_least_expert": found.at_least_expert, "avg_recovery": found.recovery,
        "routing_accuracy": found.routing_accuracy,
        "held_out": next((f.signed for f in report.forgetting
                          if f.row == report.subject and f.on == HELD_OUT), None),
    }  # fmt: skip
    if (
        name == "held_out"
        and values[name] is None
        and any(f.on == HELD_OUT for f in report.forgetting)
    ):
        return None, "the held-out tasks' scores are in different units"
    whys = {"avg": "mean", "avg_normalized": "normalised", "avg_recovery": "recovery"}
    if name in values:
        why = found.absent.get(whys.get(name, ""), "this evaluation does not have it")
        return values[name], why
    task, _, normalised = name.partition(".")
    if name in report.data:
        task, normalised = name, ""
    part = words.part_of(report, report.subject, task)
    if part is None:
        return None, f"{report.subject} was not scored on {task}"
    if normalised:
        return part.normalised, part.absent.get("normalised", "")
    if not report.data[task].higher_is_better:
        return None, f"lower is better for {report.data[task].metric}: ask for {task}.normalized"
    return part.value, ""
