"""The whole way in one command: a zoo is built, merged five ways, routers trained, all reported.

DIR/<name>.yaml          recipes
DIR/merged/<name>        what they make
DIR/report/report.html   base, experts and merges on every task's test split
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mowmerge.demo import zoo
from mowmerge.demo.images import TASKS
from mowmerge.errors import CheckpointError
from mowmerge.evals import evaluator, report
from mowmerge.evals.schema import Report
from mowmerge.recipe import parse
from mowmerge.training import train
from mowmerge.training.settings import Options

SUM = "{method: task_arithmetic, parameters: {scale: 0.05}}"  # the scale of that merge


@dataclass(frozen=True)
class Merge:
    """A recipe's comment and parameters, what becomes of the rest, and steps of its routers."""

    comment: str
    parameters: str
    rest: str = ""
    steps: int = 0


MERGES = {
    "linear": Merge("The plain average.", "{}"),
    "task_arithmetic": Merge(
        "The scale is the best of 0.05 to 0.5 on the validation splits.", "{scale: 0.05}"
    ),
    "ties": Merge(
        "The scale is the best of 0.05 to 0.7 on the validation splits.",
        "{density: 0.2, scale: 0.2}",
    ),
    "mow": Merge(
        "All is dynamic; a router chooses weights and head for each picture.",
        "{blocks: 4, norms: all, embeddings: all}",
        SUM,
        150,
    ),
    "wemoe": Merge("The MLPs are dynamic; a router in each chooses weights.", "{}", SUM, 150),
}
SUBJECT = "mow"  # the merge that the report is about
REPORT = "report"  # its folder


def run(folder: Path, merge: Callable[[Path, Path], object], tell: zoo.Tell) -> Report:
    """Builds the zoo in `folder`, has `merge(recipe, out)` do each recipe, trains, scores, reports.

    Raises:
        SourceError: a package that the zoo needs is not installed.
        CheckpointError: something in `folder` is damaged.
        ResourceError: `folder` is a file, or a training ended early.
    """
    try:
        zoo.build(folder, tell)
        write_recipes(folder)
        return _merge_and_score(folder, merge, tell)
    except CheckpointError as error:
        hint = f"remove what is damaged, or all of {folder}, and run the demo again"
        raise CheckpointError([replace(each, hint=hint) for each in error.problems]) from error


def write_recipes(folder: Path) -> None:
    """A recipe for each merge, where there is none yet."""
    for name in MERGES:
        if not (folder / f"{name}.yaml").exists():
            (folder / f"{name}.yaml").write_text(recipe(name), "utf-8")


def recipe(method: str) -> str:
    """A recipe that merges all experts, and the tasks by which to train and to score."""
    merge = MERGES[method]
    tasks = "".join(
        f"  {name}:\n    expert: {name}\n    type: image-classification\n"
        f"    data: {{path: parquet, data_dir: ./data/{name}}}\n"
        "    splits: {router: train, select: validation, eval: test}\n"
        for name in TASKS
    )
    models = "".join(f"  {name}: ./{name}\n" for name in TASKS)
    rest = f"rest: {merge.rest}\n" if merge.rest else ""
    return (
        f"# {merge.comment}\nversion: 1\nbase: ./base\nmodels:\n{models}method: {method}\n"
        f"parameters: {merge.parameters}\n{rest}heads: {{match: 'classifier.*'}}\ntasks:\n{tasks}"
    )


def _merge_and_score(folder: Path, merge: Callable[[Path, Path], object], tell: zoo.Tell) -> Report:
    """Merges by each recipe and trains routers, then scores: base, experts, merges; reports."""
    outs = {}
    for name, how in MERGES.items():
        outs[name] = folder / "merged" / name
        file = folder / f"{name}.yaml"
        tell(f"merging: {name}")
        merge(file, outs[name])
        if how.steps:
            tell(f"training the routers: {name}, {how.steps} steps")
            train.train(
                outs[name], parse.load(file), Options(steps=how.steps), lambda steps: _unheard
            )
    tell("scoring base, experts and merges on the test splits")
    about = parse.load(folder / f"{SUBJECT}.yaml")
    outs = {SUBJECT: outs[SUBJECT], **outs}
    found = evaluator.evaluate(outs, about, ("base", "experts"))
    made, items = report.build(found, about, f"mowmerge demo {folder}")
    report.write(made, items, folder / REPORT)
    return made


def _unheard(step: int, loss: float) -> None:
    """What a training says after each step; the demo keeps it to itself."""
