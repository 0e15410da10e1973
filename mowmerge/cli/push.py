"""`mowmerge push`: put a merged folder on the Hub."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mowmerge.cli import output

if TYPE_CHECKING:
    from mowmerge.hub.package import Package


def push(
    out: Annotated[Path, typer.Argument(help="The merged folder.")],
    repo: Annotated[str, typer.Argument(help="The repository on the Hub: org/name.")],
    private: Annotated[
        bool, typer.Option("--private", help="If it has to be made, make it private.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="The branch; made if absent.")] = None,
    pr: Annotated[bool, typer.Option("--pr", help="Open a pull request.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what else is there.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show card and files and stop; no network.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Verify a merged folder, complete its card and put it on the Hub in one commit.

    The token is that of `hf auth login`, or HF_TOKEN.

    Examples:

      mowmerge push merged/demo org/demo --dry-run

      mowmerge push merged/demo org/demo --private
    """
    os.environ["HF_HUB_VERBOSITY"] = "error"  # both are read when huggingface_hub is imported
    if quiet or json_ or not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from mowmerge import api

    with output.Progress(quiet or json_) as progress:
        package = api.plan_push(out, repo, begin=progress.start)
    if not quiet:
        notes = [f"left out, since SHA256SUMS lists it not: {name}" for name in package.left_out]
        output.warn([*package.warnings, *notes])
    about: dict[str, Any] = {"version": 1, "repo": repo, **_contents(package)}
    if dry_run:
        print(json.dumps(about) if json_ else _shown(package))
        return
    done = api.push(
        package, repo, private=private, revision=revision, pr=pr, force=force, tell=progress.tell
    )
    if json_:
        told = {"commit": done.commit, "url": done.url, "pr_url": done.pr_url}
        moved = {"sent": list(done.sent), "removed": list(done.removed)}
        print(json.dumps({**about, **told, **moved}))
    elif not quiet:
        print(done.pr_url or done.url)


def _contents(package: Package) -> dict[str, Any]:
    files = [{"path": f.name, "bytes": f.nbytes, "sha256": f.sha256} for f in package.files]
    return {
        "card": package.card, "files": files, "bytes": sum(f.nbytes for f in package.files),
        "left_out": list(package.left_out), "warnings": list(package.warnings),
    }  # fmt: skip


def _shown(package: Package) -> str:
    rows = [("file", "size"), *((f.name, output.size(f.nbytes)) for f in package.files)]
    total = output.size(sum(f.nbytes for f in package.files))
    return f"{package.card}\n{output.table(rows)}\n\n{len(package.files)} files, {total}"
