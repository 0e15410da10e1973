"""`mowmerge verify`: whether a merged folder is what was written."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mowmerge.cli import output
from mowmerge.errors import CheckpointError


def verify(
    out: Annotated[Path, typer.Argument(help="The merged folder.")],
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Check a merged folder: SHA256SUMS, every tensor in its place, and all values finite.

    Exits with 4 where something is wrong, and says all that is.

    Examples:

      mowmerge verify merged/demo

      mowmerge verify merged/demo --json
    """
    from mowmerge import api

    with output.Progress(quiet or json_) as progress:
        found = api.verify(out, begin=progress.start)
    if json_:
        told = {"ok": not found.problems, "path": str(out), "files": dict(found.sums)}
        told |= {"unlisted": list(found.unlisted), "tensors": found.tensors}
        told |= {"bytes": found.nbytes, "problems": [asdict(p) for p in found.problems]}
        print(json.dumps({"version": 1, **told}))
        if found.problems:
            raise typer.Exit(CheckpointError.exit_code)
        return
    if found.problems:
        raise CheckpointError(found.problems)
    output.warn([f"{name} is in no line of SHA256SUMS" for name in found.unlisted])
    if not quiet:
        what = f"{len(found.sums)} files and {found.tensors} tensors"
        print(f"{out}: {what}, {output.size(found.nbytes)}: as written, and all finite")
