"""Scores checkpoints on tasks of any type: the same items for each, mixed and shuffled in batches.

A dynamic checkpoint is run in up to three ways, each a row of its own. NAME: nothing is told; the
router chooses weights and head, and an item under another task's head is wrong. "NAME, task given":
the head is the true task's, the gates are the router's. "NAME, oracle": the gates, too, are the
true task's expert alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from math import fsum
from pathlib import Path
from random import Random
from typing import Any

from mowmerge import __version__
from mowmerge.errors import CheckpointError, RecipeError
from mowmerge.evals import costs, crossed, facts, kinds, models
from mowmerge.evals.cache import Cache, Journal
from mowmerge.evals.job import Answer, Job, Place, Taken
from mowmerge.evals.models import Entry, Loaded
from mowmerge.evals.runner import Batches, Spent
from mowmerge.evals.score import Evaluation, Gates, Score
from mowmerge.evals.settings import ALL, Advance, Options
from mowmerge.recipe.model import Recipe
from mowmerge.recipe.task_types import TYPES
from mowmerge.tasks.adapters import folders
from mowmerge.training import processes
from mowmerge.training.processes import Processes

Journals = Mapping[tuple[str, str], Journal]  # by way and task
Begin = Callable[[int], Advance]


def evaluate(
    merged: Mapping[str, Path],
    recipe: Recipe,
    against: Sequence[str] = (),
    options: Options | None = None,
    begin: Begin = lambda total: lambda items: None,
) -> Evaluation:
    """The scores of merged folders on each task, beside those of "base", "experts" and paths.

    The base is scored with each expert's head; an expert on its own tasks, or with the option
    `experts: all` on those of others too; tasks without an expert by all others. Everything that
    can be checked without a model is, before one is loaded. `begin` is given the number of items,
    over all checkpoints, and returns what is called as they are done.

    Raises:
        RecipeError: no tasks, one that cannot be scored, splits that share samples, an empty one,
            a label that a head does not know.
        CheckpointError, SourceError: a model, head, processor or data set that cannot be loaded.
        ResourceError: no such device, too little memory for one item, fewer processes than told.
    """
    asked = options or Options()
    here = _processes(asked.device)
    if not recipe.tasks:
        raise RecipeError(
            "the recipe has no tasks",
            where=recipe.file,
            hint="add tasks: to it, or name a file of them: --tasks",
        )
    jobs = [_job(recipe, name) for name in recipe.tasks]
    found = models.entries(merged, recipe, jobs, against)
    blank: crossed.Blank = {}
    if asked.experts == ALL:
        others = crossed.entries(found, recipe, jobs)
        found += [crossed.able(entry, jobs, blank) for entry in others]
    truths = {entry: _truths(entry, jobs) for entry in found}
    cache = Cache(asked.cache, here.rank)
    data = {job.name: facts.data(job) for job in jobs}
    taken: dict[tuple[Entry, str], list[Taken]] = {}
    scores = list[Score]()
    batches = Batches(asked.batch, begin(_total(found, jobs)))
    gates: dict[str, dict[str, dict[str, Gates]]] = {}
    for entry in found:
        own = [job for job in jobs if job.name in entry.tasks]
        journals = {
            (way, job.name): cache.journal(
                *_key(cache, entry, job, recipe), way, data[job.name].sha256,
                data[job.name].template, asked.dtype, here.device.type, _versions(),
            )
            for job in own
            for way in _ways(entry, job)
        }  # fmt: skip
        _run(entry, own, recipe, asked, here, batches, journals, blank)
        for (way, task), journal in journals.items():
            taken.setdefault((entry, way), []).extend(journal.taken)
            if crossed.told(blank, entry.expert, task) and entry.crossed:
                continue
            job = next(job for job in own if job.name == task)
            answers = [journal.found[i] for i in range(len(job.items))]
            score = _scored(entry, way, job, truths[entry][task], answers)
            scores.append(score)
            if score.routed:
                gates.setdefault(score.row, {})[task] = facts.gates(entry.manifest, answers)
    scores.sort(key=partial(_order, [e.row for e in found], list(recipe.tasks)))
    rows = [entry for entry in found if not entry.crossed]
    beside = {entry.row for entry in found if entry.crossed}
    return Evaluation(
        [score for score in scores if score.row not in beside],
        costs.table({key: held for key, held in taken.items() if key[0] in rows}),
        gates,
        data,
        facts.models(rows, cache, asked.dtype),
        _settings(asked, here, batches.size),
        facts.flags(rows, scores, recipe),
        [score for score in scores if score.row in beside],
        blank,
    )


def _scored(
    entry: Entry, way: str, job: Job, true: Sequence[Any], answers: Sequence[Answer]
) -> Score:
    """The score of a checkpoint's answers, and where its router sent each item."""
    scored = job.kind.score(job, true, answers)
    routed = [answer["routed"] for answer in answers if "routed" in answer]
    parts = {**vars(scored), "metric": scored.metric or job.metric}
    return Score(entry.row, way, job.name, **parts, routed=routed)


def _job(recipe: Recipe, name: str) -> Job:
    """A task made ready, after every check that needs no model."""
    asked = recipe.tasks[name]
    kind, known = kinds.of(asked.type), TYPES[asked.type].metrics
    metric = asked.metric or (known[0] if known else "")
    return Job(name, asked, kind, kind.load(recipe, name), metric)


def _ways(entry: Entry, job: Job) -> list[str]:
    """How a checkpoint can be run on a task; what is held out has no expert to be told of."""
    ways = entry.ways(job.kind.FAMILY)
    if entry.dynamic and entry.experts[job.name] not in entry.manifest.experts:
        return [way for way in ways if way == ""]
    return ways


