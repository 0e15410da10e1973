"""What a merge holds in memory at most, from the plan of its tensors alone."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from mowmerge import devices
from mowmerge.blocks import block_length
from mowmerge.errors import ResourceError
from mowmerge.methods import registry
from mowmerge.plan import RUN, TensorJob
from mowmerge.tensors import DTYPES

RUNTIME = 264 << 20  # bytes that Python, torch and the plan itself take
HISTOGRAM = 5 << 20  # bytes a model while an order statistic is counted: a fold, and its empty one
LONGER = 16  # times longer blocks on a device, where each call costs
FOLDS = {"element": 0, "row": 1, "tensor": 1, "model": 2}  # a worker has at once; or all
CODING = {"low_rank": (4, 4), "basis": (4, 4), "sparse": (7, 3), "mask": (3, 2)}


@dataclass(frozen=True)
class Room:
    """How many workers on which devices, with which blocks, and the peak bytes that go with them:
    of the process, and on each device that is not the processor."""

    devices: tuple[str, ...]
    workers: int
    block: int
    peak_bytes: int
    device_bytes: int


def room(
    jobs: Sequence[TensorJob],
    named: tuple[str, ...],
    workers: int | None,
    block: int,
    limit: int | None,
    beside: int = 0,
) -> Room:
    """The workers, one a device at least, with blocks as long as the limit on the process allows.

    `block` is the longest on the processor; `beside` what is held whatever the block.

    Raises:
        ResourceError: the limit is too little for the shortest blocks there are.
    """
    count = max(workers or min(8, os.cpu_count() or 1), len(named))
    if devices.kind(named[0]) == devices.PROCESSOR:
        return Room(named, count, *_narrowed(jobs, count, block, limit, beside, working_bytes), 0)
    found, peak = _narrowed(jobs, count, LONGER * block, limit, beside, _host_bytes)
    each = sorted((_device_bytes(job, found) for job in jobs), reverse=True)
    return Room(named, count, found, peak, sum(each[: -(-count // len(named))]))


def _narrowed(
    jobs: Sequence[TensorJob],
    workers: int,
    block: int,
    limit: int | None,
    beside: int,
    cost: Callable[[TensorJob, int], int],
) -> tuple[int, int]:
    """The block length, and the peak bytes."""
    while True:
        needs = sorted((cost(job, block) for job in jobs), reverse=True)
        peak = RUNTIME + max(sum(needs[:workers]), _sample_bytes(jobs)) + beside
        if limit is None or peak <= limit:
            return block, peak
        if block == RUN:
            largest = max(jobs, key=lambda job: cost(job, RUN))
            raise ResourceError(
                f"--max-memory {limit:,} is too little: {peak:,} bytes are the least with"
                f" {workers} worker(s)",
                where=f"tensor '{largest.output.name}', scope {largest.scope}",
                hint="use fewer --workers, or allow more",
            )
        block //= 2


def _sample_bytes(jobs: Sequence[TensorJob]) -> int:
    """Bytes for a sample of a whole model's values, which a statistic over it begins with: all
    models', and one model's three times more while it is searched."""
    groups: dict[int, list[TensorJob]] = {}
    for job in chain.from_iterable(job.each for job in jobs):
        if job.group is not None:
            groups.setdefault(job.group, []).append(job)
    found = 0
    for held in groups.values():
        total = sum(job.output.numel for job in held)
        taken = max(65_536, min(total // 1024, 1 << 20))
        found = max(found, 4 * taken * (len(held[0].models) + 3))
    return found


@dataclass(frozen=True)
class _Held:
    """Bytes that one worker holds for a job, whose blocks are so long: what is read, its values and
    temporaries, the result, counts of magnitudes, a code, a decomposition, and what is kept beside.
    """

    length: int
    read: int
    values: int
    out: int
    counted: int
    coding: int
    workspace: int
    beside: int


def working_bytes(job: TensorJob, block: int) -> int:
    """Bytes one worker holds for a job on the processor."""
    each = _held(job, block)
    worked = each.values + each.coding + each.workspace
    return each.read + worked + each.out + each.counted + each.beside


def _host_bytes(job: TensorJob, block: int) -> int:
    """Bytes one worker holds on the host for a job that a device works on: pieces of the inputs and
    results, each twice and as large as pinned memory comes; and what models are compared in."""
    each, piece = _held(job, block), min(block, max(1, job.output.numel))
    pieces = sum(_pinned(piece * given.spec.itemsize) for given in job.inputs)
    compared = sum(piece * given.spec.itemsize for given in job.inputs)
    twice = 2 * (pieces + _pinned(each.out))
    return twice + compared + each.counted + each.coding + each.beside


def _device_bytes(job: TensorJob, block: int) -> int:
    """Bytes one worker holds on a device for a job."""
    each, piece = _held(job, block), min(block, max(1, job.output.numel))
    pieces = sum(piece * given.spec.itemsize for given in job.inputs)
    return 2 * (pieces + each.out) + each.values + each.coding + each.workspace


def _pinned(nbytes: int) -> int:
    """What torch takes for that much pinned memory: the next power of two."""
    return 1 << max(0, nbytes - 1).bit_length()


def _held(job: TensorJob, block: int) -> _Held:
    whole = bool(job.method) and registry.get(str(job.method)).reduce is None
    length, n = block_length(block, job, whole=whole), len(job.inputs)
    if job.code is not None:  # its statistics are taken in blocks of their own
        length = max(length, min(block, job.output.numel))
    wide = 8 if any(i.spec.dtype == "F64" for i in job.inputs) else 4
    folds = 0 if whole else FOLDS[job.scope]
    workspace = _workspace(job)
    beside = 0 if workspace and job.code is None else n + 4  # what a method on blocks makes of one
    held = sum(i.held for one in (job, job.anchor) if one for i in one.inputs)
    if job.packing is not None:  # rows wait until all that share a scale are there
        rows = min(job.packing.block[0], math.prod(job.output.shape[:-1]))
        held += 4 * wide * rows * job.output.shape[-1]
    return _Held(
        length=length,
        read=sum(length * i.spec.itemsize for i in job.inputs),
        values=length * wide * (n + beside),
        out=length * job.output.itemsize,
        counted=HISTOGRAM * len(job.models) * folds,
        coding=_coding_bytes(job, length, wide, block) if job.code else 0,
        workspace=wide * workspace,
        beside=held,
    )


def _workspace(job: TensorJob) -> int:
    """Elements that are held for a matrix, the base among them, or by a method on a whole tensor
    beside its inputs."""
    spec, n = registry.get(job.method) if job.method else None, len(job.models)
    if spec is None or job.code is not None:
        return 0
    if job.matrix:
        base, shape = job.output.numel * (job.base is not None), job.output.shape
        held = spec.workspace(shape, n, job.parameters) if spec.workspace else 0
        return base + (held or (n + 2) * job.output.numel)
    if spec.workspace is None or spec.decompositions:
        return 0
    return spec.workspace(job.output.shape, n, job.parameters)


def _coding_bytes(job: TensorJob, length: int, wide: int, block: int) -> int:
    """Bytes for the parts of a block's code, for what their making takes, and for the anchor."""
    assert job.code is not None
    share, made = min(1.0, length / max(1, job.output.numel)), 0.0
    for part, spec in zip(job.code.parts.values(), job.parts, strict=True):
        twice = spec.nbytes + spec.numel * wide * (DTYPES[spec.dtype].kind == "float")
        made += twice * (share if part.axis is not None or part.ragged else 1.0)
    each, once = CODING.get(job.code.codec, (3, 1))
    anchor = _anchor_bytes(job, length, block)
    return int(made) + length * wide * (each * len(job.models) + once) + anchor


def _anchor_bytes(job: TensorJob, length: int, block: int) -> int:
    """Bytes for the static job that makes the anchor in blocks of its own, and for what is put
    together from them."""
    if job.anchor is None:
        return 0
    return working_bytes(job.anchor, block) + length * job.output.itemsize
