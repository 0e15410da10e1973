"""The evaluation report as data: every field of report.json, its type and what it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Pair = tuple[float, float]


class Part(BaseModel):
    """A section of the report; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Run(Part):
    """What was run, and with what."""

    recipe: str = Field(description="The recipe's name.")
    method: str = Field(description="The method of the subject's merge; empty where unknown.")
    command: str = Field(description="The command that repeats it.")
    mowmerge: str = Field(description="Version of mowmerge.")
    settings: Mapping[str, Any] = Field(
        description="Batch, seed, device, dtype, versions and whatever else the scores depend on."
    )
    resamples: int = Field(description="Bootstrap resamples behind each interval.")
    level: float = Field(description="Level of the intervals.")
    bins: int = Field(description="Bins of equal width of the calibration error.")


class ModelPart(Part):
    """One model that was scored."""

    source: str = Field(description="Hub id, or the folder's own name.")
    revision: str = Field(description="Commit on the Hub; empty for a folder.")
    sha256: str = Field(description="Hash of its weights.")
    dtype: str = Field(description="Element type it was scored in.")


class DataPart(Part):
    """The items of one task."""

    type: str = Field(description="Task type.")
    source: str = Field(description="Data set: path or name, and configuration.")
    split: str = Field(description="Split that was scored.")
    n: int = Field(description="Number of items.")
    sha256: str = Field(description="Hash of inputs and labels, in order.")
    template: str = Field(description="Hash of the prompt templates; empty without.")
    metric: str = Field(description="What is measured.")
    higher_is_better: bool = Field(description="Which way is better.")
    held_out: bool = Field(description="Whether no expert was trained for it.")
    benchmark: str = Field(
        default="", description="The Hub's benchmark that it is, org/dataset:task_id."
    )


class ScorePart(Part):
    """One row on one task. What is None is absent; `absent` says why."""

    row: str = Field(description="Model, and for a dynamic one the way it was run.")
    task: str = Field(description="Task.")
    value: float = Field(description="The metric's value.")
    interval: Pair | None = Field(description="Bootstrap percentile interval of the value.")
    normalised: float | None = Field(
        description="value / expert's value (its inverse where lower is better)."
    )
    normalised_interval: Pair | None = Field(description="Its interval, both scores resampled.")
    recovery: float | None = Field(description="(value - base) / (expert - base).")
    ece: float | None = Field(description="Expected calibration error.")
    nll: float | None = Field(description="Mean -log of the true class's probability, in nats.")
    routing_accuracy: float | None = Field(
        description="Share of items that the router sent to the task's own expert."
    )
    extras: Mapping[str, float] = Field(description="Other figures of this task, by name.")
    absent: Mapping[str, str] = Field(description="Field -> why it is None.")


class Test(Part):
    """The subject against a rival on one task, on the same items."""

    task: str = Field(description="Task.")
    rival: str = Field(description="The row it is compared with.")
    difference: float = Field(description="Subject minus rival, in the metric's own unit.")
    interval: Pair = Field(description="Paired bootstrap interval of the difference.")
    kind: str = Field(description="mcnemar (items are right or wrong) or bootstrap.")
    wins: int | None = Field(description="Items that only the subject has right.")
    losses: int | None = Field(description="Items that only the rival has right.")
    p: float = Field(description="Two-sided p of no difference.")
    p_holm: float = Field(description="p adjusted (Holm) for all tests of this report.")


class Summary(Part):
    """One row over all of the experts' tasks. What is None is absent; `absent` says why."""

    row: str = Field(description="Model, and way.")
    tasks: int = Field(description="Number of tasks.")
    mean: float | None = Field(description="Mean of the tasks' values; items are never pooled.")
    mean_interval: Pair | None = Field(description="Its interval, items resampled in each task.")
    normalised: float | None = Field(description="Mean over tasks of value / expert's value.")
    normalised_interval: Pair | None = Field(description="Its interval, both scores resampled.")
    ratio_of_means: float | None = Field(
        description="Mean of values / mean of the experts' values: not the same as normalised."
    )
    worst_task: str | None = Field(description="The task with the lowest normalised score.")
    worst: float | None = Field(description="The normalised score on it.")
    at_least_expert: int | None = Field(description="Tasks on which it reaches the expert's score.")
    recovery: float | None = Field(
        description="Mean recovery over the tasks on which expert and base differ by 2 SE."
    )
    recovery_tasks: int = Field(description="The number of those tasks.")
    ece: float | None = Field(description="Mean of the tasks' calibration errors.")
    nll: float | None = Field(description="Mean of the tasks' mean negative log likelihoods.")
    routing_accuracy: float | None = Field(description="Mean of the tasks' routing accuracies.")
    absent: Mapping[str, str] = Field(description="Field -> why it is None.")


