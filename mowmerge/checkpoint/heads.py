"""Heads that were not merged: heads/<model>.safetensors, and the model's config beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from mowmerge.checkpoint.writer import write_at
from mowmerge.plan import Shard
from mowmerge.tensors import TensorReader

CHUNK = 1 << 22  # elements copied at a time


def write(reader: TensorReader, shard: Shard, file: Path) -> None:
    """Copies the shard's tensors, byte for byte, to their places in the allocated file."""
    fd = os.open(file, os.O_WRONLY)
    try:
        for name, offset in shard.offsets.items():
            for start, data in pieces(reader, name):
                write_at(fd, data, offset + start)
    finally:
        os.close(fd)


def pieces(reader: TensorReader, name: str) -> Iterator[tuple[int, memoryview]]:
    """A tensor's bytes a chunk at a time, each with the byte from which on it lies."""
    spec = reader.specs[name]
    with closing(reader.open(name)) as handle:
        for start in range(0, spec.numel, CHUNK):
            stop = min(start + CHUNK, spec.numel)
            data = memoryview(bytearray((stop - start) * spec.itemsize))
            handle.read(start, stop, data)
            yield start * spec.itemsize, data
