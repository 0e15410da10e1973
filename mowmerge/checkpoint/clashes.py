"""Adapters that want one tensor twice: why that does not go, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from mowmerge.checkpoint.adapter_config import PREFIX
from mowmerge.errors import CheckpointError
from mowmerge.plan import Patch

UNTIE = "untie them in the base (tie_word_embeddings: false, and both stored) and start from that"


def values(
    name: str, patch: Patch, earlier: Sequence[Patch], origins: Sequence[str]
) -> CheckpointError | None:
    """Why a value cannot take a tensor's place after those of `earlier`; None where it can, as it
    is the base that peft saved again."""
    key, origin = patch.parts["value"], origins[patch.adapter]
    for other in earlier:
        theirs = other.parts["value"]
        if other.adapter == patch.adapter and not (_base(key) and _base(theirs)):
            two = " and ".join(f"'{_plain(each)}'" for each in sorted((key, theirs), key=_base))
            return CheckpointError(
                f"it has {two} of its own, which the model ties to one tensor", where=origin,
                hint=UNTIE,
            )  # fmt: skip
    if not earlier or _base(key):
        return None
    return CheckpointError(
        f"'{name}' is replaced by this adapter and by {origins[earlier[0].adapter]}", where=origin,
        hint="name them as two models, and merge those",
    )  # fmt: skip


def rows(
    name: str, patch: Patch, earlier: Sequence[Patch], origins: Sequence[str]
) -> CheckpointError | None:
    """Why rows of single tokens cannot take their place after others; None where they can."""
    taken = {number for other in earlier for number in other.rows} & {*patch.rows}
    if not taken:
        return None
    return CheckpointError(
        f"the row {min(taken)} of '{name}' is replaced twice", where=origins[patch.adapter],
        hint="name adapters that change one token as two models, and merge those",
    )  # fmt: skip


def _base(key: str) -> bool:
    """Whether it is what lies below an update, which peft saves of embeddings and heads."""
    return ".base_layer." in key


def _plain(key: str) -> str:
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")
