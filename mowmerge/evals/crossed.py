"""Experts on the tasks of others: what each forgot, and what it knows beside its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mowmerge.errors import CheckpointError, RecipeError
from mowmerge.evals.job import Job
from mowmerge.evals.models import Entry
from mowmerge.recipe.model import Recipe

Blank = dict[str, dict[str, str]]  # by expert and task, why it was not scored


def entries(found: Sequence[Entry], recipe: Recipe, jobs: Sequence[Job]) -> list[Entry]:
    """Each expert among `found` once more, on all tasks but its own.

    Where heads are kept it is the expert's backbone under the head of the task's own expert, as
    the base is scored; else its own head or language head answers.
    """
    places = {entry.expert: entry.where for entry in found if entry.expert}
    crossed = []
    for entry in (each for each in found if each.expert):
        others = [job for job in jobs if job.name not in entry.tasks]
        kept = {
            job.name: job.asked.expert
            for job in others
            if recipe.heads and job.kind.FAMILY == "head" and job.asked.expert
        }
        keeping = {task: places[expert] for task, expert in kept.items()}
        if others:
            crossed.append(
                replace(
                    entry, row=f"expert {entry.expert}", tasks=tuple(job.name for job in others),
                    experts={job.name: kept.get(job.name) for job in others}, keeping=keeping,
                    crossed=True, match=recipe.heads.match if recipe.heads else (),
                )
            )  # fmt: skip
    return crossed


def able(entry: Entry, jobs: Sequence[Job], blank: Blank) -> Entry:
    """The entry with those of its tasks whose labels its head knows; `blank` takes the others."""
    held = []
    for job in (job for job in jobs if job.name in entry.tasks):
        try:
            job.kind.truths(job, entry.label_map(job.name) if job.kind.FAMILY == "head" else {})
            held.append(job.name)
        except (RecipeError, CheckpointError) as error:
            note(entry, [job.name], error, blank)
    return replace(entry, tasks=tuple(held))


def note(
    entry: Entry, tasks: Sequence[str], error: RecipeError | CheckpointError, blank: Blank
) -> None:
    """Keeps why an expert cannot do these tasks."""
    why = error.problems[0].message
    blank.setdefault(entry.expert, {}).update(dict.fromkeys(tasks, why))


def told(blank: Mapping[str, Mapping[str, str]], expert: str, task: str) -> str:
    """Why an expert was not scored on a task; empty where it was."""
    return blank.get(expert, {}).get(task, "")
