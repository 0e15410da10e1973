"""Texts, and a language model's loss on all of their tokens but the first.

A text longer than a window is read in windows that overlap: each of `window` tokens, `stride`
further on than the last, and only the tokens that no earlier window has read are scored in it.
perplexity = exp(sum of nll / tokens); bits_per_byte = sum of nll / (ln 2 * bytes of the text).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, fsum, log
from typing import Any

from mowmerge.errors import RecipeError
from mowmerge.evals.job import Answer, Job, Place, Scored, Tools
from mowmerge.evals.loading import load
from mowmerge.evals.models import Loaded
from mowmerge.evals.tokens import longest, padded, parts
from mowmerge.tensors import torch

FAMILY = "lm"
WHOLE = False
__all__ = ["FAMILY", "WHOLE", "answer", "encode", "load", "score", "truths"]


def truths(job: Job, classes: Mapping[str, int]) -> Sequence[Any]:
    """Nothing: a text is its own."""
    return ()


def encode(tools: Tools, places: Sequence[Place]) -> list[tuple[int, list[int], int]]:
    """Windows: of which item, its tokens, and from which of them on they are scored."""
    found = []
    for row, place in enumerate(places):
        asked = place.job.asked.options
        with tools.lock:
            ids = tools.processor(place.job.items.input(place.item))["input_ids"]
        window = max(2, longest(tools, asked.window))
        stride = min(asked.stride or max(1, window // 2), window - 1)
        read, start = 1, 0
        while read < len(ids):
            stop = min(start + window, len(ids))
            found.append((row, ids[start:stop], read - start))
            read, start = stop, start + stride
    return found


def answer(loaded: Loaded, way: str, places: Sequence[Place], given: Any) -> list[Answer]:
    """The summed nll of each text, its scored tokens and its bytes."""
    sums, counts = [0.0] * len(places), [0] * len(places)
    for some in parts(given, len(places)):
        ids, mask = padded([ids for _, ids, _ in some], loaded.pad)
        out = loaded(way, places, [row for row, _, _ in some], input_ids=ids, attention_mask=mask)
        for (row, tokens, first), logits in zip(some, out.logits, strict=True):
            logp = torch.log_softmax(logits[first - 1 : len(tokens) - 1].float(), -1)  # no more
            at = torch.tensor(tokens[first:], device=logp.device)[:, None]
            sums[row] -= float(logp.gather(-1, at).double().sum())
            counts[row] += len(tokens) - first
    texts = (place.job.items.input(place.item) for place in places)
    return [
        {"nll": nll, "tokens": n, "bytes": len(text.encode())}
        for nll, n, text in zip(sums, counts, texts, strict=True)
    ]


def score(job: Job, true: Sequence[Any], answers: Sequence[Answer]) -> Scored:
    """Perplexity's items are nats a token, whose weighted mean is log(value); those of
    bits_per_byte are bits a byte."""
    unit, scale = ("bytes", log(2)) if job.metric == "bits_per_byte" else ("tokens", 1.0)
    weights = [a[unit] for a in answers]
    items = [a["nll"] / (scale * w) if w else 0.0 for a, w in zip(answers, weights, strict=True)]
    if not any(a["tokens"] for a in answers):
        raise RecipeError(
            f"no text of task '{job.name}' has a second token to be scored", where=job.items.where
        )
    total, nats = fsum(weights), fsum(a["nll"] for a in answers)
    mean = nats / (scale * total)
    value = exp(min(mean, 700.0)) if job.metric == "perplexity" else mean
    extras = {
        "tokens": fsum(a["tokens"] for a in answers),
        "bytes": fsum(a["bytes"] for a in answers),
    }
    return Scored(value, items=items, weights=weights, extras=extras)
