"""A loaded model with adapters on it: what they change is worked out as it is read, and put in."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from mowmerge.checkpoint.adapter import AdaptedReader
from mowmerge.checkpoint.reader import StoredReader
from mowmerge.errors import CheckpointError
from mowmerge.plan import Adapted, Stored, config_source
from mowmerge.tensors import DTYPES, torch

Where = Path | Adapted
"""A folder, or a checkpoint with adapters on it."""


def home(where: Where) -> Path:
    """The folder that config and tokenizer come from: with adapters, the checkpoint's below."""
    return where if isinstance(where, Path) else Path(config_source(where).folder)


def folders(where: Where) -> list[Path]:
    """Every folder that something is read from."""
    stored = [] if isinstance(where, Path) else [Path(each.folder) for each in where.adapters]
    return [home(where), *stored]


def apply(model: Any, adapted: Adapted, only: set[str] | None = None) -> set[str]:
    """Puts the tensors that adapters change, or `only` these, into a model of the checkpoint below;
    their names in the model.

    Values are rounded to the checkpoint's dtype, as in a merge, and then to the model's.

    Raises:
        CheckpointError: one of them is no tensor of the model's class, or is a part of a fused one.
    """
    from mowmerge.dynamic.loading import locator

    assert isinstance(adapted.model, Stored)
    located = locator(model)
    reader = AdaptedReader(StoredReader(adapted.model), adapted)
    places = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    done = set()
    for name in adapted.patches:
        try:
            place = located(name)
        except ValueError as error:
            raise CheckpointError(
                f"{error}, and the adapter changes it", where=adapted.adapters[0].origin,
                hint="name a base whose config has the class that was trained, or merge it first",
            ) from error  # fmt: skip
        if only is None or place in only:
            places[place].data.copy_(_read(reader, name))
            done.add(place)
    return done


def _read(reader: AdaptedReader, name: str) -> Any:
    """A tensor as the adapters leave it."""
    spec = reader.specs[name]
    value = torch.empty(spec.shape, dtype=DTYPES[spec.dtype].torch)
    with closing(reader.open(name)) as handle:
        handle.read(0, spec.numel, value.view(-1).view(torch.uint8).numpy().data)
    return value
