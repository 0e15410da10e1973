"""The verbs as functions: what the command line calls, and what a notebook may."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mowmerge import launch, scoring
from mowmerge.checkpoint.contents import contents
from mowmerge.checkpoint.contents import planned as specs_of
from mowmerge.checkpoint.dynamic import held
from mowmerge.errors import ResourceError
from mowmerge.methods import registry
from mowmerge.plan import Plan
from mowmerge.planner import Options, build
from mowmerge.ranks import Ranks
from mowmerge.recipe import parse
from mowmerge.recipe.model import Recipe
from mowmerge.scoring import (
    compare,
    evaluate,
    report_folder,
    report_on,
    tasks_of,
    tell_card,
)

if TYPE_CHECKING:
    from mowmerge.checkpoint.verify import Verified
    from mowmerge.evals.schema import Report as EvalReport
    from mowmerge.evals.settings import Options as Scoring
    from mowmerge.hub.card import Results
    from mowmerge.hub.package import Package
    from mowmerge.hub.push import Pushed
    from mowmerge.lora import Merge as AdapterMerge
    from mowmerge.soup import Soup
    from mowmerge.training.settings import Options as Training

__all__ = [
    "check", "compare", "demo", "evaluate", "extract", "inspect", "load", "looked", "merge",
    "outline", "plan", "plan_push", "plan_training", "push", "report_folder", "report_on",
    "soup", "survey", "tasks_of", "tell_card", "train_router", "verify",
]  # fmt: skip
Advance = Callable[[int], None]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """The checkpoint, what report.json now says of its routers, and whether this process is the
    one of several that speaks for all."""

    path: Path
    report: dict[str, Any]
    speaks: bool


@dataclass(frozen=True)
class Result:
    """Where the merged checkpoint is, its report, and whether this process is the one of several
    that speaks for all."""

    path: Path
    report: dict[str, Any]
    speaks: bool = True


def check(recipe: str | Path, overrides: Sequence[str] = (), *, strict: bool = False) -> Recipe:
    """The parsed recipe; RecipeError with everything that is wrong with it. Loads no torch.

    A file of mergekit's is turned into a recipe; with `strict` what mergekit ignores is wrong too.
    """
    return parse.load(recipe, overrides, strict=strict)


def plan(
    recipe: str | Path | Recipe, *, overrides: Sequence[str] = (), options: Options | None = None
) -> Plan:
    """What a merge would do, from headers alone. Loads no torch."""
    parsed = recipe if isinstance(recipe, Recipe) else check(recipe, overrides)
    return build(parsed, options)


def looked(recipe: Recipe, options: Options | None = None) -> Plan | None:
    """The same where all models are on this machine; None where one may be on the network."""
    from mowmerge.sources import here

    return build(recipe, options) if here(recipe) else None


def outline(recipe: Recipe, options: Options | None = None) -> AdapterMerge:
    """What a merge whose output is an adapter would write, from headers alone: its ranks where they
    are known, and bounds where they are not."""
    from mowmerge import lora

    return lora.plan(recipe, plan(recipe, options=options), options.max_memory if options else None)


def survey(
    recipe: str | Path | Recipe, *, overrides: Sequence[str] = (), options: Options | None = None
) -> Plan:
    """The plan, final: what a dynamic method's layout depends on is measured in the weights."""
    parsed = recipe if isinstance(recipe, Recipe) else check(recipe, overrides)
    return _surveyed(parsed, options or Options(), Ranks())


def _surveyed(recipe: Recipe, options: Options, ranks: Ranks) -> Plan:
    """The final plan, which all ranks make."""
    planned = ranks.together(lambda: build(recipe, options))
    if not planned.undecided:
        return planned
    from mowmerge.survey import survey as measure

    found = replace(options, surveyed=measure(recipe, planned, ranks))
    return ranks.together(lambda: build(recipe, found))


