"""A merge written down beforehand: plain frozen data, made by the planner, run by the engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mowmerge.tensors import TensorSpec

RUN = 65_536  # elements in the fixed run that reductions sum over and that blocks are multiples of


@dataclass(frozen=True)
class Location:
    """Where a stored tensor lies: its spec, its file, the offset of its first byte."""

    spec: TensorSpec
    file: str
    offset: int


@dataclass(frozen=True)
class Stored:
    """A checkpoint on disk: where it was found, at which revision, and where each tensor lies."""

    origin: str
    folder: str
    revision: str | None
    tensors: Mapping[str, Location]
    format: str = "safetensors"  # or "pickle", where it was asked for

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor's spec, in file order."""
        return {name: location.spec for name, location in self.tensors.items()}


@dataclass(frozen=True)
class Input:
    """One tensor of one model that a job reads."""

    model: str
    spec: TensorSpec


@dataclass(frozen=True)
class TensorJob:
    """One output tensor: what is read, by which method, with which parameters, at which scope.

    A job without a method copies its only input. `group` joins the jobs whose method takes a
    statistic over the whole model.
    """

    output: TensorSpec
    models: tuple[Input, ...]
    base: Input | None = None
    method: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    scope: str = "element"
    group: int | None = None

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Every tensor the job reads, the base first."""
        return ((self.base,) if self.base else ()) + self.models

    @property
    def read_bytes(self) -> int:
        """Bytes of input, read once."""
        return sum(i.spec.nbytes for i in self.inputs)


@dataclass(frozen=True)
class Shard:
    """One output file: its name, its header, and the offset of each tensor's first byte."""

    file: str
    header: bytes
    offsets: Mapping[str, int]
    nbytes: int


@dataclass(frozen=True)
class Tied:
    """A tensor that one model stores and the output does not, since the base ties it to another."""

    model: str
    spec: TensorSpec
    source: TensorSpec


@dataclass(frozen=True)
class Fit:
    """A fit pass: whose coefficients are found, on which tasks, how, and in how many bytes.

    `held` says that task vectors stay in memory; else each step reads them again. `nbytes` counts
    the merged weights, their gradients and what is held, and no activations.
    """

    tensors: tuple[str, ...]
    tasks: tuple[str, ...]
    granularity: Literal["tensor", "task"]
    steps: int
    rate: float
    batch: int
    balance: bool
    seed: int
    held: bool
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """Everything a merge will do. `sources` holds, for each model, a checkpoint or another plan;
    `heads` the file of each model whose head is kept as it is; `fit` what is to be fitted first."""

    name: str
    donor: str
    base: str | None
    sources: Mapping[str, Stored | Plan]
    jobs: tuple[TensorJob, ...]
    shards: tuple[Shard, ...]
    workers: int
    block: int
    peak_bytes: int
    stats: bool = True
    device: str = "cpu"
    tied: tuple[Tied, ...] = ()
    heads: Mapping[str, Shard] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    fit: Fit | None = None
    warnings: tuple[str, ...] = ()

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The output's tensors, in the order in which they are written."""
        return {job.output.name: job.output for job in self.jobs}

    @property
    def read_bytes(self) -> int:
        """Bytes of input tensors, each counted once."""
        return sum(job.read_bytes for job in self.jobs)

    @property
    def write_bytes(self) -> int:
        """Bytes of the output's weight files, headers included: the exact size on disk."""
        return sum(shard.nbytes for shard in (*self.shards, *self.heads.values()))

    @property
    def fingerprint(self) -> str:
        """A digest of what decides the output's bytes: same plan, same inputs, same bytes."""
        jobs = [
            (j.output.name, j.output.dtype, j.output.shape, j.method, dict(j.parameters), j.scope,
             [(i.model, i.spec.name) for i in j.inputs])
            for j in self.jobs
        ]  # fmt: skip
        inner = {
            name: source.fingerprint if isinstance(source, Plan) else source.revision
            for name, source in self.sources.items()
        }
        heads = {model: list(shard.offsets) for model, shard in self.heads.items()}
        text = json.dumps([jobs, inner, heads], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def block_length(block: int, job: TensorJob, *, whole: bool) -> int:
    """Elements worked on at a time: the plan's block, whole rows, or for a method that reads the
    whole tensor at once (`whole`: scope tensor without a reduction) all of them."""
    numel, shape = job.output.numel, job.output.shape
    if job.method and job.scope == "tensor" and whole:
        return max(numel, 1)
    if job.method and job.scope == "row":
        row = max(1, numel // shape[0] if len(shape) > 1 and shape[0] else numel)
        return max(1, block // row) * row
    return max(1, min(block, numel))
