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
from mowmerge.methods.ops import TALLY
from mowmerge.plan import RUN, TensorJob
from mowmerge.reduction import extent
from mowmerge.tensors import DTYPES

RUNTIME = 264 << 20  # bytes that Python, torch and the plan itself take
LONGER = 16  # times longer blocks on a device, where each call costs
TOLD = 5  # of a block of fp32: a merged one while signs are compared, a sum of that in fp64
KEPT = 8  # blocks of fp32 that a worker's allocator keeps: freed ones come apart by slivers, until
# those fill its caches; and a share of what is made. Both measured over hundreds of blocks
KEPT_SHARE = 1 / 4
TRIMMED = 62 << 20  # bytes that are freed and kept in a worker's heap; see `buffers.keeping_freed`
COUNTING = 2  # of a block: codes of one model's numbers, and which are counted
CODING = {"sparse": (2.1, 1.5), "mask": (2, 0), "one_bit": (0.8, 0), "row_sparse": (1, 1)}


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


def then(peak: int, workers: int, nbytes: int) -> int:
    """The peak where, when the tensors are done, that much more is held: of what workers freed
    large pieces are given back."""
    return max(peak, min(peak, RUNTIME + workers * TRIMMED) + nbytes)


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
        peak = RUNTIME + sum(needs[:workers]) + _total_bytes(jobs) + beside
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


