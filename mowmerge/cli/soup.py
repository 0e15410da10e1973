"""`mowmerge soup`: average those models of a recipe that make each other better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mowmerge.cli import output, results


def soup(
    recipe: Annotated[str, typer.Argument(help="A recipe: method: linear, models, tasks.")],
    out: Annotated[Path, typer.Argument(help="The output folder.", readable=False)],
    scores: Annotated[
        Path | None,
        typer.Option(help='What is known: {"scores": {"a": 0.8, "b": 0.7, "a+b": 0.81}}.'),
    ] = None,
    equal: Annotated[
        bool, typer.Option("--equal", help="A model also joins where the score stays the same.")
    ] = False,
    most: Annotated[int | None, typer.Option(min=1, help="Ingredients at most.")] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop when so many in a row did not join.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a value: output.dtype=float16.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Items at once in scoring.")] = 64,
    device: Annotated[str | None, typer.Option(help="Where to score: cpu, cuda, auto.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Keeps what is scored, so that a second run goes on.")
    ] = None,
    hash_: Annotated[bool, typer.Option("--hash/--no-hash", help="Write SHA256SUMS.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Merge the greedy soup: the best model, then each that raises the average's score.

    Averages are tried on the select splits of the recipe's tasks, one at a time. OUT-soup.json has
    the score of each; it is what --scores takes.

    Examples:

      mowmerge soup recipe.yaml merged/soup

      mowmerge soup recipe.yaml merged/soup --scores scores.json --most 5
    """
    from mowmerge import api
    from mowmerge.evals.settings import Options

    with output.Progress(quiet or json_) as progress:
        result, found = api.soup(
            recipe, out, scores=scores, equal=equal, most=most, patience=patience,
            overrides=set_ or [], options=Options(batch, device, cache=cache), hashes=hash_,
            force=force, tell=progress.tell,
        )  # fmt: skip
    if json_:
        print(json.dumps({"version": 1, "path": str(result.path), **vars(found)}))
        return
    results.show(result, as_json=False, quiet=quiet)
    if not quiet:
        print(f"the soup: {', '.join(found.ingredients)}")