def _truths(entry: Entry, jobs: Sequence[Job]) -> dict[str, Sequence[Any]]:
    """What is true of each task's items, in the numbers of the checkpoint's heads."""
    found = {}
    for job in jobs:
        if job.name in entry.tasks:
            classes = entry.label_map(job.name) if job.kind.FAMILY == "head" else {}
            found[job.name] = job.kind.truths(job, classes)
    return found


def _run(
    entry: Entry, jobs: Sequence[Job], recipe: Recipe, asked: Options, here: Processes,
    batches: Batches, journals: Journals, blank: crossed.Blank,
) -> None:  # fmt: skip
    """Answers what no journal has yet, and gathers the answers of all processes."""
    held: dict[Any, list[Loaded]] = {}
    device = "auto" if asked.device == "auto" else here.device
    for group in _groups(jobs):
        family, ways = group[0].kind.FAMILY, entry.ways(group[0].kind.FAMILY)
        shared = family == "lm"  # one model answers, however it is asked
        some = [job for job in jobs if family == job.kind.FAMILY] if shared else group
        key = family if shared else id(group)
        places = [Place(job, i) for job in group for i in range(len(job.items))]
        Random(asked.seed).shuffle(places)
        mine = [place for place in places[here.rank :: here.count] if _lacks(journals, ways, place)]
        batches.skip(len(places[here.rank :: here.count]) - len(mine))
        if mine and key not in held:
            try:
                held[key] = models.load(entry, family, some, recipe, asked.dtype, device)
            except CheckpointError as error:
                if not entry.crossed:
                    raise
                crossed.note(entry, [job.name for job in some], error, blank)
                batches.skip(len(mine))
                continue
        for loaded in held.get(key, []):
            own = [place for place in mine if place.job.name in loaded.truths]
            if own:
                spent = batches.run(loaded, own, ways, journals)
                on = costs.surroundings(here.device, here.count, batches.size)
                _took(spent, own, ways, journals, costs.size(loaded.model), on)
    for theirs in here.gathered({key: journal.found for key, journal in journals.items()}):
        for key, answers in theirs.items():
            journals[key].found.update(answers)


def _took(
    spent: Spent, places: Sequence[Place], ways: Sequence[str], journals: Journals,
    parameters: int, on: Mapping[str, Any],
) -> None:  # fmt: skip
    """Keeps what passes took with the answers that they gave, task by task."""
    counts = Counter(place.job.name for place in places)
    whole = places[0].job.kind.WHOLE
    for way, (task, n) in product(ways, counts.items()):
        if (way, task) in journals:
            journals[way, task].took(costs.shared(spent, way, n, whole, parameters, on))


def _groups(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """The tasks whose items can share a batch: of one type, with the same columns, and for language
    models of one way of asking."""
    found: dict[Any, list[Job]] = {}
    for job in jobs:
        options = job.asked.options
        how = options if job.kind.FAMILY == "lm" else options.clip
        found.setdefault((job.asked.type, frozenset(job.items.columns), how), []).append(job)
    yield from found.values()


def _lacks(journals: Journals, ways: Sequence[str], place: Place) -> bool:
    """Whether an answer to an item is still to be given."""
    keys = ((way, place.job.name) for way in ways)
    return any(key in journals and place.item not in journals[key].found for key in keys)


def _key(cache: Cache, entry: Entry, job: Job, recipe: Recipe) -> list[Any]:
    """The files and the asking that decide an answer."""
    kind, options = job.asked.type, job.asked.options
    used = [*folders(entry.where), models.processor_folder(entry, kind, recipe)]
    used += folders(entry.keeping[job.name]) if job.name in entry.keeping else []
    used += [models.clip_folder(options.clip, recipe)] if options.clip else []
    metric = job.metric if job.kind.WHOLE else ""
    files = [cache.everything(folder) for folder in used]
    return [files, entry.experts[job.name], kind, options.model_dump(), metric]


def _processes(device: str | None) -> Processes:
    """The processes that score together."""
    return processes.begin(None if device == "auto" else device, "eval")


def _total(entries: Sequence[Entry], jobs: Sequence[Job]) -> int:
    return sum(len(job.items) for e in entries for job in jobs if job.name in e.tasks)


def _order(rows: Sequence[str], tasks: Sequence[str], score: Score) -> tuple[int, int, int]:
    """Row by row, ways in their order, tasks in the recipe's."""
    ways = ("", "task given", "oracle")
    return rows.index(score.model), ways.index(score.way), tasks.index(score.task)


def _versions() -> dict[str, str]:
    """Of what computes."""
    named = ("torch", "transformers", "datasets", "lm-eval")
    found = {name: version(name) for name in named if find_spec(name.replace("-", "_"))}
    return {"mowmerge": __version__, **found}


def _settings(asked: Options, here: Processes, size: int) -> dict[str, Any]:
    """What the figures were taken with."""
    return {
        "batch": size, "seed": asked.seed, "device": str(here.device), "dtype": asked.dtype,
        "processes": here.count, "rank": here.rank, "versions": _versions(),
    }  # fmt: skip


def table(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """A row a model: its score on each task, their mean, and the mean of score / expert's score.

    The last is None where an expert scored 0.
    """
    values: dict[str, dict[str, float]] = {}
    for score in scores:
        values.setdefault(score.row, {})[score.task] = score.value
    expert = values.get("expert")
    rows = []
    for model, by_task in values.items():
        row = {"model": model, **by_task, "mean": fsum(by_task.values()) / len(by_task)}
        if expert:
            shares = [v / expert[t] for t, v in by_task.items() if expert.get(t)]
            whole = len(shares) == len(by_task)
            row["normalised"] = fsum(shares) / len(shares) if whole else None
        rows.append(row)
    return rows
