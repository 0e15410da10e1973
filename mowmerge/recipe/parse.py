"""Reads a recipe: text, overrides, nested recipes, and all of its faults at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mowmerge.errors import Problem, RecipeError, did_you_mean
from mowmerge.recipe import mergekit
from mowmerge.recipe.check import check
from mowmerge.recipe.model import Loc, Origin, Recipe, existing
from mowmerge.recipe.stacking import stacked
from mowmerge.recipe.text import Document, alone, dump, override, read_all

SUFFIXES = (".yaml", ".yml")
LOCK = "recipe.lock.yaml"


def load(path: str | Path, overrides: Sequence[str] = (), *, strict: bool = False) -> Recipe:
    """The recipe of a file, or of stdin for "-"; RecipeError with every fault in it.

    With `strict` keys that a tool of another grammar ignores are faults too.
    """
    if str(path) == "-":
        recipe = loads(sys.stdin.read(), overrides=overrides, file="<stdin>")
    else:
        file, above = Path(path), (Path(path).resolve(),)
        recipe = loads(content(file), file.stem, file.parent, overrides, str(path), above)
    if strict and recipe.ignored:
        raise RecipeError(recipe.ignored)
    return recipe


def native(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """The recipe of a file as YAML in the grammar of this tool, whatever the file's."""
    text = sys.stdin.read() if str(path) == "-" else content(Path(path))
    document, _, changed = _document(text, "<stdin>" if str(path) == "-" else str(path), overrides)
    if document.problems:
        raise RecipeError(document.problems)
    return dump(document.data) if changed else text


def kept(folder: Path) -> Path:
    """An output folder's recipe: the lock, whose paths hold from anywhere, where there is one."""
    lock = folder / LOCK
    return lock if lock.exists() else folder / "recipe.yaml"


def loads(
    text: str,
    name: str = "recipe",
    folder: Path | None = None,
    overrides: Sequence[str] = (),
    file: str = "<recipe>",
    above: tuple[Path, ...] = (),
) -> Recipe:
    """The recipe of a YAML text; RecipeError with every fault in it.

    Args:
        text: the YAML.
        name: names the recipe, and the output folder where the recipe gives none.
        folder: where relative sources are looked up first; the working directory if absent.
        overrides: `parameters.density=0.3` and the like, applied in order.
        file: what errors call the text.
        above: the files whose nested recipe this is.
    """
    document, ignored, changed = _document(text, file, overrides)
    if changed:
        text = dump(document.data)
    document = stacked(document)
    origin = Origin(
        name, folder or Path(), text, file, document.lines, bool(overrides), tuple(ignored)
    )
    lock = document.data.get("lock") if isinstance(document.data, Mapping) else None
    if isinstance(lock, Mapping):
        found = document.data.get("coefficients")
        if isinstance(found, str):  # those of the run: beside the lock
            document.data["coefficients"] = os.path.abspath(origin.folder / found)
        place = origin.folder / str(lock.get("folder", "."))
        origin = replace(origin, name=str(lock.get("name", name)), folder=place)
    return _recipe(document.data, origin, document.problems, above)


def _document(
    text: str, file: str, overrides: Sequence[str]
) -> tuple[Document, list[Problem], bool]:
    """The text as data in the recipe's grammar, with the overrides in it; what in a file of
    mergekit's is ignored; and whether it was one, or is changed."""
    documents = read_all(text, file)
    if not mergekit.recognised(documents):
        document = alone(documents)
        override(document, overrides)
        return document, [], bool(overrides)
    if overrides and len(documents) > 1:
        raise RecipeError("--set is for a file of one document", where=file)
    documents = read_all(text, file, old=True)  # as mergekit reads it
    override(documents[0], overrides)
    document, ignored = mergekit.converted(documents)
    if document.problems and "models" not in document.data:
        raise RecipeError(sorted(document.problems, key=by_line))
    return document, ignored, True


