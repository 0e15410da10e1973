"""The matrices of a job, of which each is read when it is asked for, and the products that they
are where adapters make them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mowmerge.buffers import Desk, allocate
from mowmerge.checkpoint.adapter import AdaptedReader
from mowmerge.errors import CheckpointError
from mowmerge.methods import registry
from mowmerge.methods.contracts import Block, Draws, Once
from mowmerge.plan import Adapted, Input, Plan, TensorJob
from mowmerge.tensors import Tensor, TensorHandle, TensorReader, torch


@dataclass(frozen=True)
class Read:
    """N matrices [m,k] as `contracts.Matrices`: `read` gives a new tensor each time."""

    shape: tuple[int, int, int]
    dtype: Any
    read: Callable[[int], Tensor]

    def dim(self) -> int:
        """3."""
        return len(self.shape)

    def numel(self) -> int:
        """Of all of them."""
        return math.prod(self.shape)

    @property
    def mT(self) -> Read:
        """Their transposes."""
        n, m, k = self.shape
        return Read((n, k, m), self.dtype, lambda i: self.read(i).T)

    def double(self) -> Read:
        """The same in fp64."""
        return replace(self, dtype=torch.float64, read=lambda i: self.read(i).double())

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, i: int, /) -> Tensor:
        return self.read(range(len(self))[i])

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.read, range(len(self)))


class Matrix:
    """A job on a matrix: its inputs read whole, one at a time, and nothing of them kept but the
    base."""

    def __init__(
        self,
        plan: Plan,
        job: TensorJob,
        readers: Mapping[str, TensorReader],
        desk: Desk,
        handles: Sequence[TensorHandle],
    ) -> None:
        self._plan, self._job, self._readers = plan, job, readers
        self._desk, self._handles = desk, handles
        self._spec = registry.get(job.method or "passthrough")
        self.deltas = job.base is not None and self._spec.values == "deltas"

    @property
    def each(self) -> Read:
        """What a method works on: models, or deltas."""
        rows, columns = self._job.output.shape
        return Read((len(self._job.models), rows, columns), self._desk.dtype, self._one)

    @cached_property
    def base(self) -> Tensor | None:
        """All of the base, where the method needs it."""
        needed = self.deltas or "base" in self._spec.inputs
        return self._whole(0) if self._job.base and needed else None

    def block(self, draws: Draws, once: Once) -> Block:
        """All of it, for a fold."""
        job, asked = self._job, self._spec.inputs
        return Block(
            torch.empty(len(job.models), 0, dtype=self._desk.dtype, device=self._plan.device),
            job.parameters,
            draws,
            job.output.numel,
            self.base.view(job.output.shape) if self.base is not None and "base" in asked else None,
            self.each,
            self.factors if "factors" in asked else None,
            once,
        )

    @cached_property
    def factors(self) -> list[tuple[Tensor, Tensor]] | None:
        """B [m,r], A [r,k] of what each model adds, where all are adapters on the base of low rank;
        else None."""
        job, sources = self._job, self._plan.sources
        if not job.matrix or job.base is None:
            return None
        found: list[tuple[Tensor, Tensor]] = []
        for given in job.models:
            if given.spec.name != job.base.spec.name:  # of another layer than the base's
                return None
            reader, origin = self._readers[given.model], sources[given.model]
            if not isinstance(reader, AdaptedReader) or not isinstance(origin, Adapted):
                return None
            pair = reader.factors(given.spec.name) if origin.model == sources["base"] else None
            if pair is None:
                return None
            left, right = (part.to(self._plan.device, self._desk.dtype) for part in pair)
            found.append((left, right))
        return found

    def _one(self, i: int) -> Tensor:
        """A model or delta [m,k]."""
        found = self._whole(i + (self._job.base is not None))
        if self.deltas and self.base is not None:
            found -= self.base
        return found.view(self._job.output.shape)

    def _whole(self, i: int) -> Tensor:
        """All of an input, in new memory; its numbers are finite."""
        found = allocate(self._job.output.numel, self._desk.dtype, self._plan.device)
        self._desk.way.whole(i, found, self._into)
        if not math.isfinite(found.sum().item()):
            count = len(found) - int(torch.isfinite(found).sum())
            if count:
                raise not_finite(self._job.inputs[i], count)
        return found

    def _into(self, i: int, start: int, stop: int, out: memoryview) -> None:
        self._handles[i].read(start, stop, out)


def not_finite(given: Input, count: int) -> CheckpointError:
    """For a tensor with so many NaN or Inf in a block."""
    return CheckpointError(
        f"tensor '{given.spec.name}' holds NaN or Inf ({count} in one block)",
        where=f"model '{given.model}'",
        hint="the file is damaged or the training diverged: leave this model out",
    )
