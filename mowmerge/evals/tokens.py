"""What language models are given: padded rows of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from mowmerge.evals.job import Tools
from mowmerge.tasks.inputs import MOST_TOKENS
from mowmerge.tensors import Tensor, torch

Row = TypeVar("Row")


def longest(tools: Tools, asked: int | None) -> int:
    """The tokens that model and tokenizer take at once, or fewer if asked."""
    places = getattr(tools.config, "max_position_embeddings", None)
    places = places or getattr(tools.config, "n_positions", None) or MOST_TOKENS
    return int(min(places, tools.processor.model_max_length, asked or MOST_TOKENS))


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Tokens [B,T] with `pad` on the right, and the mask of those that count."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


def parts(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    """At most `size` rows at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
