"""`mowmerge train-router`: train the routers of a dynamic checkpoint, or show what would train."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mowmerge.cli import output


def train_router(
    out: Annotated[Path, typer.Argument(help="The dynamic checkpoint.")],
    recipe: Annotated[
        str | None,
        typer.Option(help="A recipe, or a file of tasks alone; OUT's own if absent."),
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="task, entropy, distill or lm; the routers' own if absent.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples a task and step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of Adam.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of first weights and order of samples.")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Weights as stored, bf16 autocast.")] = False,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Parts in which a batch goes through the model.")
    ] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted training.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would train and stop.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1; a GPU where there is one if absent.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.01, help="Under torchrun: minutes a process waits for another.")
    ] = 10.0,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Train the routers of a dynamic checkpoint, or one-bit scales; nothing else changes.

    Examples:

      mowmerge train-router merged/mow --recipe recipe.yaml

      mowmerge train-router merged/mow --dry-run --json

      torchrun --nproc_per_node 2 -m mowmerge train-router merged/wemoe --objective entropy
    """
    from mowmerge import api
    from mowmerge.training.settings import OBJECTIVES, Options

    if objective is not None and objective not in OBJECTIVES:
        raise typer.BadParameter(
            f"'{objective}' is none of {', '.join(OBJECTIVES)}", param_hint="--objective"
        )
    if lr is not None and not lr > 0:
        raise typer.BadParameter("must be above 0", param_hint="--lr")
    options = Options(objective, steps, batch, lr, seed, bf16, accumulate, resume, device, timeout)
    if dry_run:
        output.show_training(api.plan_training(out, recipe, options), as_json=json_)
        return
    try:
        with output.Progress(quiet or json_, "step") as progress:
            result = api.train_router(out, recipe, options, begin=progress.steps)
    except KeyboardInterrupt:
        print("the checkpoint is as it was; --resume goes on from the last save", file=sys.stderr)
        raise
    if result.speaks:
        output.show_trained(result, as_json=json_, quiet=quiet)
