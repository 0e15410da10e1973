"""Figures over tasks, against rivals and against the base: macro means, never pooled items."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from math import fsum

import numpy as np

from mowmerge.evals import statistics
from mowmerge.evals.figures import BASE, EXPERT, Table, judged
from mowmerge.evals.schema import (
    BinPart,
    Calibration,
    CostPart,
    Forgetting,
    Pair,
    Routing,
    ScorePart,
    Summary,
    Test,
)
from mowmerge.evals.score import Cost, Score
from mowmerge.evals.statistics import Array

HELD_OUT, OWN = "held-out tasks", "experts' tasks"
SIZES, MEASURED = ("parameters", "bytes_on_disk"), ("peak_bytes", "latency", "throughput")


def summaries(table: Table, scores: Sequence[ScorePart]) -> list[Summary]:
    """Every row over the experts' tasks; what cannot be had over all of them is absent."""
    held = set(table.own)
    return [_summary(table, r, [s for s in scores if s.row == r and s.task in held])
            for r in table.rows]  # fmt: skip


def _summary(table: Table, row: str, parts: Sequence[ScorePart]) -> Summary:
    tasks = [part.task for part in parts]
    missing = [task for task in table.own if task not in tasks]
    gap = f"not scored on {', '.join(missing)}" if missing else ""
    mixed = "the tasks' scores are in different units"
    no_mean = gap or ("" if not tasks or table.alike(tasks) else mixed)
    no_share = gap or "; ".join(
        dict.fromkeys(f"{p.task}: {p.absent['normalised']}" for p in parts if p.normalised is None)
    )
    shares = {p.task: p.normalised for p in parts if p.normalised is not None}
    worst = min(shares, key=lambda task: shares[task]) if shares else None
    recoveries = [p.recovery for p in parts if p.recovery is not None]
    absent = {"mean": no_mean, "normalised": no_share}
    absent["recovery"] = "" if recoveries else "on no task is the expert better by 2 SE"
    return Summary(
        row=row,
        tasks=len(parts),
        mean=None if no_mean else mean([part.value for part in parts]),
        mean_interval=None if no_mean else _interval(table.draws.get((row, t)) for t in tasks),
        normalised=None if no_share else mean(shares.values()),
        normalised_interval=None if no_share else _interval(_ratio(table, row, t) for t in tasks),
        ratio_of_means=None if no_mean else _ratio_of_means(table, parts),
        worst_task=worst,
        worst=shares[worst] if worst else None,
        at_least_expert=sum(share >= 1 for share in shares.values()) if shares else None,
        recovery=mean(recoveries),
        recovery_tasks=len(recoveries),
        ece=mean(part.ece for part in parts),
        nll=mean(part.nll for part in parts),
        routing_accuracy=mean(part.routing_accuracy for part in parts),
        absent={name: why for name, why in absent.items() if why},
    )


def mean(values: Iterable[float | None]) -> float | None:
    """The mean; None where there is nothing, or something of it is missing."""
    found = list(values)
    known = [value for value in found if value is not None]
    return fsum(known) / len(known) if known and len(known) == len(found) else None


def _ratio(table: Table, row: str, task: str) -> Array | None:
    share = table.share(row, task)
    return None if isinstance(share, str) else share[1]


def _ratio_of_means(table: Table, parts: Sequence[ScorePart]) -> float | None:
    ours, theirs = mean(p.value for p in parts), mean(table.value(EXPERT, p.task) for p in parts)
    return ours / theirs if ours is not None and theirs else None


def _interval(draws: Iterable[Array | None]) -> Pair | None:
    """The interval of the mean over tasks, each task's items resampled on their own."""
    found = list(draws)
    known = [each for each in found if each is not None]
    whole = known and len(known) == len(found)
    return statistics.interval(np.mean(known, 0)) if whole else None


def tests(table: Table, subject: str, rivals: Sequence[str]) -> list[Test]:
    """The subject against each rival on each task that both were scored on, item by item."""
    found = []
    for rival, task in ((rival, task) for rival in rivals for task in table.tasks):
        ours, theirs = table.scores.get((subject, task)), table.scores.get((rival, task))
        one, two = table.draws.get((subject, task)), table.draws.get((rival, task))
        if ours and theirs and one is not None and two is not None and alike(ours, theirs):
            found.append(test(task, rival, ours, theirs, one - two))
    return adjusted(found)


def alike(one: Score, two: Score) -> bool:
    """Whether two scores have the same number of items."""
    return len(one.items or one.predicted) == len(two.items or two.predicted)


