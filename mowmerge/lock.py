"""What decides the bytes of a merge: for its journal while it runs, in its lock for good."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mowmerge import __version__
from mowmerge.checkpoint import identity
from mowmerge.errors import CheckpointError
from mowmerge.plan import Plan
from mowmerge.recipe.complete import completed
from mowmerge.recipe.model import Recipe
from mowmerge.tensors import torch


def key(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """What a merge must have in common with an earlier one to take up its work.

    The plan, the place of every byte, the inputs by size, time and inode, and the versions that
    change bytes; not workers, blocks or memory. The recipe is in it to say what has changed.
    """
    layout = hashlib.sha256()
    for shard in plan.files:
        layout.update(shard.file.encode() + shard.header)
    told = completed(recipe)
    if plan.fit is None:
        del told["tasks"]
    del told["name"], told["output"]["path"]
    return {
        "journal": 1,
        "mowmerge": __version__,
        "torch": str(torch.__version__),
        "device": device_type(plan),
        "statistics": plan.stats,
        "plan": plan.fingerprint,
        "layout": layout.hexdigest()[:16],
        "fit": told["tasks"] if plan.fit else None,
        "inputs": seen(plan),
        "recipe": told,
    }


def device_type(plan: Plan) -> str:
    """cpu, cuda ..."""
    return plan.device.partition(":")[0]


def seen(plan: Plan) -> dict[str, dict[str, list[int]]]:
    """Size, time and inode of each input file, by model."""
    found: dict[str, dict[str, list[int]]] = {}
    for model, stored in plan.checkpoints:
        files = found.setdefault(model, {})
        files.update({Path(file).name: identity.of(file) for file in stored.files})
    return found


def unchanged(before: Mapping[str, Any], plan: Plan) -> None:
    """CheckpointError where an input is no longer the file that the merge began with."""
    for model, files in seen(plan).items():
        for name, facts in files.items():
            if before["inputs"][model][name] != facts:
                raise CheckpointError(
                    f"{name} was changed while the merge was running", where=f"model '{model}'",
                    hint="start again when the inputs are whole",
                )  # fmt: skip
