"""`mowmerge demo`: build a small real zoo, merge it, train routers, report on everything."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mowmerge.cli import reports


def demo(
    folder: Annotated[Path, typer.Argument(help="Where to put models, data and merges.")] = Path(
        "mowmerge-demo"
    ),
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Train a small vision transformer and eight experts, merge them five ways, report on all.

    Examples:

      mowmerge demo

      mowmerge demo /tmp/zoo --json
    """
    from mowmerge import api
    from mowmerge.demo import tour

    def tell(line: str) -> None:
        if not (quiet or json_):
            print(line, file=sys.stderr, flush=True)

    made = api.demo(folder, tell)
    reports.show(made, folder / tour.REPORT, as_json=json_)
