"""The memory that a job is worked on in: reused from block to block, and from job to job."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from mowmerge import staging
from mowmerge.blocks import WHOLE
from mowmerge.errors import ResourceError
from mowmerge.plan import Plan
from mowmerge.tensors import DTYPES, Tensor, torch

MOST = 31 << 20  # bytes
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclass(frozen=True)
class Make:
    """What decides a worker's memory: the codes of the inputs' dtypes and of the output's, the
    device, the most elements in a block, and in a piece that is brought to a device at a time."""

    inputs: tuple[str, ...]
    output: str
    device: str
    block: int
    piece: int


class Desk:
    """A worker's memory, and the way of blocks into it and out of it. Jobs of one make leave it to
    each other, since to set it up costs as much as to merge a small tensor."""

    def __init__(self, make: Make) -> None:
        self.make = make
        self.dtype = torch.float64 if "F64" in (*make.inputs, make.output) else torch.float32
        kinds, out = [DTYPES[code].torch for code in make.inputs], DTYPES[make.output].torch
        sizes = staging.Sizes(kinds, self.dtype, out, make.block, make.piece)
        self.way = staging.of(Pools(make.device), sizes, make.device)


def seat(left: list[Desk], make: Make) -> Desk:
    """A desk that another job left, or a new one in its place where that is of another make."""
    with suppress(IndexError):  # another worker may take the last one
        desk = left.pop()
        if desk.make == make:
            desk.way.begin()
            return desk
        del desk
    return Desk(make)


class Pools:
    """Buffers by name; the first to ask for one decides how large it is."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._held: dict[str, Tensor] = {}

    def __call__(
        self, name: str, length: int, dtype: Any, device: str | None = None, pinned: bool = False
    ) -> Tensor:
        """The first `length` elements of a buffer, on the device unless another is named."""
        if name not in self._held:
            self._held[name] = allocate(length, dtype, device or self.device, pinned)
        return self._held[name][:length]


def allocate(length: int, dtype: Any, device: str, pinned: bool = False) -> Tensor:
    """New memory for so many elements.

    Raises:
        ResourceError: the processor has too little.
    """
    try:
        return torch.empty(length, dtype=dtype, device=device, pin_memory=pinned)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):  # of a device: see `room`
            raise
        raise ResourceError(
            f"not enough memory for {length:,} elements at once: {error}",
            hint="lower --max-memory or --workers",
        ) from error


@contextmanager
def keeping_freed(plan: Plan) -> Iterator[None]:
    """Lets the allocator reuse what is freed, in pieces of up to 31 MiB: without that every
    temporary of every block costs page faults again. While a plan has matrices, only in pieces as
    blocks need them: matrices are of many sizes, and would leave holes between each other.

    For glibc; another allocator is left as it is.
    """
    block = 2 * 4 * plan.block
    _keep(min(block, MOST) if _on_matrices(plan) else MOST)
    try:
        yield
    finally:
        _keep(MOST)


def _keep(piece: int) -> None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if mallopt := getattr(libc, "mallopt", None):
        mallopt(M_TRIM_THRESHOLD, 2 * MOST)
        mallopt(M_MMAP_THRESHOLD, piece)


def _on_matrices(plan: Plan) -> bool:
    """Whether it has jobs on matrices, or codes of whole tensors, or another plan does that is
    merged as it is read."""
    nested = (source for source in plan.sources.values() if isinstance(source, Plan))
    coded = any(job.code and job.code.codec in WHOLE for job in plan.jobs)
    return coded or any(job.matrix for job in plan.each) or any(map(_on_matrices, nested))
