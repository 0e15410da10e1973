"""`mowmerge eval`: score a merged checkpoint beside others, report on it, compare reports."""

from __future__ import annotations

import shlex
import sys
from math import isnan
from pathlib import Path
from typing import Annotated, Literal

import typer

from mowmerge.cli import output, reports

DTYPES = ("float32", "float16", "bfloat16")
Experts = Literal["own", "all"]
CACHE = ".mowmerge-cache"  # beside the merged folder


def eval(
    out: Annotated[Path | None, typer.Argument(help="The merged folder.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="A recipe, or a file of tasks alone; OUT/recipe.yaml if absent."),
    ] = None,
    against: Annotated[
        str, typer.Option(help="Score these too: base, experts, folders of other merges.")
    ] = "base,experts",
    experts: Annotated[
        Experts, typer.Option(help="Score each expert on its own tasks, or on all: what it forgot.")
    ] = "own",
    batch: Annotated[
        int, typer.Option(min=1, help="Items at once; halved where memory does not suffice.")
    ] = 64,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1, or auto: spread over all; a GPU if absent."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; the files' own if absent.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help=f"Keeps what is scored; {CACHE} beside OUT if absent.")
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Keep nothing, and score all anew.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Where the report goes; OUT-eval if absent.")
    ] = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(help="Exit with 7 where a figure is less: avg_normalized=0.95."),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Score nothing: two reports, and what changed between them."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Score a merged checkpoint on a recipe's tasks, beside its base, its experts and other merges.

    What is scored is kept by content: an interrupted evaluation goes on, experts are scored once.
    The report (JSON, Markdown, one HTML page) says what is sure, and at what cost.

    Examples:

      mowmerge eval merged/demo --tasks recipe.yaml

      mowmerge eval merged/mow --against base,experts,merged/ties --json

      mowmerge eval merged/demo --fail-under avg_normalized=0.95 --fail-under worst_normalized=0.9

      mowmerge eval --compare merged/ties-eval merged/mow-eval

      torchrun --nproc_per_node 2 -m mowmerge eval merged/llm --dtype bfloat16
    """
    from mowmerge import api
    from mowmerge.evals import thresholds
    from mowmerge.evals.settings import Options

    if (out is None) == (compare is None):
        raise typer.BadParameter("name a merged folder, or two reports with --compare")
    if compare is not None:
        reports.show_comparison(api.compare(*compare), as_json=json_)
        return
    assert out is not None
    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"'{dtype}' is none of {', '.join(DTYPES)}", param_hint="--dtype")
    asked = [word.strip() for word in against.split(",") if word.strip()]
    if experts == "all" and "experts" not in asked:
        raise typer.BadParameter("--experts all, and --against names no experts")
    least = dict(_threshold(word) for word in fail_under or ())
    recipe = api.tasks_of(out, tasks)
    thresholds.check(least, list(recipe.tasks))
    kept = None if no_cache else cache or out.resolve().parent / CACHE
    try:
        with output.Progress(quiet or json_, "item") as progress:
            found = api.evaluate(
                out, recipe, against=asked,
                options=Options(batch, device, dtype, kept, experts=experts),
                begin=progress.start,
            )  # fmt: skip
    except KeyboardInterrupt:
        if kept is not None:
            print(f"what is scored is kept in {kept}: run it again to go on", file=sys.stderr)
        raise
    if found.settings["rank"] == 0:
        command = shlex.join(["mowmerge", "eval", str(out), "--tasks", str(recipe.file),
                              "--against", against, "--experts", experts,
                              "--batch", str(batch)])  # fmt: skip
        made = api.report_on(found, out, recipe, out=report, command=command)
        reports.show(made, report or api.report_folder(out), as_json=json_)
        thresholds.require(made, least)


def _threshold(word: str) -> tuple[str, float]:
    name, _, value = word.rpartition("=")
    try:
        least = float(value)
        if isnan(least):  # nothing is less
            raise ValueError
        return name.strip(), least
    except ValueError:
        raise typer.BadParameter(
            f"'{word}' is not FIGURE=NUMBER, such as avg_normalized=0.95",
            param_hint="--fail-under",
        ) from None
