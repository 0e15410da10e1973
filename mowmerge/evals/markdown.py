"""The report as Markdown: short, with intervals, and with what makes a figure doubtful."""

from __future__ import annotations

from collections.abc import Sequence

from mowmerge.evals import words
from mowmerge.evals.figures import BASE, EXPERT
from mowmerge.evals.schema import CrossPart, Report
from mowmerge.evals.words import NONE


def render(report: Report) -> str:
    """The whole report: what it says, the scores, what is sure, costs, flags, how to repeat it."""
    lines = [
        f"# {_plain(words.title(report))}: evaluation",
        "",
        f"**{_plain(words.headline(report))}**",
        "",
    ]
    lines += [f"- {_plain(line)}" for line in words.verdicts(report)]
    if report.failures:
        lines += ["", "What went wrong:", "", *(f"- {_plain(line)}" for line in report.failures)]
    lines += ["", *scores(report), "", *_summary(report)]
    for title, found in (
        ("Against the base", _forgetting(report)),
        ("Every expert on every task", _matrix(report)),
        ("Costs, and as a multiple of one expert", _costs(report)),
        ("What the scores rest on", _flags(report)),
    ):
        lines += ["", f"## {title}", "", *found] if found else []
    lines += ["", "## Data", "", *_data(report), "", "## How to read it", ""]
    lines += ["- " + line.replace("*", "\\*") for line in words.reading(report)]
    if report.run.command:
        lines += ["", "## To repeat it", "", "```sh", report.run.command, "```"]
    held = {"mowmerge": report.run.mowmerge, **report.run.settings}
    settings = ", ".join(f"{name} {words.flag(value)}" for name, value in held.items())
    lines += ["", f"With {settings}."]
    return "\n".join([*lines, ""])


def scores(report: Report) -> list[str]:
    """A table with a row a task: base, expert, the subject with its interval, the others; marks
    say where the subject differs from a row."""
    first = [row for row in (BASE, EXPERT) if row in report.rows]
    others = [row for row in report.rows if row not in (*first, report.subject)]
    rows = [["task", "n", "metric", *first, f"**{report.subject}**", "interval", *others]]
    for task, data in report.data.items():
        own = words.part_of(report, report.subject, task)
        cells = [_cell(report, row, task) for row in first]
        value = words.figure(own.value, data.metric) if own else NONE
        sure = words.span(own.interval, data.metric) if own else ""
        cells += [f"**{value}**", sure, *(_cell(report, row, task) for row in others)]
        rows.append([task, str(data.n), data.metric, *cells])
    return table(rows, numbers_from=3)


def _cell(report: Report, row: str, task: str) -> str:
    part, test = words.part_of(report, row, task), words.test_of(report, row, task)
    if part is None:
        return NONE
    stars = words.mark(test.p_holm).replace("*", "\\*") if test else ""
    return f"{words.figure(part.value, report.data[task].metric)} {stars}".rstrip()


def _summary(report: Report) -> list[str]:
    rows = [[
        "over the experts' tasks", "mean", "interval", "normalised", "interval", "ratio of means",
        "worst task", "at expert's level", "recovery", "routing", "ECE",
    ]]  # fmt: skip
    absent: list[str] = []
    for s in report.summary:
        worst = f"{s.worst_task} {words.percent(s.worst)}" if s.worst_task else NONE
        reached = NONE if s.at_least_expert is None else f"{s.at_least_expert} of {s.tasks}"
        recovery = f"{words.percent(s.recovery)} ({s.recovery_tasks})" if s.recovery_tasks else NONE
        rows.append([
            s.row, words.figure(s.mean), words.span(s.mean_interval), words.percent(s.normalised),
            words.shares(s.normalised_interval), words.percent(s.ratio_of_means), worst, reached,
            recovery, words.percent(s.routing_accuracy), words.figure(s.ece),
        ])  # fmt: skip
        absent += [f"{s.row}: no {name}: {why}" for name, why in s.absent.items()]
    said = ["", *(f"- {_plain(line)}" for line in absent)] if absent else []
    return [*table(rows, numbers_from=1), *said]


