"""Who does what of a merge that several ranks share, from the plan and their number alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mowmerge.plan import Plan, TensorJob
from mowmerge.ranks import Ranks

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """One rank's part of a merge: the jobs it runs, and the files it alone writes to.

    Without `files` all ranks write to all. With them a job whose tensors lie in files of two ranks
    is run by both, and each keeps what is its own. `first` says that what no job makes is for it.
    """

    jobs: tuple[TensorJob, ...]
    places: dict[str, str]
    files: frozenset[str] | None = None
    first: bool = True

    def files_of(self, job: TensorJob) -> list[str]:
        """The files that hold what a job makes, each once."""
        return list(dict.fromkeys(self.places[spec.name] for spec in (*job.stored, *job.parts)))

    def written(self, job: TensorJob) -> tuple[list[str], int]:
        """The files that this rank writes of a job, and how many bytes."""
        files = [file for file in self.files_of(job) if self.files is None or file in self.files]
        specs = (*job.stored, *job.parts)
        return files, sum(spec.nbytes for spec in specs if self.places[spec.name] in files)

    def writes(self, name: str) -> bool:
        """Whether a tensor that no job makes, of a head or a router, is for this rank."""
        return self.first if self.files is None else self.places[name] in self.files


def share(plan: Plan, done: Collection[str], ranks: Ranks) -> Share:
    """The rank's part of what is not done: tensors spread by bytes, or across hosts whole files.

    Two hosts that write to one file of a shared file system may overwrite each other's pages.
    """
    places = {name: shard.file for shard in plan.files for name in shard.offsets}
    rest = [job for job in plan.jobs if job.output.name not in done]
    if not ranks.across:
        mine = spread(rest, [cost(job) for job in rest], ranks)
        return Share(tuple(mine), places, None, ranks.first)
    whole = Share(plan.jobs, places)
    files = frozenset(f for f, rank in _writers(whole, plan, ranks).items() if rank == ranks.rank)
    mine = [job for job in rest if files & set(whole.files_of(job))]
    return Share(tuple(mine), places, files, ranks.first)


def cost(job: TensorJob) -> int:
    """Bytes that a job moves."""
    read = sum(one.read_bytes for one in job.each)
    return read + sum(spec.nbytes for spec in (*job.stored, *job.parts))


def spread(items: Sequence[T], costs: Sequence[int], ranks: Ranks) -> list[T]:
    """This rank's items: the largest first, each goes to the rank that has least to do."""
    loads, mine = [0] * ranks.count, []
    for i in sorted(range(len(items)), key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        loads[least] += costs[i]
        if least == ranks.rank:
            mine.append(i)
    return [items[i] for i in sorted(mine)]


def run_of(items: Sequence[T], costs: Sequence[int], ranks: Ranks) -> list[T]:
    """This rank's run of the items, after those of the ranks before it: an item goes to the rank in
    whose part of the row its middle lies."""
    mine, at, total = [], 0, max(1, sum(costs))
    for item, each in zip(items, costs, strict=True):
        if min(ranks.count - 1, (2 * at + each) * ranks.count // (2 * total)) == ranks.rank:
            mine.append(item)
        at += each
    return mine


def _writers(whole: Share, plan: Plan, ranks: Ranks) -> dict[str, int]:
    """The rank that writes each file: that in whose part of the plan the file's middle lies.

    So the files of a dynamic merge's anchors and codes go where their jobs are.
    """
    ends: dict[str, tuple[int, int]] = {}
    at = 0
    for job in plan.jobs:
        after = at + cost(job)
        for file in whole.files_of(job):
            ends[file] = (ends.get(file, (at, 0))[0], after)
        at = after
    found = {shard.file: 0 for shard in plan.files}
    for file, (first, last) in ends.items():
        found[file] = min(ranks.count - 1, (first + last) * ranks.count // (2 * max(1, at)))
    return found
