"""The memory that a job is worked on in: reused from block to block, and from job to job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mowmerge import staging
from mowmerge.errors import ResourceError
from mowmerge.tensors import DTYPES, Tensor, torch


@dataclass(frozen=True)
class Make:
    """What decides a worker's memory: the codes of the inputs' dtypes and of the output's, the
    device, the most elements in a block, and in a piece that is brought to a device at a time."""

    inputs: tuple[str, ...]
    output: str
    device: str
    block: int
    piece: int


class Desk:
    """A worker's memory, and the way of blocks into it and out of it. Jobs of one make leave it to
    each other, since to set it up costs as much as to merge a small tensor."""

    def __init__(self, make: Make) -> None:
        self.make = make
        self.dtype = torch.float64 if "F64" in (*make.inputs, make.output) else torch.float32
        kinds, out = [DTYPES[code].torch for code in make.inputs], DTYPES[make.output].torch
        sizes = staging.Sizes(kinds, self.dtype, out, make.block, make.piece)
        self.way = staging.of(Pools(make.device), sizes, make.device)


class Pools:
    """Buffers by name; the first to ask for one decides how large it is.

    Raises ResourceError where the processor's memory is too little.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._held: dict[str, Tensor] = {}

    def __call__(
        self, name: str, length: int, dtype: Any, device: str | None = None, pinned: bool = False
    ) -> Tensor:
        """The first `length` elements of a buffer, on the device unless another is named."""
        if name not in self._held:
            where = device or self.device
            try:
                self._held[name] = torch.empty(length, dtype=dtype, device=where, pin_memory=pinned)
            except (MemoryError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError):  # of a device: see `room`
                    raise
                raise ResourceError(
                    f"not enough memory for {length:,} elements at once: {error}",
                    hint="lower --max-memory or --workers",
                ) from error
        return self._held[name][:length]


def keep_freed_memory() -> None:
    """Lets the allocator reuse what blocks free instead of giving it back to the system.

    glibc raises its thresholds for that to the size of the largest mapped piece it sees freed, up
    to 32 MiB; without this every temporary of every block costs page faults again.
    """
    torch.empty(31 << 20, dtype=torch.uint8)
