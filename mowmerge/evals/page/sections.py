"""The page's sections about scores: each is None where the report has nothing for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from math import floor
from xml.etree.ElementTree import Element

from mowmerge.evals import words
from mowmerge.evals.figures import BASE, EXPERT
from mowmerge.evals.page import charts
from mowmerge.evals.page.charts import Bar
from mowmerge.evals.page.nodes import STEPS, Node, grid, node, section, step, table
from mowmerge.evals.schema import Report, ScorePart, Test

CURVES = 6  # reliability diagrams
GATES = 12  # panels of gates


def tiles(report: Report) -> Element:
    """The subject's figures at a glance."""
    found = words.summary_of(report, report.subject)
    base = next((row for row in report.summary if row.row == BASE), None)
    cost = next((each for each in report.costs if each.row == report.subject), None)
    facts: list[tuple[str, str, str]] = []
    if found.normalised is not None:
        sure = words.shares(found.normalised_interval)
        facts.append(("of the experts' scores", words.percent(found.normalised), sure))
    if found.mean is not None:
        against = f"base {words.figure(base.mean)}" if base and base.mean is not None else ""
        facts.append((f"mean of {found.tasks} tasks", words.figure(found.mean), against))
    if found.worst_task is not None:
        facts.append(("of the expert's, worst task", words.percent(found.worst), found.worst_task))
    if found.at_least_expert is not None:
        facts.append(
            ("tasks at the expert's level", f"{found.at_least_expert} of {found.tasks}", "or above")
        )
    if found.routing_accuracy is not None:
        said = "items sent to their own expert"
        facts.append(("routing accuracy", words.percent(found.routing_accuracy), said))
    if cost and "bytes_on_disk" in cost.ratios:
        facts.append(("size, in experts", words.times(cost.ratios["bytes_on_disk"]),
                      words.size(cost.bytes_on_disk)))  # fmt: skip
    made = [
        node("div", node("dt", name), node("dd", value), node("dd", more, class_="small"),
             class_="tile")
        for name, value, more in facts
    ]  # fmt: skip
    return node("dl", *made, class_="tiles")


def heat(report: Report) -> Element:
    """Every row on every task: the score, coloured by what it is of the expert's."""
    shares = [s.normalised for s in report.scores if s.normalised is not None]
    relative = bool(shares)
    low = min(0.9, floor(10 * max(0.0, min(shares))) / 10) if relative else 0.0
    tasks = list(report.data)
    heads: list[Node] = ["", *tasks, "mean", "normalised"]
    body: list[list[Node]] = []
    for row in report.rows:
        found = words.summary_of(report, row)
        cells: list[Node] = [_score(report, row, task, low, relative) for task in tasks]
        sums = (words.figure(found.mean), words.percent(found.normalised))
        body.append([row, *cells, *(node("td", said, class_="sum") for said in sums)])
    made = table(
        heads, body, "Score (hundredths where it has a top), by model and task", kind="heat",
        least=290 + 58 * len(tasks), strong=lambda row: row[0] == report.subject,
    )  # fmt: skip
    what = "share of the expert's score" if relative else "score"
    note = (
        f"Colour is the {what}. ▲ and ▼: {report.subject} is better or worse than this row by more"
        " than chance; no mark: not told apart, or not tested."
    )
    return section(
        "scores", "Scores by task and model", note, made, _key(low, relative), _extras(report)
    )


def _extras(report: Report) -> Element | None:
    """What else was measured on the way."""
    rows: list[list[Node]] = [
        [s.row, s.task, name.replace("_", " "), f"{value:.4g}"]
        for s in report.scores for name, value in s.extras.items()
    ]  # fmt: skip
    if not rows:
        return None
    told = table(["", "task", "figure", "value"], rows, "As the tasks report them")
    return node("details", node("summary", "Other figures"), told)