def _recipe(
    data: Any, origin: Origin, problems: Sequence[Problem], above: tuple[Path, ...]
) -> Recipe:
    """Data to a recipe, its nested recipes first."""
    if not isinstance(data, Mapping) or not data:
        what = "is empty" if not data else "is not a mapping of keys to values"
        found = Problem(
            f"the recipe {what}", origin.where(()), "write at least models: and method:"
        )
        raise RecipeError([*problems, found])
    filled, inner = _nested(data, origin, above)
    recipe, faults = check(filled, origin)
    every = [*sorted([*problems, *faults], key=by_line), *inner]
    if recipe is None or every:
        raise RecipeError(every)
    return recipe


def by_line(problem: Problem) -> float:
    """The problem's line; overrides come after all lines."""
    number = problem.where.rpartition(":")[2]
    return int(number) if number.isdecimal() else float("inf")


def _nested(
    data: Mapping[str, Any], origin: Origin, above: tuple[Path, ...]
) -> tuple[dict[str, Any], list[Problem]]:
    """The data with a Recipe for every nested one, and the faults in those."""
    problems: list[Problem] = []
    filled = dict(data)
    if isinstance(data.get("models"), Mapping):
        filled["models"] = {
            name: dict(entry) if isinstance(entry, Mapping) else entry
            for name, entry in data["models"].items()
        }
    for loc, source in _sources(filled):
        here = filled
        for part in loc[:-1]:
            here = here[str(part)]
        try:
            here[str(loc[-1])] = _inner(source, loc, origin, above)
        except RecipeError as error:
            problems += error.problems
            here[str(loc[-1])] = "faulty"  # so that faults elsewhere still show
    return filled, problems


def _sources(data: Mapping[str, Any]) -> Iterator[tuple[Loc, Any]]:
    """Every source that is a nested recipe: a mapping, or a path to a YAML file."""
    models = data.get("models")
    found: dict[Loc, Any] = {("base",): data.get("base")}
    for name, entry in models.items() if isinstance(models, Mapping) else ():
        if isinstance(entry, Mapping):
            found["models", name, "source"] = entry.get("source")
        else:
            found["models", name] = entry
    for loc, source in found.items():
        if isinstance(source, Mapping) or str(source).endswith(SUFFIXES):
            yield loc, source


def _inner(source: Any, loc: Loc, origin: Origin, above: tuple[Path, ...]) -> Recipe:
    """One nested recipe."""
    if isinstance(source, Mapping):
        depth = len(loc)
        lines = {k[depth:]: line for k, line in origin.lines.items() if k[:depth] == loc}
        name = str(loc[1] if depth > 1 else loc[0])
        inner = Origin(name, origin.folder, dump(source), origin.file, lines)
        return _recipe(source, inner, (), above)
    path = next(iter(existing(source, origin.folder)), origin.folder / source)
    if path.resolve() in above:
        chain = [p.name for p in above[above.index(path.resolve()) :]]
        message = f"the recipe includes itself: {' -> '.join([*chain, path.name])}"
        raise RecipeError(message, where=origin.where(loc))
    text = content(path, origin.where(loc))
    return loads(text, path.stem, path.parent, file=str(path), above=(*above, path.resolve()))


def content(path: Path, where: str = "") -> str:
    """The file's text; RecipeError where it cannot be read."""
    try:
        return path.read_text("utf-8-sig")
    except FileNotFoundError:
        folder = path.parent
        near = [p.name for p in folder.glob("*") if p.suffix in SUFFIXES] if folder.is_dir() else []
        hint = did_you_mean(path.name, near)
        raise RecipeError(f"there is no file '{path}'", where=where, hint=hint) from None
    except UnicodeDecodeError:
        raise RecipeError(f"'{path}' is not UTF-8 text", where=where) from None
    except OSError as error:
        message = f"'{path}' cannot be read: {error.strerror}"
        raise RecipeError(message, where=where) from None
