"""The page's section of experts by tasks: what each knows beside its own, and what it forgot."""

from __future__ import annotations

from math import floor
from xml.etree.ElementTree import Element

from mowmerge.evals import words
from mowmerge.evals.figures import BASE
from mowmerge.evals.page.nodes import Node, node, section, step, table
from mowmerge.evals.schema import CrossPart, Matrix, Report


def matrix(report: Report) -> Element | None:
    """Every expert on every task, coloured by what it is of the task's own expert."""
    found = report.matrix
    if found is None:
        return None
    cells = {(cell.expert, cell.task): cell for cell in found.cells}
    shares = {key: _share(report, found, cell) for key, cell in cells.items()}
    known = [share for share in shares.values() if share is not None]
    low = min(0.9, floor(10 * max(0.0, min(known))) / 10) if known else 0.0
    spilled = {each.expert: each for each in found.forgetting}
    body: list[list[Node]] = []
    for expert in found.experts:
        made: list[Node] = [
            _cell(report, cells[expert, task], shares[expert, task], low) for task in found.tasks
        ]
        spill = spilled.get(expert)
        said, ends = words.gap(spill.signed, spill.interval, spill.unit) if spill else ("", "")
        full = f"interval {ends}" if ends else None
        body.append([expert, *made, node("td", said, class_="sum", title=full)])
    body += _beside(report, found)
    heads: list[Node] = ["", *found.tasks, "others' tasks against the base"]
    drawn = table(
        heads, body, "Score (hundredths where it has a top), by expert and task", kind="heat cross",
        least=250 + 58 * len(found.tasks), strong=lambda row: row[0] == report.subject,
    )  # fmt: skip
    note = (
        "Each expert on every task, with the head of the task's own expert where heads are kept."
        f" Colour is the share of the own expert's score, from {100 * low:.0f} %; the own task is"
        " bold, in a frame. ▲ and ▼: better or worse than the base by more than the interval of the"
        " difference. The last column is the mean difference from the base on the others' tasks"
        " where their scores can be added: below 0 is forgotten."
    )
    return section("matrix", "Every expert on every task", note, drawn, _blanks(found))


def _share(report: Report, found: Matrix, cell: CrossPart) -> float | None:
    """A score as a multiple of the task's own expert's (its inverse where lower is better)."""
    own = next((c.value for c in found.cells if c.task == cell.task and c.own), None)
    if cell.value is None or not own or own < 0:
        return None
    if report.data[cell.task].higher_is_better:
        return cell.value / own
    return own / cell.value if cell.value > 0 else None


def _cell(report: Report, cell: CrossPart, share: float | None, low: float) -> Element:
    if cell.value is None:
        return node("td", words.NONE, class_="none", title=cell.absent)
    metric = report.data[cell.task].metric
    full = f"{cell.expert} on {cell.task}: {metric} {cell.value:.4g}"
    full += f", interval {words.span(cell.interval, metric)}" if cell.interval else ""
    side = words.beside_base(cell)
    kind = step(share, low, 1.0) + (" mine" if cell.own else "")
    said = words.figure(cell.value, metric)
    return node("td", said, node("sup", side) if side else None, title=full, class_=kind)


def _beside(report: Report, found: Matrix) -> list[list[Node]]:
    """The base and the subject as rows, without colour."""
    rows: list[list[Node]] = []
    for row in (BASE, report.subject):
        parts = [words.part_of(report, row, task) for task in found.tasks]
        if any(parts):
            said = [
                words.figure(p.value, report.data[p.task].metric) if p else words.NONE
                for p in parts
            ]
            rows.append([row, *(node("td", each, class_="plain") for each in said),
                         node("td", "", class_="sum")])  # fmt: skip
    return rows


def _blanks(found: Matrix) -> Element | None:
    """Why cells are blank."""
    said = [
        node("li", f"{cell.expert} on {cell.task}: {cell.absent}")
        for cell in found.cells
        if cell.absent
    ]
    return node("details", node("summary", "Blank cells"), node("ul", *said)) if said else None
