"""How an evaluation runs: what it may use, and where it keeps what is finished."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BATCH = 64  # items a forward pass, to begin with
SEED = 0  # of the order in which the tasks' items mix
OWN, ALL = "own", "all"  # which tasks an expert is scored on

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Options:
    """batch: items a forward pass to begin with; halved where memory does not suffice. device:
    cpu, cuda, cuda:1, or auto, which spreads a model over what there is; None is a GPU where there
    is one. dtype: of the weights; the files' own if None. cache: the folder that keeps answers.
    experts: whether each is scored on its own tasks alone, or on all."""

    batch: int = BATCH
    device: str | None = None
    dtype: str | None = None
    cache: Path | None = None
    seed: int = SEED
    experts: str = OWN