class Forgetting(Part):
    """One row against the base: a mean of differences, positive where it is better."""

    row: str = Field(description="Model, and way.")
    on: str = Field(description="held-out tasks or experts' tasks.")
    tasks: Sequence[str] = Field(description="The tasks.")
    signed: float | None = Field(
        description="Mean of value - base (negated if lower is better); None over different units."
    )
    interval: Pair | None = Field(description="Its paired bootstrap interval.")
    unit: str = Field(
        default="", description="The metric where lower is better; empty: a share of 1."
    )
    relative: float | None = Field(description="Mean over tasks of (value - base) / |base|.")
    worse_than_base: Sequence[str] = Field(description="Tasks on which the row is below the base.")


class CrossPart(Part):
    """An expert on a task, its own or another's."""

    expert: str = Field(description="Expert.")
    task: str = Field(description="Task.")
    own: bool = Field(description="Whether the expert is this task's own.")
    value: float | None = Field(description="The metric's value.")
    interval: Pair | None = Field(description="Bootstrap percentile interval of the value.")
    over_base: float | None = Field(description="value - base (negated if lower is better).")
    over_base_interval: Pair | None = Field(description="Its paired bootstrap interval.")
    absent: str = Field(description="Why there is no value; empty where there is one.")


class BestSingle(Part):
    """The one expert that is best on a task, and the subject beside it."""

    task: str = Field(description="Task.")
    expert: str = Field(description="The expert with the best score.")
    difference: float | None = Field(
        description="Subject minus that expert (negated if lower is better)."
    )
    interval: Pair | None = Field(description="Its paired bootstrap interval.")


class Spillover(Part):
    """An expert on the tasks of others, beside the base."""

    expert: str = Field(description="Expert.")
    tasks: Sequence[str] = Field(description="The others' tasks, where base and it were scored.")
    signed: float | None = Field(
        description="Mean of value - base (negated if lower is better); None over different units."
    )
    interval: Pair | None = Field(description="Its paired bootstrap interval.")
    unit: str = Field(
        default="", description="The metric where lower is better; empty: a share of 1."
    )
    worse_than_base: Sequence[str] = Field(description="Tasks on which it is below the base.")


class Matrix(Part):
    """Every expert on every task: with the head of the task's own expert where heads are kept."""

    experts: Sequence[str] = Field(description="Rows.")
    tasks: Sequence[str] = Field(description="Columns.")
    cells: Sequence[CrossPart] = Field(description="Every expert on every task.")
    best: Sequence[BestSingle] = Field(description="By task, the best single expert.")
    forgetting: Sequence[Spillover] = Field(description="By expert, the others' tasks.")


class Routing(Part):
    """Where a router sent each task's items."""

    row: str = Field(description="Model, and way.")
    experts: Sequence[str] = Field(description="Columns of the matrix.")
    counts: Mapping[str, Sequence[int]] = Field(description="Task -> items sent to each expert.")
    own: Mapping[str, str] = Field(description="Task -> its own expert.")
    accuracy: float = Field(description="Mean over tasks of the share sent to the own expert.")


class Gate(Part):
    """The coefficients of a gate over the items of a task."""

    row: str = Field(description="Model, and way.")
    task: str = Field(description="Task.")
    gate: str = Field(description="The gate's name.")
    slots: Sequence[str] = Field(description="What each coefficient weighs.")
    mean: Sequence[float] = Field(description="Mean coefficient of each slot.")
    std: Sequence[float] = Field(description="Standard deviation of each.")
    entropy: float = Field(description="Mean entropy of the coefficients' shares, in nats.")


class BinPart(Part):
    """Items by confidence."""

    low: float = Field(description="Confidence above this.")
    high: float = Field(description="Up to and with this.")
    n: int = Field(description="Items.")
    confidence: float = Field(description="Their mean confidence.")
    accuracy: float = Field(description="The share of them that is right.")


class Calibration(Part):
    """A row's confidence beside its accuracy, items of all tasks together: for the picture. The
    figure, `ece`, is the mean of the tasks' own."""

    row: str = Field(description="Model, and way.")
    n: int = Field(description="Items, over all tasks.")
    bins: Sequence[BinPart] = Field(description="The bins that hold items, of all tasks together.")


