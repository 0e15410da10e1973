"""Every expert on every task: what each forgot, and whether a merge beats the best of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from math import fsum

import numpy as np

from mowmerge.evals import figures, statistics
from mowmerge.evals.figures import BASE, EXPERT, Table
from mowmerge.evals.schema import BestSingle, CrossPart, Matrix, Pair, Spillover
from mowmerge.evals.score import Evaluation


def matrix(
    found: Evaluation, held_out: Collection[str], subject: str, owner: Mapping[str, str]
) -> Matrix | None:
    """The matrix; None where experts were scored on their own tasks alone.

    All rows of a task are resampled together. owner: task -> its own expert.
    """
    if not found.crossed and not found.blank:
        return None
    own = [
        replace(score, model=_row(owner[score.task]))
        for score in found.scores
        if score.row == EXPERT and score.task in owner
    ]
    beside = [score for score in found.scores if score.row in (BASE, subject)]
    table = figures.tabled([*beside, *own, *found.crossed], held_out)
    experts = list(dict.fromkeys(owner.values()))
    cells = [
        _cell(table, expert, task, owner, found.blank.get(expert, {}).get(task, ""))
        for expert in experts
        for task in table.tasks
    ]
    return Matrix(
        experts=experts,
        tasks=table.tasks,
        cells=cells,
        best=[best for task in table.tasks if (best := _best(table, experts, task, subject))],
        forgetting=[each for expert in experts if (each := _forgotten(table, expert, owner))],
    )


def _row(expert: str) -> str:
    return f"expert {expert}"


def _cell(table: Table, expert: str, task: str, owner: Mapping[str, str], why: str) -> CrossPart:
    value = table.value(_row(expert), task)
    draws = table.draws.get((_row(expert), task))
    gap, sure = _difference(table, _row(expert), BASE, task)
    return CrossPart(
        expert=expert,
        task=task,
        own=owner.get(task) == expert,
        value=value,
        interval=None if draws is None else statistics.interval(draws),
        over_base=gap,
        over_base_interval=sure,
        absent="" if value is not None else why or "its score is no number",
    )


def _difference(table: Table, one: str, two: str, task: str) -> tuple[float | None, Pair | None]:
    """By how much the first row is better than the second, and the paired interval of that."""
    ours, theirs, sign = table.value(one, task), table.value(two, task), table.sign(task)
    if ours is None or theirs is None:
        return None, None
    above, below = table.draws.get((one, task)), table.draws.get((two, task))
    if above is None or below is None:
        return sign * (ours - theirs), None
    return sign * (ours - theirs), statistics.interval(sign * (above - below))


def _best(table: Table, experts: list[str], task: str, subject: str) -> BestSingle | None:
    """The best expert on a task, the first of equals."""
    sign = table.sign(task)
    known = {e: v for e in experts if (v := table.value(_row(e), task)) is not None}
    if not known:
        return None
    expert = max(known, key=lambda each: sign * known[each])
    gap, sure = _difference(table, subject, _row(expert), task)
    return BestSingle(task=task, expert=expert, difference=gap, interval=sure)


def _forgotten(table: Table, expert: str, owner: Mapping[str, str]) -> Spillover | None:
    """An expert against the base on all tasks but its own, where both were scored."""
    gaps, draws = {}, []
    for task in (task for task in table.tasks if owner.get(task) != expert):
        gap, _ = _difference(table, _row(expert), BASE, task)
        if gap is not None:
            gaps[task] = gap
            ours, theirs = (table.draws.get((row, task)) for row in (_row(expert), BASE))
            if ours is not None and theirs is not None:
                draws.append(table.sign(task) * (ours - theirs))
    if not gaps:
        return None
    alike = table.alike(gaps)
    sure = alike and len(draws) == len(gaps)
    return Spillover(
        expert=expert,
        tasks=list(gaps),
        signed=fsum(gaps.values()) / len(gaps) if alike else None,
        interval=statistics.interval(np.mean(draws, 0)) if sure else None,
        unit=table.unit(next(iter(gaps))),
        worse_than_base=[task for task, gap in gaps.items() if gap < 0],
    )
