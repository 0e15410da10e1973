"""Two reports side by side: what changed, whether it is more than noise, and what else differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import erfc, sqrt
from typing import Any

import numpy as np
from pydantic import Field

from mowmerge.evals import aggregates, figures, statistics
from mowmerge.evals.report import Items
from mowmerge.evals.schema import DataPart, Pair, Part, Report, ScorePart, Test
from mowmerge.evals.score import Score

NORMAL = 1.959963984540054  # half the width of a 95 % interval in standard errors


class Change(Part):
    """A task's score in both reports."""

    task: str = Field(description="Task; empty for the mean over the experts' tasks.")
    metric: str = Field(description="Metric.")
    before: float = Field(description="In the first report.")
    after: float = Field(description="In the second.")
    difference: float = Field(description="after - before.")
    interval: Pair | None = Field(description="Interval of the difference.")
    kind: str = Field(description="mcnemar or bootstrap (same items), unpaired, or none.")
    p: float | None = Field(description="Two-sided p of no difference.")
    p_holm: float | None = Field(description="p adjusted (Holm) for the tasks.")


class Comparison(Part):
    """What two evaluations say of their subjects."""

    version: int = Field(default=1, description="Version of this schema.")
    before: str = Field(description="Subject of the first report.")
    after: str = Field(description="Subject of the second.")
    changes: Sequence[Change] = Field(description="Every task that both scored.")
    mean: Change | None = Field(description="The mean, where it is over the same tasks.")
    differing: Mapping[str, tuple[Any, Any]] = Field(
        description="Setting, datum or hash that is not the same -> both values."
    )
    notes: Sequence[str] = Field(description="What makes a comparison doubtful.")


def compare(
    first: Report, second: Report, items: tuple[Items | None, Items | None] = (None, None)
) -> Comparison:
    """The second report's subject against the first's, task by task.

    The test is paired where both were scored on the same items, by hash, and `items` has what each
    predicted; else the difference's interval is that of two independent scores.
    """
    notes = []
    tasks = [task for task in first.data if task in second.data]
    for one, other, which in ((first, second, "second"), (second, first, "first")):
        if gone := [task for task in one.data if task not in other.data]:
            notes.append(f"the {which} report lacks {', '.join(gone)}")
    paired = _paired(first, second, items)
    found = {t.task: t for t in aggregates.tests(paired, "after", ["before"])}
    changes = []
    for task in tasks:
        before, after = first.data[task], second.data[task]
        if before.metric != after.metric:
            notes.append(f"{task}: {before.metric} in one, {after.metric} in the other")
            continue
        if not _same(before, after):
            notes.append(f"{task}: not the same items, so that the test is not paired")
        changes += _change(first, second, task, found.get(task))
    p = statistics.holm([c.p for c in changes if c.p is not None])
    adjusted = iter(p)
    changes = [
        c if c.p is None else c.model_copy(update={"p_holm": next(adjusted)}) for c in changes
    ]
    return Comparison(
        before=first.subject,
        after=second.subject,
        changes=changes,
        mean=_mean(first, second, paired),
        differing=dict(_differing(first, second)),
        notes=notes,
    )


def _same(before: DataPart, after: DataPart) -> bool:
    """Whether two tasks are the same items, asked in the same way."""
    return bool(before.sha256) and all(
        getattr(before, name) == getattr(after, name) for name in ("sha256", "n", "template")
    )


def _paired(
    first: Report, second: Report, items: tuple[Items | None, Items | None]
) -> figures.Table:
    """Both subjects' scores on the tasks whose items are the same and known one by one."""
    scores: list[Score] = []
    for task, data in first.data.items():
        other = second.data.get(task)
        if other is None or other.metric != data.metric or not _same(data, other):
            continue
        both = [
            _score(held, report.subject, task, name)
            for held, report, name in zip(items, (first, second), ("before", "after"), strict=True)
        ]
        known = [score for score in both if score is not None]
        scores += known if len(known) == len(both) else []
    return figures.tabled(scores, [task for task, data in first.data.items() if data.held_out])


