"""A merge written down beforehand: plain frozen data, made by the planner, run by the engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from mowmerge.placement import Placed, Vocabulary
from mowmerge.tensors import TensorSpec

if TYPE_CHECKING:
    from mowmerge.dynamic.format import Code, Manifest

RUN = 65_536  # elements in the fixed run that reductions sum over and that blocks are multiples of


@dataclass(frozen=True)
class Location:
    """Where a stored tensor lies: its spec, its file, the offset of its first byte."""

    spec: TensorSpec
    file: str
    offset: int


@dataclass(frozen=True)
class Scale:
    """What an fp8 weight is multiplied by: where that lies, how many rows and columns share a
    number, and the dtype of the product."""

    location: Location
    block: tuple[int, int]
    dtype: str


@dataclass(frozen=True)
class Stored:
    """A checkpoint on disk: where it was found, at which revision, and where each tensor lies.

    `scales` holds those of its fp8 weights, whose specs are those of the products.
    """

    origin: str
    folder: str
    revision: str | None
    tensors: Mapping[str, Location]
    format: str = "safetensors"  # or "pickle", where it was asked for
    scales: Mapping[str, Scale] = field(default_factory=dict)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor's spec, in file order."""
        held = {name: location.spec for name, location in self.tensors.items()}
        return held | {n: replace(held[n], dtype=scale.dtype) for n, scale in self.scales.items()}

    @property
    def files(self) -> tuple[str, ...]:
        """The files that are read, in order of name."""
        places = [*self.tensors.values(), *(scale.location for scale in self.scales.values())]
        return tuple(sorted({location.file for location in places}))


