"""One tensor on one worker: its inputs read block by block, its method applied, its bytes given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from threading import Event
from typing import Any

from mowmerge import coding, staging
from mowmerge.anchor import Anchor, Give
from mowmerge.blocks import block_length
from mowmerge.buffers import Desk, Make, seat
from mowmerge.checkpoint import naming
from mowmerge.errors import CheckpointError
from mowmerge.matrices import Matrix, Read, not_finite
from mowmerge.methods import registry
from mowmerge.methods.contracts import Block, Draws, Fold, Once, anew
from mowmerge.plan import Plan, TensorJob
from mowmerge.report import DeltaStats
from mowmerge.scratch import Scratch
from mowmerge.tensors import Tensor, TensorHandle, TensorReader, torch

SAMPLE_RUN = 1024  # elements in a contiguous piece of a sample
AHEAD = 8  # blocks that are asked for while one is worked on


class OpenJob:
    """A job with its handles open and its buffers allocated; used by one thread."""

    def __init__(
        self,
        plan: Plan,
        job: TensorJob,
        readers: Mapping[str, TensorReader],
        stopped: Event,
        desks: list[Desk],
        scratch: Scratch | None = None,
    ) -> None:
        self.plan, self.job, self._readers, self._stopped = plan, job, readers, stopped
        self._desks = desks
        self._once: Once = anew
        if scratch and job.matrix and job.group is not None:
            self._once = scratch.once(job.group, job.output.name, plan.device)
        self.spec = registry.get(job.method or "passthrough")
        self.state: Any = None
        self.below: Anchor | None = None  # of a dynamic method that asks for one
        self.block = block_length(plan.block, job, whole=self.spec.reduce is None)
        by_row = job.scope == "row"
        self._step = self.block if by_row else max(1, min(plan.block, job.output.numel))
        whole = job.scope == "tensor" and self.spec.reduce is None
        self._by_matrix = job.matrix and job.code is None
        self._shaped = by_row or whole or job.matrix
        self._stretch = min(self.block, plan.block)  # what is compared or copied at a time
        self._deltas = job.base is not None and self.spec.values == "deltas"
        self._parts: coding.Parts | None = None
        self.told: dict[str, Any] = {}  # what a method says of its code
        self._values: tuple[tuple[int, int], Tensor] | None = None  # of the block that lies there
        self._handles: list[TensorHandle] = []

    def __enter__(self) -> OpenJob:
        try:
            for given in self.job.inputs:
                self._handles.append(self._readers[given.model].open(given.spec.name))
            self._desk = self._seat()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: object = None, *exc: object) -> None:
        self._close()
        self._desk.way.close()
        if kind is None and self._desk.way.lasts and len(self._desks) < self.plan.workers:
            self._desks.append(self._desk)

    def _close(self) -> None:
        while self._handles:
            self._handles.pop().close()

    def _seat(self) -> Desk:
        job, block = self.job, max(self.block, self._step)
        kinds = tuple(given.spec.dtype for given in job.inputs)
        make = (kinds, job.output.dtype, self.plan.device, block, min(block, self.plan.block))
        return seat(self._desks, Make(*make))

    @cached_property
    def stats(self) -> DeltaStats | None:
        """What is to be told of the deltas, where that is wanted."""
        job = self.job
        watched = self.plan.stats and job.base is not None and job.output.kind == "float"
        return DeltaStats(len(job.models)) if watched else None

    def step(self, give: Callable[[int, int], Give]) -> int:
        """The most elements that `copied` or `merged` gives at a time."""
        return self._stretch if give == self.copied else self.block

    def blocks(self, length: int | None = None) -> Iterator[tuple[int, int]]:
        """(start, stop) of each block in order, asking ahead for the next; ends a stopped run."""
        numel, block = self.job.output.numel, length or self.block
        for i, start in enumerate(range(0, numel, block)):
            if self._stopped.is_set():
                raise KeyboardInterrupt
            stop = min(start + block, numel)
            if i % AHEAD == 0 and stop < numel:
                for handle in self._handles:
                    handle.advise(stop, min(stop + 2 * AHEAD * block, numel))
            yield start, stop

    def given(self, give: Callable[[int, int], Give]) -> Iterator[tuple[int, memoryview]]:
        """The first element and the bytes of each block, of `copied` or `merged`, in order: one is
        given when the next, where the device does that beside, is on its way."""
        before: tuple[int, Give] | None = None
        for start, stop in self.blocks(self.step(give)):
            ready = give(start, stop)
            if not self._desk.way.behind:
                yield start, ready()
                continue
            if before:
                yield before[0], before[1]()
            before = start, ready
        if before:
            yield before[0], before[1]()

    def identical(self) -> bool:
        """Whether the output is a copy: all that decides it has the same bytes.

        A tensor that equals the base in every model is the base's, for every method that needs a
        base; one that is equal in every model is that, for methods that are idempotent.
        """
        job, spec = self.job, self.spec
        if job.output.kind == "float" and job.method:
            alike = spec.needs_base or spec.holds("idempotent", job.parameters)
            if not alike or len({i.spec.dtype for i in job.inputs[self._first :]}) > 1:
                return False
        if len(job.inputs) - self._first == 1:
            return True
        return all(self._equal(start, stop) for start, stop in self.blocks(self._stretch))

    @property
    def _first(self) -> int:
        """The input that a copy is made of: the base, or the first model where none is needed."""
        job = self.job
        models_only = job.base and job.method and not self.spec.needs_base
        return 1 if models_only and job.output.kind == "float" else 0

    def _equal(self, start: int, stop: int) -> bool:
        first, *rest = self._read(start, stop)[self._first :]
        bits = first.view(torch.uint8)
        return all(torch.equal(bits, row.view(torch.uint8)) for row in rest)

    def copied(self, start: int, stop: int) -> Give:
        """A block of a copy in the output's dtype: what gives its bytes, until the next but one is
        asked for."""
        job = self.job
        if job.output.kind == "float":
            base, values = self._working(start, stop, check=True)
            if self.stats and base is not None:
                deltas = self._apart(base, values)
                self.stats.update(deltas, deltas[0])

        def give() -> memoryview:
            value = self._read(start, stop)[self._first]
            if job.inputs[self._first].spec.dtype != job.output.dtype:
                return self._cast(value, start, stop)()
            return staging.data(value)

        return give

    def merged(self, start: int, stop: int) -> Give:
        """A block of the merged tensor in the output's dtype: what gives its bytes, until the next
        but one is asked for."""
        if self._by_matrix:
            return self._of_matrix(start, stop)
        later = self._desk.way.behind and not self._shaped  # decompositions want numbers
        unseen = not self.spec.holds("propagates", self.job.parameters)
        base, values = self._working(start, stop, check=unseen and not later)
        inputs = None
        if unseen and later:
            inputs = values.sum() if base is None else values.sum() + base.sum()
        result = self._applied(base, values, start)
        self._watch(base, values, result)
        merged = result.add_(base) if self._deltas and base is not None else result
        return self._cast(merged, start, stop, inputs)

    def _of_matrix(self, start: int, stop: int) -> Give:
        """The same of a matrix, which its method makes at the first."""
        result = self._made[start:stop].clone()
        if self.stats:
            self._watch(*self._working(start, stop, check=False), result)
        if self._deltas and self._matrix.base is not None:
            result += self._matrix.base[start:stop]
        return self._cast(result, start, stop)

    @cached_property
    def _made(self) -> Tensor:
        self._values = None  # memory that is read into as well
        return self._applied(self._matrix.base, self._matrix.each, 0)

    def _watch(self, base: Tensor | None, values: Tensor, result: Tensor) -> None:
        """Takes down what is to be told of a block; its values may be overwritten."""
        if self.stats and base is not None:
            moved = result if self._deltas else result - base
            self.stats.update(self._apart(base, values), moved)

    def parts(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The base [B], and what each model adds to it at a coefficient of 1 [N,B]: a fit's terms.

        For a method on deltas that is linear in the parameter it has fitted; new tensors.
        """
        base, values = self._working(start, stop, check=True)
        assert base is not None
        rows = []
        for k in range(len(values)):
            alone = tuple(float(i == k) for i in range(len(values)))
            rows.append(self._applied(base, values, start, **{str(self.spec.fit): alone}))
        return base.clone(), torch.stack(rows)

    def _applied(
        self, base: Tensor | None, values: Tensor | Read, start: int, **changed: Any
    ) -> Tensor:
        """What the method makes of a block, or of a matrix: a weight, or a delta [B]."""
        found = self._found(base, values, start, **changed)
        result: Tensor = found[0] @ found[1] if isinstance(found, tuple) else found
        return result.reshape(-1)

    def _found(self, base: Tensor | None, values: Tensor | Read, start: int, **changed: Any) -> Any:
        job, spec = self.job, self.spec
        shape = (-1, *job.output.shape[1:]) if self._shaped and job.output.shape[1:] else (-1,)
        given: dict[str, Any] = {**job.parameters, **changed}
        if "state" in spec.inputs:
            given["state"] = self.state
        if "rng" in spec.inputs:
            given["rng"] = self._draws(start)
        if "role" in spec.inputs:
            given["role"] = naming.role(job.output.name)
        if "start" in spec.inputs:
            given["start"] = start
        if "base" in spec.inputs:
            given["base"] = base.view(shape) if base is not None else None
        if "factors" in spec.inputs:
            given["factors"] = self.factors
        if "once" in spec.inputs:
            given["once"] = self._once
        shaped = values if isinstance(values, Read) else values.view(len(values), *shape)
        return spec.function(shaped, **given)

    def product(self) -> tuple[Tensor, Tensor] | None:
        """The merged delta of a matrix as B [m,r], A [r,k], where all of the models' are such
        products and the method keeps it one; the matrix is not read."""
        if "factors" not in self.spec.inputs or self.factors is None:
            return None
        found = self._found(None, self._matrix.each, 0)
        return found if isinstance(found, tuple) else None

    @property
    def factors(self) -> list[tuple[Tensor, Tensor]] | None:
        """B [m,r], A [r,k] of what each model adds to a matrix, where all are adapters on the base
        of low rank; else None."""
        return self._matrix.factors

    @cached_property
    def _matrix(self) -> Matrix:
        """The job's matrix, if it is on one."""
        return Matrix(self.plan, self.job, self._readers, self._desk, self._handles)

    def coded(self, start: int, stop: int) -> Iterator[tuple[str, int, memoryview]]:
        """The anchor's bytes and those of its code's parts, for a block of whole rows: each with
        its tensor's name and the byte there from which on it lies."""
        job, code, spec = self.job, self.job.code, self.spec
        assert code is not None
        anchor = self.below.data(start, stop) if self.below else None
        if anchor is not None:
            yield job.output.name, start * job.output.itemsize, anchor
        base, values = self._working(start, stop, check=True)
        below = self.below.of(anchor, values) if self.below and anchor is not None else None
        given: dict[str, Any] = {"state": self.state, "start": start}
        if "factors" in spec.inputs:
            given["factors"] = self.factors
        parts = coding.made(job, spec, base, values, below, given)
        if "lost" in parts:
            self.told["lost"] = parts["lost"].tolist()
            self.told["svd"] = "randomised" if parts["drawn"] else "exact"
        made = parts.pop("anchor")
        if anchor is None:
            yield (
                job.output.name,
                start * job.output.itemsize,
                self._cast(made.reshape(-1), start, stop)(),
            )
        if self.stats and base is not None:
            made = made.reshape(-1)
            for at in range(0, len(base), self.plan.block):
                some = slice(at, at + self.plan.block)
                deltas = values[:, some] if self._deltas else values[:, some] - base[some]
                self.stats.update(deltas, made[some] - base[some])
        self._parts = self._parts or coding.Parts(code)
        yield from self._parts.pieces(parts, start, stop)

    def observe(self, fold: Fold, start: int, stop: int, before: int = 0) -> Fold:
        """Feeds elements start..stop, or a sample of them, to a fold; `before` is how many of other
        tensors came before them, so that a sample is as large as asked for of all together."""
        if self._by_matrix:
            fold.observe(self._matrix.block(self._draws(0), self._once))
            return fold
        wide = self._step
        shape: tuple[int, ...] = (-1,)
        if self.job.scope == "row":  # a vector is one
            shape = (-1, *(self.job.output.shape[1:] or self.job.output.shape or (1,)))
        row = math.prod(shape[1:])
        if fold.share < 1:
            wide = max(row, SAMPLE_RUN // row * row)
            due = [round(at * fold.share / wide) for at in (before, before + stop - start)]
            pieces, rows = due[1] - due[0], (stop - start) // row
            starts: Iterable[int] = (start + rows * i // pieces * row for i in range(pieces))
        else:
            starts = range(start, stop, wide)
        for first in starts:
            if self._stopped.is_set():
                raise KeyboardInterrupt
            base, values = self._working(first, min(first + wide, stop), check=False)
            fold.observe(
                Block(
                    values.view(len(values), *shape),
                    self.job.parameters,
                    self._draws(first),
                    self.job.output.numel,
                    base.view(shape) if base is not None and "base" in self.spec.inputs else None,
                    anchor=self.below.beside(values, first).view(shape) if self.below else None,
                )
            )
        return fold

    def _working(self, start: int, stop: int, *, check: bool) -> tuple[Tensor | None, Tensor]:
        """The base [B] and what the method works on, models or deltas [N,B]; they stay as they are
        from one pass to the next, so that a tensor of one block is read once."""
        if self._values is None or self._values[0] != (start, stop):
            values = self._desk.way.fill(start, stop, self._into)
            if self._deltas and self.job.base:
                values[1:].sub_(values[0])
            self._values = (start, stop), values
        values = self._values[1]
        if check and not math.isfinite(values.sum().item()):
            self._blame(start, stop)
            return self._working(start, stop, check=False)  # each is finite, and their sum is not
        return (values[0], values[1:]) if self.job.base else (None, values)

    def _apart(self, base: Tensor, values: Tensor) -> Tensor:
        """The deltas [N,B] of the block that lies there, once its method is done with it."""
        if self._deltas:
            return values
        self._values = None
        return values.sub_(base)

    def _blame(self, start: int, stop: int) -> None:
        """Raises for the first input with a NaN or Inf in the block, if there is one."""
        bad = [0] * len(self.job.inputs)
        for first in range(start, stop, self._stretch):
            for i, row in enumerate(self._read(first, min(first + self._stretch, stop))):
                bad[i] += row.numel() - int(torch.isfinite(row).sum())
        for given, found in zip(self.job.inputs, bad, strict=True):
            if found:
                raise not_finite(given, found)

    def _read(self, start: int, stop: int) -> list[Tensor]:
        """A block of every input on the host, in its own dtype; the values may be overwritten."""
        self._values = None
        return self._desk.way.raw(start, stop, self._into)

    def _into(self, i: int, start: int, stop: int, out: memoryview) -> None:
        """Reads elements of input i."""
        self._handles[i].read(start, stop, out)

    def _draws(self, start: int) -> Draws:
        job = self.job
        seed = int(job.parameters.get("seed", 0))
        return Draws(seed, [i.model for i in job.models], job.output.name, start)

    def _cast(self, weight: Tensor, start: int, stop: int, inputs: Tensor | None = None) -> Give:
        """What gives the bytes of a result in the output's dtype, and if that is not finite, or
        this sum of inputs is not, says whose fault it is."""
        taken = self._desk.way.take(weight, inputs)

        def give() -> memoryview:
            out, total = taken()
            if not math.isfinite(total):
                self._blame(start, stop)
                if not bool(torch.isfinite(out).all()):
                    raise CheckpointError(
                        f"the merged '{self.job.output.name}' overflows {self.job.output.dtype}",
                        hint="lower scale or the weights, or set output.dtype to a wider type",
                    )
            return staging.data(out)

        return give
