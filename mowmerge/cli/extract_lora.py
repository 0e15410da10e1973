"""`mowmerge extract-lora`: what a model adds to its base, as an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mowmerge.cli import output, results


def extract_lora(
    model: Annotated[str, typer.Argument(help="The fine-tuned model: a path or Hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    base: Annotated[str, typer.Option(help="The model that it was fine-tuned from.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Cut each update to it [64].")] = None,
    energy: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Or keep this share of each update's squared norm."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder.")] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Take up one that was cut off; leave the work if this one is."
        ),
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Tensors worked on at once.")] = None,
    timeout: Annotated[
        float,
        typer.Option(
            min=0.01, help="Under torchrun: minutes of silence after which a rank is gone."
        ),
    ] = 10.0,
    max_memory: Annotated[str | None, typer.Option(help="Peak memory, such as 2GB.")] = None,
    hash_: Annotated[bool, typer.Option("--hash/--no-hash", help="Write SHA256SUMS.")] = True,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read .bin and .pt files (weights_only).")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Write what a model adds to its base as a LoRA adapter that peft loads.

    Examples:

      mowmerge extract-lora ./math lora/math --base ./base --rank 32

      mowmerge extract-lora org/math lora/math --base org/base --energy 0.95

      torchrun --nproc_per_node 2 -m mowmerge extract-lora ./math lora/math --base ./base --resume
    """
    from mowmerge import api

    if rank is not None and energy is not None:
        raise typer.BadParameter("give one of them, and not both", param_hint="--rank, --energy")
    if energy == 0:
        raise typer.BadParameter("must be above 0", param_hint="--energy")
    with output.Progress(quiet or json_) as progress:
        result = api.extract_lora(
            model, base, out, rank=rank, energy=energy, workers=workers,
            max_memory=output.limit(max_memory), allow_pickle=allow_pickle,
            hashes=hash_, force=force, resume=resume, timeout=timeout, begin=progress.start,
        )  # fmt: skip
    if result.speaks:
        results.show(result, as_json=json_, quiet=quiet)
