"""Runs a plan: settles statistics, then streams every tensor through its method into a sink.

Workers share nothing but the plan. Blocks are multiples of 65,536 elements and reductions add up
runs of that size in index order, so the bytes do not depend on workers, ranks, block size or
shards, nor on how often a run was cut off and taken up.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from threading import Event, Lock
from typing import Any, Protocol

from mowmerge import devices
from mowmerge.anchor import Anchor, Give
from mowmerge.buffers import Desk, keeping_freed
from mowmerge.checkpoint.adapter import AdaptedReader
from mowmerge.checkpoint.journal import Journal
from mowmerge.checkpoint.placed import PlacedReader
from mowmerge.checkpoint.reader import StoredReader
from mowmerge.errors import CheckpointError
from mowmerge.methods import registry
from mowmerge.methods.contracts import Fold
from mowmerge.placement import Placed
from mowmerge.plan import RUN, Adapted, Plan, Source, Stored, TensorJob, Tied
from mowmerge.ranks import Ranks
from mowmerge.reduction import bunched, driven, extent, reduced
from mowmerge.report import TensorReport
from mowmerge.room import fitting
from mowmerge.scratch import FULL, Scratch
from mowmerge.sharing import share, spread
from mowmerge.streaming import OpenJob
from mowmerge.tensors import TensorHandle, TensorReader, TensorSpec, torch

BUNCH = 32 * RUN  # elements of small tensors that one worker writes in a row


class Sink(Protocol):
    """Where the bytes of output tensors go; called from any worker."""

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Takes a tensor's bytes from byte `start` on."""
        ...


@dataclass(frozen=True)
class Done:
    """A report on every tensor, how many of them, and bytes, each rank wrote, what methods say of
    their statistics over the model, and what the user should know."""

    reports: list[TensorReport]
    ranks: list[dict[str, int]]
    statistics: list[dict[str, Any]]
    warnings: list[str]


