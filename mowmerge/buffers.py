"""The memory that a job is worked on in: reused from block to block, and from job to job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mowmerge.tensors import DTYPES, Tensor, torch


@dataclass(frozen=True)
class Make:
    """What decides a worker's memory: the codes of the inputs' dtypes, the base's the first if
    there is one, and of the output's; the device, and the longest block."""

    inputs: tuple[str, ...]
    based: bool
    output: str
    device: str
    length: int


class Desk:
    """A worker's memory: what is read, its values, what is written. Jobs of one make leave it to
    each other, since to set it up costs as much as to merge a small tensor."""

    def __init__(self, make: Make) -> None:
        self.make = make
        self.values = torch.float64 if "F64" in (*make.inputs, make.output) else torch.float32
        self._pools: dict[str, Tensor] = {}
        self._buffers: dict[int, Buffers] = {}
        self.buffers(make.length)

    def buffers(self, length: int) -> Buffers:
        """The buffers for blocks of that length: mostly the longest, and a last shorter one."""
        if length not in self._buffers:
            self._buffers[length] = Buffers(self, length)
        return self._buffers[length]

    def memory(self, name: str, length: int, dtype: Any, device: str = "cpu") -> Tensor:
        """The first `length` elements of a pool; the first to ask decides how large it is."""
        if name not in self._pools:
            self._pools[name] = torch.empty(length, dtype=dtype, device=device)
        return self._pools[name][:length]


class Buffers:
    """A desk's memory cut to one block length.

    Inputs of one dtype lie in one tensor, so that one call widens them all; those that need no
    widening are read into the values themselves. Few calls a block matter: between two of them
    workers wait for each other.
    """

    def __init__(self, desk: Desk, length: int) -> None:
        make, kinds = desk.make, [DTYPES[code].torch for code in desk.make.inputs]
        n = len(kinds)
        self.values = desk.memory("values", n * length, desk.values, make.device).view(n, length)
        self.together: Tensor | None = None
        self.in_place = set(kinds) == {desk.values} and make.device == "cpu"
        if len(set(kinds)) > 1:
            self.raw = [desk.memory(f"raw {i}", length, kind) for i, kind in enumerate(kinds)]
        elif self.in_place:
            self.raw = list(self.values)
        else:
            self.together = desk.memory("raw", n * length, kinds[0]).view(n, length)
            self.raw = list(self.together)
        self.bytes = [row.view(torch.uint8).numpy().data for row in self.raw]
        first = 1 if make.based else 0
        self.base, self.models = self.values[0] if first else None, self.values[first:]
        self.out = desk.memory("out", length, DTYPES[make.output].torch)
        self.out_bytes = self.out.view(torch.uint8).numpy().data

    def widen(self) -> None:
        """Fills the values from what was read."""
        if self.together is not None:
            self.values.copy_(self.together)
        elif not self.in_place:
            for row, raw in zip(self.values, self.raw, strict=True):
                row.copy_(raw)
