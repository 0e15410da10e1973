"""A file of tasks alone: `tasks:` as in a recipe, for models of a recipe that is kept already."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mowmerge.errors import Problem, RecipeError
from mowmerge.recipe import parse
from mowmerge.recipe.check import check
from mowmerge.recipe.model import Origin, Recipe
from mowmerge.recipe.parameters import hint_for
from mowmerge.recipe.text import Document, read

KEYS = ("tasks", "version")


def load(path: str | Path, folder: Path) -> Recipe:
    """The recipe of a file; of one that has neither models nor method, the folder's own with the
    tasks of that file, whose paths start there.

    Raises:
        RecipeError: every fault in the file; or it has tasks alone, and the folder no recipe.
    """
    text = sys.stdin.read() if str(path) == "-" else parse.content(Path(path))
    file = "<stdin>" if str(path) == "-" else str(path)
    document = read(text, file)
    data = document.data
    if not isinstance(data, Mapping) or not data or {"models", "method"} & set(data):
        name, above = Path(path).stem, (Path(path).resolve(),)
        return parse.loads(text, name, Path(path).parent, file=file, above=above)
    origin = Origin("tasks", Path(path).parent, text, file, document.lines)
    problems = _alone(document, origin)
    if not parse.kept(folder).exists():
        raise RecipeError(
            f"the file has tasks alone, and {folder} has no recipe that names models", where=file,
            hint="write base:, models: and method: beside tasks:",
        )  # fmt: skip
    return _joined(data.get("tasks"), parse.load(parse.kept(folder)), origin, problems)


def _alone(document: Document, origin: Origin) -> list[Problem]:
    """Faults of the file's own keys."""
    problems = list(document.problems)
    for key in document.data:
        if key in Recipe.model_fields and key not in KEYS:
            hint = "models and method make it a recipe; without them leave it out"
            message = f"'{key}' has no meaning in a file of tasks alone"
            problems.append(Problem(message, origin.where((key,)), hint))
        elif key not in KEYS:
            message = f"unknown key '{key}'"
            problems.append(Problem(message, origin.where((key,)), hint_for(key, list(KEYS))))
    if not document.data.get("tasks"):
        problems.append(Problem("the file names no tasks", origin.where(()), "add tasks:"))
    return problems


def _joined(tasks: Any, kept: Recipe, origin: Origin, problems: list[Problem]) -> Recipe:
    """The kept recipe with other tasks; its sources hold from anywhere."""
    base = kept.base if kept.base is None else _found(kept, kept.base)
    models = {name: _found(kept, model.source) for name, model in kept.models.items()}
    shell = {"base": base, "models": models, "method": "linear", "tasks": tasks or {}}
    checked, faults = check(shell, origin)
    if checked is None or problems or faults:
        raise RecipeError(sorted([*problems, *faults], key=parse.by_line))
    sources = {
        name: model.model_copy(update={"source": models[name]})
        for name, model in kept.models.items()
    }
    made = kept.model_copy(update={"base": base, "models": sources, "tasks": checked.tasks})
    made._origin = Origin(kept.name, origin.folder, kept.text, origin.file, origin.lines)
    return made


def _found(kept: Recipe, source: str | Recipe) -> str | Recipe:
    """A source as it is from here: an absolute path where it is one, else as it was."""
    if isinstance(source, Recipe):
        return source
    place = kept.locate(source)
    return os.path.abspath(place) if os.path.exists(place) else source
