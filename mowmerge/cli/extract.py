"""`mowmerge extract`: an ordinary checkpoint back from a dynamic one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mowmerge.cli import output

if TYPE_CHECKING:
    from mowmerge.api import Result


def extract(
    out: Annotated[Path, typer.Argument(help="The dynamic checkpoint.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    expert: Annotated[str | None, typer.Option(help="Give this expert back.")] = None,
    task: Annotated[str | None, typer.Option(help="Write the model that this task sees.")] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Compare with this checkpoint; the recipe's source if absent."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="The recipe that names the task; OUT's own if absent.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder.")] = False,
    hash_: Annotated[bool, typer.Option("--hash/--no-hash", help="Write SHA256SUMS.")] = True,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Write one expert of a dynamic checkpoint, or what a task sees, as an ordinary checkpoint.

    Examples:

      mowmerge extract merged/demo --expert pos experts/pos

      mowmerge extract merged/demo --task pos dense/pos --reference ./pos
    """
    from mowmerge import api

    if (expert is None) == (task is None):
        raise typer.BadParameter("name one of them, and not both", param_hint="--expert, --task")
    with output.Progress(quiet or json_) as progress:
        result = api.extract(
            out, folder, expert=expert, task=task, recipe=recipe, reference=reference,
            hashes=hash_, force=force, begin=progress.start,
        )  # fmt: skip
    if json_:
        summary = {k: v for k, v in result.report.items() if k != "tensors"}
        print(json.dumps({"path": str(result.path), **summary}))
    elif not quiet:
        print(_summary(result))


def _summary(result: Result) -> str:
    """What was written, and how near it is to the expert, in a line; and a note on a second."""
    told = result.report
    what = f"task {told['task']}, expert" if told["task"] else "expert"
    head = (
        f"{result.path}: {what} {told['expert']},"
        f" {output.size(told['written_bytes'])} in {told['seconds']:.1f} s; {_nearness(told)}"
    )
    return f"{head}\n{told['note']}" if told["note"] else head


def _nearness(told: dict[str, Any]) -> str:
    if told["reference"] is None:
        return f"not compared: {told['why_none']}"
    exact, all_ = told["exact"], len(told["tensors"])
    if exact == all_:
        return f"all {all_} tensors are exact"
    near = f"{exact} of {all_} tensors are exact"
    if told["largest"] is None:
        return f"{near}; the errors are in report.json (no base to measure them by)"
    return (
        f"{near}, relative error {told['relative']:.2g}, at most"
        f" {told['largest']['relative']:.2g} ({told['largest']['name']})"
    )
