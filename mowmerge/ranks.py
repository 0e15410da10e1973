"""The ranks that share one merge, as torchrun starts them: how they keep in step.

All go through the same exchanges in the same order. What a rank does before one is given to it as a
function: where that fails on one rank the exchange fails on all, and nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

from mowmerge.errors import MowmergeError, Problem, ResourceError

T = TypeVar("T")
Send = Callable[[Any, int, bool], Any]


class Lost(ResourceError):
    """Another rank ended without a word, or has said none for too long."""


class Stopped(Exception):
    """This rank gave up because another one had failed."""


@dataclass(frozen=True)
class Ranks:
    """This process's rank, how many there are, and how many of them on this host.

    `send(value, source, patient)` gives all ranks the value of that one; `alarm` is a file that is
    there when one of them has failed, in a folder that all see.
    """

    rank: int = 0
    count: int = 1
    here: int = 1
    send: Send = lambda value, source, patient: value
    alarm: Path | None = None

    @property
    def first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0

    @property
    def across(self) -> bool:
        """Whether they are on several hosts."""
        return self.here != self.count

    def watching(self, alarm: Path) -> Ranks:
        """These ranks, with a file by which one that fails tells the others before they meet."""
        return replace(self, alarm=alarm)

    def check(self) -> None:
        """Stopped where another rank has failed."""
        if self.count > 1 and self.alarm is not None and self.alarm.exists():
            raise Stopped

    def together(self, work: Callable[[], T], *, patient: bool = False) -> T:
        """What `work` returns here, once all ranks are done with theirs; `patient` waits for days.

        Raises:
            MowmergeError: what `work` raised, on this rank or on another.
            Lost: another rank is gone.
        """
        if self.count == 1:
            return work()
        found, error = None, None
        try:
            found = work()
        except Exception as raised:
            error = raised
            if self.alarm is not None and not isinstance(raised, Stopped):
                with suppress(OSError):
                    self.alarm.touch()
        try:
            told = [self.send(_told(error), rank, patient) for rank in range(self.count)]
        except Lost as lost:
            raise error or lost from None
        failed = [rank for rank, fault in enumerate(told) if fault is not None]
        failed.sort(key=lambda rank: told[rank][0] is Stopped)  # they only followed another
        if error is not None and (not isinstance(error, Stopped) or told[failed[0]][0] is Stopped):
            raise error
        if failed:
            kind, problems = told[failed[0]]
            raise kind([replace(p, message=f"rank {failed[0]}: {p.message}") for p in problems])
        return cast(T, found)

    def each(self, work: Callable[[], T]) -> Iterator[T]:
        """What `work` returns on each rank, in order of rank; raises as `together`."""
        found = self.together(work)
        for rank in range(self.count):
            yield self.send(found if rank == self.rank else None, rank, False)

    def from_first(self, work: Callable[[], T], *, patient: bool = False) -> T:
        """What `work` returns on rank 0, where alone it is done; raises as `together`."""
        found = self.together(lambda: work() if self.first else None, patient=patient)
        return cast(T, self.send(found, 0, False))

    def alike(self, facts: Mapping[str, Any], differ: Callable[..., list[str]]) -> None:
        """ResourceError where a rank sees something else than rank 0; `differ` says what."""
        wanted = self.from_first(lambda: facts)

        def compare() -> None:
            changes = differ(wanted, facts)
            if changes:
                raise ResourceError(
                    f"this is not what rank 0 is about to do: {'; '.join(changes[:4])}",
                    hint="all ranks need the same recipe, inputs, options and versions",
                )

        self.together(compare)


@contextmanager
def heard(minutes: float, again: str) -> Iterator[None]:
    """Lost, where an exchange finds another rank gone, or hears nothing of it for that long."""
    try:
        yield
    except RuntimeError as error:
        late = "timed out" in str(error).lower()
        raise Lost(
            f"another rank has said nothing for {minutes:g} minutes" if late
            else "the connection to another rank is gone",
            hint=f"{again}: what is done is kept",
        ) from error  # fmt: skip


def _told(error: Exception | None) -> tuple[type[Exception], tuple[Problem, ...]] | None:
    """An error as it goes to the other ranks."""
    if error is None:
        return None
    if isinstance(error, MowmergeError):
        return type(error), error.problems
    kind = Stopped if isinstance(error, Stopped) else ResourceError
    said = Problem(f"{type(error).__name__}: {error}", "", "that rank's own output says more")
    return kind, (said,)


@contextmanager
def joined(rank: int, count: int, here: int, minutes: float) -> Iterator[Ranks]:
    """The ranks of the process group that stands, who wait for each other that long."""
    from torch import distributed

    hasty, patient = (
        distributed.new_group(backend="gloo", timeout=timedelta(minutes=wait))
        for wait in (minutes, 30 * 24 * 60)
    )

    def send(value: Any, source: int, waiting: bool) -> Any:
        box = [value]
        with heard(minutes, "run it again with --resume"):
            distributed.broadcast_object_list(box, source, patient if waiting else hasty)
        return box[0]

    try:
        yield Ranks(rank, count, here, send)
    except MowmergeError as error:
        if not isinstance(error, Lost):
            with suppress(Lost):
                send(None, 0, False)  # rank 0 tidies up, and torchrun kills it when another ends
        raise
    finally:
        for group in (hasty, patient):
            with suppress(Exception):  # where a rank is gone there is nobody to take leave of
                distributed.destroy_process_group(group)
