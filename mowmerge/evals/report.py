"""The report of an evaluation: built from what was found, written, and read again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mowmerge import __version__
from mowmerge.checkpoint.source import config, find
from mowmerge.errors import ResourceError, SourceError
from mowmerge.evals import aggregates, figures, statistics
from mowmerge.evals.anatomy import anatomy
from mowmerge.evals.cache import Cache
from mowmerge.evals.figures import BASE, EXPERT, LOWER_IS_BETTER, Table
from mowmerge.evals.matrix import matrix
from mowmerge.evals.schema import DataPart, Gate, Merge, ModelPart, Report, Run
from mowmerge.evals.score import Evaluation, Score
from mowmerge.recipe.model import Recipe

REPORT, ITEMS = "report.json", "items.json"
Items = Mapping[str, Any]


def beside(folder: Path) -> Path:
    """Where the report on a merged folder goes unless told: FOLDER-eval."""
    whole = folder.resolve()
    return whole.with_name(f"{whole.name}-eval")


def build(found: Evaluation, recipe: Recipe, command: str = "") -> tuple[Report, str]:
    """The report, and the text of the file of items that goes beside it.

    The subject is the first merge that was scored. command: what repeats the evaluation.

    Raises:
        SourceError: nothing was scored but base and experts.
    """
    subject = figures.headline([s for s in found.scores if isfinite(s.value)])
    if subject is None:
        raise SourceError("there is no merge to report on", hint="name a merged folder")
    first = (BASE, EXPERT)  # then merges, in the order they were scored in
    scores = sorted(found.scores, key=lambda s: first.index(s.model) if s.model in first else 2)
    held_out = [name for name, task in recipe.tasks.items() if task.expert is None]
    table = figures.tabled(scores, held_out)
    folders = {
        score.model: Path(find(found.models[score.model].source).folder)
        for score in scores
        if score.model in found.models and score.model not in first
    }
    experts = {name: _experts(folder) for name, folder in folders.items()}
    owner = {name: task.expert for name, task in recipe.tasks.items() if task.expert}
    parts = figures.scored(table, experts, owner)
    folder = folders.get(table.scores[subject, table.tasks[0]].model)
    merge = _merge(folder) if folder else None
    items = items_text([*found.scores, *found.crossed])
    report = Report(
        subject=subject,
        run=_run(found, recipe, merge, command),
        models={name: ModelPart(**asdict(model)) for name, model in found.models.items()},
        data={task: _data(found, table, task) for task in table.tasks},
        flags={row: dict(found.flags[row]) for row in table.rows if row in found.flags},
        rows=table.rows,
        summary=aggregates.summaries(table, parts),
        scores=parts,
        tests=aggregates.tests(table, subject, _rivals(scores, subject)),
        forgetting=aggregates.forgetting(table),
        matrix=matrix(found, held_out, subject, owner),
        routing=aggregates.routing(table, experts, owner),
        gates=_gates(found, experts),
        calibration=aggregates.calibrations(table),
        costs=aggregates.costs(sorted(found.costs, key=lambda c: table.rows.index(c.row))),
        merge=merge,
        failures=table.failures,
        items=ITEMS,
        items_sha256=hashlib.sha256(items.encode()).hexdigest(),
    )
    return report, items


def _rivals(scores: Sequence[Score], subject: str) -> list[str]:
    """Base, expert and every other merge as its headline row."""
    own = next(score.model for score in scores if score.row == subject)
    models = dict.fromkeys(score.model for score in scores if score.model != own)
    return [row for model in models if (row := figures.headline(scores, model))]


def _run(found: Evaluation, recipe: Recipe, merge: Merge | None, command: str) -> Run:
    return Run(
        recipe=recipe.name,
        method=merge.method if merge else "",
        command=command,
        mowmerge=__version__,
        settings=dict(found.settings),
        resamples=statistics.RESAMPLES,
        level=statistics.LEVEL,
        bins=statistics.BINS,
    )


def _data(found: Evaluation, table: Table, task: str) -> DataPart:
    score = next(score for score in found.scores if score.task == task)
    data = found.data.get(task)
    told = (
        asdict(data)
        if data
        else {"type": "", "source": "", "split": "", "sha256": "", "template": ""}
    )
    return DataPart(
        **{**told, "n": data.n if data else len(score.items or score.predicted)},
        metric=score.metric,
        higher_is_better=score.metric not in LOWER_IS_BETTER,
        held_out=task in table.held_out,
    )


def _experts(folder: Path) -> list[str]:
    """Whom the routers of a dynamic checkpoint choose from; empty for a static one."""
    manifest = config(folder).get("mowmerge") or {}
    return list(manifest.get("experts", ()))


def _merge(folder: Path) -> Merge | None:
    """What the merge's own report says; None where there is none that can be read."""
    try:
        return anatomy(json.loads((folder / "report.json").read_text("utf-8")))
    except (OSError, ValueError, KeyError):
        return None


