"""Scores laid out by row and task, every task's rows resampled together, and figures of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum, isfinite
from zlib import crc32

import numpy as np

from mowmerge.evals import statistics
from mowmerge.evals.schema import ScorePart
from mowmerge.evals.score import Score
from mowmerge.evals.statistics import Array

BASE, EXPERT = "base", "expert"
WAYS = ("", "task given", "oracle")  # the first that a model has speaks for it
LOWER_IS_BETTER = frozenset(
    {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "nll"}
)


@dataclass(frozen=True)
class Table:
    """Scores by row and task, with their values under the same resampled items of each task.

    held_out: the tasks that no expert was trained for. failures grows while the table is made.
    """

    scores: Mapping[tuple[str, str], Score]
    draws: Mapping[tuple[str, str], Array]
    rows: Sequence[str]
    tasks: Sequence[str]
    held_out: Sequence[str]
    failures: Sequence[str] = field(default_factory=list)

    @property
    def own(self) -> list[str]:
        """The experts' tasks."""
        return [task for task in self.tasks if task not in self.held_out]

    def value(self, row: str, task: str) -> float | None:
        """A row's score on a task; None where it was not scored."""
        score = self.scores.get((row, task))
        return score.value if score else None

    def sign(self, task: str) -> int:
        """1 where higher is better on a task, -1 where lower is."""
        return -1 if self.unit(task) else 1

    def unit(self, task: str) -> str:
        """What a task's score is counted in: its metric where lower is better, else "", a share."""
        metric = next(s.metric for (_, t), s in self.scores.items() if t == task)
        return metric if metric in LOWER_IS_BETTER else ""

    def alike(self, tasks: Iterable[str]) -> bool:
        """Whether the scores of these tasks can be added."""
        return len({self.unit(task) for task in tasks}) == 1

    def share(self, row: str, task: str) -> tuple[float, Array | None] | str:
        """A score as a multiple of the expert's, and resampled; or why there is none."""
        value, expert = self.value(row, task), self.value(EXPERT, task)
        if value is None or expert is None:
            return "no expert was scored on it" if expert is None else "not scored on it"
        above, below = self.draws.get((row, task)), self.draws.get((EXPERT, task))
        error = 0.0 if below is None else float(below.std())
        if expert <= 2 * error:
            return f"the expert's {expert:.3g} is not told from 0: a ratio would mean nothing"
        if self.sign(task) < 0:
            value, expert, above, below = expert, value, below, above
        if not expert:
            return "the score is 0, and lower is better"
        if above is None or below is None or not below.all():  # none over a resample of zeros
            return value / expert, None
        ratio = above / below
        return value / expert, ratio


def tabled(scores: Sequence[Score], held_out: Collection[str] = ()) -> Table:
    """The table: every task's rows resampled together. held_out: tasks that have no expert."""
    by_task: dict[str, list[Score]] = defaultdict(list)
    finite = [score for score in scores if isfinite(score.value)]
    for score in finite:
        by_task[score.task].append(score)
    draws: dict[tuple[str, str], Array] = {}
    failures = [f"{s.task}, {s.row}: the score is {s.value}: left out" for s in scores
                if not isfinite(s.value)]  # fmt: skip
    for task, held in by_task.items():
        sized: dict[int, list[Score]] = defaultdict(list)
        for score in held:
            sized[len(score.items) or len(score.predicted)].append(score)
        if len(sized) > 1:
            counts = ", ".join(map(str, sorted(sized)))
            failures.append(f"{task}: rows were scored on different numbers of items ({counts})")
        for same in sized.values():
            draws |= _resampled(same, failures)
    rows = list(dict.fromkeys(score.row for score in finite))
    found = {(s.row, s.task): s for s in finite}
    without = [task for task in by_task if task in held_out]
    return Table(found, draws, rows, list(by_task), without, failures)


