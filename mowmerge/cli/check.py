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
    allow_pickle: Annotated[
        bool, typer.Option(help="Also read .bin and .pt files (weights_only).")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a recipe, and show it with every default filled in.

    Where all its models are on this machine, what their headers say is checked too: names, shapes,
    numbers of layers, tokenizers. A path that is not there is an error. No tensor is read, and
    nothing is asked of the network.
    """
    from mowmerge import api
    from mowmerge.cli.output import warn
    from mowmerge.planner import Options
    from mowmerge.recipe import parse
    from mowmerge.recipe.complete import completed
    from mowmerge.recipe.text import dump

    read = api.check(recipe, set_ or (), strict=strict)
    if convert:
        warn([str(each) for each in read.ignored])
        print(parse.native(recipe, set_ or ()), end="")
        return
    plan = api.looked(read, Options(allow_pickle=allow_pickle))
    warn(plan.warnings if plan else [str(each) for each in read.ignored])
    found = {"file": read.file, "ok": True, "headers": plan is not None}
    if json_:
        print(json.dumps({**found, "recipe": completed(read)}, indent=2))
    else:
        headers = "" if plan else ", by itself: its models are not all on this machine"
        print(f"# {read.file}: ok{headers}\n\n{dump(completed(read))}", end="")