def _change(first: Report, second: Report, task: str, test: Test | None) -> list[Change]:
    """The change on a task, as surely as it is known."""
    before, after = _part(first, task), _part(second, task)
    if before is None or after is None:
        return []
    if test is not None:
        return [_changed(first, before, after, test.interval, test.kind, test.p)]
    found = _apart(before, after)
    if found is None:
        return [_changed(first, before, after, None, "none", None)]
    return [_changed(first, before, after, found[0], "unpaired", found[1])]


def _changed(
    report: Report, before: ScorePart, after: ScorePart, interval: Pair | None, kind: str,
    p: float | None,
) -> Change:  # fmt: skip
    return Change(
        task=before.task, metric=report.data[before.task].metric, before=before.value,
        after=after.value, difference=after.value - before.value, interval=interval, kind=kind,
        p=p, p_holm=p,
    )  # fmt: skip


def _part(report: Report, task: str) -> ScorePart | None:
    found = (s for s in report.scores if s.row == report.subject and s.task == task)
    return next(found, None)


def _score(items: Items | None, row: str, task: str, name: str) -> Score | None:
    """A row's score rebuilt from a file of items."""
    held = (items or {}).get(task, {})
    own = held.get("rows", {}).get(row)
    if own is None:
        return None
    return Score(
        name, "", task, held["metric"], own["value"], own.get("predicted", ()),
        own.get("true", held["true"]), own.get("items", ()), held["weights"],
    )  # fmt: skip


def _apart(before: ScorePart, after: ScorePart) -> tuple[Pair, float] | None:
    """Interval and p of the difference of two independent scores, each with an interval.

    Standard errors are the half widths / 1.96; their squares add up.
    """
    if before.interval is None or after.interval is None:
        return None
    return _normal(after.value - before.value, before.interval, after.interval)


def _normal(difference: float, one: Pair, two: Pair) -> tuple[Pair, float]:
    error = sqrt(sum(((high - low) / 2 / NORMAL) ** 2 for low, high in (one, two)))
    p = erfc(abs(difference) / error / sqrt(2)) if error else float(not difference)
    return (difference - NORMAL * error, difference + NORMAL * error), p


def _mean(first: Report, second: Report, paired: figures.Table) -> Change | None:
    """The change of the mean over the experts' tasks, paired where all of them are."""
    before, after = (
        next(s for s in report.summary if s.row == report.subject) for report in (first, second)
    )
    tasks = [{t for t, d in report.data.items() if not d.held_out} for report in (first, second)]
    if before.mean is None or after.mean is None or tasks[0] != tasks[1]:
        return None
    interval, kind, p = None, "none", None
    if all((row, task) in paired.draws for row in ("before", "after") for task in tasks[0]):
        differences = [
            paired.draws["after", t] - paired.draws["before", t] for t in sorted(tasks[0])
        ]
        draws = np.mean(differences, 0)
        interval, kind, p = statistics.interval(draws), "bootstrap", statistics.bootstrap_p(draws)
    elif before.mean_interval and after.mean_interval:
        ends = before.mean_interval, after.mean_interval
        interval, p = _normal(after.mean - before.mean, *ends)
        kind = "unpaired"
    return Change(
        task="", metric="mean", before=before.mean, after=after.mean,
        difference=after.mean - before.mean, interval=interval, kind=kind, p=p, p_holm=p,
    )  # fmt: skip


def _differing(first: Report, second: Report) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Everything that the scores depend on and that is not the same in both."""
    one, two = _settings(first), _settings(second)
    for name in dict.fromkeys([*one, *two]):
        if one.get(name) != two.get(name):
            yield name, (one.get(name), two.get(name))


def _settings(report: Report) -> dict[str, Any]:
    run = report.run
    found: dict[str, Any] = {
        "recipe": run.recipe, "method": run.method, "mowmerge": run.mowmerge,
        "resamples": run.resamples,
    }  # fmt: skip
    for name, value in run.settings.items():
        parts = value if isinstance(value, Mapping) else {"": value}
        found |= {f"{name} {part}".strip(): held for part, held in parts.items()}
    for task, data in report.data.items():
        found |= {
            f"{task} {name}": getattr(data, name) for name in ("split", "n", "sha256", "template")
        }
    for name, model in report.models.items():
        subject = report.subject == name or report.subject.startswith(f"{name}, ")
        found[f"weights of {'the subject' if subject else name}"] = model.sha256
    for name, value in report.flags.get(report.subject, {}).items():
        found[f"flag {name}"] = value
    return found
