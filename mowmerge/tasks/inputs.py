"""What a model is given of a sample: its text or picture through the expert's own processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mowmerge.errors import SourceError

MOST_TOKENS = 8192  # of a text, where neither model nor tokenizer says fewer


def processor(folder: Path, kind: str) -> Any:
    """The expert's own image processor or tokenizer; SourceError where it has none."""
    import transformers

    try:
        if kind == "image-classification":
            return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        what = "image processor" if kind == "image-classification" else "tokenizer"
        raise SourceError(
            f"there is no {what} that loads: {str(error).splitlines()[0]}",
            where=str(folder),
            hint=f"save the expert's {what} into its folder",
        ) from error


def encoded(samples: Sequence[Any], processor: Any, model: Any) -> Any:
    """The samples as one batch of tensors, on the CPU: texts padded and cut, pictures in RGB."""
    if not isinstance(samples[0], str):
        return processor([sample.convert("RGB") for sample in samples], return_tensors="pt")
    places = getattr(model.config, "max_position_embeddings", MOST_TOKENS)
    longest = min(places, processor.model_max_length, MOST_TOKENS)
    return processor(
        list(samples), padding=True, truncation=True, max_length=longest, return_tensors="pt"
    )