def _total_bytes(jobs: Sequence[TensorJob]) -> int:
    """Bytes for what all workers together have of a statistic over a whole model: counts, before
    them a sample, all models' and one model's three times more while it is searched."""
    groups: dict[int, list[TensorJob]] = {}
    for job in chain.from_iterable(job.each for job in jobs):
        if job.group is not None:
            groups.setdefault(job.group, []).append(job)
    found = 0
    for held in groups.values():
        if counted := max(map(_counted_bytes, held)):
            total = sum(job.output.numel for job in held)
            taken = max(65_536, min(total // 1024, 1 << 20))
            found = max(found, counted, 4 * taken * (len(held[0].models) + 3))
    return found


@dataclass(frozen=True)
class _Held:
    """Bytes that one worker holds for a job: what is read, its values, the result, and what is kept
    beside; in turn counts of magnitudes, and what is made of a block, a code's parts among it; and
    what its allocator keeps."""

    read: int
    values: int
    out: int
    beside: int
    counted: int
    made: int
    kept: int

    @property
    def desk(self) -> int:
        """What stays from block to block."""
        return self.read + self.values + self.out + self.beside


def working_bytes(job: TensorJob, block: int) -> int:
    """Bytes one worker holds for a job on the processor."""
    each = _held(job, block)
    return each.desk + max(each.counted, each.made + each.kept)


def _host_bytes(job: TensorJob, block: int) -> int:
    """Bytes one worker holds on the host for a job that a device works on: pieces of the inputs and
    results, each twice and as large as pinned memory comes; and what models are compared in."""
    each, piece = _held(job, block), min(block, max(1, job.output.numel))
    pieces = sum(_pinned(piece * given.spec.itemsize) for given in job.inputs)
    compared = sum(piece * given.spec.itemsize for given in job.inputs)
    twice = 2 * (pieces + _pinned(each.out))
    coded = each.made if job.code else 0
    return twice + compared + each.counted + coded + each.beside


def _device_bytes(job: TensorJob, block: int) -> int:
    """Bytes one worker holds on a device for a job."""
    each, piece = _held(job, block), min(block, max(1, job.output.numel))
    pieces = sum(piece * given.spec.itemsize for given in job.inputs)
    return 2 * (pieces + each.out) + each.values + each.made


def _pinned(nbytes: int) -> int:
    """What torch takes for that much pinned memory: the next power of two."""
    return 1 << max(0, nbytes - 1).bit_length()


def _held(job: TensorJob, block: int) -> _Held:
    spec = registry.get(job.method) if job.method else None
    length = block_length(block, job, whole=spec is not None and spec.reduce is None)
    length = min(length, max(1, job.output.numel))
    wide = 8 if any(i.spec.dtype == "F64" for i in job.inputs) else 4
    widened = {given.spec.dtype for given in job.inputs} not in ({"F32"}, {"F64"})
    held = sum(i.held for one in job.each for i in one.inputs)
    if job.packing is not None:  # rows wait until all that share a scale are there
        rows = min(job.packing.block[0], math.prod(job.output.shape[:-1]))
        held += 4 * wide * rows * job.output.shape[-1]
    made = _coding_bytes(job, block, length, wide) if job.code else wide * _made(job, length)
    kept = KEPT * min(length, block) * wide if made else 0
    if not job.matrix and length <= block:  # what is longer is mapped, and given back
        kept += int(KEPT_SHARE * made)
    return _Held(
        read=sum(min(length, block) * i.spec.itemsize for i in job.inputs) if widened else 0,
        values=length * wide * len(job.inputs),
        out=0 if job.anchor else length * job.output.itemsize,
        counted=_counted_bytes(job, length),
        made=made,
        kept=kept,
        beside=held,
    )


def _counted_bytes(job: TensorJob, length: int = 0) -> int:
    """Bytes for the order statistics of a tensor or model, and for the counting of a block: of a
    method whose statistic begins with a sample, which is none of up to 65,536 elements."""
    reduce = registry.get(job.method).reduce if job.method else None
    if reduce is None or job.scope == "element" or not job.output.numel:
        return 0
    first = next(reduce([extent(job)]), None)
    if first is None or first.share >= 1:
        return 0
    return 4 * (TALLY * len(job.models) + COUNTING * length)


def _made(job: TensorJob, length: int) -> int:
    """Elements that a method makes of a block; or of a matrix, the base among them."""
    spec, n, numel = registry.get(job.method or "passthrough"), len(job.models), job.output.numel
    ask = spec.workspace
    if job.matrix:
        held = ask(job.output.shape, n, job.parameters) if ask else 0
        return numel * (job.base is not None) + (held or (n + 2) * numel)
    if ask is None or spec.decompositions:
        return (n + 4) * length
    shape = job.output.shape if length == numel else (length,)
    return max(TOLD * length * (job.base is not None), ask(shape, n, job.parameters))


def _coding_bytes(job: TensorJob, block: int, length: int, wide: int) -> int:
    """Bytes for the anchor of a block, and then in turn: for the static job that makes that, for
    the making of the code, for the code as it is stored, and for statistics."""
    code, method, n, each = job.code, registry.get(str(job.method)), len(job.models), length * wide
    assert code is not None
    share, parts, stored = min(1.0, length / max(1, job.output.numel)), 0.0, 0.0
    for part, spec in zip(code.parts.values(), job.parts, strict=True):
        there = share if part.axis is not None or part.ragged else 1.0
        floating = DTYPES[spec.dtype].kind == "float"
        parts += there * (spec.numel * wide if floating else spec.nbytes)
        stored = max(stored, there * (spec.nbytes + 8 * spec.numel * floating))  # a sum in fp64
    apart = n * each if method.values == "models" else 0
    making = float(apart)
    if code.codec in CODING:
        by_model, once = CODING[code.codec]
        making += each * (by_model * n + once) + parts
    elif code.codec in ("full", "full_abs"):  # views of the models, or of their deltas
        parts = apart if code.codec == "full" else 0
        making = parts = max(parts, each)  # or an anchor
    else:
        ask = method.workspace
        making += wide * (ask(code.matrix, n, job.parameters) if ask else (n + 2) * length)
        making -= 0 if job.scope == "row" else apart  # one by one
        making += parts if job.scope == "row" else 0
    told = wide * min(length, block) * (TOLD + n * (method.values == "models"))
    found, below = 0, 0
    if job.anchor is not None:
        static = _held(job.anchor, block)
        below, found = max(static.counted, static.made), static.desk - static.beside
        found += length * job.output.itemsize + each
    return found + int(max(below, making, parts + max(stored, told)))
