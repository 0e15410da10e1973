"""`mowmerge check`: read a recipe, report every fault, show it with every default filled in."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def check(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file; - reads stdin.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a value: parameters.density=0.3.")
    ] = None,
    convert: Annotated[
        bool, typer.Option("--convert", help="Print a mergekit file as a recipe, and stop.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Keys that mergekit ignores are errors.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a recipe without opening a model, and show it with every default filled in."""
    from mowmerge.cli.output import warn
    from mowmerge.recipe import parse
    from mowmerge.recipe.complete import completed
    from mowmerge.recipe.text import dump

    read = parse.load(recipe, set_ or (), strict=strict)
    warn([str(each) for each in read.ignored])
    if convert:
        print(parse.native(recipe, set_ or ()), end="")
    elif json_:
        print(json.dumps({"file": read.file, "ok": True, "recipe": completed(read)}, indent=2))
    else:
        print(f"# {read.file}: ok\n\n{dump(completed(read))}", end="")
