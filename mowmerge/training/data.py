"""The samples that routers learn from: the recipe's tasks, balanced and in seeded order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from mowmerge.dynamic.format import Manifest
from mowmerge.errors import Problem, RecipeError, did_you_mean
from mowmerge.recipe.model import Recipe
from mowmerge.tasks.data import Items
from mowmerge.tasks.splits import load_apart
from mowmerge.tensors import torch


@dataclass(frozen=True)
class Samples:
    """One task's samples: which expert is theirs, what is trained on, what is chosen by."""

    task: str
    type: str
    expert: int
    router: Items
    select: Items | None


def samples(recipe: Recipe, manifest: Manifest, objective: str) -> list[Samples]:
    """Every task's samples, of splits that share none; labels are not asked for.

    Raises:
        RecipeError: no tasks, an expert that the checkpoint has not or that has no task, no router
            split, an empty one, splits that share samples.
        SourceError: data that cannot be loaded.
    """
    if problems := _faults(recipe, manifest, objective):
        raise RecipeError(problems)
    found = []
    for name, (named, task) in recipe.trained.items():
        uses = ["router", *(use for use in ("select", "eval") if getattr(task.splits, use))]
        loaded = load_apart(recipe, name, uses, labelled=False)
        for use in ("router", "select"):
            if use in loaded and not len(loaded[use]):
                raise RecipeError(
                    f"the {use} split of task '{name}' is empty", where=loaded[use].where
                )
        expert = manifest.experts.index(named)
        found.append(Samples(name, task.type, expert, loaded["router"], loaded.get("select")))
    return found


def _faults(recipe: Recipe, manifest: Manifest, objective: str) -> list[Problem]:
    """What can be said against the tasks before any data is loaded."""
    experts = list(manifest.experts)
    if not recipe.trained:
        hint = "name data for each expert under `tasks`, or pass --recipe"
        return [Problem("the recipe has no tasks to train routers on", recipe.file, hint)]
    problems = []
    for name, (expert, task) in recipe.trained.items():
        if expert not in experts:
            problems.append(
                Problem(
                    f"the checkpoint has no expert '{expert}': it was built from"
                    f" {', '.join(experts)}",
                    recipe.where("tasks", name, "expert"),
                    did_you_mean(expert, experts),
                )
            )
        if task.splits.router is None:
            hint = "name one: splits: {router: train}"
            where = recipe.where("tasks", name)
            problems.append(Problem(f"task '{name}' has no split for routers", where, hint))
        text = task.type == "causal-lm"
        if (objective == "lm" and not text) or (objective == "entropy" and text):
            hint = "--objective distill" if text else "--objective task, entropy or distill"
            message = f"task '{name}' is of type {task.type}, which '{objective}' cannot learn from"
            problems.append(Problem(message, recipe.where("tasks", name, "type"), hint))
    named = {expert for expert, _ in recipe.trained.values()}
    if objective == "task":
        problems += [
            Problem(
                f"expert '{expert}' has no task, so a router could not learn when it is meant",
                recipe.file,
                f"add a task with `expert: {expert}` under `tasks`",
            )
            for expert in experts
            if expert not in named
        ]
    return problems


def number(*words: object) -> int:
    """A seed that is a function of all words."""
    text = "\0".join(map(str, words))
    return int.from_bytes(sha256(text.encode()).digest()[:7], "little")


def draw(n: int, count: int, step: int, *seed: object) -> list[int]:
    """The `count` items of n that a step takes: the order of all n is drawn anew each epoch."""
    orders: dict[int, list[int]] = {}
    found = []
    for place in range(step * count, (step + 1) * count):
        epoch = place // n
        if epoch not in orders:
            chance = torch.Generator().manual_seed(number(*seed, epoch))
            orders[epoch] = torch.randperm(n, generator=chance).tolist()
        found.append(orders[epoch][place % n])
    return found


def parts(items: Sequence[int], rank: int, of: int, count: int) -> list[list[int]]:
    """What rank `rank` of `of` takes of the items, in at most `count` parts that are not empty."""
    mine = list(items)[rank::of]
    size = -(-len(mine) // count)
    return [mine[i : i + size] for i in range(0, len(mine), size)] if size else []