def _gates(found: Evaluation, experts: Mapping[str, Sequence[str]]) -> list[Gate]:
    models = {score.row: score.model for score in found.scores}
    parts = []
    for row, tasks in found.gates.items():
        names = experts.get(models.get(row, row), ())
        for task, gates in tasks.items():
            for name, gate in gates.items():
                slots = names if len(names) == len(gate.mean) else range(len(gate.mean))
                parts.append(
                    Gate(row=row, task=task, gate=name, slots=[str(s) for s in slots],
                         **asdict(gate))
                )  # fmt: skip
    return parts


def items_text(scores: Sequence[Score]) -> str:
    """Every item's prediction and its part in the metric, by task and row, as JSON.

    The weights of a task's items, and the true answers where a row has the same, stand once.
    """
    tasks: dict[str, dict[str, Any]] = {}
    for score in scores:
        task = tasks.setdefault(
            score.task, {"metric": score.metric, "true": list(score.true),
                         "weights": list(score.weights), "rows": {}}
        )  # fmt: skip
        row = {"predicted": score.predicted, "items": score.items, "confidence": score.confidence}
        held = {name: list(each) for name, each in row.items() if each}
        if list(score.true) != task["true"]:  # another checkpoint numbers its classes otherwise
            held["true"] = list(score.true)
        task["rows"][score.row] = {"value": score.value, **held}
    return json.dumps({"version": 1, "tasks": tasks}, separators=(",", ":")) + "\n"


def read(file: Path) -> Report:
    """A report that was written.

    Raises:
        SourceError: there is none, or not one of this version.
    """
    file = file / REPORT if file.is_dir() else file
    try:
        return Report.model_validate_json(file.read_text("utf-8"))
    except OSError as error:
        raise SourceError(
            f"no report can be read: {error.strerror}", where=str(file),
            hint="`mowmerge eval OUT --report DIR` writes one",
        ) from error  # fmt: skip
    except UnicodeDecodeError as error:
        raise SourceError("this is no evaluation report: not text", where=str(file)) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise SourceError(
            f"this is no evaluation report of version 1 or 2: {place}: {first['msg']}",
            where=str(file),
        ) from error


def of(folder: Path) -> Report | None:
    """The report beside a merged folder, if it is one on the very weights that are there."""
    try:
        report = read(beside(folder))
    except SourceError:
        return None
    model = report.models.get(report.subject.partition(", ")[0])
    return report if model and model.sha256 == Cache(None).weights(folder) else None


def read_items(file: Path, report: Report) -> Items | None:
    """The items beside a report; None where they are gone or another evaluation's."""
    folder = file if file.is_dir() else file.parent
    try:
        text = (folder / report.items).read_bytes()
    except OSError:
        return None
    if hashlib.sha256(text).hexdigest() != report.items_sha256:
        return None
    held: Items = json.loads(text)["tasks"]
    return held


def write(report: Report, items: str, folder: Path) -> None:
    """Writes report.json, items.json, report.md and report.html, each whole or not at all.

    Raises:
        ResourceError: the folder cannot be written, or is a merged checkpoint, which is sealed.
    """
    from mowmerge.evals import markdown, page

    if (folder / "SHA256SUMS").exists():
        raise ResourceError(
            "a report cannot go into a checkpoint, which its hashes seal",
            where=str(folder), hint="name another folder with --report",
        )  # fmt: skip
    texts = {
        ITEMS: items,
        REPORT: report.model_dump_json(indent=1) + "\n",
        "report.md": markdown.render(report),
        "report.html": page.render(report),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            staged = folder / f".{name}.partial"
            staged.write_text(text, encoding="utf-8")
            staged.replace(folder / name)
    except OSError as error:
        raise ResourceError(
            f"the report cannot be written: {error.strerror}", where=str(folder)
        ) from error
