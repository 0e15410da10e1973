"""The ranks that share one merge, as torchrun starts them: how they keep in step.

All go through the same exchanges in the same order. What a rank does before one is given to it as a
function: where that fails on one rank the exchange fails on all, and nobody waits for it. While a
rank works it says so now and then: one that is silent for too long is gone.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from mowmerge.errors import MowmergeError, Problem, ResourceError

T = TypeVar("T")
Send = Callable[[Any, int], Any]
BEAT = 10.0  # seconds after which a rank that works says so, if the others wait for long enough


class Lost(ResourceError):
    """Another rank ended without a word, or has said none for too long."""


class Stopped(Exception):
    """This rank gave up because another one had failed."""


class _Told(NamedTuple):
    """How a rank's work ended: the kind of its error and what it says, or nothing; and where."""

    kind: type[Exception] | None
    problems: tuple[Problem, ...]
    host: str


@dataclass(frozen=True)
class Ranks:
    """This process's rank, how many there are, and how many of them on this host.

    `send(value, source)` gives all ranks the value of that one; `beat` is after how many seconds of
    work a rank says that it is there; `sign` is a file that is there as long as none of them has
    failed, in a folder that all see.
    """

    rank: int = 0
    count: int = 1
    here: int = 1
    send: Send = lambda value, source: value
    beat: float = BEAT
    sign: Path | None = None

    @property
    def first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0

    @property
    def across(self) -> bool:
        """Whether they are on several hosts."""
        return self.here != self.count

    def watching(self, sign: Path) -> Ranks:
        """These ranks, with a file by which one that fails tells the others before they meet."""
        return replace(self, sign=sign)

    def check(self) -> None:
        """Stopped where another rank has failed."""
        if self.sign is not None and not self.sign.exists():
            raise Stopped

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns here, once all ranks are done with theirs.

        Raises:
            MowmergeError: what `work` raised, on this rank or on another.
            Lost: another rank is gone.
        """
        if self.count == 1:
            return work()
        found, error = None, None
        ended: Future[_Told] = Future()
        with ThreadPoolExecutor(1) as beside:
            meeting = beside.submit(self._meet, ended)
            try:
                found = work()
            except BaseException as raised:
                error = raised
                self._warn()
            ended.set_result(_told(error))
        if error is not None and not isinstance(error, Stopped):
            raise error
        failed = [one for one in enumerate(meeting.result()) if one[1].kind is not None]
        failed.sort(key=lambda one: one[1].kind is Stopped)  # they only followed another
        if failed:
            raise self._blamed(*failed[0])
        return cast(T, found)

    def _meet(self, ended: Future[_Told]) -> list[_Told]:
        """What each rank says in the end, in order of rank; until then it says that it is there."""
        told: list[_Told] = []
        try:
            while len(told) < self.count:
                word = None
                if len(told) == self.rank:
                    with suppress(TimeoutError):
                        word = ended.result(self.beat)
                said = self.send(word, len(told))
                told += [said] if said is not None else []
        except Lost:
            self._warn()
            raise
        return told

    def _warn(self) -> None:
        """Tells those who share the folder that there is no use in going on."""
        if self.sign is not None:
            with suppress(OSError):
                self.sign.unlink(missing_ok=True)

    def _blamed(self, rank: int, told: _Told) -> MowmergeError:
        """The error of another rank, as this one raises it."""
        if told.kind is None or not issubclass(told.kind, MowmergeError):
            return ResourceError(
                f"'{self.sign}' is gone, though no rank has failed",
                hint="leave the folder alone while a merge writes to it",
            )
        who = f"rank {rank} on {told.host}" if self.across else f"rank {rank}"
        return told.kind([replace(p, message=f"{who}: {p.message}") for p in told.problems])

    def each(self, work: Callable[[], T]) -> Iterator[T]:
        """What `work` returns on each rank, in order of rank; raises as `together`."""
        found = self.together(work)
        for rank in range(self.count):
            yield self.send(found if rank == self.rank else None, rank)

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, where alone it is done; raises as `together`."""
        found = self.together(lambda: work() if self.first else None)
        return cast(T, self.send(found, 0))

    def alike(self, facts: Callable[[], T], differ: Callable[[T, T], list[str]]) -> T:
        """This rank's facts; ResourceError where they are not rank 0's: `differ` says what is."""
        mine = self.together(facts)
        wanted = self.send(mine, 0)

        def compare() -> None:
            changes = differ(wanted, mine)
            if changes:
                raise ResourceError(
                    f"this is not what rank 0 is about to do: {'; '.join(changes[:4])}",
                    hint="all ranks need the same recipe, inputs, options and versions",
                )

        self.together(compare)
        return mine


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


def _told(error: BaseException | None) -> _Told:
    """How work ended, as it goes to the other ranks."""
    host = socket.gethostname()
    if error is None:
        return _Told(None, (), host)
    if isinstance(error, MowmergeError):
        return _Told(type(error), error.problems, host)
    if isinstance(error, Stopped):
        return _Told(Stopped, (), host)
    said = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else "interrupted"
    return _Told(ResourceError, (Problem(said, "", "that rank's own output says more"),), host)


@contextmanager
def joined(rank: int, count: int, here: int, minutes: float) -> Iterator[Ranks]:
    """The ranks of the process group that stands; one that says nothing for that long is gone."""
    from torch import distributed

    group = distributed.new_group(backend="gloo", timeout=timedelta(minutes=minutes))

    def send(value: Any, source: int) -> Any:
        box = [value]
        with heard(minutes, "run it again with --resume"):
            distributed.broadcast_object_list(box, source, group)
        return box[0]

    try:
        yield Ranks(rank, count, here, send, min(BEAT, 60 * minutes / 4))
    except MowmergeError as error:
        if not isinstance(error, Lost):
            with suppress(Lost):
                send(None, 0)  # rank 0 tidies up, and torchrun kills it when another ends
        raise
    finally:
        with suppress(Exception):  # where a rank is gone there is nobody to take leave of
            distributed.destroy_process_group(group)
