"""What scoring gives, as plain data: scores item by item, costs, gates, and what they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Score:
    """One model, run one way, on one task: the metric's value, and each item's part in it.

    model: the row's plain name: merged, base, expert, or that of another merge. way: how a dynamic
    model was run: "" (nothing is told), "task given" or "oracle". predicted, true: of each item.
    items: of each item what the metric is the mean of (correct 0 or 1, negative log likelihood,
    ...), weighted by `weights` where there are any (tokens or bytes of an item); empty where the
    metric is no mean (macro_f1, matthews, spearman). confidence, nll: the probability of the
    predicted class, and -log of the true one's; empty where there is none. routed: the expert that
    each item was sent to, where the router chose one. extras: other figures, by name.
    """

    model: str
    way: str
    task: str
    metric: str
    value: float
    predicted: Sequence[int | float | str] = ()
    true: Sequence[int | float | str] = ()
    items: Sequence[float] = ()
    weights: Sequence[float] = ()
    confidence: Sequence[float] = ()
    nll: Sequence[float] = ()
    routed: Sequence[int] = ()
    extras: Mapping[str, float] = field(default_factory=dict)

    @property
    def row(self) -> str:
        """The model's name with the way behind it."""
        return f"{self.model}, {self.way}" if self.way else self.model


@dataclass(frozen=True)
class Cost:
    """What a row took: the model's size, and the time of the same run that gave the scores.

    parameters: all that is loaded. bytes_on_disk: of its weight files. peak_bytes: the most memory
    while it ran: a GPU's allocated, else the process's resident. seconds: of forward passes,
    encoding left out. items: scored in them. latency: seconds an item in batches of 1; 0 where it
    was not measured. throughput: items a second. "expert" is the mean over the experts. on: the
    machine, device, threads, processes and batch of the run that was measured; earlier: it was not
    this one, and the answers were kept from it.
    """

    row: str
    parameters: int
    bytes_on_disk: int
    peak_bytes: int
    seconds: float
    items: int
    latency: float
    throughput: float
    on: Mapping[str, Any] = field(default_factory=dict)
    earlier: bool = False


@dataclass(frozen=True)
class Gates:
    """A gate's coefficients over a task's items: mean and standard deviation for each slot, and the
    mean entropy in nats of their shares."""

    mean: Sequence[float]
    std: Sequence[float]
    entropy: float


@dataclass(frozen=True)
class Data:
    """What a task's items were. sha256: of inputs and labels in order. template: sha256 of the
    prompt templates, empty where there are none. benchmark: the Hub's, org/dataset:task_id."""

    type: str
    source: str
    split: str
    n: int
    sha256: str
    template: str = ""
    benchmark: str = ""


@dataclass(frozen=True)
class Model:
    """What a row's model was. sha256: of its weights; an expert's row lists each task's."""

    source: str
    revision: str
    sha256: str
    dtype: str


@dataclass(frozen=True)
class Evaluation:
    """Everything that an evaluation found.

    gates: by row, task and gate, for the rows whose router chose. data: by task. models: by row;
    an expert's is "expert NAME". settings: batch, seed, device, dtype, versions. flags: by row:
    those of `facts.flags`. crossed: the scores of "expert NAME" on the tasks of others, where that
    was asked; blank: why there is none, by expert and task.
    """

    scores: Sequence[Score]
    costs: Sequence[Cost] = ()
    gates: Mapping[str, Mapping[str, Mapping[str, Gates]]] = field(default_factory=dict)
    data: Mapping[str, Data] = field(default_factory=dict)
    models: Mapping[str, Model] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    crossed: Sequence[Score] = ()
    blank: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
