"""From a task's samples to what a model takes: tokens or pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mowmerge.errors import SourceError

MOST_TOKENS = 8192  # of a text, where neither model nor tokenizer says fewer


def processor(folder: Path, kind: str) -> Any:
    """The image processor or tokenizer in a folder; SourceError where it has none."""
    import transformers

    try:
        if kind.endswith("image-classification"):
            return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        what = "image processor" if kind.endswith("image-classification") else "tokenizer"
        raise SourceError(
            f"there is no {what} that loads: {str(error).splitlines()[0]}",
            where=str(folder),
            hint=f"save the expert's {what} into its folder",
        ) from error


def encode(
    processor: Any, inputs: Sequence[Any], config: Any, most: int = MOST_TOKENS
) -> dict[str, Any]:
    """A batch of texts, pairs of texts or pictures as tensors; texts are cut to what model and
    tokenizer take."""
    if not isinstance(inputs[0], str | tuple):
        return dict(processor([i.convert("RGB") for i in inputs], return_tensors="pt"))
    places = getattr(config, "max_position_embeddings", most)
    longest = min(places, processor.model_max_length, most)
    pairs = isinstance(inputs[0], tuple)
    texts = [list(part) for part in zip(*inputs, strict=True)] if pairs else [list(inputs)]
    return dict(
        processor(*texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    )
