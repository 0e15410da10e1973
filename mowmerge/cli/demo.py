"""`mowmerge demo`: merge real checkpoints that a package ships."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mowmerge.cli import output


def demo(
    folder: Annotated[Path, typer.Argument(help="Where to put models and merge.")] = Path(
        "mowmerge-demo"
    ),
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Merge all-MiniLM-L6-v2 with two variants fine-tuned from it here, in about a minute."""
    from mowmerge import api

    result = api.demo(folder)
    output.show_demo(result, as_json=json_)