class CostPart(Part):
    """What a row costs, and as a multiple of one expert. Ratios are None without an expert."""

    row: str = Field(description="Model, and way.")
    parameters: int = Field(description="Parameters that are loaded.")
    bytes_on_disk: int = Field(description="Size of its weight files.")
    peak_bytes: int = Field(description="Most memory while it was scored.")
    seconds: float = Field(description="Forward passes, encoding left out.")
    items: int = Field(description="Items scored in that time.")
    latency: float = Field(description="Seconds an item in batches of 1; 0 if not measured.")
    throughput: float = Field(description="Items a second.")
    ratios: Mapping[str, float] = Field(
        description="Field -> value / the experts' mean; of what was measured only where both ran"
        " on the same."
    )
    on: Mapping[str, Any] = Field(
        default_factory=dict,
        description="What it was measured on: machine, device, threads, processes, batch.",
    )
    earlier: bool = Field(
        default=False, description="Whether an earlier run measured it, whose answers were kept."
    )


class LayerPart(Part):
    """What the merge did to the tensors of one role in one layer."""

    stack: str = Field(description="The stack of layers; empty outside of one.")
    layer: int | None = Field(description="Number in it; None outside the layers.")
    role: str = Field(description="embedding, attention, mlp, norm, head, router or other.")
    tensors: int = Field(description="Tensors.")
    elements: int = Field(description="Their elements.")
    dynamic: float = Field(description="Share of elements that are mixed for each input.")
    copied: float = Field(description="Share of elements that are the base's, or were copied.")
    norms: Mapping[str, float] = Field(description="Model -> norm of its task vector here.")
    cosine: float | None = Field(
        description="Cosine between two task vectors, mean over pairs; weighted by elements."
    )
    sign_conflict: float | None = Field(description="Share of elements whose signs disagree.")
    kept: float | None = Field(description="Share of elements that the merge moved.")


class Merge(Part):
    """What the merge did, from the subject's own report.json."""

    method: str = Field(description="Methods, the most used first.")
    experts: Sequence[str] = Field(description="What was merged.")
    layers: Sequence[LayerPart] = Field(description="By stack, layer and role.")
    codecs: Mapping[str, int] = Field(description="Codec -> tensors that it stores.")
    similarity: Mapping[str, Mapping[str, float]] = Field(
        description="Component -> block -> similarity of the experts, where a survey measured it."
    )
    seconds: float = Field(description="What the merge took.")
    peak_bytes: int = Field(description="Memory that was planned for it.")
    read_bytes: int = Field(description="Bytes read.")
    written_bytes: int = Field(description="Bytes written.")
    warnings: Sequence[str] = Field(description="What it warned of.")


class Report(Part):
    """An evaluation: what was scored, how well, how surely, at what cost."""

    version: Literal[1, 2] = Field(
        default=2, description="Version of this schema; 1 had no matrix, and is read still."
    )
    subject: str = Field(description="The row that the report is about.")
    run: Run = Field(description="What was run.")
    models: Mapping[str, ModelPart] = Field(description="Every model, by name.")
    data: Mapping[str, DataPart] = Field(description="Every task's items.")
    flags: Mapping[str, Mapping[str, Any]] = Field(description="By row: what the scores rest on.")
    rows: Sequence[str] = Field(description="Every row, in order.")
    summary: Sequence[Summary] = Field(description="Every row over all tasks.")
    scores: Sequence[ScorePart] = Field(description="Every row on every task.")
    tests: Sequence[Test] = Field(description="The subject against each rival.")
    forgetting: Sequence[Forgetting] = Field(description="Rows against the base.")
    matrix: Matrix | None = Field(
        default=None, description="Every expert on every task; None unless asked for."
    )
    routing: Sequence[Routing] = Field(description="Rows whose router chose experts.")
    gates: Sequence[Gate] = Field(description="Rows whose gates were watched.")
    calibration: Sequence[Calibration] = Field(description="Rows that give probabilities.")
    costs: Sequence[CostPart] = Field(description="Every row's costs.")
    merge: Merge | None = Field(description="What the merge did; None where it left no report.")
    failures: Sequence[str] = Field(description="What went wrong or makes a figure doubtful.")
    items: str = Field(description="The file beside this one with each item's prediction.")
    items_sha256: str = Field(description="Its hash.")


def json_schema() -> dict[str, Any]:
    """The JSON Schema of report.json."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mowmerge evaluation report",
        **{k: v for k, v in Report.model_json_schema().items() if k != "title"},
    }
