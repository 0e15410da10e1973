"""How evaluations look in a terminal: the scores with what is sure of them, and comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mowmerge.cli import output

if TYPE_CHECKING:
    from mowmerge.evals.compare import Change, Comparison
    from mowmerge.evals.schema import Report


def show(report: Report, folder: Path, *, as_json: bool) -> None:
    """Models by tasks, what it comes to, and where the report is; or report.json."""
    from mowmerge.evals import words

    if as_json:
        print(report.model_dump_json())
        return
    rows = [["model", *report.data, "mean", "normalised"]]
    for found in report.summary:
        cells = [_cell(report, found.row, task) for task in report.data]
        mean = f"{words.figure(found.mean)} {_width(found.mean_interval)}".rstrip()
        rows.append([found.row, *cells, mean, words.percent(found.normalised)])
    print(output.table(rows))
    print(f"\n{words.headline(report)}")
    print("\n".join(words.verdicts(report)))
    output.warn(report.failures)
    print(f"\nreport: {folder / 'report.html'} (and report.md, report.json)")


def _cell(report: Report, row: str, task: str) -> str:
    """A score, and stars where the subject differs from it by more than chance."""
    from mowmerge.evals import words

    part, test = words.part_of(report, row, task), words.test_of(report, row, task)
    if part is None:
        return words.NONE
    stars = words.mark(test.p_holm) if test else ""
    return words.figure(part.value, report.data[task].metric) + stars


def _width(pair: tuple[float, float] | None) -> str:
    """Half of an interval, in hundredths."""
    return f"\N{PLUS-MINUS SIGN} {50 * (pair[1] - pair[0]):.1f}" if pair else ""


def show_comparison(found: Comparison, *, as_json: bool) -> None:
    """What changed between two reports, and whether it is more than noise."""
    if as_json:
        print(found.model_dump_json())
        return
    rows = [["task", "before", "after", "change", "interval", "p (Holm)", "verdict", "test"]]
    rows += [_row(change) for change in found.changes]
    if found.mean:
        rows.append(_row(found.mean))
    print(f"{found.before} -> {found.after}\n\n{output.table(rows)}")
    if found.differing:
        print("\nwhat else differs:")
        told = [[name, _short(a), _short(b)] for name, (a, b) in found.differing.items()]
        print(output.table([["", "before", "after"], *told]))
    output.warn(found.notes)


def _row(change: Change) -> list[str]:
    from mowmerge.evals import words

    metric = change.metric
    ends = change.interval and " to ".join(words.signed(end, metric) for end in change.interval)
    sure = change.p_holm is not None and change.p_holm < words.SURE
    verdict = "unknown" if change.p_holm is None else "more than noise" if sure else "noise"
    return [
        change.task or "mean", words.figure(change.before, metric),
        words.figure(change.after, metric), words.signed(change.difference, metric), ends or "",
        words.NONE if change.p_holm is None else f"{change.p_holm:.2g}", verdict, change.kind,
    ]  # fmt: skip


def _short(value: object) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 24 else text[:16] + "..."