def _resampled(scores: Sequence[Score], failures: list[str]) -> dict[tuple[str, str], Array]:
    """The resampled values of rows that were scored on the same items of one task."""
    ready, columns, chosen = [], [], []
    for score in scores:
        statistic = _statistic(score)
        if statistic is None:
            continue
        pair = _columns(score)
        value = float(statistic(*pair, np.ones((1, len(pair[0]))))[0])
        if abs(value - score.value) > 1e-6 * max(1.0, abs(value)):
            failures.append(
                f"{score.task}, {score.row}: the items give {value:.6g}, the score is"
                f" {score.value:.6g}: no interval"
            )
            continue
        ready.append(score)
        columns.append(pair)
        chosen.append(statistic)
    if not ready:
        return {}
    values = statistics.resample(columns, chosen, crc32(ready[0].task.encode()))
    return {(s.row, s.task): v for s, v in zip(ready, values, strict=True)}


def _statistic(score: Score) -> statistics.Statistic | None:
    if score.items:
        return statistics.perplexity if "perplexity" in score.metric else statistics.mean
    return statistics.OF_CLASSES.get(score.metric) if score.predicted else None


def _columns(score: Score) -> tuple[Array, Array]:
    first, second = (
        (score.items, score.weights or [1.0] * len(score.items))
        if score.items
        else (score.predicted, score.true)
    )
    return np.asarray(first, np.float64), np.asarray(second, np.float64)


def headline(rows: Iterable[Score], model: str | None = None) -> str | None:
    """The row that speaks for a model: the first merge's, unless one is named."""
    scores = list(rows)
    named = model or next((s.model for s in scores if s.model not in (BASE, EXPERT)), None)
    ways = {s.way: s.row for s in scores if s.model == named}
    return next((ways[way] for way in WAYS if way in ways), None)


def scored(
    table: Table, experts: Mapping[str, Sequence[str]], owner: Mapping[str, str]
) -> list[ScorePart]:
    """Every row on every task.

    experts: model -> whom its router chooses from, in order. owner: task -> its own expert.
    """
    return [
        _part(table, score, experts.get(score.model, ()), owner.get(score.task))
        for score in table.scores.values()
    ]


def _part(table: Table, score: Score, experts: Sequence[str], own: str | None) -> ScorePart:
    row, task = score.row, score.task
    draws = table.draws.get((row, task))
    share, recovery = table.share(row, task), _recovery(table, row, task)
    absent = {"interval": "no items that its metric is known of"} if draws is None else {}
    absent |= {"normalised": share} if isinstance(share, str) else {}
    absent |= {"recovery": recovery} if isinstance(recovery, str) else {}
    nll = fsum(score.nll) / len(score.nll) if score.nll else None
    if nll is not None and not isfinite(nll):
        absent["nll"] = "a true class was given no probability at all"
    routing = None
    if own in experts and score.routed:
        number = experts.index(own)
        routing = sum(choice == number for choice in score.routed) / len(score.routed)
    return ScorePart(
        row=row,
        task=task,
        value=score.value,
        interval=None if draws is None else statistics.interval(draws),
        normalised=None if isinstance(share, str) else share[0],
        normalised_interval=(
            None if isinstance(share, str) or share[1] is None else statistics.interval(share[1])
        ),
        recovery=None if isinstance(recovery, str) else recovery,
        ece=statistics.calibration(score.confidence, score.items)[1] if judged(score) else None,
        nll=nll if nll is not None and isfinite(nll) else None,
        routing_accuracy=routing,
        extras={name: value for name, value in score.extras.items() if isfinite(value)},
        absent=absent,
    )


def judged(score: Score) -> bool:
    """Whether each item is right or wrong, and its prediction has a probability."""
    return bool(score.items) and bool(score.confidence) and set(score.items) <= {0, 1}


def _recovery(table: Table, row: str, task: str) -> float | str:
    """(m - b) / (e - b) where e - b is above two of its standard errors, or why there is none."""
    value, base, expert = (table.value(each, task) for each in (row, BASE, EXPERT))
    if value is None or base is None or expert is None:
        return "needs base and expert"
    low, high = table.draws.get((BASE, task)), table.draws.get((EXPERT, task))
    if low is None or high is None:
        return "the gap between base and expert has no standard error"
    gap = table.sign(task) * (expert - base)
    if gap <= 2 * float((high - low).std()):
        return "the expert is not better than the base by 2 SE"
    return table.sign(task) * (value - base) / gap
