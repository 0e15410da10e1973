"""Blocks on their way to where they are worked on, and back: directly, or through pinned memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from threading import local
from typing import Any, NamedTuple, Protocol

from mowmerge import devices
from mowmerge.tensors import Tensor, torch

Read = Callable[[int, int, int, memoryview], None]
"""Reads of an input, by its number, elements start..stop."""
Memory = Callable[..., Tensor]
"""Where buffers come from, as `buffers.Pools`: each by its name, of which one is made."""
Given = Callable[[], tuple[Tensor, float]]
"""What was taken, on the host, and a sum that is finite where all of it is."""
_lanes = local()


class Sizes(NamedTuple):
    """What passes: the dtypes of the inputs, the values and the output; the most elements in a
    block, and in a piece that is brought to a device at a time."""

    inputs: Sequence[Any]
    values: Any
    output: Any
    block: int
    piece: int


def of(memory: Memory, sizes: Sizes, device: str) -> Direct | Staged:
    """A worker's way to a device: on a GPU through pinned memory, in queues of its own."""
    if devices.kind(device) == "cuda" and devices.own() is not None:
        return Staged(memory, sizes, _lane(device))
    return Direct(memory, sizes)


def data(value: Tensor) -> memoryview:
    """The bytes of a tensor on the host."""
    found: memoryview = value.view(torch.uint8).numpy().data
    return found


def _total(value: Tensor, cast: Tensor) -> Tensor:
    """A sum that is not finite where the output is not: fp16 may overflow where the value does
    not."""
    return cast.sum(dtype=torch.float32) if cast.dtype == torch.float16 else value.sum()


class _Cut:
    """A worker's memory cut to one block length: what is read, its values, what is written.

    Inputs of one dtype lie in one tensor, so that one call widens them all; those that need no
    widening are read into the values themselves. Few calls a block matter: between two of them
    workers wait for each other. What is longer than a piece is read a piece at a time.
    """

    def __init__(self, memory: Memory, sizes: Sizes, length: int) -> None:
        kinds, n = sizes.inputs, len(sizes.inputs)
        self.values = memory("values", n * length, sizes.values).view(n, length)
        self._copies: list[tuple[Tensor, Tensor]] = []
        self.in_place = set(kinds) == {sizes.values} and self.values.device.type == "cpu"
        self.piece = length if self.in_place else min(length, sizes.piece)
        if len(set(kinds)) > 1:
            self.raw = [memory(f"raw {i}", self.piece, k, "cpu") for i, k in enumerate(kinds)]
            self._copies = list(zip(self.values, self.raw, strict=True))
        elif self.in_place:
            self.raw = list(self.values)
        else:
            together = memory("raw", n * self.piece, kinds[0], "cpu").view(n, self.piece)
            self.raw, self._copies = list(together), [(self.values, together)]
        self.bytes = [data(row) for row in self.raw]
        self.out = memory("out", length, sizes.output, "cpu")

    def widen(self) -> None:
        """Fills the values from what was read."""
        for value, raw in self._copies:
            value.copy_(raw)


