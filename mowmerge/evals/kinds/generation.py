"""A prompt, and the answer that the model writes: greedy, compared whole with the true one.

An answer ends with the end token or before a stop text, and at `max_new_tokens` if neither comes:
then it counts as truncated. White space around answers does not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum
from typing import Any

from mowmerge.evals.job import Answer, Job, Place, Scored, Tools
from mowmerge.evals.loading import load
from mowmerge.evals.models import Loaded
from mowmerge.evals.tokens import longest, padded
from mowmerge.tensors import Tensor

FAMILY = "lm"
WHOLE = False
__all__ = ["FAMILY", "WHOLE", "answer", "encode", "load", "score", "truths"]


def truths(job: Job, classes: Mapping[str, int]) -> Sequence[str]:
    """The true answers."""
    return [str(value).strip() for value in job.items.column("label")]


def encode(tools: Tools, places: Sequence[Place]) -> dict[str, Tensor]:
    """Prompts, padded on the left; what is too long loses its beginning."""
    rows = []
    for place in places:
        text, asked = place.job.items.input(place.item), place.job.asked.options
        with tools.lock:
            if asked.chat:
                turn = [{"role": "user", "content": text}]
                text = tools.processor.apply_chat_template(
                    turn, tokenize=False, add_generation_prompt=True
                )
            ids = tools.processor(text, add_special_tokens=not asked.chat)["input_ids"]
        rows.append(ids[-max(1, longest(tools, None) - asked.max_new_tokens) :][::-1])
    ids, mask = padded(rows, 0)
    return {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}


def answer(loaded: Loaded, way: str, places: Sequence[Place], given: Any) -> list[Answer]:
    """Each item's answer, how many tokens it took, and whether it had to be cut."""
    asked = places[0].job.asked.options
    tools = loaded.tools
    stops = list(asked.stop or ())
    ids = given["input_ids"].masked_fill(given["attention_mask"] == 0, loaded.pad)
    made = loaded.generate(
        way, places, input_ids=ids, attention_mask=given["attention_mask"], stops=stops,
        max_new_tokens=asked.max_new_tokens,
    )  # fmt: skip
    found = []
    for row in made.tolist():
        ends = [i for i, token in enumerate(row) if token in loaded.ends]
        kept = row[: ends[0]] if ends else row
        with tools.lock:
            text = tools.processor.decode(kept, skip_special_tokens=True)
        cuts = [text.index(stop) for stop in stops if stop in text]
        cut = not ends and not cuts and len(kept) >= asked.max_new_tokens
        text = text[: min(cuts, default=len(text))].strip()
        found.append({"predicted": text, "tokens": len(kept), "truncated": cut})
    return found


def score(job: Job, true: Sequence[str], answers: Sequence[Answer]) -> Scored:
    """Share of answers that are the true one to the letter."""
    predicted = [a["predicted"] for a in answers]
    correct = [float(p == t) for p, t in zip(predicted, true, strict=True)]
    n = len(true)
    extras = {
        "mean_tokens": fsum(a["tokens"] for a in answers) / n,
        "truncated": float(sum(a["truncated"] for a in answers)),
        "empty": float(sum(not text for text in predicted)),
    }
    return Scored(fsum(correct) / n, predicted, true, correct, extras=extras)
