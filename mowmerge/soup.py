"""Greedy soup: models join an average one by one, best first, as long as its score rises."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum, isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mowmerge.errors import RecipeError, ResourceError, did_you_mean
from mowmerge.evals.figures import LOWER_IS_BETTER
from mowmerge.evals.score import Evaluation
from mowmerge.recipe import parse
from mowmerge.recipe.model import Recipe
from mowmerge.recipe.text import dump, read

JOIN = "+"  # between the models of a soup; no name of a model has it
Tell = Callable[[str], None]
Score = Callable[[Sequence[str]], float]


@dataclass(frozen=True)
class Soup:
    """The ingredients in the order in which they joined, and the score of every soup tried, by its
    models joined with "+". metric: what the scores are; higher is better."""

    ingredients: Sequence[str]
    scores: Mapping[str, float]
    metric: str = ""

    def text(self) -> str:
        """As `known` reads it."""
        return json.dumps({"version": 1, **vars(self)}, indent=1) + "\n"


def choose(
    models: Sequence[str],
    score: Score,
    *,
    equal: bool = False,
    most: int | None = None,
    patience: int | None = None,
) -> Soup:
    """The greedy soup of `models`, of which `score` says what their uniform average is worth.

    Each alone is scored and the best begins, of equals the first. Then, best first, a model joins
    where the average with it scores higher than the best so far: all means of q + 1 models, never
    a running mean. The result is never below the best single model.

    Args:
        models: names, at least one.
        score: of the average of these; higher is better.
        equal: a model also joins where the score stays the same.
        most: ingredients at most, if that is limited.
        patience: the search ends when so many in a row did not join, if it ends before the last.

    Source: Model Soups, arXiv:2203.05482, recipe 1; reference code main.py.
    Differs: as the code a model joins where the score is higher; the paper's "at least as high" is
    `equal`.
    """
    scores = {name: score([name]) for name in models}
    first, *others = sorted(models, key=lambda name: -scores[name])
    chosen, best, missed = [first], scores[first], 0
    for name in others:
        if len(chosen) == most or missed == patience:
            break
        tried = [*chosen, name]
        value = scores[JOIN.join(tried)] = score(tried)
        if value > best or (equal and value == best):
            chosen, best, missed = tried, value, 0
        else:
            missed += 1
    return Soup(chosen, scores)


def known(file: Path) -> dict[frozenset[str], float]:
    """The scores of a file, by which models were averaged: {"scores": {"a": 0.8, "a+b": 0.81}}.

    Raises:
        RecipeError: no such file, or not such scores.
    """
    try:
        found = read(file.read_text("utf-8"), str(file)).data
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the scores cannot be read: {error}", where=str(file)) from error
    scores = found.get("scores") if isinstance(found, Mapping) else None
    wrong = not isinstance(scores, Mapping) or not all(
        isinstance(value, int | float) and isfinite(value) for value in scores.values()
    )
    if wrong:
        raise RecipeError(
            "the file holds no scores", where=str(file),
            hint='write {"scores": {"a": 0.80, "b": 0.79, "a+b": 0.81}}: higher is better',
        )  # fmt: skip
    assert isinstance(scores, Mapping)
    return {frozenset(str(key).split(JOIN)): float(value) for key, value in scores.items()}


def check(recipe: Recipe, scores: Mapping[frozenset[str], float]) -> None:
    """Raises RecipeError where the recipe is no plain average, or scores are of other models."""
    weighed = [name for name, model in recipe.models.items() if "weight" in model.parameters]
    if recipe.method != "linear" or "weight" in recipe.parameters or weighed or recipe.rules:
        raise RecipeError(
            "a soup is the plain average of some of the models",
            where=recipe.where("models", weighed[0]) if weighed else recipe.where("method"),
            hint="method: linear, without weights and without rules",
        )
    if strange := sorted({name for key in scores for name in key} - set(recipe.models)):
        raise RecipeError(
            f"the scores name '{strange[0]}', which is none of the recipe's models",
            where=recipe.where("models"), hint=did_you_mean(strange[0], list(recipe.models)),
        )  # fmt: skip


def of(recipe: Recipe, models: Sequence[str], heading: str = "") -> Recipe:
    """The recipe with these models alone. Its tasks have no experts: every model is for all."""
    data = read(recipe.text, recipe.file).data
    data["models"] = {name: data["models"][name] for name in models}
    for task in data.get("tasks", {}).values():
        task.pop("expert", None)
    return parse.loads(heading + dump(data), recipe.name, recipe.folder, file=recipe.file)


def on_select(recipe: Recipe) -> Recipe:
    """The recipe with the select split of each task in the place of that which is scored.

    Raises:
        RecipeError: no tasks, or one without such a split.
    """
    if not recipe.tasks:
        raise RecipeError(
            "a soup is chosen by scores, and the recipe has no tasks", where=recipe.file,
            hint="add tasks, or give the score of each average that is tried with --scores",
        )  # fmt: skip
    for name, task in recipe.tasks.items():
        if task.splits.select is None:
            raise RecipeError(
                f"task '{name}' has no split to choose by",
                where=recipe.where("tasks", name, "splits"),
                hint="name one: splits: {select: validation, eval: test}",
            )
    data = read(recipe.text, recipe.file).data
    for task in data["tasks"].values():
        task["splits"] = {"eval": task["splits"]["select"]}
    return parse.loads(dump(data), recipe.name, recipe.folder, file=recipe.file)


class Kitchen:
    """Scores soups: from what is known, else by making and tasting them one at a time.

    merge(recipe, folder) makes one in the folder, taste(folder, recipe) scores it on the recipe's
    tasks; folders lie in `beside` for as long as that takes. metric: what the scores are.
    """

    def __init__(
        self, recipe: Recipe, scores: Mapping[frozenset[str], float],
        merge: Callable[[Recipe, Path], object], taste: Callable[[Path, Recipe], Evaluation],
        beside: Path, tell: Tell,
    ) -> None:  # fmt: skip
        self._recipe, self._scores, self._tell = recipe, scores, tell
        self._merge, self._taste, self._beside = merge, taste, beside
        self.metric = ""

    def score(self, models: Sequence[str]) -> float:
        """The mean over the tasks of a soup's scores, negated where lower is better."""
        key = frozenset(models)
        value = self._scores[key] if key in self._scores else self._made(models)
        self._tell(f"soup: {', '.join(models)}: {value:.6g}")
        return value

    def _made(self, models: Sequence[str]) -> float:
        asked = on_select(of(self._recipe, models))
        try:
            self._beside.mkdir(parents=True, exist_ok=True)
            place = TemporaryDirectory(prefix=".soup-", dir=self._beside)
        except OSError as error:
            where = str(self._beside)
            raise ResourceError(f"cannot be written: {error.strerror}", where=where) from error
        with place as folder:
            self._merge(asked, Path(folder, "soup"))
            scores = self._taste(Path(folder, "soup"), asked).scores
        signs = {-1 if score.metric in LOWER_IS_BETTER else 1 for score in scores}
        metrics = " and ".join(sorted({score.metric for score in scores}))
        if len(signs) > 1:
            raise RecipeError(
                f"{metrics} have no mean: higher is better for one, lower for another",
                where=self._recipe.where("tasks"), hint="choose by tasks of one kind",
            )  # fmt: skip
        (sign,) = signs
        self.metric = f"-{metrics}" if sign < 0 else metrics
        value = sign * fsum(score.value for score in scores) / len(scores)
        if not isfinite(value):
            raise RecipeError(
                f"the average of {', '.join(models)} scores {value}", where=self._recipe.file,
                hint="leave out the model that is broken: `mowmerge eval` scores each",
            )  # fmt: skip
        return value


def find(recipe: Recipe, kitchen: Kitchen, **how: Any) -> tuple[Soup, Recipe]:
    """The greedy soup of a recipe's models, and the recipe that makes it; `how`: as to `choose`."""
    found = choose(list(recipe.models), kitchen.score, **how)
    soup = replace(found, metric=kitchen.metric)
    best = soup.scores[JOIN.join(soup.ingredients)]
    told = f"# Greedy soup of {', '.join(recipe.models)}: {best:.6g} {soup.metric}".rstrip()
    return soup, of(recipe, soup.ingredients, f"{told}\n")
