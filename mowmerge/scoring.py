"""The verbs on scores: evaluate, report on it, compare reports, and tell the model card."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mowmerge.errors import SourceError
from mowmerge.recipe import parse, tasks_file
from mowmerge.recipe.model import Recipe

if TYPE_CHECKING:
    from mowmerge.evals.compare import Comparison
    from mowmerge.evals.schema import Report
    from mowmerge.evals.score import Evaluation
    from mowmerge.evals.settings import Options as Scoring
    from mowmerge.hub.card import Results

Advance = Callable[[int], None]


def evaluate(
    folder: str | Path | Mapping[str, str | Path],
    tasks: str | Path | Recipe | None = None,
    *,
    against: Sequence[str] = ("base", "experts"),
    options: Scoring | None = None,
    begin: Callable[[int], Advance] = lambda total: lambda items: None,
) -> Evaluation:
    """The scores of a merged folder on the tasks of a recipe, its own or another, and of others.

    `against` names base, experts and other checkpoints by path. Several folders, by the names that
    their scores shall bear, share one scoring of the rest. `begin` is given the number of items and
    returns what is called as they are done.

    Raises:
        RecipeError, CheckpointError, SourceError, ResourceError: see `mowmerge.evals.evaluator`.
    """
    from mowmerge.evals import evaluator

    folders = folder if isinstance(folder, Mapping) else {"merged": folder}
    parsed = tasks_of(next(iter(folders.values()), Path()), tasks)
    merged = {name: Path(path) for name, path in folders.items()}
    return evaluator.evaluate(merged, parsed, against, options, begin)


def report_on(
    found: Evaluation, folder: str | Path, tasks: str | Path | Recipe | None = None, *,
    out: str | Path | None = None, command: str = "",
) -> Report:  # fmt: skip
    """The report of an evaluation of `folder`, written into `out`: FOLDER-eval if absent.

    Raises:
        RecipeError, SourceError, ResourceError: see `mowmerge.evals.report`.
    """
    from mowmerge.evals import report as reports

    made, items = reports.build(found, tasks_of(folder, tasks), command)
    reports.write(made, items, Path(out) if out else report_folder(folder))
    return made


def report_folder(folder: str | Path) -> Path:
    """Where the report on a merged folder goes unless told: FOLDER-eval."""
    from mowmerge.evals import report as reports

    return reports.beside(Path(folder))


def compare(first: str | Path, second: str | Path) -> Comparison:
    """What changed between two reports, and whether it is more than noise.

    Raises:
        SourceError: there is no report, or not one of this version.
    """
    from mowmerge.evals import compare as comparing
    from mowmerge.evals import report as reports

    files = Path(first), Path(second)
    one, two = (reports.read(file) for file in files)
    items = reports.read_items(files[0], one), reports.read_items(files[1], two)
    return comparing.compare(one, two, items)


def tell_card(folder: str | Path) -> None:
    """Puts what the report beside a merged folder says into its card; nothing else changes."""
    from mowmerge.hub.card import card

    file = Path(folder) / "README.md"
    staged = file.with_name(".README.md.partial")
    staged.write_text(card(Path(folder), results=results(Path(folder))).text, encoding="utf-8")
    staged.replace(file)


def results(folder: Path) -> Results | None:
    """What FOLDER-eval says of these very weights; None where there is no such report."""
    from mowmerge.evals import published
    from mowmerge.evals import report as reports
    from mowmerge.hub.card import Results

    found = reports.of(folder)
    if found is None:
        return None
    lines = published.lines(found)
    return Results(published.figures(found), lines, published.benchmarks(found))


def tasks_of(folder: str | Path, recipe: str | Path | Recipe | None) -> Recipe:
    """The recipe that names the tasks: the folder's own, another, or a file of tasks alone.

    Raises:
        RecipeError: it cannot be read, or the folder has none and no other is named.
        SourceError: there is no such folder.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not Path(folder).is_dir():
        raise SourceError(f"there is no folder '{folder}'", hint="name a merged folder")
    if recipe is None:
        return parse.load(parse.kept(Path(folder)))
    return tasks_file.load(recipe, Path(folder))
