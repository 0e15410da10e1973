"""Scores models on classification tasks: one prediction an item, then the task's metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import fsum
from pathlib import Path
from typing import Any

from mowmerge.checkpoint.source import config, find
from mowmerge.errors import RecipeError, did_you_mean
from mowmerge.evals import routed
from mowmerge.evals.score import Evaluation, Score
from mowmerge.recipe.model import Recipe
from mowmerge.tasks import heads, inputs
from mowmerge.tasks.data import Items
from mowmerge.tasks.metrics import METRICS
from mowmerge.tasks.splits import load_apart
from mowmerge.tensors import torch

BATCH = 64  # items a forward pass


def evaluate(merged: Mapping[str, Path], recipe: Recipe, against: Sequence[str] = ()) -> Evaluation:
    """The scores of merged folders, and of "base" and "experts" if asked, on each task.

    The base is scored with each expert's head. All splits that a task names are loaded, so that an
    eval split which shares samples with another is refused.

    Raises:
        RecipeError: no tasks, a type or metric that cannot be scored, splits that share samples.
        CheckpointError, SourceError: a model, head, processor or data set that cannot be loaded.
    """
    items = {name: _items(recipe, name) for name in recipe.tasks}
    if not items:
        raise RecipeError("the recipe has no tasks", where=recipe.file, hint="see docs/recipe.md")
    dynamic = {k: f for k, f in merged.items() if config(f).get("model_type") == "mowmerge"}
    merged = {which: folder for which, folder in merged.items() if which not in dynamic}
    scores = []
    for name, samples in items.items():
        expert = recipe.tasks[name].expert
        own = Path(find(recipe.locate(_source(recipe, expert))).folder)
        models = {
            which: heads.load(folder, name if (folder / "heads").is_dir() else None, expert)
            for which, folder in merged.items()
        }
        if "base" in against:
            if recipe.base is None:
                raise RecipeError("--against base, and the recipe names no base", where=recipe.file)
            bare = Path(find(recipe.locate(_source(recipe, None))).folder)
            kept = next((f for f in merged.values() if (f / "heads").is_dir()), own)
            models["base"] = heads.load(bare, name, expert, keeping=kept)
        if "experts" in against:
            models["expert"] = heads.load(own, None)
        metric = recipe.tasks[name].metric or "accuracy"
        processor = inputs.processor(own, recipe.tasks[name].type)
        for which, model in models.items():
            predicted = predict(model, processor, samples)
            true = samples.labels(model.config.label2id)
            value = METRICS[metric](predicted, true)
            scores.append(Score(which, "", name, metric, value, predicted, true))
    for which, folder in dynamic.items():
        scores += routed.scores(which, folder, recipe, items, BATCH)
    return Evaluation(scores)


def predict(model: Any, processor: Any, items: Items, batch: int = BATCH) -> list[int]:
    """The class of each item: the largest logit, the first of equals."""
    found: list[int] = []
    with torch.inference_mode():
        for start in range(0, len(items), batch):
            some = [items.input(i) for i in range(start, min(start + batch, len(items)))]
            given = inputs.encode(processor, some, model.config)
            found += model(**given).logits.argmax(-1).tolist()
    return found


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
            shares = [v / expert[t] for t, v in by_task.items() if expert[t]]
            whole = len(shares) == len(by_task)
            row["normalised"] = fsum(shares) / len(shares) if whole else None
        rows.append(row)
    return rows


def _items(recipe: Recipe, task: str) -> Items:
    """The eval split's items, after every check that needs no model."""
    asked = recipe.tasks[task]
    if asked.type == "causal-lm":
        raise RecipeError(
            f"task '{task}' is a causal-lm task, which cannot be scored yet",
            where=recipe.where("tasks", task, "type"),
        )
    if asked.metric is not None and asked.metric not in METRICS:
        raise RecipeError(
            f"there is no metric '{asked.metric}'",
            where=recipe.where("tasks", task, "metric"),
            hint=did_you_mean(asked.metric, list(METRICS)),
        )
    named = [use for use in ("router", "select") if getattr(asked.splits, use)]
    return load_apart(recipe, task, [*named, "eval"])["eval"]


def _source(recipe: Recipe, model: str | None) -> str:
    """The folder or Hub id of a model, or of the base."""
    source = recipe.models[model].source if model else recipe.base
    if not isinstance(source, str):
        raise RecipeError(
            f"the {'model ' + model if model else 'base'} is itself a recipe",
            where=recipe.file,
            hint="merge it first: only checkpoints can be scored",
        )
    return source


def as_json(found: Evaluation) -> Mapping[str, Any]:
    """Everything as plain data, and the table."""
    return {"version": 1, "table": table(found.scores), **asdict(found)}
