"""A lane of a device that works as late as it may, and tells where the order of two things is left
to chance: what a GPU would get wrong now and then is wrong here every time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

QUEUES = ("host", "up", "work", "down")
Clock = dict[str, int]


@dataclass
class Touch:
    """Bytes that a queue, or the host, read or wrote, and when by its own clock."""

    first: int
    last: int
    wrote: bool
    queue: str
    at: int


@dataclass
class Mark:
    """How far a queue was, and what it knew of the others."""

    queue: str
    length: int
    clock: Clock


class Watched:
    """A lane in which copies `up` and `down` wait until somebody waits for them.

    `races` says which memory two of them touched without a mark between, one of them writing.
    `deaf` is the line of a wait that is not done; `waits` are the lines of all that were asked for.
    """

    pins = False

    def __init__(self, deaf: int | None = None) -> None:
        self.deaf, self.waits, self.races = deaf, set[int](), list[str]()
        self._clocks: dict[str, Clock] = {queue: dict.fromkeys(QUEUES, 0) for queue in QUEUES}
        self._touched: list[Touch] = []
        self._put: dict[str, list[Callable[[], Any]]] = {"up": [], "down": []}
        self._done = {"up": 0, "down": 0}

    def copy(self, queue: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        for out, value in pairs:
            self.touch(queue, value, wrote=False)
            self.touch(queue, out, wrote=True)
            if queue == "work":
                out.copy_(value)
            else:
                self._put[queue].append(lambda out=out, value=value: out.copy_(value))

    def mark(self, queue: str) -> Mark:
        return Mark(queue, len(self._put.get(queue, ())), dict(self._clocks[queue]))

    def after(self, queue: str, mark: Mark | None) -> None:
        self._wait(queue, mark)

    def reach(self, mark: Mark | None) -> None:
        self._wait("host", mark)

    def drain(self) -> None:
        for queue in self._put:
            self._reach(queue, len(self._put[queue]))

    def touch(self, queue: str, value: Tensor, *, wrote: bool) -> None:
        """Notes that a queue, or the host, reads or writes a tensor."""
        clock = self._clocks[queue]
        if queue != "host":  # what is put into a queue comes after all that the host has done
            self._hear(queue, self._clocks["host"])
        clock[queue] += 1
        first = getattr(value, "held", value).data_ptr()
        new = Touch(first, first + value.nbytes, wrote, queue, clock[queue])
        for old in self._touched:
            apart = old.last <= new.first or new.last <= old.first or not (old.wrote or wrote)
            if not apart and clock[old.queue] < old.at:
                self.races.append(f"{old.queue} {old.wrote=}, {queue} {wrote=}")
        self._touched.append(new)

    def _wait(self, queue: str, mark: Mark | None) -> None:
        line = sys._getframe(2).f_lineno
        self.waits.add(line)
        if mark is None or line == self.deaf:
            return
        self._hear(queue, mark.clock)
        if mark.queue in self._put and queue in ("host", "work"):
            self._reach(mark.queue, mark.length)

    def _hear(self, queue: str, other: Clock) -> None:
        mine = self._clocks[queue]
        mine.update({name: max(mine[name], other[name]) for name in QUEUES})

    def _reach(self, queue: str, length: int) -> None:
        while self._done[queue] < length:
            self._put[queue][self._done[queue]]()
            self._done[queue] += 1