def merge(
    recipe: str | Path | Recipe | Callable[[], Recipe],
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    options: Options | None = None,
    hashes: bool = True,
    force: bool = False,
    resume: bool = False,
    locked: bool = False,
    timeout: float = 10.0,
    begin: Callable[[Plan], Advance] = lambda plan: lambda nbytes: None,
    tell: Tell = lambda line: None,
) -> Result:
    """Merges a recipe's models into the folder `out`, which appears when it is whole.

    `out` defaults to the recipe's output.path, then to ./merged/<recipe name>. `begin` is given the
    plan and returns what is called with the number of bytes written, for progress; `tell` is given
    a line now and then while coefficients are fitted. With `resume` the work of a merge that was
    cut off is taken up, and should this one be, its work is left for the next. A recipe.lock.yaml
    replays its run, and the report says how that went; with `locked` its inputs must be the files
    that it names, and its weights what they were. Under torchrun every rank calls this, and they
    share the work; one that has said nothing for `timeout` minutes is gone. A function that gives
    the recipe is called when they have met, so that what is wrong on one of them is told by all.

    Raises:
        CheckpointError: an input is not whole, or is not what `locked` asks for.
        ResourceError: `out` is taken or cannot be written; the merge that was cut off was another
            one, or `resume` was not asked for; another rank is gone, or is about to merge something
            else.
    """
    from mowmerge import lora, merging

    began = time.perf_counter()

    def read() -> Recipe:
        if isinstance(recipe, str | Path):
            return check(recipe, overrides)
        return recipe if isinstance(recipe, Recipe) else recipe()

    with launch.joined(options or Options(), timeout) as (ranks, asked):
        parsed = ranks.together(read)
        target = Path(out or parsed.output.path or Path("merged") / parsed.name)
        planned = _surveyed(parsed, asked, ranks)
        if not ranks.first:
            begin, tell = (lambda plan: lambda nbytes: None), (lambda line: None)
        if parsed.output.format == "adapter":
            outlined = ranks.together(lambda: lora.plan(parsed, planned, asked.max_memory))
            made = lora.merge(
                parsed, outlined, target, hashes=hashes, force=force, resume=resume, locked=locked,
                begin=begin, ranks=ranks,
            )  # fmt: skip
        else:
            how = merging.How(hashes, force, resume, locked)
            made = merging.merge(parsed, planned, target, how, began, begin, tell, ranks)
        return Result(*made, speaks=ranks.first)


def soup(
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    scores: str | Path | None = None,
    equal: bool = False,
    most: int | None = None,
    patience: int | None = None,
    overrides: Sequence[str] = (),
    options: Scoring | None = None,
    hashes: bool = True,
    force: bool = False,
    tell: Tell = lambda line: None,
) -> tuple[Result, Soup]:
    """Merges the greedy soup of a recipe's models into `out`, and says how it was found.

    Models are averaged, tried on the select splits of the recipe's tasks, and join while the score
    rises (`mowmerge.soup.choose`). OUT-soup.json has all that was tried; `scores` is such a file.

    Raises:
        RecipeError: no plain average, no tasks to choose by, or scores of other models.
    """
    from mowmerge import soup as soups

    parsed = recipe if isinstance(recipe, Recipe) else check(recipe, overrides)
    given = soups.known(Path(scores)) if scores is not None else {}
    soups.check(parsed, given)
    target = Path(out)
    if target.exists() and not force:
        raise ResourceError(f"'{target}' is there already", hint="--force replaces it")
    kitchen = soups.Kitchen(
        parsed, given,
        lambda made, folder: merge(made, folder, hashes=False),
        lambda folder, asked: scoring.evaluate(folder, asked, against=(), options=options),
        target.resolve().parent, tell,
    )  # fmt: skip
    found, chosen = soups.find(parsed, kitchen, equal=equal, most=most, patience=patience)
    result = merge(chosen, target, hashes=hashes, force=force)
    result.path.with_name(f"{result.path.name}-soup.json").write_text(found.text(), "utf-8")
    return result, found


def verify(
    folder: str | Path, *, begin: Callable[[int], Advance] = lambda total: lambda nbytes: None
) -> Verified:
    """What is wrong with a merged folder: its files by SHA256SUMS, every tensor in its place, and
    finite. `begin` is given the bytes to read and returns what is called with those that were.

    Raises:
        SourceError: there is no such folder.
    """
    from mowmerge.checkpoint import verify as checks

    return checks.verify(Path(folder), finite=True, begin=begin)


def load(folder: str | Path, *, task: str | None = None) -> Any:
    """The transformers model of a merged folder: its backbone, or with the head of a task.

    `task` is a task of the folder's recipe, or the name of a model whose head was kept.

    Raises:
        CheckpointError: no such head, or one that does not fit the backbone.
        SourceError: transformers is not installed.
    """
    from mowmerge.tasks import heads as task_heads

    return task_heads.load(Path(folder), task)


def inspect(
    target: str | Path, *, overrides: Sequence[str] = (), options: Options | None = None
) -> dict[str, Any]:
    """What a dynamic checkpoint holds, from its headers; or what a recipe would write.

    For a recipe whose method needs a survey that is run (it reads the weights), and nothing else.

    Raises:
        RecipeError, CheckpointError, SourceError: as `plan`; or no dynamic checkpoint.
    """
    if Path(target).is_dir():
        source = held(Path(target))
        told = contents(source.manifest, source.specs, source.encoder)
        return {
            "version": 1, "kind": "checkpoint", "path": str(target), "trained": source.trained,
            **told,
        }  # fmt: skip
    parsed = check(target, overrides)
    how = registry.get(parsed.method).dynamic
    named = {"version": 1, "kind": "recipe", "recipe": parsed.name, "method": parsed.method}
    if how is None:
        return {**named, "dynamic": False}
    asked = replace(options or Options(), download=how.survey is not None)
    planned = survey(parsed, options=asked)
    made, beside = planned.manifest, planned.encoder
    told = contents(made, specs_of(planned), beside) if made else {}
    return {
        **named, "dynamic": True, "rest": planned.rest, "survey": planned.surveyed, **told,
        "write_bytes": planned.write_bytes, "warnings": list(planned.warnings),
    }  # fmt: skip


