"""Statistics over a whole model: one reduction streamed over many tensors, by workers and ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

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


def reduced(
    plan: Plan,
    jobs: Sequence[TensorJob],
    opening: Callable[[TensorJob, Plan], OpenJob],
    pool: ThreadPoolExecutor | None,
    ranks: Ranks,
) -> Any:
    """What the reduction of the jobs' method returns, in tasks that are merged in plan order.

    Ranks read a run of the tasks each. Where merging is exact a rank's folds are merged before they
    are exchanged, else all of them are exchanged and merged one by one. Without a pool tasks run
    here.
    """
    reduce = registry.get(str(jobs[0].method)).reduce
    assert reduce is not None

    def span(job: TensorJob) -> int:
        return max(1, job.output.numel) if job.matrix else SPAN

    tasks = [(job, start) for job in jobs for start in range(0, job.output.numel, span(job))]
    lengths = [min(span(job), job.output.numel - start) for job, start in tasks]
    mine = run_of(tasks, lengths, ranks)
    bunches = bunched(mine, lambda t: min(span(t[0]), t[0].output.numel - t[1]), SPAN)

    def part(fold: Fold, some: Sequence[tuple[TensorJob, int]], narrowed: Plan) -> list[Fold]:
        found: list[Fold] = []
        for job, start in some:
            ranks.check()
            if not found or not fold.exact:
                found.append(fold.fresh())
            with opening(job, narrowed) as opened:
                opened.observe(found[-1], start, min(start + span(job), job.output.numel))
        return found

    def fitted(fold: Fold, some: Sequence[tuple[TensorJob, int]]) -> list[Fold]:
        return fitting(plan, lambda narrowed: part(fold, some, narrowed))[0]

    def parts(fold: Fold) -> Iterator[Fold]:
        pending: list[Future[list[Fold]]] = []
        for some in bunches:
            pending.append(_submit(pool, fitted, fold, some))
            if len(pending) > 2 * plan.workers:
                yield from pending.pop(0).result()
        for future in pending:
            yield from future.result()

    def gathered(fold: Fold) -> list[Mapping[str, Any]]:
        if fold.exact:
            return [seen(_merged(fold, parts(fold)))]
        return [seen(one) for one in parts(fold)]

    def fill(fold: Fold) -> Fold:
        if ranks.count == 1:
            return _merged(fold, parts(fold))
        told = ranks.each(lambda: gathered(fold))
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
