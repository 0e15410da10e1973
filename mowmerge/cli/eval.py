"""`mowmerge eval`: score a merged checkpoint beside its base and its experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mowmerge.cli import output


def eval(
    out: Annotated[Path, typer.Argument(help="The merged folder.")],
    tasks: Annotated[str, typer.Option(help="The recipe that names tasks and models.")],
    against: Annotated[str, typer.Option(help="Score these too: base,experts.")] = "base,experts",
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score a merged checkpoint on a recipe's tasks, beside its base and its experts.

    Examples:

      mowmerge eval merged/demo --tasks recipe.yaml

      mowmerge eval merged/demo --tasks recipe.yaml --against experts --json
    """
    from mowmerge import api

    asked = [word.strip() for word in against.split(",") if word.strip()]
    if wrong := [word for word in asked if word not in ("base", "experts")]:
        raise typer.BadParameter(
            f"'{wrong[0]}' is neither base nor experts", param_hint="--against"
        )
    output.show_scores(api.evaluate(out, tasks, against=asked), as_json=json_)
