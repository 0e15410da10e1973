"""Tensors that wait for their places: each rank appends its own to a file of the stage."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Lock

from mowmerge.checkpoint.writer import write_at
from mowmerge.errors import ResourceError, refused

CHUNK = 1 << 24  # bytes read at a time


class Part:
    """The part of one rank, of which the first `length` bytes are there already."""

    def __init__(self, file: Path, length: int) -> None:
        self._file, self._end, self._lock = file, length, Lock()
        with refused(file):
            self._fd = os.open(file, os.O_WRONLY | os.O_CREAT, 0o666)
            os.ftruncate(self._fd, length)

    def __enter__(self) -> Part:
        return self

    def append(self, nbytes: int, pieces: Iterable[memoryview]) -> int:
        """Writes that many bytes behind what is there, and returns where they begin; called from
        any worker."""
        with self._lock:
            start, self._end = self._end, self._end + nbytes
        at = start
        with refused(self._file):
            for piece in pieces:
                write_at(self._fd, piece, at)
                at += piece.nbytes
        return start

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)


def pieces(file: Path, start: int, nbytes: int) -> Iterator[tuple[int, memoryview]]:
    """A part's bytes from `start` on, some at a time, each with its place among them."""
    with refused(file), file.open("rb") as stream:
        stream.seek(start)
        for at in range(0, nbytes, CHUNK):
            data = stream.read(min(CHUNK, nbytes - at))
            if len(data) < min(CHUNK, nbytes - at):
                raise ResourceError("it is shorter than what was written to it", where=str(file))
            yield at, memoryview(data)