def adjusted(found: Sequence[Test]) -> list[Test]:
    """The tests with p adjusted for their number."""
    p = statistics.holm([each.p for each in found])
    return [each.model_copy(update={"p_holm": q}) for each, q in zip(found, p, strict=True)]


def test(task: str, rival: str, ours: Score, theirs: Score, differences: Array) -> Test:
    """One paired test: McNemar's where every item is right or wrong, else the bootstrap's."""
    binary = bool(ours.items) and not ours.weights and {*ours.items, *theirs.items} <= {0, 1}
    wins = losses = None
    p = statistics.bootstrap_p(differences)
    if binary:
        wins, losses, p = statistics.mcnemar(ours.items, theirs.items)
    return Test(
        task=task,
        rival=rival,
        difference=ours.value - theirs.value,
        interval=statistics.interval(differences),
        kind="mcnemar" if binary else "bootstrap",
        wins=wins,
        losses=losses,
        p=p,
        p_holm=p,
    )


def forgetting(table: Table) -> list[Forgetting]:
    """Every row but the base's against it: on held-out tasks, and on the experts' own."""
    found = []
    for on, tasks in ((HELD_OUT, table.held_out), (OWN, table.own)):
        for row in table.rows:
            both = [t for t in tasks if {(row, t), (BASE, t)} <= table.scores.keys()]
            if row != BASE and both and len(both) == len(tasks):
                found.append(_forgetting(table, row, on, both))
    return found


def _forgetting(table: Table, row: str, on: str, tasks: Sequence[str]) -> Forgetting:
    gaps, shares, draws = {}, [], []
    for task in tasks:
        sign, base = table.sign(task), table.scores[BASE, task].value
        gaps[task] = sign * (table.scores[row, task].value - base)
        shares.append(gaps[task] / abs(base) if base else None)
        ours, theirs = table.draws.get((row, task)), table.draws.get((BASE, task))
        draws.append(None if ours is None or theirs is None else sign * (ours - theirs))
    return Forgetting(
        row=row,
        on=on,
        tasks=tasks,
        signed=fsum(gaps.values()) / len(gaps) if table.alike(tasks) else None,
        interval=_interval(draws) if table.alike(tasks) else None,
        unit=table.unit(tasks[0]),
        relative=mean(shares),
        worse_than_base=[task for task, gap in gaps.items() if gap < 0],
    )


def routing(
    table: Table, experts: Mapping[str, Sequence[str]], owner: Mapping[str, str]
) -> list[Routing]:
    """Where each row's router sent each task's items."""
    found = []
    for row in table.rows:
        routed = {t: s for (r, t), s in table.scores.items() if r == row and s.routed}
        if not routed:
            continue
        names = list(experts.get(next(iter(routed.values())).model, ()))
        if not names:
            continue
        counts = {
            task: [sum(choice == k for choice in score.routed) for k in range(len(names))]
            for task, score in routed.items()
        }
        own = {task: owner[task] for task in counts if owner.get(task) in names}
        shares = [counts[t][names.index(own[t])] / len(routed[t].routed) for t in own]
        accuracy = mean(shares)
        if accuracy is not None:
            found.append(Routing(row=row, experts=names, counts=counts, own=own, accuracy=accuracy))
    return found


def calibrations(table: Table) -> list[Calibration]:
    """Confidence beside accuracy for every row whose predictions have probabilities."""
    found = []
    for row in table.rows:
        held = [s for (r, _), s in table.scores.items() if r == row and judged(s)]
        if held:
            confidence = [c for score in held for c in score.confidence]
            right = [i for score in held for i in score.items]
            bins, _ = statistics.calibration(confidence, right)
            parts = [BinPart(**asdict(each)) for each in bins]
            found.append(Calibration(row=row, n=len(right), bins=parts))
    return found


def costs(found: Sequence[Cost]) -> list[CostPart]:
    """Every row's costs, and as multiples of one expert's: of what was measured only where both
    ran on the same."""
    expert = next((cost for cost in found if cost.row == EXPERT), None)
    parts = []
    for cost in found:
        ratios = {
            name: getattr(cost, name) / getattr(expert, name)
            for name in (*SIZES, *(MEASURED if expert and cost.on == expert.on else ()))
            if expert and getattr(expert, name) and getattr(cost, name)
        }
        parts.append(CostPart(**asdict(cost), ratios=ratios))
    return parts
