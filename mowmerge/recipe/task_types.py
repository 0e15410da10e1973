"""What types of task there are: the columns that each reads, its metrics, and its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TaskType:
    """What a task of one type may say.

    columns: what is read, and the column it is read from unless the task names another; "" where
    there is none by default. metrics: the first is the type's own; none: any. trains: whether
    routers and coefficients can be trained on its items.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    options: frozenset[str] = frozenset()
    trains: bool = False


CLASSES = ("accuracy", "macro_f1", "matthews")

TYPES: Mapping[str, TaskType] = {
    "image-classification": TaskType(
        {"input": "image", "label": "label"}, CLASSES, frozenset(), True
    ),
    "text-classification": TaskType(
        {"input": "text", "pair": "", "label": "label"}, (*CLASSES, "spearman"), frozenset(), True
    ),
    "zero-shot-image-classification": TaskType(
        {"input": "image", "label": "label"}, CLASSES, frozenset({"classes", "templates", "clip"})
    ),
    "causal-lm": TaskType(
        {"input": "text"},
        ("perplexity", "bits_per_byte"),
        frozenset({"window", "stride"}),
        True,
    ),
    "multiple-choice": TaskType(
        {"input": "text", "choices": "choices", "label": "label"},
        ("accuracy", "accuracy_norm"),
        frozenset({"window"}),
    ),
    "generation": TaskType(
        {"input": "text", "label": "answer"},
        ("exact_match",),
        frozenset({"max_new_tokens", "stop", "chat"}),
    ),
    "lm-eval": TaskType(options=frozenset({"name", "include", "few_shot"})),
}