class Direct:
    """Blocks are read into the memory that they are worked on in, or copied there at once. A block
    that lies there already is not read again."""

    behind, lasts = False, True

    def __init__(self, memory: Memory, sizes: Sizes) -> None:
        self._memory, self._sizes = memory, sizes
        self._cuts: dict[int, _Cut] = {}
        self._there: tuple[int, int] | None = None
        self._cut(sizes.block)

    def _cut(self, length: int) -> _Cut:
        """The buffers for blocks of that length: mostly the full one, and a last shorter one."""
        if length not in self._cuts:
            self._cuts[length] = _Cut(self._memory, self._sizes, length)
        return self._cuts[length]

    def begin(self) -> None:
        """What is read from now on is of other inputs."""
        self._there = None

    def fill(self, start: int, stop: int, read: Read) -> Tensor:
        """The values of a block of every input, [N,B], till the next is filled; the caller's to
        change."""
        cut = self._cut(stop - start)
        if stop - start == cut.piece:
            self._read(start, stop, read).widen()
            self._there = None if cut.in_place else self._there
            return cut.values
        for first in range(start, stop, cut.piece):
            last = min(first + cut.piece, stop)
            part = self._read(first, last, read)
            for value, raw in zip(cut.values, part.raw, strict=True):
                value[first - start : last - start].copy_(raw)
        return cut.values

    def whole(self, i: int, out: Tensor, read: Read) -> None:
        """Fills `out` [B], in the values' dtype, with all of an input."""
        self._there = None
        for first in range(0, len(out), self._sizes.piece):
            last = min(first + self._sizes.piece, len(out))
            cut = self._cut(last - first)
            read(i, first, last, cut.bytes[i])
            out[first:last].copy_(cut.raw[i])

    def raw(self, start: int, stop: int, read: Read) -> list[Tensor]:
        """A piece of every input on the host, in its own dtype."""
        return self._read(start, stop, read).raw

    def _read(self, start: int, stop: int, read: Read) -> _Cut:
        cut = self._cut(stop - start)
        if self._there != (start, stop):
            for i, row in enumerate(cut.bytes):
                read(i, start, stop, row)
            self._there = start, stop
        return cut

    def take(self, value: Tensor, also: Tensor | None = None) -> Given:
        """Takes a block [B] to the host in the output's dtype; `also` goes into the sum."""
        out = self._cut(value.numel()).out
        out.copy_(value)
        total = _total(value, out) if also is None else _total(value, out) + also
        return lambda: (out, total.item())

    def close(self) -> None:
        """There is nothing to wait for."""