def _forgetting(report: Report) -> list[str]:
    if not report.forgetting:
        return []
    rows = [["", "on", "points", "interval", "of the base's score", "worse than the base on"]]
    for f in report.forgetting:
        said, ends = words.gap(f.signed, f.interval, f.unit)
        worse = ", ".join(f.worse_than_base) or "none"
        rows.append([f.row, f"{f.on}: {len(f.tasks)}", said, ends,
                     words.percent(f.relative), worse])  # fmt: skip
    return table(rows, numbers_from=2)


def _matrix(report: Report) -> list[str]:
    found = report.matrix
    if found is None:
        return []
    rows = [["", *found.tasks, "others' tasks against the base"]]
    spilled = {each.expert: each for each in found.forgetting}
    for expert in found.experts:
        cells = [_crossed(report, cell) for cell in found.cells if cell.expert == expert]
        spill = spilled.get(expert)
        said = words.gap(spill.signed, None, spill.unit)[0] if spill else NONE
        rows.append([expert, *cells, said])
    best = [
        NONE if each is None else f"{each.expert}"
        for each in ({b.task: b for b in found.best}.get(task) for task in found.tasks)
    ]
    gaps = {b.task: b.difference for b in found.best if b.difference is not None}
    over = [words.gap(gaps.get(t), None, report.data[t].metric)[0] for t in found.tasks]
    rows += [["best single", *best, ""], [f"{report.subject} minus it", *over, ""]]
    blank = [f"- {c.expert} on {c.task}: {_plain(c.absent)}" for c in found.cells if c.absent]
    note = (
        "Own tasks in bold, others' with the head of the task's own expert where heads are kept; ▲"
        " and ▼: better or worse than the base by more than the interval."
    )
    return [*table(rows, numbers_from=1), "", note, *(["", *blank] if blank else [])]


def _crossed(report: Report, cell: CrossPart) -> str:
    said = words.figure(cell.value, report.data[cell.task].metric)
    return f"**{said}**" if cell.own else f"{said} {words.beside_base(cell)}".rstrip()


def _costs(report: Report) -> list[str]:
    missing = words.uncosted(report)
    if not report.costs:
        return [missing]
    rows = [["", "parameters", "on disk", "peak memory", "latency", "items a second"]]
    for cost in report.costs:
        told = {
            "parameters": f"{cost.parameters:,}", "bytes_on_disk": words.size(cost.bytes_on_disk),
            "peak_bytes": words.size(cost.peak_bytes), "latency": words.seconds(cost.latency),
            "throughput": f"{cost.throughput:,.4g}",
        }  # fmt: skip
        cells = [f"{said} {_times(cost.ratios.get(name))}".rstrip() for name, said in told.items()]
        name = f"{cost.row} (earlier)" if cost.earlier else cost.row
        rows.append([name, *cells])
    said = [f"- {_plain(line)}" for line in (*words.conditions(report), missing) if line]
    return [*table(rows, numbers_from=1), "", *said]


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"({words.times(ratio)})"


def _flags(report: Report) -> list[str]:
    names = list(dict.fromkeys(name for held in report.flags.values() for name in held))
    if not names:
        return []
    rows = [["", *(name.replace("_", " ") for name in names)]]
    rows += [[row, *(words.flag(held.get(n)) for n in names)] for row, held in report.flags.items()]
    return table(rows)


def _data(report: Report) -> list[str]:
    rows = [["task", "data", "split", "n", "sha256"]]
    rows += [
        [
            task,
            words.source(data.source),
            data.split,
            str(data.n),
            f"`{data.sha256[:16]}`" if data.sha256 else "",
        ]
        for task, data in report.data.items()
    ]
    return table(rows)


def table(rows: Sequence[Sequence[str]], numbers_from: int = 1000) -> list[str]:
    """A Markdown table; columns from `numbers_from` on are set to the right."""
    rule = ["---:" if i >= numbers_from else "---" for i in range(len(rows[0]))]
    return [_row(each) for each in (rows[0], rule, *rows[1:])]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _plain(cell: str) -> str:
    """Text that neither ends a cell nor is taken for markup."""
    return cell.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
