"""Stored checkpoints as TensorReaders: byte ranges read into the caller's buffers."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from functools import cached_property
from io import FileIO
from typing import TYPE_CHECKING, Any

from mowmerge.checkpoint import fp8
from mowmerge.errors import CheckpointError
from mowmerge.plan import Location, Stored
from mowmerge.tensors import Tensor, TensorHandle, TensorSpec, torch

if TYPE_CHECKING:
    from numpy import int64, uint8
    from numpy.typing import NDArray


class StoredReader:
    """A checkpoint on disk; each handle owns its file, so threads share nothing."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored

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
            numbers = _FileHandle(scale.location)
            return fp8.scaled(_FileHandle(location), location.spec, scale, numbers)
        return _FileHandle(location)

    @cached_property
    def _pickles(self) -> dict[str, dict[str, Tensor]]:
        files = {location.file for location in self._stored.tensors.values()}
        return {file: load_pickle(file) for file in files}


class _FileHandle:
    def __init__(self, location: Location) -> None:
        self._at, self._size = location.offset, location.spec.itemsize
        self._name = location.spec.name
        try:
            self._file = FileIO(location.file)
        except OSError as error:
            raise CheckpointError(
                f"cannot be read any more: {error.strerror}", where=location.file,
                hint="leave the inputs where they are while a merge runs",
            ) from error  # fmt: skip

    def read(self, start: int, stop: int, out: memoryview) -> None:
        offset = self._at + start * self._size
        out = out[: (stop - start) * self._size]
        while out:  # one call moves at most 2 GiB
            got = _read_at(self._file, out, offset)
            if not got:
                raise self._ended()
            out, offset = out[got:], offset + got

    def advise(self, start: int, stop: int) -> None:
        if hasattr(os, "posix_fadvise"):
            offset, length = self._at + start * self._size, (stop - start) * self._size
            os.posix_fadvise(self._file.fileno(), offset, length, os.POSIX_FADV_WILLNEED)

    def gather(self, rows: NDArray[int64], length: int) -> NDArray[uint8]:
        """The bytes of these rows of `length` elements each, [rows, bytes].

        Through a map of the file, since a call for each row would cost more than its bytes; what
        was mapped is given back after each time.
        """
        import numpy

        end = self._at + (int(rows.max()) + 1) * length * self._size
        if os.fstat(self._file.fileno()).st_size < end:  # a map would not say so
            raise self._ended()
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
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
        self._file.close()


def _read_at(file: FileIO, out: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [out], offset)
    file.seek(offset)
    return file.readinto(out) or 0


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