class Engine:
    """A plan with readers for its sources; one that is itself a plan is merged as it is read.

    With several ranks all of them call `run`, and `measure`, of the same plan.
    """

    def __init__(
        self,
        plan: Plan,
        stopped: Event | None = None,
        ranks: Ranks | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        self.plan, self.stopped, self.ranks = plan, stopped or Event(), ranks or Ranks()
        self.scratch = scratch
        self._nested: list[Engine] = []
        self._shared: dict[int, TensorReader] = {}
        self.readers: Mapping[str, TensorReader] = {
            name: self._reader(source) for name, source in plan.sources.items()
        }
        self._states: dict[int, Any] = {}
        self._desks: list[Desk] = []  # those that nobody sits at
        self._lock = Lock()

    def _reader(self, source: Source) -> TensorReader:
        """The source's tensors as they are read; one reader for all that read them."""
        if id(source) not in self._shared:
            self._shared[id(source)] = self._opened(source)
        return self._shared[id(source)]

    def _opened(self, source: Source) -> TensorReader:
        if isinstance(source, Stored):
            return StoredReader(source)
        if isinstance(source, Adapted):
            return AdaptedReader(self._reader(source.model), source)
        if isinstance(source, Placed):
            return PlacedReader([self._reader(lender) for lender in source.lenders], source)
        self._nested.append(Engine(source, self.stopped))
        return MergedReader(self._nested[-1])

    def run(self, sink: Sink, journal: Journal | None = None) -> Done:
        """Streams every tensor of the plan into the sink; one report a tensor, in plan order.

        What the journal says is done is not done again, and what gets done is told to it. Ranks
        write their shares, and each gets the reports of all.
        """
        self.ranks.together(lambda: devices.check(self.plan.devices))
        held = dict(journal.done) if journal else {}
        reports = {name: TensorReport(**entry) for name, entry in held.items()}
        mine = share(self.plan, held, self.ranks)
        largest_first = sorted(mine.jobs, key=lambda job: -job.read_bytes)

        def write(job: TensorJob) -> TensorReport:
            self.ranks.check()
            told = self._write(job, sink)
            files, nbytes = mine.written(job)
            if journal:
                all_files = len(mine.files_of(job))
                journal.finished(told.name, dict(vars(told)), nbytes, files, all_files)
            return told

        def written() -> list[TensorReport]:
            if self.ranks.first:
                self._check_ties()
            together = bunched(largest_first, lambda job: job.output.numel, BUNCH)
            futures = [pool.submit(lambda some: [*map(write, some)], some) for some in together]
            return [told for future in as_completed(futures) for told in future.result()]

        with one_thread_each(), keeping_freed(self.plan), self._pool() as pool:
            self._settle_groups(pool, journal)
            work = {"tensors": len(mine.jobs), "bytes": sum(mine.written(j)[1] for j in mine.jobs)}
            found = list(self.ranks.each(lambda: (written(), work)))
        for each, _ in reversed(found):  # what two ranks wrote parts of is told by the first
            reports |= {one.name: one for one in each}
        told = [reports[job.output.name] for job in self.plan.jobs]
        full = [FULL] if self.scratch and self.scratch.full else []
        return Done(told, [work for _, work in found], self._statistics(), full)

    def _statistics(self) -> list[dict[str, Any]]:
        """What methods say of their statistics over the model (`report` of the state), in order."""
        found = []
        for group, state in sorted(self._states.items()):
            told = getattr(state, "report", None)
            job = next(job for job in self.plan.each if job.group == group)
            if told is not None:
                found.append(
                    {"method": job.method, "models": [i.model for i in job.models], **told}
                )
        return found

    def measure(self, asked: Sequence[tuple[TensorJob, Fold]]) -> dict[str, Any]:
        """The total of each job's fold over the values its method works on, by tensor."""

        def total(job: TensorJob, fold: Fold) -> Any:
            def whole(plan: Plan) -> Any:
                with self.open(job, plan) as opened:
                    return opened.observe(fold.fresh(), 0, job.output.numel)

            return fitting(self.plan, whole)[0]

        mine = spread(asked, [job.read_bytes for job, _ in asked], self.ranks)

        def measured() -> dict[str, Any]:
            futures = {job.output.name: pool.submit(total, job, fold) for job, fold in mine}
            return {name: future.result().total for name, future in futures.items()}

        with one_thread_each(), self._pool() as pool:
            found = {name: it for part in self.ranks.each(measured) for name, it in part.items()}
        return {job.output.name: found[job.output.name] for job, _ in asked}

    @contextmanager
    def _pool(self) -> Iterator[ThreadPoolExecutor]:
        begin = devices.in_turn(self.plan.devices)
        pool = ThreadPoolExecutor(self.plan.workers, initializer=begin)
        try:
            yield pool
        except BaseException:
            self.stopped.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            self._rest()

    def _rest(self) -> None:
        """Keeps no file open, nor memory, until there is work again."""
        self._desks.clear()
        for reader in self._shared.values():
            of_adapters = reader.adapters if isinstance(reader, AdaptedReader) else ()
            for stored in (reader, *of_adapters):
                if isinstance(stored, StoredReader):
                    stored.rest()
        for engine in self._nested:
            engine._rest()

    def open(self, job: TensorJob, plan: Plan | None = None) -> OpenJob:
        """The job with its inputs open, for one thread; under a plan of other blocks or device."""
        mine = plan or devices.on_own(self.plan)
        return OpenJob(mine, job, self.readers, self.stopped, self._desks, scratch=self.scratch)

    def _write(self, job: TensorJob, sink: Sink) -> TensorReport:
        """Writes a tensor where there is room to make it."""
        write = self._write_plain if job.code is None else self._write_coded
        told, used = fitting(self.plan, lambda plan: write(job, sink, plan))
        if self.scratch:
            for one in job.each:
                if one.matrix and one.group is not None:
                    self.scratch.drop(one.group, one.output.name)
        if used.device not in self.plan.devices:
            own = devices.on_own(self.plan).device
            told.notes.append(f"too large for {own}: made on the {used.device}")
        return told

    def _write_plain(self, job: TensorJob, sink: Sink, plan: Plan) -> TensorReport:
        began = time.perf_counter()
        notes, size = [], job.output.itemsize
        with self.open(job, plan) as opened:
            give = self.settled(opened)
            for start, data in opened.given(give):
                sink.write(job.output.name, start * size, data)
            merged = give == opened.merged
            if not merged and job.output.kind != "float" and not opened.identical():
                notes = ["not a float tensor and not the same in every model: the first is kept"]
            figures = opened.stats.figures() if opened.stats else {}
        return TensorReport(
            name=job.output.name,
            action="merged" if merged else "copied",
            method=job.method if merged else None,
            read_bytes=job.read_bytes,
            written_bytes=sum(spec.nbytes for spec in job.stored),
            seconds=time.perf_counter() - began,
            figures=figures,
            notes=notes,
        )

    def _write_coded(self, job: TensorJob, sink: Sink, plan: Plan) -> TensorReport:
        """An anchor and the parts of its code, a block of whole rows at a time."""
        began = time.perf_counter()
        with ExitStack() as stack:
            opened = stack.enter_context(self.open(job, plan))
            if job.anchor is not None:
                below = stack.enter_context(self.open(job.anchor, plan))
                opened.below = Anchor(self.settled(below), job.anchor, below.block)
            self.settle(opened)
            for start, stop in opened.blocks():
                for name, at, data in opened.coded(start, stop):
                    sink.write(name, at, data)
            figures = (opened.stats.figures() if opened.stats else {}) | opened.told
        return TensorReport(
            name=job.output.name,
            action="dynamic",
            method=job.method,
            read_bytes=job.read_bytes + (job.anchor.read_bytes if job.anchor else 0),
            written_bytes=job.output.nbytes + sum(part.nbytes for part in job.parts),
            seconds=time.perf_counter() - began,
            figures=figures,
        )

    def settled(self, opened: OpenJob) -> Callable[[int, int], Give]:
        """What gives the job's blocks, `copied` or `merged`, with its method's state in place."""
        job = opened.job
        if job.method is None or job.output.kind != "float" or opened.identical():
            return opened.copied
        self.settle(opened)
        return opened.merged

    def settle(self, opened: OpenJob) -> None:
        """Gives the job its method's state, where that has one."""
        job = opened.job
        if job.group is not None:
            with self._lock:  # a nested plan settles when it is first read
                if job.group not in self._states:
                    self._states[job.group] = self._settle_group(job.group, None)
            opened.state = self._states[job.group]
        elif job.scope in ("row", "tensor") and opened.spec.reduce and job.output.numel:
            rounds, numel = opened.spec.reduce([extent(job)]), job.output.numel
            opened.state = driven(rounds, lambda fold: opened.observe(fold.fresh(), 0, numel))

    def prepare(self, journal: Journal) -> None:
        """Settles what is taken over the whole model, for one who reads merged tensors then."""
        with self._pool() as pool:
            self._settle_groups(pool, journal)

    def _settle_groups(self, pool: ThreadPoolExecutor, journal: Journal | None) -> None:
        for group in sorted({job.group for job in self.plan.each if job.group is not None}):
            self._states[group] = self._group_state(group, pool, journal)

    def _group_state(self, group: int, pool: ThreadPoolExecutor, journal: Journal | None) -> Any:
        """A group's state: the one kept, or found in a pass over the whole model and kept."""
        method = next(job.method for job in self.plan.each if job.group == group)
        home = sys.modules[registry.get(str(method)).function.__module__]
        classes = [kind for kind in vars(home).values() if isinstance(kind, type)]
        if journal is None:
            return self._settle_group(group, pool)
        state = self.ranks.from_first(lambda: journal.state(group, classes))
        if state is None:
            state = self._settle_group(group, pool)
            self.ranks.from_first(lambda: journal.keep_state(group, state))
        return state

    def _settle_group(self, group: int, pool: ThreadPoolExecutor | None) -> Any:
        """Runs a reduction over every job of a group; a nested plan is for each rank to read."""
        jobs = [job for job in self.plan.each if job.group == group]
        ranks = self.ranks if pool is not None else Ranks()
        return reduced(self.plan, jobs, self.open, pool, ranks)

    def _check_ties(self) -> None:
        for tied in self.plan.tied:
            self._check_tied(tied)
        for engine in self._nested:
            engine._check_ties()

    def _check_tied(self, tied: Tied) -> None:
        """CheckpointError where a tied tensor differs from what the base ties it to."""
        reader, size = self.readers[tied.model], tied.spec.itemsize
        with (
            closing(reader.open(tied.spec.name)) as one,
            closing(reader.open(tied.source.name)) as two,
        ):
            for start in range(0, tied.spec.numel, 16 * RUN):
                stop = min(start + 16 * RUN, tied.spec.numel)
                pieces = []
                for handle in (one, two):
                    pieces.append(bytearray((stop - start) * size))
                    handle.read(start, stop, memoryview(pieces[-1]))
                if pieces[0] != pieces[1]:
                    raise CheckpointError(
                        f"'{tied.spec.name}' is not '{tied.source.name}', its tie in the base",
                        where=f"model '{tied.model}'",
                        hint="it would be lost: use a base that stores this tensor, or drop it with"
                        " a rule",
                    )


@contextmanager
def one_thread_each() -> Iterator[None]:
    """One intra-op thread a worker: reductions inside torch depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class MergedReader:
    """A plan as a TensorReader: a nested recipe, with the bytes that its own merge would write."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._jobs = {job.output.name: job for job in engine.plan.jobs}

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The nested plan's output tensors."""
        return self.engine.plan.specs

    def open(self, name: str) -> TensorHandle:
        """A handle that merges what is read from it."""
        return _MergedHandle(self.engine, self._jobs[name])


class _MergedHandle:
    """Merges block by block; keeps the last one, since what is read next mostly continues it."""

    def __init__(self, engine: Engine, job: TensorJob) -> None:
        self._opened, self._job = engine.open(job).__enter__(), job
        try:
            self._give = engine.settled(self._opened)
        except BaseException:
            self.close()
            raise
        self._start, self._data = 0, b""

    def read(self, start: int, stop: int, out: memoryview) -> None:
        size, block = self._job.output.itemsize, self._opened.step(self._give)
        at = start * size
        while at < stop * size:
            if not self._start <= at < self._start + len(self._data):
                first = at // size // block * block
                last = min(first + block, self._job.output.numel)
                self._start, self._data = first * size, bytes(self._give(first, last)())
            piece = self._data[at - self._start : stop * size - self._start]
            out[at - start * size : at - start * size + len(piece)] = piece
            at += len(piece)

    def advise(self, start: int, stop: int) -> None:
        pass

    def close(self) -> None:
        self._opened.__exit__()
