"""A text and its possible continuations, of which the likeliest is chosen.

log p(choice | text) is summed over the choice's tokens, a space before it. accuracy: the largest
sum; accuracy_norm: the largest sum over the choice's characters. Differs from nothing in
lm-evaluation-harness's acc and acc_norm: the tokens of a choice are those that the whole has beyond
the text's own, and what is too long loses its beginning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum
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


def truths(job: Job, classes: Mapping[str, int]) -> Sequence[int]:
    """The number of the right choice; a label may also be the choice itself, or its letter."""
    found = []
    pairs = zip(job.items.column("label"), job.items.column("choices"), strict=True)
    for i, (label, choices) in enumerate(pairs):
        known = [str(choice) for choice in choices]
        letters = [chr(ord("A") + j) for j in range(len(known))]
        if isinstance(label, int):
            number = label
        elif label in known:
            number = known.index(label)
        else:
            number = letters.index(label) if label in letters else -1
        if not 0 <= number < len(known):
            raise RecipeError(
                f"item {i} of task '{job.name}' has the label {label!r}, which is none of its"
                f" {len(known)} choices",
                where=job.items.where,
                hint="a number from 0, the choice itself, or its letter",
            )
        found.append(number)
    return found


def encode(tools: Tools, places: Sequence[Place]) -> list[tuple[int, list[int], int]]:
    """A row for each choice: of which item, its tokens, and how many of them are the choice's."""
    found = []
    for row, place in enumerate(places):
        text = place.job.items.input(place.item)
        most = longest(tools, place.job.asked.options.window) + 1
        for choice in place.job.items.data[place.item][place.job.items.columns["choices"]]:
            before, after = _pair(tools, text, f" {choice}")
            ids = (before + after)[-most:]
            found.append((row, ids, min(len(after), len(ids) - 1)))
    return found


def _pair(tools: Tools, text: str, choice: str) -> tuple[list[int], list[int]]:
    """The tokens of a text and those of its continuation."""
    kept = text.rstrip()
    with tools.lock:
        tokenizer = tools.processor
        if not kept:
            start = tokenizer.bos_token_id
            start = tokenizer.eos_token_id if start is None else start
            return [start], tokenizer(choice, add_special_tokens=False)["input_ids"]
        before = tokenizer(kept)["input_ids"]
        return before, tokenizer(text + choice)["input_ids"][len(before) :]


def answer(loaded: Loaded, way: str, places: Sequence[Place], given: Any) -> list[Answer]:
    """log p of each choice of each item."""
    found: list[list[float]] = [[] for _ in places]
    for some in parts(given, len(places)):
        ids, mask = padded([tokens[:-1] for _, tokens, _ in some], loaded.pad)
        out = loaded(way, places, [row for row, _, _ in some], input_ids=ids, attention_mask=mask)
        for (row, tokens, n), logits in zip(some, out.logits, strict=True):
            last = len(tokens) - 1
            logp = torch.log_softmax(logits[last - n : last].float(), -1)
            at = torch.tensor(tokens[-n:], device=logp.device)[:, None]
            found[row].append(float(logp.gather(-1, at).sum()))
    return [{"logp": logp} for logp in found]


def score(job: Job, true: Sequence[int], answers: Sequence[Answer]) -> Scored:
    """Share of items whose choice is right; the other metric is among the extras."""
    lengths = [[len(str(c)) or 1 for c in choices] for choices in job.items.column("choices")]
    sums = [a["logp"] for a in answers]
    normed = [
        [x / n for x, n in zip(*pair, strict=True)] for pair in zip(sums, lengths, strict=True)
    ]
    values, correct = {}, {}
    chosen = {"accuracy": sums, "accuracy_norm": normed}
    for metric, logp in chosen.items():
        correct[metric] = [
            float(_best(each) == right) for each, right in zip(logp, true, strict=True)
        ]
        values[metric] = fsum(correct[metric]) / len(true)
    shares = [torch.softmax(torch.tensor(each), 0).tolist() for each in chosen[job.metric]]
    predicted = list(map(_best, chosen[job.metric]))
    return Scored(
        values[job.metric],
        predicted,
        true,
        correct[job.metric],
        confidence=[share[p] for share, p in zip(shares, predicted, strict=True)],
        nll=[
            -float(torch.log_softmax(torch.tensor(each), 0)[t])
            for each, t in zip(chosen[job.metric], true, strict=True)
        ],
        extras={m: v for m, v in values.items() if m != job.metric},
    )


def _best(values: Sequence[float]) -> int:
    """The place of the largest, the first of equals."""
    return max(range(len(values)), key=values.__getitem__)
