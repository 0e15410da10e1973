"""`mowmerge eval`: score a merged checkpoint beside its base, its experts and other merges."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mowmerge.cli import output

DTYPES = ("float32", "float16", "bfloat16")
CACHE = ".mowmerge-cache"  # beside the merged folder


def eval(
    out: Annotated[Path, typer.Argument(help="The merged folder.")],
    tasks: Annotated[
        str | None,
        typer.Option(help="The recipe that names tasks and models; OUT/recipe.yaml if absent."),
    ] = None,
    against: Annotated[
        str, typer.Option(help="Score these too: base, experts, folders of other merges.")
    ] = "base,experts",
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
    no_cache: Annotated[bool, typer.Option(help="Keep nothing, and score all anew.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Score a merged checkpoint on a recipe's tasks, beside its base, its experts and other merges.

    What is scored is kept by content: an interrupted evaluation goes on, experts are scored once.

    Examples:

      mowmerge eval merged/demo --tasks recipe.yaml

      mowmerge eval merged/mow --against base,experts,merged/ties --json

      torchrun --nproc_per_node 2 -m mowmerge eval merged/llm --dtype bfloat16
    """
    from mowmerge import api
    from mowmerge.evals.settings import Options

    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"'{dtype}' is none of {', '.join(DTYPES)}", param_hint="--dtype")
    asked = [word.strip() for word in against.split(",") if word.strip()]
    kept = None if no_cache else cache or out.resolve().parent / CACHE
    try:
        with output.Items(quiet or json_) as progress:
            found = api.evaluate(
                out, tasks, against=asked, options=Options(batch, device, dtype, kept),
                begin=progress.begin,
            )  # fmt: skip
    except KeyboardInterrupt:
        if kept is not None:
            print(f"what is scored is kept in {kept}: run it again to go on", file=sys.stderr)
        raise
    if found.settings["rank"] == 0:
        output.show_scores(found, as_json=json_)
