"""Scores a dynamic checkpoint on all tasks at once: batches in which every task's items mix.

Three ways, each a row of its own. NAME: nothing is told; the router chooses weights and head, and
an item under another task's head is wrong. "NAME, task given": the head is the true task's, the
gates are the router's. "NAME, oracle": the gates, too, are the true task's expert alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from mowmerge.checkpoint.source import find
from mowmerge.errors import SourceError
from mowmerge.evals.score import Score
from mowmerge.recipe.model import Recipe
from mowmerge.tasks import heads, inputs
from mowmerge.tasks.data import Items
from mowmerge.tasks.metrics import METRICS
from mowmerge.tensors import torch

SEED = 0  # of the order in which items mix
NOWHERE = -1  # the class of an item that was given to another task's head


def scores(
    which: str, folder: Path, recipe: Recipe, items: Mapping[str, Items], batch: int
) -> list[Score]:
    """The scores of the dynamic model in `folder` on each task, for each way that it can be run."""
    model = heads.load(folder, None)
    manifest = model._manifest
    scopes = {gate.scope for gate in manifest.gates.values()}
    ways = ["oracle"]
    if scopes != {"task"}:
        ways.insert(0, "task given")
    if "sample" in scopes:  # the gates of blocks and modules say nothing of heads
        ways.insert(0, "")
    experts = {task: manifest.experts.index(recipe.tasks[task].expert) for task in items}
    predicted = _predict(model, folder, recipe, items, experts, ways, batch)
    found = []
    for way, by_task in predicted.items():
        for task, classes in by_task.items():
            metric = recipe.tasks[task].metric or "accuracy"
            true = items[task].labels(_labels(manifest, experts[task]))
            value = METRICS[metric](classes, true)
            found.append(Score(which, way, task, metric, value, classes, true))
    return found


def _predict(
    model: Any,
    folder: Path,
    recipe: Recipe,
    items: Mapping[str, Items],
    experts: Mapping[str, int],
    ways: Sequence[str],
    batch: int,
) -> dict[str, dict[str, list[int]]]:
    """The class of each item, by way and task, from shuffled batches of all tasks of one type."""
    blank = {task: [NOWHERE] * len(held) for task, held in items.items()}
    predicted = {way: {task: list(row) for task, row in blank.items()} for way in ways}
    for kind in sorted({recipe.tasks[task].type for task in items}):
        named = [task for task in items if recipe.tasks[task].type == kind]
        processor = _processor(folder, kind, recipe, named[0])
        places = [(task, i) for task in named for i in range(len(items[task]))]
        Random(SEED).shuffle(places)
        for start in range(0, len(places), batch):
            some = places[start : start + batch]
            given = inputs.encode(processor, [items[t].input(i) for t, i in some], model.config)
            ids = torch.tensor([experts[t] for t, _ in some])
            for way in ways:
                told = {"oracle": {"task_ids": ids}, "task given": {"head_ids": ids}}.get(way, {})
                with torch.inference_mode():
                    out = model(**given, **told)
                classes = torch.where(out["task"] == ids, out.logits.argmax(-1), NOWHERE).tolist()
                for (task, i), number in zip(some, classes, strict=True):
                    predicted[way][task][i] = number
    return predicted


def _processor(folder: Path, kind: str, recipe: Recipe, task: str) -> Any:
    """The checkpoint's own processor, or where it has none that of a task's expert."""
    try:
        return inputs.processor(folder, kind)
    except SourceError:
        source = recipe.models[recipe.tasks[task].expert].source
        if not isinstance(source, str):
            raise
        return inputs.processor(Path(find(recipe.locate(source)).folder), kind)


def _labels(manifest: Any, expert: int) -> Mapping[str, int]:
    """The label map of an expert's head."""
    named: Sequence[Any] = manifest.heads
    config = named[expert].config
    if "label2id" in config:
        return {str(name): int(number) for name, number in config["label2id"].items()}
    return {f"LABEL_{i}": i for i in range(int(config.get("num_labels", 2)))}
