"""A task as the evaluator holds it, and the places of its items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from threading import Lock
from types import ModuleType
from typing import Any, NamedTuple

from mowmerge.recipe.task import Task

Answer = dict[str, Any]  # what a model said of one item, as JSON has it


@dataclass(frozen=True, eq=False)
class Job:
    """A task, the module that knows its type, and its items: `Items`, or what passes for them."""

    name: str
    asked: Task
    kind: ModuleType
    items: Any
    metric: str


class Place(NamedTuple):
    """One item of a task."""

    job: Job
    item: int


@dataclass(frozen=True)
class Tools:
    """What turns items into tensors: an image processor or tokenizer, and the model's config."""

    processor: Any
    config: Any
    lock: Lock = field(default_factory=Lock)  # a tokenizer serves one thread at a time


@dataclass(frozen=True)
class Scored:
    """A type's part of a Score; see there. metric: where only the answers tell."""

    value: float
    predicted: Sequence[int | float | str] = ()
    true: Sequence[int | float | str] = ()
    items: Sequence[float] = ()
    weights: Sequence[float] = ()
    confidence: Sequence[float] = ()
    nll: Sequence[float] = ()
    extras: Mapping[str, float] = field(default_factory=dict)
    metric: str = ""


@dataclass(frozen=True)
class Taken:
    """What passes over items of one task took, one way. on: what they ran on. now: in this run."""

    seconds: float
    items: int
    latency: float
    peak: int
    parameters: int
    on: Mapping[str, Any]
    now: bool = False

    def told(self) -> dict[str, Any]:
        """As JSON has it; `now` is nobody else's."""
        return {name: value for name, value in asdict(self).items() if name != "now"}
