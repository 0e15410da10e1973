"""Stored checkpoints as TensorReaders: byte ranges read into the caller's buffers."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import finalize

from mowmerge.checkpoint import fp8
from mowmerge.errors import CheckpointError
from mowmerge.plan import Location, Stored
from mowmerge.tensors import Tensor, TensorHandle, TensorSpec, torch

if TYPE_CHECKING:
    from numpy import int64, uint8
    from numpy.typing import NDArray


class StoredReader:
    """A checkpoint on disk. A file stays open while a handle reads it, and the last one until
    another is asked for: to open it costs more than to read a small tensor."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._last: _File | None = None

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor, in file order."""
        return self._stored.specs

    def open(self, name: str) -> TensorHandle:
        """A handle on one tensor."""
        location = self._stored.tensors[name]
        if self._stored.format == "pickle":
            return _PickleHandle(self._pickles[location.file][name])
        scale = self._stored.scales.get(name)
        if scale is not None:
            numbers = self._handle(scale.location)
            return fp8.scaled(self._handle(location), location.spec, scale, numbers)
        return self._handle(location)

    def rest(self) -> None:
        """Keeps no file open for a next handle."""
        self._last = None

    def _handle(self, location: Location) -> _FileHandle:
        file = self._last
        if file is None or file.name != location.file:
            file = self._last = _File(location.file)
        return _FileHandle(location, file)

    @cached_property
    def _pickles(self) -> dict[str, dict[str, Tensor]]:
        files = {location.file for location in self._stored.tensors.values()}
        return {file: load_pickle(file) for file in files}


class _File:
    """A file to be read at any place by any thread; closed with the last reference to it."""

    def __init__(self, name: str) -> None:
        self.name, self._seeking = name, Lock()
        try:
            self.fd = os.open(name, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise CheckpointError(
                f"cannot be read any more: {error.strerror}", where=name,
                hint="leave the inputs where they are while a merge runs",
            ) from error  # fmt: skip
        finalize(self, os.close, self.fd)

    def read(self, out: memoryview, offset: int) -> int:
        """Fills `out`, or a part of it, from that offset on; how many bytes that were."""
        if hasattr(os, "preadv"):
            return os.preadv(self.fd, [out], offset)
        with self._seeking:
            os.lseek(self.fd, offset, os.SEEK_SET)
            data = os.read(self.fd, len(out))
        out[: len(data)] = data
        return len(data)


class _FileHandle:
    def __init__(self, location: Location, file: _File) -> None:
        self._at, self._size = location.offset, location.spec.itemsize
        self._name, self._file = location.spec.name, file

    def read(self, start: int, stop: int, out: memoryview) -> None:
        offset = self._at + start * self._size
        out = out[: (stop - start) * self._size]
        while out:  # one call moves at most 2 GiB
            got = self._file.read(out, offset)
            if not got:
                raise self._ended()
            out, offset = out[got:], offset + got

    def advise(self, start: int, stop: int) -> None:
        if hasattr(os, "posix_fadvise"):
            offset, length = self._at + start * self._size, (stop - start) * self._size
            os.posix_fadvise(self._file.fd, offset, length, os.POSIX_FADV_WILLNEED)

    def gather(self, rows: NDArray[int64], length: int) -> NDArray[uint8]:
        """The bytes of these rows of `length` elements each, [rows, bytes].

        Through a map of the file, since a call for each row would cost more than its bytes; what
        was mapped is given back after each time.
        """
        import numpy

        end = self._at + (int(rows.max()) + 1) * length * self._size
        if os.fstat(self._file.fd).st_size < end:  # a map would not say so
            raise self._ended()
        with mmap.mmap(self._file.fd, 0, access=mmap.ACCESS_READ) as mapped:
            whole = numpy.frombuffer(mapped, numpy.uint8, end - self._at, self._at)
            found = whole.reshape(-1, length * self._size)[rows]
            del whole
        return found

    def _ended(self) -> CheckpointError:
        return CheckpointError(
            f"the file ended inside tensor '{self._name}'", where=self._file.name,
            hint="it changed while the merge was running: start again",
        )  # fmt: skip

    def close(self) -> None:
        del self._file


class _PickleHandle:
    def __init__(self, tensor: Tensor) -> None:
        self._flat = tensor.contiguous().reshape(-1)

    def read(self, start: int, stop: int, out: memoryview) -> None:
        piece = self._flat[start:stop].view(torch.uint8)
        out[: piece.numel()] = piece.numpy().data

    def advise(self, start: int, stop: int) -> None:
        pass

    def close(self) -> None:
        pass


def load_pickle(file: str) -> dict[str, Tensor]:
    """The tensors of a .bin or .pt file, memory-mapped, loaded with weights_only."""
    try:
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(
            f"cannot be loaded with weights_only: {error}", where=file,
            hint="convert it to safetensors where you trust it",
        ) from error  # fmt: skip
    if not isinstance(loaded, dict):
        raise CheckpointError(
            "holds no mapping of names to tensors: not a plain state dict", where=file,
            hint="save model.state_dict() alone",
        )  # fmt: skip
    tensors = {k: v for k, v in loaded.items() if isinstance(v, torch.Tensor)}
    if len(tensors) != len(loaded):
        odd = next(k for k in loaded if k not in tensors)
        raise CheckpointError(
            f"entry '{odd}' is no tensor: not a plain state dict", where=file,
            hint="save model.state_dict() alone",
        )  # fmt: skip
    return tensors