class Lane(Protocol):
    """Three queues of a device: `up` to it, `work` on it, where all goes that its thread computes,
    and `down` from it. What is put into one is done in order, some time; a mark says how far a
    queue was."""

    pins: bool

    def copy(self, queue: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Puts copies into a queue: each pair's second to its first."""
        ...

    def mark(self, queue: str) -> Any:
        """A mark behind what is in the queue."""
        ...

    def after(self, queue: str, mark: Any) -> None:
        """What is put into the queue from now on waits for the mark."""
        ...

    def reach(self, mark: Any) -> None:
        """Returns when all before the mark is done."""
        ...

    def drain(self) -> None:
        """Returns when the queues are empty."""
        ...


class Staged:
    """Blocks go through pinned memory, while the device works on the one before.

    Inputs are brought in pieces, through two halves of the memory in turn: one is read into while
    the other is on its way. A result comes back behind, while the next block is read; it is to be
    asked for before the next but one is taken. The calling thread waits only for what it needs.
    """

    behind, lasts = True, False  # a lane is its thread's

    def __init__(self, memory: Memory, sizes: Sizes, lane: Lane) -> None:
        self._memory, self._sizes, self._lane = memory, sizes, lane
        self._values = memory("values", len(sizes.inputs) * sizes.block, sizes.values)
        self._in = cycle([_Half(memory, sizes, side, lane.pins) for side in "ab"])
        self._out = cycle("ab")

    def begin(self) -> None:
        """There is nothing to forget."""

    def fill(self, start: int, stop: int, read: Read) -> Tensor:
        """The values of a block of every input, [N,B], till the next is filled."""
        n, length = len(self._sizes.inputs), stop - start
        values = self._values[: n * length].view(n, length)
        self._bring(range(n), start, values, read)
        return values

    def whole(self, i: int, out: Tensor, read: Read) -> None:
        """Fills `out` [B], in the values' dtype, with all of an input."""
        self._bring([i], 0, out.view(1, -1), read)

    def _bring(self, inputs: Sequence[int], start: int, values: Tensor, read: Read) -> None:
        """Fills the values [n,B] with those inputs' from element `start` on."""
        lane, length = self._lane, values.shape[1]
        for first in range(0, length, self._sizes.piece):
            last = min(first + self._sizes.piece, length)
            half = next(self._in)
            lane.reach(half.sent)  # what was read into it before is on the device
            for i in inputs:
                row = half.bytes[i][: (last - first) * half.here[i].itemsize]
                read(i, start + first, start + last, row)
            here, there = (
                [rows[i][: last - first] for i in inputs] for rows in (half.here, half.there)
            )
            lane.after("up", half.widened)  # what was sent before is no longer needed there
            lane.copy("up", zip(there, here, strict=True))
            half.sent = lane.mark("up")
            lane.after("work", half.sent)
            lane.copy("work", zip(values[:, first:last], there, strict=True))
            half.widened = lane.mark("work")

    def raw(self, start: int, stop: int, read: Read) -> list[Tensor]:
        """A piece of every input on the host, in its own dtype."""
        found = []
        for i, kind in enumerate(self._sizes.inputs):
            pool = self._memory(f"raw {i}", self._sizes.piece, kind, devices.PROCESSOR)
            found.append(pool[: stop - start])
            read(i, start, stop, data(found[-1]))
        return found

    def take(self, value: Tensor, also: Tensor | None = None) -> Given:
        """Takes a block [B] to the host in the output's dtype; `also` goes into the sum."""
        lane, half, length = self._lane, next(self._out), value.numel()
        made, out = (
            self._buffer(f"{name} {half}", self._sizes.block, self._sizes.output, pinned)[:length]
            for name, pinned in (("made", False), ("out", True))
        )
        sums, total = (
            self._buffer(f"{name} {half}", 1, torch.float64, pinned)
            for name, pinned in (("sum", False), ("total", True))
        )
        lane.copy("work", [(made, value)])
        found = _total(value, made)
        lane.copy("work", [(sums, (found if also is None else found + also).view(1))])
        lane.after("down", lane.mark("work"))
        lane.copy("down", [(out, made), (total, sums)])
        back = lane.mark("down")

        def given() -> tuple[Tensor, float]:
            lane.reach(back)
            return out, total.item()

        return given

    def _buffer(self, name: str, length: int, dtype: Any, pinned: bool) -> Tensor:
        if pinned:
            return self._memory(name, length, dtype, devices.PROCESSOR, self._lane.pins)
        return self._memory(name, length, dtype)

    def close(self) -> None:
        """Returns when nothing is under way any more, so that memory is free in every queue."""
        self._lane.drain()


class _Half:
    """One of two places for a piece of every input: here, pinned, and there, on the device."""

    def __init__(self, memory: Memory, sizes: Sizes, side: str, pinned: bool) -> None:
        kinds = list(enumerate(sizes.inputs))
        piece = sizes.piece
        self.here = [memory(f"in {side}{i}", piece, k, devices.PROCESSOR, pinned) for i, k in kinds]
        self.there = [memory(f"there {side}{i}", piece, kind) for i, kind in kinds]
        self.bytes = [data(row) for row in self.here]
        self.sent: Any = None
        self.widened: Any = None


class _Streams:
    """A worker's lane on a GPU: three CUDA streams, of which that for work is the thread's own."""

    pins = True

    def __init__(self, device: str) -> None:
        made: Callable[[str], Any] = torch.cuda.Stream
        self._queues = {name: made(device) for name in ("up", "work", "down")}
        torch.cuda.set_stream(self._queues["work"])

    def copy(self, queue: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        with torch.cuda.stream(self._queues[queue]):
            for out, value in pairs:
                out.copy_(value, non_blocking=True)

    def mark(self, queue: str) -> Any:
        made: Callable[..., Any] = torch.cuda.Event
        event = made(blocking=True)  # a thread that waits sleeps
        event.record(self._queues[queue])
        return event

    def after(self, queue: str, mark: Any) -> None:
        if mark is not None:
            self._queues[queue].wait_event(mark)

    def reach(self, mark: Any) -> None:
        if mark is not None:
            mark.synchronize()

    def drain(self) -> None:
        for queue in self._queues.values():
            queue.synchronize()


def _lane(device: str) -> Lane:
    """This thread's lane on a device. It is kept: only the queue that memory was asked for in has
    it again when it is freed."""
    held: dict[str, Lane] = vars(_lanes)
    if device not in held:
        held[device] = _Streams(device)
    return held[device]
