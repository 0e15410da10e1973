"""`mowmerge merge`: run a recipe, or show what it would do."""

from __future__ import annotations

import os
import shlex
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mowmerge.cli import adapters, output, reports, results
from mowmerge.errors import RecipeError

if TYPE_CHECKING:
    from mowmerge.api import Result
    from mowmerge.evals.schema import Report
    from mowmerge.planner import Options
    from mowmerge.recipe.model import Recipe


def merge(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file; - reads stdin.")],
    out: Annotated[Path | None, typer.Argument(help="The output folder.", readable=False)] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a value: parameters.density=0.3.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    survey: Annotated[
        bool,
        typer.Option("--survey", help="With --dry-run: measure what a dynamic layout depends on."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder.")] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Take up a merge that was cut off; leave the work if this one is."
        ),
    ] = False,
    locked: Annotated[
        bool,
        typer.Option(
            "--locked", help="Of a recipe.lock.yaml: fail if an input or the result differs."
        ),
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Tensors worked on at once.")] = None,
    timeout: Annotated[
        float,
        typer.Option(
            min=0.01, help="Under torchrun: minutes of silence after which a rank is gone."
        ),
    ] = 10.0,
    max_memory: Annotated[str | None, typer.Option(help="Peak memory, such as 2GB.")] = None,
    device: Annotated[
        str, typer.Option(help="Where to compute: cpu, cuda (every GPU), cuda:1, cuda:0,cuda:1.")
    ] = "cpu",
    stats: Annotated[
        bool, typer.Option("--stats/--no-stats", help="Measure task vectors for report.json.")
    ] = True,
    hash_: Annotated[bool, typer.Option("--hash/--no-hash", help="Write SHA256SUMS.")] = True,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read .bin and .pt files (weights_only).")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Keys that mergekit ignores are errors.")
    ] = False,
    eval_: Annotated[
        bool, typer.Option("--eval", help="Then score it on the recipe's tasks; see eval.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Merge the models of a recipe, or of a mergekit file, into one checkpoint.

    Examples:

      mowmerge merge recipe.yaml merged/demo

      mowmerge merge recipe.yaml --dry-run --json

      mowmerge merge recipe.yaml merged/demo --eval

      mowmerge merge recipe.yaml merged/demo --set parameters.density=0.3 --force

      mowmerge merge recipe.yaml merged/demo --resume

      mowmerge merge merged/demo/recipe.lock.yaml merged/again --locked

      torchrun --nproc_per_node 4 -m mowmerge merge recipe.yaml merged/demo --resume
    """
    from mowmerge import api

    if quiet or json_ or not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when huggingface_hub is imported
    options = _options(workers, max_memory, device, stats, not dry_run, allow_pickle)

    @cache
    def read() -> Recipe:
        parsed = api.check(recipe, set_ or [], strict=strict)
        if eval_ and not parsed.tasks and not dry_run:
            raise RecipeError("--eval needs tasks, and the recipe has none", where=parsed.file)
        return parsed

    if dry_run and read().output.format == "adapter":
        adapters.show(api.outline(read(), options), as_json=json_)
        return
    if dry_run:
        planned = api.survey if survey else api.plan
        output.show_plan(planned(read(), options=options), as_json=json_)
        return
    with output.Progress(quiet or json_) as progress:
        result = api.merge(
            read, out, options=options, hashes=hash_, force=force, resume=resume, locked=locked,
            timeout=timeout, begin=progress.begin, tell=progress.tell,
        )  # fmt: skip
    if not eval_:
        if result.speaks:
            results.show(result, as_json=json_, quiet=quiet)
        return
    report = _scored(result, read(), quiet or json_)
    if report is None:
        return
    results.show(result, as_json=json_, quiet=quiet, evaluation=report)
    if not json_ and not quiet:
        reports.show(report, api.report_folder(result.path), as_json=False)


def _scored(result: Result, recipe: Recipe, hidden: bool) -> Report | None:
    """Scores a merge beside what it was made of, and has its card tell of it; None but for the
    process that speaks for all."""
    from mowmerge import api

    against = ["base", "experts"] if recipe.base is not None else ["experts"]
    with output.Progress(hidden, "item") as progress:
        found = api.evaluate(result.path, recipe, against=against, begin=progress.start)
    if not result.speaks:
        return None
    command = shlex.join(["mowmerge", "merge", str(recipe.file), str(result.path), "--eval"])
    report = api.report_on(found, result.path, recipe, command=command)
    api.tell_card(result.path)
    return report


def _options(
    workers: int | None,
    max_memory: str | None,
    device: str,
    stats: bool,
    download: bool,
    allow_pickle: bool,
) -> Options:
    from mowmerge.planner import Options

    limit = output.limit(max_memory)
    return Options(workers, limit, device, stats, download, allow_pickle)