def _score(report: Report, row: str, task: str, low: float, relative: bool) -> Element:
    part = words.part_of(report, row, task)
    if part is None:
        return node("td", words.NONE, class_="none")
    metric = report.data[task].metric
    said = words.figure(part.value, metric)
    coloured = part.normalised if relative else part.value
    if not relative and not report.data[task].higher_is_better:
        coloured = None  # of nothing that has a top
    full = f"{row} on {task}: {metric} {part.value:.4g}" + (
        f", interval {words.span(part.interval, metric)}" if part.interval else ""
    )
    found = words.test_of(report, row, task)
    side = ""
    if found and found.p_holm < words.SURE:
        side = "▲" if words.better(report, found) > 0 else "▼"
    return node("td", said, node("sup", side) if side else None, title=full,
                class_=step(coloured, low, 1.0))  # fmt: skip


def _key(low: float, relative: bool) -> Element:
    wide = 190 / STEPS
    boxes = [
        node("rect", x=i * wide, y=0, width=wide - 1, height=12, class_=f"c{i}")
        for i in range(STEPS)
    ]
    high = "100 % and above" if relative else "100"
    scale = charts.svg(12, "Colour scale", f"from {100 * low:.0f} to {high}", *boxes, width=190)
    ends = f"{100 * low:.0f} %" if relative else f"{100 * low:.0f}"
    return node("p", node("span", ends), scale, node("span", high), class_="key")


def bars(report: Report) -> Element | None:
    """What each row keeps of the expert's score: over all tasks, then task by task."""
    parts = [s for s in report.scores if s.normalised is not None]
    if not parts:
        return None
    ends = [s.normalised_interval[1] for s in parts if s.normalised_interval]
    top = max(1.05, *(s.normalised or 0 for s in parts), *(min(e, 1.6) for e in ends))
    whole = [
        Bar(s.row, s.normalised, s.normalised_interval, words.percent(s.normalised).rstrip(" %"),
            s.row == report.subject)
        for s in report.summary if s.row != EXPERT
    ]  # fmt: skip
    drawn = charts.bars("All tasks: share of the experts' scores in percent", whole, top, 1.0)
    first = charts.panel("All tasks", drawn, "mean of the ratios")
    first.set("class", "panel first")
    panels = [first]
    for task in report.data:
        held = [_bar(report, s) for s in parts if s.task == task and s.row != EXPERT]
        if held:
            own = words.part_of(report, EXPERT, task)
            aside = f"expert {words.figure(own.value, report.data[task].metric)}" if own else ""
            title = f"{task}: share of the expert's score in percent"
            panels.append(charts.panel(task, charts.bars(title, held, top, 1.0), aside))
    note = (
        "Each bar is a share of the score of the task's own expert, the dashed line; whiskers are"
        f" {100 * report.run.level:.0f} % intervals of the ratio, items resampled for both."
    )
    return section("normalised", "Beside the experts", note, grid(panels))


def _bar(report: Report, part: ScorePart) -> Bar:
    said = words.percent(part.normalised).rstrip(" %")
    strong = part.row == report.subject
    return Bar(part.row, part.normalised, part.normalised_interval, said, strong)


def rivals(report: Report) -> Element | None:
    """The subject against each rival: differences with intervals, task by task."""
    by_rival: dict[str, list[Test]] = defaultdict(list)
    for test in report.tests:
        by_rival[test.rival].append(test)
    if not by_rival:
        return None
    panels = []
    for rival, tests in by_rival.items():
        held = [_difference(report, test) for test in tests]
        ends = [end for bar in held if bar.interval for end in bar.interval]
        low, high = min(0.0, *ends), max(0.0, *ends)
        named = {EXPERT: "the experts", BASE: "the base"}.get(rival, rival)
        title = f"{report.subject} minus {named}, in points"
        sure = sum(bar.strong for bar in held)
        drawn = charts.forest(title, held, low, high)
        panels.append(charts.panel(f"minus {named}", drawn, f"{sure} of {len(held)} sure"))
    note = (
        f"Differences of {report.subject} from each rival on the same items, right of the line"
        " where it is better. Filled: more than chance at 5 %, adjusted for all tests."
    )
    return section("rivals", "More than chance?", note, grid(panels))


