"""Statistics over a whole model: one reduction streamed over many tensors, by workers and ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, NamedTuple, TypeVar

from mowmerge.checkpoint import naming
from mowmerge.methods import registry
from mowmerge.methods.contracts import Extent, Fold, Reduction, seen, with_seen
from mowmerge.plan import RUN, Plan, TensorJob
from mowmerge.ranks import Ranks
from mowmerge.room import fitting
from mowmerge.sharing import run_of
from mowmerge.streaming import OpenJob

T = TypeVar("T")
SPAN = 256 * RUN  # elements in one task


class Task(NamedTuple):
    """Elements start..stop of a job's tensor, and how many of other tasks come before."""

    job: TensorJob
    start: int
    stop: int
    before: int

    @property
    def length(self) -> int:
        """How many elements."""
        return self.stop - self.start

    @property
    def after(self) -> int:
        """How many there are with it."""
        return self.before + self.length


def reduced(
    plan: Plan,
    jobs: Sequence[TensorJob],
    opening: Callable[[TensorJob, Plan], OpenJob],
    pool: ThreadPoolExecutor | None,
    ranks: Ranks,
) -> Any:
    """What the reduction of the jobs' method returns, in tasks that are merged in plan order.

    Ranks read a run of the tasks each. Where merging is exact each worker merges what it has with
    the others', and a rank's folds are one when they are exchanged; else all of them are exchanged
    and merged one by one, in order. Without a pool tasks run here.
    """
    reduce = registry.get(str(jobs[0].method)).reduce
    assert reduce is not None

    def span(job: TensorJob) -> int:
        return max(1, job.output.numel) if job.matrix else SPAN

    tasks: list[Task] = []
    for job in jobs:
        for start in range(0, job.output.numel, span(job)):
            stop = min(start + span(job), job.output.numel)
            tasks.append(Task(job, start, stop, tasks[-1].after if tasks else 0))
    mine = run_of(tasks, [task.length for task in tasks], ranks)
    length = sum(task.length for task in mine)

    def part(fold: Fold, some: Sequence[Task], narrowed: Plan) -> list[Fold]:
        found: list[Fold] = []
        for task in some:
            ranks.check()
            if not found or not fold.exact:
                found.append(fold.fresh())
            with opening(task.job, narrowed) as opened:
                opened.observe(found[-1], task.start, task.stop, task.before)
        return found

    def fitted(fold: Fold, some: Sequence[Task]) -> list[Fold]:
        return fitting(plan, lambda narrowed: part(fold, some, narrowed))[0]

    def bunches(most: int) -> list[list[Task]]:
        return bunched(mine, lambda task: task.length, most)

    def parts(fold: Fold) -> Iterator[Fold]:
        pending: list[Future[list[Fold]]] = []
        for some in bunches(SPAN):
            pending.append(_submit(pool, fitted, fold, some))
            if len(pending) > 2 * plan.workers:
                yield from pending.pop(0).result()
        for future in pending:
            yield from future.result()

    def together(fold: Fold) -> Fold:
        total, lock = fold.fresh(), Lock()

        def work(some: Sequence[Task]) -> None:
            (found,) = fitted(fold, some)
            with lock:
                total.merge(found)

        few = bunches(max(SPAN, length // (4 * plan.workers)))  # each has memory of its own
        for future in [_submit(pool, work, some) for some in few]:
            future.result()
        return total

    def fill(fold: Fold) -> Fold:
        if ranks.count == 1:
            return together(fold) if fold.exact else _merged(fold, parts(fold))
        told = ranks.each(
            lambda: [seen(one) for one in ([together(fold)] if fold.exact else parts(fold))]
        )
        return _merged(fold, (with_seen(fold, one) for each in told for one in each))

    return driven(reduce([extent(job) for job in jobs]), fill)


def extent(job: TensorJob) -> Extent:
    """What a reduction is told of a tensor."""
    return Extent(
        job.output.shape,
        job.parameters,
        codec=job.code.codec if job.code else "",
        role=naming.role(job.output.name),
        matrix=job.matrix,
        rows=job.scope == "row",
        models=len(job.models),
    )


def driven(rounds: Reduction, fill: Callable[[Fold], Fold]) -> Any:
    """Runs a reduction to its end: each fold it yields is filled and sent back."""
    try:
        fold = next(rounds)
        while True:
            fold = rounds.send(fill(fold))
    except StopIteration as done:
        return done.value


def bunched(tasks: Sequence[T], length: Callable[[T], int], most: int) -> list[list[T]]:
    """Neighbours together as long as they are no more than `most` elements: small tensors cost less
    in one task than in thousands, for which workers wait on each other."""
    found: list[list[T]] = []
    filled = most
    for task in tasks:
        filled += length(task)
        if filled > most:
            found.append([])
            filled = length(task)
        found[-1].append(task)
    return found


def _submit(pool: ThreadPoolExecutor | None, function: Callable[..., T], *args: Any) -> Future[T]:
    if pool is not None:
        return pool.submit(function, *args)
    future: Future[T] = Future()
    future.set_result(function(*args))
    return future


def _merged(fold: Fold, parts: Iterable[Fold]) -> Fold:
    """The folds as one, merged in order."""
    total = fold.fresh()
    for one in parts:
        total.merge(one)
    return total