def extract(
    folder: str | Path,
    out: str | Path,
    *,
    expert: str | None = None,
    task: str | None = None,
    recipe: str | Path | None = None,
    reference: str | None = None,
    hashes: bool = True,
    force: bool = False,
    begin: Callable[[int], Advance] = lambda total: lambda nbytes: None,
) -> Result:
    """Writes the dense model of one expert of a dynamic checkpoint, or of one task, into `out`.

    The report says how far each tensor lies from the expert's: from `reference`, or where the
    recipe found it if that is still there.

    Raises:
        ValueError: not one of `expert` and `task`.
        CheckpointError, RecipeError, ResourceError: see `mowmerge.extraction`.
    """
    from mowmerge import extraction

    if (expert is None) == (task is None):
        raise ValueError("name an expert or a task, and not both")
    found, content = extraction.extract(
        Path(folder), Path(out), expert=expert, task=task, recipe=Path(recipe) if recipe else None,
        reference=reference, hashes=hashes, force=force, begin=begin,
    )  # fmt: skip
    return Result(found, content)


def extract_lora(
    model: str | Path, base: str | Path, out: str | Path, *, workers: int | None = None,
    timeout: float = 10.0, **options: Any,
) -> Result:  # fmt: skip
    """Writes what a model adds to its base as a LoRA into `out`; see `mowmerge.lora.extract`. Under
    torchrun every rank calls this, and one silent for `timeout` minutes is gone."""
    from mowmerge import lora

    with launch.joined(Options(workers), timeout, "extract-lora") as (ranks, asked):
        if not ranks.first:
            options["begin"] = lambda total: lambda nbytes: None
        made = lora.extract(
            str(model), str(base), Path(out), workers=asked.workers, ranks=ranks, **options
        )
        return Result(*made, speaks=ranks.first)


def plan_training(
    folder: str | Path, recipe: str | Path | Recipe | None = None, options: Training | None = None
) -> dict[str, Any]:
    """What `train_router` would train, on which samples, for how many steps."""
    from mowmerge.training import settings, train

    return train.plan(Path(folder), tasks_of(folder, recipe), options or settings.Options())


def train_router(
    folder: str | Path,
    recipe: str | Path | Recipe | None = None,
    options: Training | None = None,
    *,
    begin: Callable[[int], Callable[[int, float], None]] = lambda steps: lambda step, loss: None,
) -> Trained:
    """Trains the routers of a dynamic checkpoint on the tasks of a recipe: its own, or another.

    The router file is replaced when training has ended well, and the card says so; until then
    nothing changes. `begin` is given the number of steps and returns what is called after each with
    its number and loss.
    """
    from mowmerge.training import settings, train

    asked = options or settings.Options()
    section, speaks = train.train(Path(folder), tasks_of(folder, recipe), asked, begin)
    if speaks and (Path(folder) / "README.md").exists():
        tell_card(folder)
    return Trained(Path(folder), section, speaks)


def plan_push(
    folder: str | Path,
    repo: str,
    results: Results | None = None,
    begin: Callable[[int], Advance] = lambda total: lambda nbytes: None,
) -> Package:
    """The card and the files of a push; CheckpointError if the folder is not whole."""
    from mowmerge.hub.package import package

    return package(Path(folder), repo, results or scoring.results(Path(folder)), begin)


def push(
    folder: str | Path | Package, repo: str, *, private: bool = False, revision: str | None = None,
    pr: bool = False, force: bool = False, results: Results | None = None,
    tell: Tell = lambda line: None,
) -> Pushed:  # fmt: skip
    """Puts a merged folder on the Hub in one commit; raises as `plan_push` and SourceError."""
    from mowmerge.hub import push as hub

    made = plan_push(folder, repo, results) if isinstance(folder, str | Path) else folder
    return hub.push(made, hub.Target(repo, revision or "", pr, private, force), tell)


def demo(folder: str | Path, tell: Callable[[str], None] = lambda line: None) -> EvalReport:
    """Builds a small real zoo in `folder`, merges it five ways, trains routers, scores them all.

    The report lies in `folder`/report. `tell` is given a line now and then. Experts are trained in
    processes of their own: a script that calls this needs `if __name__ == "__main__"`.
    """
    from mowmerge.demo import tour

    return tour.run(Path(folder), lambda recipe, out: merge(recipe, out, force=True), tell)