@dataclass(frozen=True)
class Patch:
    """What an adapter does to one tensor: adds scale * B A, takes its place, or (DoRA) scales rows.

    `parts` names tensors of the adapter's file: a and b, with m where there is a magnitude, or the
    value, with `rows` of those alone. The tensor is a stack of `stack` matrices, `across` [in,out].
    """

    adapter: int
    parts: Mapping[str, str]
    scale: float = 1.0
    weight: float = 1.0
    across: bool = False
    stack: int = 1
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Adapted:
    """A model with adapters on it, which are applied as it is read; its names are the model's.

    Tensors that only an adapter has are `added`, and so are those with a row for each token of its
    own vocabulary; `wide` gives what is adapted in fp32 at least.
    """

    model: Stored | Plan
    adapters: tuple[Stored, ...]
    patches: Mapping[str, tuple[Patch, ...]]
    added: Mapping[str, TensorSpec]
    wide: bool = False

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The model's tensors, then those that only an adapter has."""
        held = {**self.model.specs, **self.added}
        changed = self.patches.keys() & self.model.specs.keys() - self.added.keys()
        narrow = {n: held[n] for n in self.patches if n in changed} if self.wide else {}
        wider = {n: replace(s, dtype="F32") for n, s in narrow.items() if s.dtype != "F64"}
        return {**held, **wider}

    @property
    def resized(self) -> list[str]:
        """The tensors that the model has too, with a row for each token of its vocabulary."""
        return [name for name in self.added if name in self.model.specs]

    @property
    def fingerprint(self) -> str:
        """A digest of what is applied to what."""
        model = self.model.fingerprint if isinstance(self.model, Plan) else self.model.revision
        text = json.dumps([model, [a.revision for a in self.adapters], str(self.patches)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Input:
    """One tensor of one model that a job reads: `read` bytes of files; a handle holds `held`."""

    model: str
    spec: TensorSpec
    read: int
    held: int = 0


@dataclass(frozen=True)
class Packing:
    """An output tensor in fp8: the weight, its scales, the rows and columns that share one."""

    weight: TensorSpec
    scale: TensorSpec
    block: tuple[int, int]


@dataclass(frozen=True)
class TensorJob:
    """One output tensor: what is read, by which method, with which parameters, at which scope.

    A job without a method copies its only input. A method on matrices gets a `matrix` whole, model
    by model, and of every other tensor its elements. `group` joins the jobs whose method takes a
    statistic over the whole model. With a `code` the method is dynamic: it also gives the code's
    parts, and where it asks for an anchor, `anchor` is the static job that makes it.
    """

    output: TensorSpec
    models: tuple[Input, ...]
    base: Input | None = None
    method: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    scope: str = "element"
    matrix: bool = False
    group: int | None = None
    code: Code | None = None
    anchor: TensorJob | None = None
    packing: Packing | None = None

    @cached_property
    def stored(self) -> tuple[TensorSpec, ...]:
        """What the output is on disk: itself, or an fp8 weight and its scales."""
        return (self.packing.weight, self.packing.scale) if self.packing else (self.output,)

    @cached_property
    def parts(self) -> tuple[TensorSpec, ...]:
        """What is written beside the output: the parts of its code."""
        if self.code is None:
            return ()
        name = self.code.part_name
        return tuple(TensorSpec(name(n), p.dtype, p.shape) for n, p in self.code.parts.items())

    @cached_property
    def each(self) -> tuple[TensorJob, ...]:
        """The job, and the one that makes its anchor."""
        return (self,) if self.anchor is None else (self, self.anchor)

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        """Every tensor the job reads, the base first."""
        return ((self.base,) if self.base else ()) + self.models

    @cached_property
    def read_bytes(self) -> int:
        """Bytes of files behind its input, read once."""
        return sum(given.read for given in self.inputs)


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
class Algebra:
    """What a merge decomposes: how many matrices, how often, at about how many operations; the
    costliest shape; how many bytes lie on the disk until the statistics are known."""

    matrices: int
    decompositions: int
    flops: int
    largest: tuple[int, int]
    kept: int


@dataclass(frozen=True)
class Plan:
    """Everything a merge will do.

    `sources` holds, for each model, a checkpoint or another plan; `heads` the file of each model
    whose head is kept as it is. A dynamic merge has a manifest, files of codes and one of routers;
    `head_names` says of a head's tensor among the codes which model's it is; `surveyed` what was
    measured; while that is `undecided` more is planned than will be written; `rest` is the static
    method of the rest, and why; `encoder` is what classifiers look at, copied whole; `config` is
    what the output's config has other than the donor's; `fit` is what is to be fitted first,
    `algebra` what is decomposed; `vocabulary` is there where rows are placed by token. Workers take
    the `devices` in turn; `device_bytes` is the peak on each GPU.
    """

    name: str
    donor: str
    base: str | None
    sources: Mapping[str, Source]
    jobs: tuple[TensorJob, ...]
    shards: tuple[Shard, ...]
    workers: int
    block: int
    peak_bytes: int
    stats: bool = True
    devices: tuple[str, ...] = ("cpu",)
    device_bytes: int = 0
    tied: tuple[Tied, ...] = ()
    heads: Mapping[str, Shard] = field(default_factory=dict)
    manifest: Manifest | None = None
    codes: tuple[Shard, ...] = ()
    router: Shard | None = None
    head_names: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    surveyed: Mapping[str, Any] | None = None
    undecided: bool = False
    rest: str = ""
    encoder: Stored | None = None
    dropped: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    fit: Fit | None = None
    algebra: Algebra | None = None
    vocabulary: Vocabulary | None = None
    warnings: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        """What a worker computes on; of several devices the first."""
        return self.devices[0]

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The output's tensors, in the order in which they are written."""
        return {job.output.name: job.output for job in self.jobs}

    @property
    def packings(self) -> Mapping[str, Packing]:
        """How each tensor that goes to fp8 is stored, by name."""
        return {job.output.name: job.packing for job in self.jobs if job.packing}

    @property
    def checkpoints(self) -> list[tuple[str, Stored]]:
        """Every checkpoint that is read, by model: adapters, nested ones and the encoder too."""
        found = [pair for name, source in self.sources.items() for pair in _stored(name, source)]
        outside = self.vocabulary.outside if self.vocabulary else None
        beside = ("encoder", self.encoder), ("tokenizer", outside)
        return found + [(name, stored) for name, stored in beside if stored]

    @property
    def static(self) -> Plan:
        """The static merge in it: that which a dynamic one's anchor is, with the heads' names."""
        heads: dict[str, dict[str, int]] = {}
        for model, name in self.head_names.values():
            heads.setdefault(model, {})[name] = 0
        kept = {model: Shard("", b"", names, 0) for model, names in heads.items()}
        return replace(self, jobs=tuple(j.anchor or j for j in self.jobs), heads=self.heads or kept)

    def anchored(self, static: Plan) -> Plan:
        """The plan with the jobs of its static merge replaced by another's."""
        pairs = zip(self.jobs, static.jobs, strict=True)
        jobs = tuple(replace(job, anchor=one) if job.code else one for job, one in pairs)
        return replace(self, jobs=jobs, fit=static.fit, warnings=static.warnings)

    @property
    def each(self) -> tuple[TensorJob, ...]:
        """Every job, those that make anchors too."""
        return tuple(one for job in self.jobs for one in job.each)

    @property
    def read_bytes(self) -> int:
        """Bytes of files that the jobs read, each input once: of nested recipes too."""
        return sum(job.read_bytes for job in self.jobs)

    @property
    def write_bytes(self) -> int:
        """The exact size on disk of the output's weight files, without a copied encoder's."""
        return sum(shard.nbytes for shard in self.files)

    @property
    def data_bytes(self) -> int:
        """Bytes of tensors in them, without the heads of a static merge."""
        written = (*self.shards, *self.codes, *((self.router,) if self.router else ()))
        return sum(shard.nbytes - len(shard.header) for shard in written)

    @property
    def files(self) -> tuple[Shard, ...]:
        """Every weight file of the output."""
        router = (self.router,) if self.router else ()
        return (*self.shards, *self.codes, *router, *self.heads.values())

    @cached_property
    def fingerprint(self) -> str:
        """A digest of what decides the output's bytes: same plan, same inputs, same bytes."""
        jobs = [
            (j.output.name, j.output.dtype, j.output.shape, j.method, dict(j.parameters), j.scope,
             [(i.model, i.spec.name) for i in j.inputs], str(j.code), str(j.packing),
             (j.anchor.method, dict(j.anchor.parameters)) if j.anchor else None)
            for j in self.jobs
        ]  # fmt: skip
        inner = {
            name: source.revision if isinstance(source, Stored) else source.fingerprint
            for name, source in self.sources.items()
        }
        if self.encoder:
            inner["encoder"] = self.encoder.revision
        heads = {model: list(shard.offsets) for model, shard in self.heads.items()}
        fit = replace(self.fit, held=False, nbytes=0) if self.fit else None
        text = json.dumps([jobs, inner, heads, str(fit)], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


Source = Stored | Adapted | Plan | Placed


def _stored(name: str, source: Source) -> list[tuple[str, Stored]]:
    """The checkpoints of one source."""
    source = unplaced(source)
    if isinstance(source, Stored):
        return [(name, source)]
    if isinstance(source, Plan):
        return [(f"{name}-{inner}", stored) for inner, stored in source.checkpoints]
    many = len(source.adapters) > 1
    named = [(f"{name}-adapter" + f"-{i}" * many, one) for i, one in enumerate(source.adapters)]
    return [*_stored(name, source.model), *named]


def config_source(source: Source) -> Stored:
    """The checkpoint whose config a source has; a plan's is its donor's."""
    if isinstance(source, Stored):
        return source
    return config_source(source.sources[source.donor] if isinstance(source, Plan) else source.model)


def unplaced(source: Source) -> Stored | Adapted | Plan:
    """The source with its vocabulary rows where they were."""
    return source.model if isinstance(source, Placed) else source


def run_length(row: int) -> int:
    """Elements in a run of whole rows of that length: as many as RUN holds, at least one row."""
    return max(1, RUN // max(1, row)) * max(1, row)
