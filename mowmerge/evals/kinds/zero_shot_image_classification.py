"""Pictures, and the class whose prompts a CLIP model finds nearest.

A class's embedding is the mean of its prompts' normalised embeddings, normalised; logits are
logit_scale * cosine. The text tower is the model's own, or that of `options: {clip: ...}` where
only vision towers were merged. In a whole dynamic CLIP each tower mixes its weights by its own
input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mowmerge.errors import CheckpointError, RecipeError, did_you_mean
from mowmerge.evals.classes import encode, said, score
from mowmerge.evals.job import Answer, Job, Place
from mowmerge.evals.loading import load
from mowmerge.evals.models import Loaded
from mowmerge.tensors import Tensor, torch

FAMILY = "clip"
WHOLE = False
__all__ = ["FAMILY", "WHOLE", "answer", "classes", "encode", "load", "score", "truths"]


def classes(job: Job) -> Sequence[str]:
    """What prompts call the classes, in the order of their numbers."""
    labels = job.items.column("label")
    if job.asked.options.classes:
        return job.asked.options.classes
    names: Sequence[str] | None = job.items.names
    if names:
        return names
    if not all(isinstance(label, str) for label in labels):
        raise RecipeError(
            f"task '{job.name}' has numbers for labels, and nothing says what they are called",
            where=job.items.where,
            hint="name the classes: options: {classes: [...]}",
        )
    return sorted(set(labels))


def truths(job: Job, known: Mapping[str, int]) -> Sequence[int]:
    """Each item's class number."""
    names, found = list(classes(job)), []
    for label in job.items.column("label"):
        number = label if isinstance(label, int) else -1
        if isinstance(label, str) and label in names:
            number = names.index(label)
        if not 0 <= number < len(names):
            raise RecipeError(
                f"task '{job.name}' has the label {label!r}, which is none of its classes",
                where=job.items.where,
                hint=did_you_mean(str(label), names),
            )
        found.append(number)
    return found


def answer(loaded: Loaded, way: str, places: Sequence[Place], given: Any) -> list[Answer]:
    """The nearest class of each item's own task."""
    images = _images(loaded, way, places, given)
    scale = loaded.clip.logit_scale.exp().float()
    texts = {p.job.name: _texts(loaded, way, p.job) for p in places}
    widest = max(map(len, texts.values()))
    logits = torch.full((len(places), widest), float("-inf"), device=images.device)
    for row, place in enumerate(places):
        each = texts[place.job.name]
        logits[row, : len(each)] = scale * (each @ images[row])
    return said(loaded, places, logits)


def _images(loaded: Loaded, way: str, places: Sequence[Place], given: Any) -> Tensor:
    """Normalised embeddings [B,d]."""
    out = loaded(way, places, range(len(places)), **given)
    embedded = out.get("embeds") if loaded.prompts else out.get("image_embeds")
    if embedded is None:
        pooled = out.get("pooler_output")
        if pooled is None:
            raise CheckpointError(
                f"{type(loaded.model).__name__} is no vision tower of CLIP",
                where=str(loaded.folder),
            )
        embedded = loaded.clip.visual_projection(pooled)
    return torch.nn.functional.normalize(embedded.float(), dim=-1)


def _texts(loaded: Loaded, way: str, job: Job) -> Tensor:
    """Normalised embeddings of a task's classes [C,d]; worked out once a model and way."""
    key = f"{job.name}, {way}"
    if key not in loaded.kept:
        prompts = job.asked.options.templates
        names = classes(job)
        texts = [prompt.replace("{}", name) for name in names for prompt in prompts]
        given = loaded.text_tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        rows = []
        for start in range(0, len(texts), 64):
            some = {k: v[start : start + 64].to(loaded.device) for k, v in given.items()}
            embedded = _embedded(loaded, way, job, some).float()
            rows.append(torch.nn.functional.normalize(embedded, dim=-1))
        each = torch.cat(rows).view(len(names), len(prompts), -1).mean(1)
        loaded.kept[key] = torch.nn.functional.normalize(each, dim=-1)
    found: Tensor = loaded.kept[key]
    return found


def _embedded(loaded: Loaded, way: str, job: Job, some: Mapping[str, Tensor]) -> Tensor:
    """The embeddings of prompts [B,d]; under the task's expert where its weights are told."""
    found: Tensor
    if loaded.prompts is None:
        found = loaded.clip.text_projection(loaded.clip.text_model(**some).pooler_output)
        return found
    told = loaded.told(way, [Place(job, 0)] * len(some["input_ids"]))
    found = loaded.prompts(**some, **told)["embeds"]
    return found
