"""How figures read: numbers, intervals, significance, and the sentences at a report's head."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mowmerge.evals.figures import BASE, EXPERT, LOWER_IS_BETTER
from mowmerge.evals.schema import CrossPart, Pair, Report, ScorePart, Summary, Test

NONE = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
SURE = 0.05  # the level of the marks
MARKS = ((0.001, "***"), (0.01, "**"), (SURE, "*"))


def figure(value: float | None, metric: str = "") -> str:
    """A score for a table: hundredths with one decimal, or three digits where it has no top."""
    if value is None:
        return NONE
    if metric in LOWER_IS_BETTER or abs(value) > 1:
        return minus(f"{value:.4g}")
    return minus(f"{100 * value:.1f}")


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent."""
    return NONE if value is None else minus(f"{100 * value:.{digits}f} %")


def span(pair: Pair | None, metric: str = "") -> str:
    """An interval: 96.6 to 97.9."""
    return "" if pair is None else f"{figure(pair[0], metric)} to {figure(pair[1], metric)}"


def shares(pair: Pair | None) -> str:
    """An interval of shares in percent: 96.6 to 101.2."""
    return "" if pair is None else " to ".join(minus(f"{100 * end:.1f}") for end in pair)


def gap(value: float | None, pair: Pair | None, metric: str = "") -> tuple[str, str]:
    """A difference and its interval, dashes where there is none."""
    ends = "" if pair is None else " to ".join(signed(end, metric) for end in pair)
    return (NONE if value is None else signed(value, metric)), ends


def signed(value: float, metric: str = "") -> str:
    """A difference with its sign."""
    lower = metric in LOWER_IS_BETTER
    return minus(f"{value:+.3g}" if lower else f"{100 * value:+.1f}")


def minus(text: str) -> str:
    """The typographic minus."""
    return text.replace("-", "\N{MINUS SIGN}")


def mark(p: float) -> str:
    """*** below 0.001, ** below 0.01, * below 0.05, else nothing."""
    return next((stars for level, stars in MARKS if p < level), "")


def size(nbytes: float) -> str:
    """Bytes for people: 2.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def seconds(value: float) -> str:
    """A duration: 2.1 ms, 3.4 s."""
    if not value:
        return NONE
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def times(ratio: float | None) -> str:
    """A multiple: 1.24 times."""
    return "" if ratio is None else f"{ratio:.3g}{TIMES}"


def flag(value: Any) -> str:
    """A flag or setting in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {held}" for name, held in value.items()) or NONE
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or NONE
    return NONE if value in (None, "") else str(value)


def source(text: str) -> str:
    """A data set's arguments: its path first, then the others' values."""
    try:
        held = json.loads(text)
    except ValueError:
        return text
    rest = [str(value) for name, value in held.items() if name != "path"]
    return " ".join([str(held.get("path", "")), *rest]).strip()


def summary_of(report: Report, row: str) -> Summary:
    """A row's summary."""
    return next(each for each in report.summary if each.row == row)


def part_of(report: Report, row: str, task: str) -> ScorePart | None:
    """A row's figures on a task."""
    return next((s for s in report.scores if s.row == row and s.task == task), None)


def test_of(report: Report, rival: str, task: str) -> Test | None:
    """The subject's test against a rival on a task."""
    return next((t for t in report.tests if t.rival == rival and t.task == task), None)


def beside_base(cell: CrossPart) -> str:
    """▲ or ▼ where an expert is better or worse than the base by more than the interval."""
    if cell.over_base_interval is None or cell.own:
        return ""
    low, high = cell.over_base_interval
    return "▲" if low > 0 else "▼" if high < 0 else ""


def better(report: Report, test: Test) -> float:
    """A test's difference, above 0 where the subject is better."""
    return test.difference if report.data[test.task].higher_is_better else -test.difference


def title(report: Report) -> str:
    """The subject's name for a heading: its recipe's, where it is just what was merged."""
    model, told, way = report.subject.partition(", ")
    return (report.run.recipe if model == "merged" else model) + told + way


def headline(report: Report) -> str:
    """What the report says, in a sentence."""
    found = summary_of(report, report.subject)
    tasks = f"{found.tasks} task{'s' if found.tasks != 1 else ''}"
    if found.normalised is not None:
        sure = shares(found.normalised_interval)
        between = f" ({100 * report.run.level:.0f} % interval {sure})" if sure else ""
        return (
            f"{title(report)} keeps {percent(found.normalised)} of its experts' scores{between},"
            f" averaged over {tasks}."
        )
    if found.mean is not None:
        return f"{title(report)} scores {figure(found.mean)} on average over {tasks}."
    return f"{title(report)} was scored on {tasks}."


def verdicts(report: Report) -> list[str]:
    """How the subject stands to the experts, to the base and to the other merges."""
    lines = []
    for rival in dict.fromkeys(test.rival for test in report.tests):
        held = [test for test in report.tests if test.rival == rival]
        sure = [better(report, test) for test in held if test.p_holm < SURE]
        up, down = sum(gap > 0 for gap in sure), sum(gap < 0 for gap in sure)
        named = {EXPERT: "the experts", BASE: "the base"}.get(rival, rival)
        lines.append(
            f"Against {named}: better on {up} of {len(held)} tasks, worse on {down},"
            f" not told apart on {len(held) - up - down}."
        )
    return lines


def uncosted(report: Report) -> str:
    """Which rows' costs are not known; empty where all are."""
    measured = {cost.row for cost in report.costs}
    missing = [row for row in report.rows if row not in measured]
    if not missing:
        return ""
    return (
        "Not measured: what they answered was kept from an earlier run, and not what it took"
        f" (--no-cache measures anew): {', '.join(missing)}."
    )


def conditions(report: Report) -> list[str]:
    """What the costs were measured on, a line for each set of rows that ran on the same."""
    found: dict[str, list[str]] = {}
    for cost in report.costs:
        if cost.on:
            what = ", ".join(f"{name} {flag(value)}" for name, value in cost.on.items())
            when = "in an earlier run, whose answers were kept" if cost.earlier else "in this run"
            found.setdefault(f"{when}, on {what}", []).append(cost.row)
    lines = [f"{'; '.join(rows)}: measured {what}." for what, rows in found.items()]
    if len({json.dumps(dict(cost.on), sort_keys=True) for cost in report.costs}) > 1:
        lines.append(
            "Memory, latency and throughput are put beside the experts' only for rows that ran on"
            " the same as they."
        )
    return lines


def reading(report: Report) -> list[str]:
    """How the figures are to be read."""
    run = report.run
    return [
        f"Intervals are {100 * run.level:.0f} % bootstrap percentiles: {run.resamples:,} resamples"
        " of the items of each task; those of an average resample each task on its own. An interval"
        " of no width means that every item was right, or every one wrong.",
        "Normalised is the mean over tasks of score / expert's score, not the ratio of the means,"
        " which is given beside it. Averages are over tasks; items are never pooled.",
        f"Marks: * p < {SURE}, ** p < 0.01, *** p < 0.001, adjusted (Holm) for all"
        f" {len(report.tests)} tests of this report. McNemar's exact test where every item is right"
        " or wrong, else a paired bootstrap.",
        "A dynamic model as it stands: the router chooses weights and head, and an item under"
        " another task's head is wrong. Task given: the head is the true task's, the gates are the"
        " router's. Oracle: the gates, too, are the true task's expert alone.",
        "Recovery is (score - base) / (expert - base), only where expert and base are two standard"
        " errors apart.",
    ]
