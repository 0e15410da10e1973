"""A recipe's tasks as frozen data: what a model is trained or measured on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt

from mowmerge.recipe.fields import Benchmark, Count, Names, Strict


class Splits(Strict):
    """Which split of the data serves what."""

    router: str | None = Field(default=None, description="Split that routers are trained on.")
    select: str | None = Field(default=None, description="Split that choices are made on.")
    eval: str | None = Field(default=None, description="Split that scores are taken on.")


class Asking(Strict):
    """How a task is put to a model; each type of task takes some of these."""

    classes: Names | None = Field(
        default=None,
        description="zero-shot: what prompts call the classes, in the order of the labels; the"
        " names in the data if absent.",
    )
    templates: Names = Field(
        default=("a photo of a {}.",), description="zero-shot: prompts, with {} for the class."
    )
    clip: str | None = Field(
        default=None,
        description="zero-shot: the CLIP model whose text tower and projections serve, where only"
        " vision towers are merged.",
    )
    window: Count | None = Field(
        default=None, description="causal-lm, multiple-choice: tokens at once; all it takes."
    )
    stride: Count | None = Field(
        default=None, description="causal-lm: tokens by which windows advance; half a window."
    )
    max_new_tokens: Count = Field(
        default=64, description="generation: an answer that goes on longer is cut, and counted."
    )
    stop: Names | None = Field(default=None, description="generation: texts that end an answer.")
    chat: StrictBool = Field(
        default=False, description="generation: the input is a user's turn of the chat template."
    )
    name: str | None = Field(default=None, description="lm-eval: its task; the task's own name.")
    include: str | None = Field(default=None, description="lm-eval: a folder of task YAMLs.")
    few_shot: Annotated[StrictInt, Field(ge=0)] | None = Field(
        default=None, description="lm-eval: examples in the prompt; what the task says if absent."
    )


class Task(Strict):
    """What a model is trained or measured on."""

    expert: str | None = Field(
        default=None,
        description="The model that was fine-tuned for this task; none: it is held out.",
    )
    type: Literal[
        "image-classification", "text-classification", "zero-shot-image-classification",
        "causal-lm", "multiple-choice", "generation", "lm-eval",
    ] = Field(description="What kind of task it is.")  # fmt: skip
    data: Mapping[str, Any] = Field(
        default_factory=dict, description="Arguments of datasets.load_dataset."
    )
    columns: Mapping[str, str] = Field(
        default_factory=dict, description="Which column is what the task's type reads."
    )
    splits: Splits = Field(default=Splits(), description="Which split serves what.")
    options: Asking = Field(default=Asking(), description="How it is put to a model.")
    metric: str | None = Field(
        default=None, description="What is measured; the task type's own if absent."
    )
    benchmark: Benchmark | None = Field(
        default=None,
        description="The Hub's benchmark that this is, org/dataset:task_id: a push reports it.",
    )
    limit: Count | None = Field(default=None, description="At most this many items of each split.")
    seed: Annotated[StrictInt, Field(ge=0)] = Field(
        default=0, description="Seed of the order of items."
    )
