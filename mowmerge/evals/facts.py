"""What an evaluation was of: data, models, gates, and what each row needed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from mowmerge.errors import MowmergeError
from mowmerge.evals.cache import Cache
from mowmerge.evals.job import Answer, Job
from mowmerge.evals.models import Entry
from mowmerge.evals.score import Data, Gates, Model, Score
from mowmerge.recipe import needs, parse
from mowmerge.recipe.model import Recipe
from mowmerge.tasks.adapters import folders
from mowmerge.tensors import torch


def data(job: Job) -> Data:
    """A task's items by content: their inputs and all that else is read of them."""
    items, asked = job.items, job.asked
    rest = [items.column(what) for what in items.columns if what not in ("input", "pair")]
    names = items.names if "label" in items.columns else None
    text = json.dumps([items.digests, rest, names])
    options = asked.options.model_dump(exclude_defaults=True)
    own = getattr(items, "template", "")
    templates = json.dumps([options, own], sort_keys=True) if options or own else ""
    source = json.dumps(dict(asked.data), sort_keys=True, default=str)
    return Data(
        asked.type, source, items.split, len(items.digests), sha256(text.encode()).hexdigest(),
        sha256(templates.encode()).hexdigest() if templates else "", asked.benchmark or "",
    )  # fmt: skip


def gates(manifest: Any, answers: Sequence[Answer]) -> dict[str, Gates]:
    """Each routed gate's statistics over a task's items."""
    rows = torch.tensor([a["gates"] for a in answers], dtype=torch.float64)
    found = {}
    parts = torch.split(rows, [manifest.slots(name) for name in manifest.routed], 1)
    for name, c in zip(manifest.routed, parts, strict=True):
        shares = c.abs() / c.abs().sum(1, keepdim=True).clamp_min(1e-12)
        entropy = float(torch.special.entr(shares).sum(1).mean())
        std = c.std(0, correction=0)
        found[name] = Gates(c.mean(0).tolist(), std.tolist(), entropy)
    return found


def models(entries: Sequence[Entry], cache: Cache, dtype: str | None) -> dict[str, Model]:
    """What the rows' models are; an expert's name is that of its tasks' expert."""
    found = {}
    for entry in entries:
        settings = entry.config.get("base_config") or entry.config
        own = str(settings.get("dtype") or settings.get("torch_dtype") or "float32")
        name = f"expert {entry.expert}" if entry.row == "expert" else entry.row
        weights = cache.weights(*folders(entry.where))
        found[name] = Model(entry.source, entry.revision, weights, dtype or own)
    return found


def flags(
    entries: Sequence[Entry], scores: Sequence[Score], recipe: Recipe
) -> dict[str, Mapping[str, Any]]:
    """What each row was given beyond weights; what is None is not known, or means nothing of it.

    needs_task_id: someone says which task an item is of, for its head or its weights. tuned_on: the
    splits that coefficients were fitted or routers trained on. uses_test_inputs: one of those is
    the eval split. output: static or dynamic. The others are those of `recipe.needs`, from the
    recipe that lies in the merged folder.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for entry in entries:
        held = _needs(entry)
        learned = held["needs_data"] is True
        own = [task for name, task in recipe.tasks.items() if name in entry.tasks]
        splits = {task.splits.router for task in own if task.splits.router} if learned else set()
        headed = any(entry.head(task) for task in entry.tasks) and len(entry.tasks) > 1
        for score in (s for s in scores if s.model == entry.row):
            told = headed and not entry.dynamic and entry.row != "expert"
            found[score.row] = {
                "needs_task_id": told or score.way != "",
                **held,
                "tuned_on": sorted(splits),
                "uses_test_inputs": any(t.splits.eval in splits for t in own if learned),
            }
    return found


def _needs(entry: Entry) -> dict[str, Any]:
    """What its making needed, by the recipe and the report in its folder; an expert and a base
    needed nothing."""
    unmerged = entry.row in ("base", "expert")
    try:
        told = json.loads((entry.folder / "report.json").read_text("utf-8"))
        recipe = None if unmerged else parse.load(parse.kept(entry.folder))
    except (OSError, ValueError, MowmergeError):
        told, recipe = {}, None
    heads = "per_task" if entry.keeping else "own" if unmerged else None
    if recipe is None:
        names = ("needs_base", "needs_data", "needs_labels", "needs_gradients")
        found = {**dict.fromkeys(names, False if unmerged else None), "heads": heads}
        return {**found, "faithful": None, "output": "dynamic" if entry.dynamic else "static"}
    router = told.get("router", {})
    objective = router.get("objective", "") if router.get("trained") else None
    made = needs.needs(recipe, objective)
    return {**made, "output": "dynamic" if entry.dynamic else "static"}