def _difference(report: Report, test: Test) -> Bar:
    data = report.data[test.task]
    low, high = test.interval if data.higher_is_better else (-test.interval[1], -test.interval[0])
    said = f"{words.signed(test.difference, data.metric)} {words.mark(test.p_holm)}".rstrip()
    return Bar(test.task, words.better(report, test), (low, high), said,
               test.p_holm < words.SURE)  # fmt: skip


def routing(report: Report) -> Element | None:
    """Where routers sent the items, and what their gates did on the way."""
    panels = []
    for found in report.routing:
        if found.row not in _first(each.row for each in report.routing):
            continue
        values: dict[str, list[float | None]] = {}
        for task, counts in found.counts.items():
            total = max(1, sum(counts))
            values[task] = [count / total for count in counts]
        title = f"{found.row}: share of each task's items (rows) sent to each expert (columns)"
        drawn = charts.cells(title, values, found.experts, 0.0, 1.0, own=found.own)
        said = f"{words.percent(found.accuracy)} to their own"
        panels.append(charts.panel(found.row, drawn, said))
    gates = _gates(report)
    if not panels and not gates:
        return None
    note = (
        "Rows are the true tasks, columns the experts; the frame marks a task's own. Numbers are"
        " percent of the task's items, or of a gate's coefficients."
    )
    heading = node("h3", "Gates: mean coefficient of each slot by task, mean entropy in nats")
    shown = [grid(panels)] if panels else []
    shown += [heading, grid(gates)] if gates else []
    return section("routing", "Where the router sent them", note, *shown)


def _gates(report: Report) -> list[Element]:
    """At most GATES gates a row, evenly over the depth: what each gives on each task."""
    owner = {task: own for found in report.routing for task, own in found.own.items()}
    named: dict[tuple[str, str], dict[str, list[float | None]]] = defaultdict(dict)
    slots: dict[tuple[str, str], list[str]] = {}
    entropy: dict[tuple[str, str], list[float]] = defaultdict(list)
    for gate in report.gates:
        key = gate.row, gate.gate
        named[key][gate.task] = list(gate.mean)
        slots[key] = list(gate.slots)
        entropy[key].append(gate.entropy)
    panels = []
    for row in _first({row: None for row, _ in named}):
        keys = [key for key in named if key[0] == row]
        pace = max(1, -(-len(keys) // GATES))
        for key in keys[::pace]:
            own = {task: owner.get(task, task) for task in named[key]}
            high = max([1.0, *(v for held in named[key].values() for v in held if v)])
            title = f"{row}, gate {key[1]}: mean coefficients"
            drawn = charts.cells(title, named[key], slots[key], 0.0, high, own=own)
            nats = sum(entropy[key]) / len(entropy[key])
            said = f"{row}, entropy {nats:.2f}"
            panels.append(
                charts.panel(key[1] if "." in key[1] else f"router {key[1]}", drawn, said)
            )
    return panels


def _first(rows: Iterable[str]) -> list[str]:
    """The first row of each model: what it is told of heads does not change its gates."""
    found: dict[str, str] = {}
    for row in rows:
        found.setdefault(row.partition(", ")[0], row)
    return list(found.values())


def calibration(report: Report) -> Element | None:
    """Confidence beside accuracy: the subject first, then its rivals."""
    named = {found.row: found for found in report.calibration}
    rivals = list(dict.fromkeys(test.rival for test in report.tests))
    rows = [row for row in dict.fromkeys([report.subject, *rivals, *named]) if row in named]
    if not rows:
        return None
    panels = []
    for row in rows[:CURVES]:
        bins = [(b.low, b.high, b.confidence, b.accuracy, b.n) for b in named[row].bins]
        ece = words.summary_of(report, row).ece
        said = f"ECE {words.figure(ece)}" if ece is not None else ""
        title = f"{row}: share of right predictions by confidence"
        panels.append(charts.panel(row, charts.reliability(title, bins), said))
    note = (
        "Where bars meet the diagonal, a confidence of 80 % is right in 80 of 100. Items of all"
        f" tasks together; ECE is the mean of the tasks' own, over {report.run.bins} bins, in"
        " hundredths."
    )
    return section("calibration", "Does it know what it knows?", note, grid(panels))
