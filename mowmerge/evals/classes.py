"""What classification of any kind shares: from logits to answers, and from answers to a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum
from typing import Any

from mowmerge.evals.job import Answer, Job, Place, Scored, Tools
from mowmerge.evals.models import Loaded
from mowmerge.tasks import inputs
from mowmerge.tasks.metrics import METRICS
from mowmerge.tensors import Tensor, torch

NOWHERE = -1  # the class of an item that was given to another task's head


def truths(job: Job, classes: Mapping[str, int]) -> Sequence[float]:
    """Each item's class number in the head's map."""
    found: Sequence[float] = job.items.labels(classes)
    return found


def encode(tools: Tools, places: Sequence[Place]) -> dict[str, Tensor]:
    """Pixels or tokens."""
    with tools.lock:
        some = [place.job.items.input(place.item) for place in places]
        return inputs.encode(tools.processor, some, tools.config)


def answer(loaded: Loaded, way: str, places: Sequence[Place], given: Any) -> list[Answer]:
    """What the head of each item's task says of it; of the router's choice where nothing is told.

    The class is the largest logit's, the first of equals.
    """
    out = loaded(way, places, range(len(places)), **given)
    return said(loaded, places, out.logits, out.get("task"))


def said(
    loaded: Loaded, places: Sequence[Place], logits: Tensor, chosen: Tensor | None = None
) -> list[Answer]:
    """Answers from logits [B,C]; `chosen` is the expert whose head each item was given to."""
    logp = torch.log_softmax(logits.float(), -1)
    confidence, predicted = logp.max(-1)
    classes = [loaded.widths[place.job.name] > 1 for place in places]
    true = [
        loaded.truths[p.job.name][p.item] if c else 0 for p, c in zip(places, classes, strict=True)
    ]
    at = torch.tensor(true, device=logp.device).long().unsqueeze(-1)
    columns = zip(
        predicted.tolist(), confidence.exp().tolist(), (-logp.gather(-1, at)).flatten().tolist(),
        logits[:, 0].tolist(), strict=True,
    )  # fmt: skip
    here = [True] * len(places)
    if chosen is not None:
        here = [
            k == loaded.experts[p.job.name] for k, p in zip(chosen.tolist(), places, strict=True)
        ]
    found = []
    for (number, sure, nll, value), ours, chooses in zip(columns, here, classes, strict=True):
        if not chooses:
            found.append({"predicted": value})
        elif ours:
            found.append({"predicted": number, "confidence": sure, "nll": nll})
        else:
            found.append({"predicted": NOWHERE, "confidence": sure, "nll": None})
    return found


def score(job: Job, true: Sequence[float], answers: Sequence[Answer]) -> Scored:
    """The metric over all items; accuracy is also a mean over them."""
    predicted = [a["predicted"] for a in answers]
    correct = [float(p == t) for p, t in zip(predicted, true, strict=True)]
    known = all("confidence" in a for a in answers)
    nll = [a["nll"] for a in answers] if known else []
    value = METRICS[job.metric](predicted, true)
    if job.metric == "accuracy":
        value = fsum(correct) / len(correct)
    return Scored(
        value,
        predicted,
        true,
        correct if job.metric == "accuracy" else (),
        confidence=[a["confidence"] for a in answers] if known else (),
        nll=() if None in nll else nll,
    )
